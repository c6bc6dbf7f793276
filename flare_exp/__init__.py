"""FLARE: language fusion for parameter-efficient cross-lingual transfer (arXiv 2501.06892).

This package is an experiment framework for the method. This module stays free of heavy imports:
`python -m flare_exp --help` must answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from flare_exp.experiment.predicting import LoadedRun

__version__ = "0.1.0"


def load(folder: str | Path, *options: str) -> LoadedRun:
    """Load the model of a finished run; see `flare_exp.experiment.loading.load`."""
    from flare_exp.experiment.runs import quiet_as

    quiet_as(folder, options)
    from flare_exp.experiment import loading

    return loading.load(folder, *options)
