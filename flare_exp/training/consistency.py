"""Add X-Mixup's consistency losses to the loss of the task (flare_exp.flare.mixup)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flare_exp.flare.mixup import MixupStates, kl_consistency, state_consistency
from flare_exp.training.global_batch import mean_over_rows, upcast


@dataclass(frozen=True)
class Consistency:
    """Weights and form of the consistency losses.

    Args:
        states: hold the source's and the target's final states, and the source's logits.
        kl: weight of the KL divergence between the classes' distributions (classifiers only).
        mse: weight of the squared difference of the final states.
        pool: "first" compares the first tokens' states, "mean" the mean over all tokens.
    """

    states: MixupStates
    kl: float
    mse: float
    pool: str

    def loss(self, batch: Mapping[str, Any], logits: Tensor | None = None) -> Tensor | float:
        """Return the weighted losses, as a mean over the examples of the global batch.

        It is called after the target pass. Rows without a source add nothing.

        Args:
            batch: the batch of that pass.
            logits: [B, classes] of a classifier; None for other models.
        """
        source, target = self.states.source(), self.states.target
        if source is None or target is None:
            return 0.0
        tokens = self.states.mixed_tokens(target)
        assert tokens is not None
        found, mask = source
        total = self.mse * state_consistency(upcast(found), upcast(target), mask, tokens, self.pool)
        if logits is not None and self.states.logits is not None:
            divergence = kl_consistency(upcast(self.states.logits), upcast(logits))
            total = total + self.kl * divergence * mask.any(1)
        return mean_over_rows(total, batch)
