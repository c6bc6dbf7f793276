"""Translators of examples (human, files, models), label projection, noise and quality.

Nothing about training belongs here.
"""
