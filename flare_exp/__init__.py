"""FLARE: language fusion for parameter-efficient cross-lingual transfer (arXiv 2501.06892), as an experiment framework.

This module stays free of heavy imports: `python -m flare_exp --help` must answer at once.
"""

__version__ = "0.1.0"
