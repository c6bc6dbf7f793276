"""One function per stage of a run. Each builds one artifact, or finds it built.

The key of an artifact holds all that its content depends on: configuration, data and earlier
artifacts, never paths or the machine.
"""
