"""The options of a run: schema, composition by Hydra, and validation of a command line.

Nothing is loaded or run in this package.
"""
