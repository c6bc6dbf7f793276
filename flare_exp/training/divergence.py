"""Stop a training at its first loss or gradient that is not finite."""

from __future__ import annotations

from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from flare_exp.errors import UserError

LAG = 8  # steps that a check stays behind, so that reading a loss does not wait for the GPU


class NotFinite(UserError):
    """Error of a training that has diverged; none of its results can be used."""


class StopIfNotFinite(pl.Callback):
    """Callback that stops a training at the first loss or gradient norm that is NaN or infinite.

    On a GPU the numbers of a step are checked `LAG` steps later, when they have been computed
    anyway. Before any state is saved, all pending steps are checked. With a gradient scaler
    (16-mixed) an infinite gradient only means a skipped step, so only the loss is checked. All
    processes stop together.

    Args:
        name: name of the stage, for the message.
        causes: likely causes, with the options' values.

    Raises:
        NotFinite: a loss or gradient norm is not finite; the message names the step.
    """

    def __init__(self, name: str, causes: str):
        self.name, self.causes = name, causes
        self.norm: Tensor | None = None
        self.pending: deque[tuple[int, Tensor, Tensor | None, Tensor]] = deque()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Compute the norm of the gradient, except with a gradient scaler."""
        if trainer.precision == "16-mixed":
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients).detach()
        self.norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded weights

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_
    ) -> None:
        """Queue the step's numbers, and check those that have been computed."""
        loss = outputs["loss"].detach()
        bad = ~torch.isfinite(loss)
        if self.norm is not None:
            bad = bad | ~torch.isfinite(self.norm)
        everywhere = trainer.strategy.reduce(bad.long(), reduce_op="sum")
        self.pending.append((trainer.global_step, loss, self.norm, everywhere))
        self._look(LAG if loss.is_cuda else 0)

    def on_save_checkpoint(self, *_) -> None:
        """Check all pending steps."""
        self._look(0)

    def on_validation_start(self, *_) -> None:
        """Check all pending steps."""
        self._look(0)

    def on_train_end(self, *_) -> None:
        """Check all pending steps."""
        self._look(0)

    def _look(self, lag: int) -> None:
        """Check all pending steps but the last `lag`."""
        while len(self.pending) > lag:
            step, loss, norm, bad = self.pending.popleft()
            if bad.item():
                said = (
                    f"the loss is {loss.item():g}"
                    if norm is None or not torch.isfinite(loss)
                    else ""
                )
                said = said or f"the norm of the gradient is {norm.item():g}"  # type: ignore[union-attr]
                raise NotFinite(
                    f"{self.name}: {said} at step {step}, so the training was stopped and nothing "
                    f"of it is kept. Likely causes: {self.causes}"
                )
