"""Tables and figures of finished runs: read from their folders, compared, written in many formats.

Only files of run folders are read. Nothing here trains, predicts or imports a command.
"""
