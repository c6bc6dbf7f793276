"""Backbones: the table of model families, and how checkpoints of them are loaded. Nothing about adapters or data."""
