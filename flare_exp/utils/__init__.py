"""Small helpers without knowledge of models, tasks or experiments: signals, files, checks of numbers."""
