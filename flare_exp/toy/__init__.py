"""The embedded world and the tiny models trained on it.

Everything is built on first use; no weights or data are shipped.
"""
