"""Export: folders of finished runs that other people can load, and their upload to the hub.

What a run leaves is made in `flare_exp.experiment`; this package only reads it.
"""
