"""Use a finished run: predict for the rows of a file, and answer requests over HTTP.

Nothing about training belongs here.
"""
