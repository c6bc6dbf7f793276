"""Train and read models whose head gives one output: labels of texts, or spans in them.

Shapes: B examples, T target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flare_exp.data.classification import UNLABELED
from flare_exp.data.preprocessing import Prediction
from flare_exp.data.question_answering import best_spans
from flare_exp.training.global_batch import global_mean, likeliest, real_row_mask, upcast
from flare_exp.training.modules import FusionModule


class HeadModule(FusionModule):
    """A model whose single output gives both the loss and the predictions."""

    def loss_from_output(self, output: Any, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of an output, a scalar."""
        raise NotImplementedError  # pragma: no cover

    def predictions_from_output(self, output: Any, batch: dict[str, Any]) -> list[Prediction]:
        """Return one prediction per row of an output."""
        raise NotImplementedError  # pragma: no cover

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        return self.loss_from_output(self(batch), batch)

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        """Return one prediction per row."""
        return self.predictions_from_output(self(batch), batch)

    def evaluate(self, batch: dict[str, Any]) -> tuple[Tensor, list[Prediction]]:
        """Return the loss and the predictions of a batch after a single forward pass."""
        output = self(batch)
        return self.loss_from_output(output, batch), self.predictions_from_output(output, batch)


class ClassificationModule(HeadModule):
    """A sequence classifier.

    Args:
        model: a model with a classification head.
        labels: names of the classes, in the order of the logits.
        **options: arguments of `FusionModule`.
    """

    def __init__(self, model: nn.Module, labels: Sequence[str], **options):
        super().__init__(model, **options)
        self.labels = list(labels)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return logits [B, labels] of the batch's target texts."""
        self.read_source(batch)
        return self.model(**batch["target"]).logits

    def loss_from_output(self, output: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return the mean cross-entropy of the labels, a scalar."""
        labels = batch["labels"].masked_fill(~real_row_mask(batch), UNLABELED)
        total = nn.functional.cross_entropy(
            upcast(output), labels, ignore_index=UNLABELED, reduction="sum"
        )
        loss = global_mean(total, (labels != UNLABELED).sum(), batch)
        return loss + self.added.loss(batch, output) if self.added else loss

    def predictions_from_output(self, output: Tensor, batch: dict[str, Any]) -> list[Prediction]:
        """Return the likeliest label of every row, with the probabilities of all labels."""
        return likeliest(upcast(output), self.labels)


class SpanModule(HeadModule):
    """A model for extractive question answering.

    Args:
        model: a model with a head for start and end logits.
        longest: longest answer in tokens.
        **options: arguments of `FusionModule`.
    """

    def __init__(self, model: nn.Module, longest: int = 30, **options):
        super().__init__(model, **options)
        self.longest = longest

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return start and end logits, both [B, T], of the batch's target texts."""
        self.read_source(batch)
        output = self.model(**batch["target"])
        return output.start_logits, output.end_logits

    def loss_from_output(self, output: tuple[Tensor, Tensor], batch: dict[str, Any]) -> Tensor:
        """Return the mean cross-entropy of start and end over the context's tokens, a scalar.

        An answer that was cut off or lost does not count. With windows, the first special token is
        a further choice: it is the label of a window without the answer.
        """
        legal, known = (
            batch["offsets"][..., 0] >= 0,
            (batch["span"][:, 0] >= 0) & real_row_mask(batch),
        )
        if (null := batch.get("null")) is not None:
            legal = legal | (torch.arange(legal.shape[1], device=legal.device) == null[:, None])
        total = torch.zeros((), device=legal.device)
        for logits, wanted in zip(output, batch["span"].T, strict=True):
            logits = upcast(logits).masked_fill(~legal, float("-inf"))
            total = total + nn.functional.cross_entropy(
                logits[known], wanted[known], reduction="sum"
            )
        loss = global_mean(total, 2 * known.sum(), batch)
        return loss + self.added.loss(batch) if self.added else loss

    def predictions_from_output(
        self, output: tuple[Tensor, Tensor], batch: dict[str, Any]
    ) -> list[Prediction]:
        """Return the likeliest answer of every row."""
        start, end = output
        return best_spans(start, end, batch["offsets"], batch["contexts"], self.longest)
