"""Turn outputs into losses over a global batch, of which this process reads a part, and labels.

Padding rows do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flare_exp.data.preprocessing import Prediction


def upcast(logits: Tensor) -> Tensor:
    """Return logits in at least float32, the type in which losses are computed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def likeliest(logits: Tensor, labels: Sequence[str]) -> list[Prediction]:
    """Return the label with the highest logit of every row, and the probabilities of all labels.

    Args:
        logits: [B, labels], up to a constant per row.
        labels: names of the labels.
    """
    chosen, probabilities = logits.argmax(-1).tolist(), logits.softmax(-1).tolist()
    return [
        Prediction(labels[i], probabilities=tuple(row))
        for i, row in zip(chosen, probabilities, strict=True)
    ]


def global_mean(total: Tensor, count: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return this batch's part of the mean loss of the global batch.

    Trainers average gradients over processes and over the batches of a step. The average of the
    returned values over all parts, on all processes, is the mean loss of the global batch.

    Args:
        total: sum of the batch's loss terms, a scalar.
        count: number of these terms; read only if the batch is no part of a global batch.
        batch: the batch; `batch["whole"]` describes the global batch.
    """
    if (whole := batch.get("whole")) is None:
        return total / count.clamp(min=1)
    return total * whole.parts / max(1, whole.terms)


def mean_over_rows(losses: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return this batch's part of the mean over the examples of the global batch.

    Args:
        losses: [B], one loss per row; those of padding rows do not count.
        batch: the batch, as for `global_mean`.
    """
    total = (losses * real_row_mask(batch)).sum()
    if (whole := batch.get("whole")) is None:
        return total / len(losses)
    return total * whole.parts / whole.rows


def real_row_mask(batch: Mapping[str, Any]) -> Tensor:
    """Return which rows are real examples and no padding rows: [B] bool.

    Without an index, all rows are real examples.
    """
    ids = batch["target"]["input_ids"]
    return batch.get("index", torch.zeros(len(ids), device=ids.device)) >= 0


def predictions_by_row(
    batch: Mapping[str, Any], found: Sequence[Prediction]
) -> dict[int, Prediction]:
    """Return row of the dataset -> prediction, without padding rows."""
    return {row: one for row, one in zip(batch["index"].tolist(), found, strict=True) if row >= 0}


def global_batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of examples in the global batch."""
    return batch["whole"].rows if "whole" in batch else len(batch["index"])
