"""Small helpers for signals, files, progress, suggestions and checks of numbers.

No helper depends on models, tasks or experiments.
"""
