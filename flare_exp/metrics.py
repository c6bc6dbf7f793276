"""Scores, as fractions in 0..1, by torchmetrics; the same code for validation during training and for the test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


def classification_metrics(num_labels: int) -> MetricCollection:
    """Accuracy over examples and the unweighted mean of the classes' F1."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_labels, average="micro"),
            "macro_f1": MulticlassF1Score(num_labels, average="macro"),
        }
    )


def score(predictions: Sequence[int], gold: Sequence[int], num_labels: int) -> dict[str, float]:
    """All metrics of a finished set of predictions."""
    computed = classification_metrics(num_labels)(torch.tensor(predictions), torch.tensor(gold))
    return {name: round(float(value), 6) for name, value in computed.items()}
