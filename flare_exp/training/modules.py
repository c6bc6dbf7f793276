"""Train and score a language model with its adapters; the classes per task type are subclasses.

They are in `flare_exp.training.heads` and `flare_exp.training.generation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from flare_exp.data.preprocessing import Prediction
from flare_exp.flare.source_encoders import SourceEncoder
from flare_exp.models.families import blocks
from flare_exp.training import distributed
from flare_exp.training.global_batch import global_batch_size, predictions_by_row

Score = Callable[[Mapping[int, Prediction]], Mapping[str, float]]


class AddedLoss(Protocol):
    """A loss that is added to that of the task."""

    def loss(self, batch: Mapping[str, Any], logits: Tensor | None = None) -> Tensor | float:
        """Return this batch's part of the mean over the examples of the global batch.

        It is called after the target pass.

        Args:
            batch: the batch of that pass.
            logits: [B, classes] of a classifier; None for other models.
        """


class FusionModule(LightningModule):
    """Base of all modules: reads the source before the target, optimizes, and scores predictions.

    A batch may be a part of a global batch, which this process reads one part after the other
    (`batch["whole"]`, `flare_exp.data.sampling.RankShardBatchSampler`). Losses are means over the
    global batch (`global_mean`). All processes must run the same number of steps. Rows with an
    index below 0 are padding rows and do not count.

    Args:
        model: a (PEFT) model, in which the parameters to be trained require a gradient.
        source: reads the batch's source before the target pass; None for methods without a source.
        score: predictions of the validation set, by row -> metrics; needed for validation only.
        optimizer: parameters -> optimizer (`functools.partial`); needed for training only.
        warmup: share of the steps with a rising learning rate; afterwards it falls linearly to
            zero.
        added: a loss that is added to that of the task (X-Mixup's consistency, distillation);
            None for other methods.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: SourceEncoder | None = None,
        score: Score | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        warmup: float = 0.1,
        added: AddedLoss | None = None,
    ):
        super().__init__()
        self.strict_loading = False  # checkpoints hold the trained weights only
        self.model, self.source, self.score, self.optimizer, self.warmup = (
            model,
            source,
            score,
            optimizer,
            warmup,
        )
        self.added = added
        self.found: dict[int, Prediction] = {}
        self.parts: list[Tensor] = []  # losses of the current global batch

    model: Any

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        raise NotImplementedError  # pragma: no cover

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        """Return one prediction per row."""
        raise NotImplementedError  # pragma: no cover

    def evaluate(self, batch: dict[str, Any]) -> tuple[Tensor, list[Prediction]]:
        """Return the loss of a batch and one prediction per row."""
        return self.loss(batch), self.predict(batch)

    def read_source(self, batch: dict[str, Any], prompt: int | None = None) -> None:
        """Encode the batch's source, if the method has one.

        Args:
            batch: the batch; `batch["source"]` holds the source texts.
            prompt: length of the prompt in tokens; None: the whole first forward pass is prompt.
        """
        if self.source is not None:
            self.source.encode(batch.get("source"), prompt)

    def configure_model(self) -> None:
        """Shard the module over the processes (trainer=fsdp) when Lightning calls this."""
        if (mesh := self.device_mesh) is not None:
            called = self.source.called if self.source else ()
            distributed.shard(self, (*called, *blocks(self.model)), mesh["data_parallel"])

    def on_fit_end(self) -> None:
        """Release the last batch's source states, because the module may be kept."""
        if self.source is not None:
            self.source.states.clear()

    on_predict_end = on_fit_end

    def on_fit_start(self) -> None:
        """Switch the model to training mode."""
        # from_pretrained returns modules in eval mode, which Lightning keeps: dropout would be off
        self.model.train()

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        """Return the loss of a batch; the loss of a whole global batch is logged."""
        loss = self.loss(batch)
        self.parts.append(loss.detach())
        if len(self.parts) == self.trainer.accumulate_grad_batches:
            whole, self.parts = torch.stack(self.parts).mean(), []
            self.log(
                "train/loss",
                whole,
                batch_size=global_batch_size(batch),
                on_step=True,
                on_epoch=True,
                prog_bar=True,
                sync_dist=True,
            )
        return loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        """Log the loss of a batch and collect its predictions."""
        loss, found = self.evaluate(batch)
        self.log("validation/loss", loss, batch_size=global_batch_size(batch), sync_dist=True)
        self.found |= predictions_by_row(batch, found)

    def on_validation_epoch_end(self) -> None:
        """Score the predictions of all processes and log the metrics.

        Raises:
            ValueError: the module has no `score`.
        """
        if self.score is None:
            raise ValueError("validation needs a score")
        scores = self.score(distributed.all_gather_dict(self.found))
        # every process has the same scores: their maximum is exact, while their mean may round
        self.log_dict(
            {f"validation/{k}": v for k, v in scores.items()},
            prog_bar=True,
            sync_dist=True,
            reduce_fx="max",
        )
        self.found = {}

    def predict_step(self, batch: dict[str, Any], _: int) -> dict[int, Prediction]:
        """Return row of the dataset -> prediction."""
        return predictions_by_row(batch, self.predict(batch))

    def configure_optimizers(self):
        """Build the optimizer of the trainable parameters and its warmup schedule.

        Raises:
            ValueError: the module has no `optimizer`.
        """
        if self.optimizer is None:
            raise ValueError("training needs an optimizer")
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out of a checkpoint."""
        checkpoint["state_dict"] = self.trained(checkpoint["state_dict"])

    def trained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the entries of `state` that belong to trainable parameters."""
        names = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in state.items() if k in names}
