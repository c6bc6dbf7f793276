"""Add the loss of a student against its teacher's soft labels (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flare_exp.training.global_batch import mean_over_rows, upcast

SMALLEST = 1e-9  # probability that is taken for zero, whose logarithm is finite


@dataclass(frozen=True)
class Distillation:
    """The divergence of a student's label distribution from its teacher's.

    Args:
        teacher: [N, labels], the teacher's probabilities for each row of the training data.
        weight: weight of the divergence, beside the loss of the labels.
        temperature: t; both distributions are softened by it.
    """

    teacher: Tensor
    weight: float
    temperature: float

    def loss(self, batch: Mapping[str, Any], logits: Tensor | None = None) -> Tensor | float:
        """Return weight t^2 KL(teacher^(1/t) || student^(1/t)), a mean over the global batch.

        The validation set has no teacher, so that its rows add nothing.

        Args:
            batch: the batch; `index` gives the rows, those below 0 do not count.
            logits: [B, labels] of the student.
        """
        assert logits is not None
        if not torch.is_grad_enabled():
            return 0.0
        rows = batch["index"].clamp(min=0).to(self.teacher.device)
        t = self.temperature
        teacher = self.teacher[rows].to(logits.device).clamp(min=SMALLEST)
        wanted = torch.log_softmax(teacher.log() / t, -1)
        found = torch.log_softmax(upcast(logits) / t, -1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1)
        return self.weight * t**2 * mean_over_rows(divergence, batch)
