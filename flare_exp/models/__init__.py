"""Backbones: the table of model families and the loader of their checkpoints.

Nothing about adapters or data belongs here.
"""
