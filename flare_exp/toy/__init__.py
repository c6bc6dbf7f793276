"""The embedded world and the tiny models trained on it; everything is built on first use, nothing is shipped."""
