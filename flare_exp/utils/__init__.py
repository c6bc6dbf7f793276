"""Small helpers for signals, files, progress and checks of numbers.

No helper depends on models, tasks or experiments.
"""
