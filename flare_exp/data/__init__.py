"""From examples to batches: pairing, preprocessing, collation, sampling.

Nothing about models' weights or training belongs here.
"""
