"""LightningModules: the mPLM with its adapters and task head, one optimisation recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from flare_exp.metrics import classification_metrics
from flare_exp.sources import BackboneSource


class ClassificationModule(LightningModule):
    """A sequence classifier, with or without a source to fuse.

    Args:
        model: a (PEFT) sequence-classification model, trainable where it is to be trained.
        num_labels: number of classes.
        source: reads the batch's source before the target pass; None for methods without source.
        optimizer: parameters -> optimiser (`functools.partial`); needed for training only.
        warmup: share of the steps with rising learning rate; then it falls linearly to zero.
    """

    def __init__(
        self,
        model: nn.Module,
        num_labels: int,
        *,
        source: BackboneSource | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        warmup: float = 0.1,
    ):
        super().__init__()
        self.model, self.source, self.optimizer, self.warmup = model, source, optimizer, warmup
        self.validation_metrics = classification_metrics(num_labels).clone(prefix="validation/")
        self.strict_loading = False  # checkpoints hold the trainable weights only

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B, labels] of the batch's target texts."""
        if self.source is not None:
            self.source.read(batch.get("source"))
        return self.model(**batch["target"]).logits

    def on_fit_start(self) -> None:
        # from_pretrained returns modules in eval mode and Lightning leaves them so: dropout would stay off
        self.model.train()

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch), batch["labels"])
        self.log("train/loss", loss, batch_size=len(batch["labels"]), on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        logits, size = self(batch), len(batch["labels"])
        self.log("validation/loss", nn.functional.cross_entropy(logits, batch["labels"]), batch_size=size)
        self.validation_metrics.update(logits, batch["labels"])
        self.log_dict(self.validation_metrics, batch_size=size, prog_bar=True)

    def predict_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        """Row of the dataset [B] and logits [B, labels]."""
        return {"index": batch["index"].cpu(), "logits": self(batch).float().cpu()}

    def configure_optimizers(self):
        if self.optimizer is None:
            raise ValueError("training needs an optimizer")
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
