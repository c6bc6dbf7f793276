"""Prepare examples for a classification head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import torch

from flare_exp.data.preprocessing import Item, Preprocessor
from flare_exp.tasks import Example

UNLABELED = -100  # the label that PyTorch's cross-entropy leaves out


class ClassificationPreprocessor(Preprocessor):
    """Classification by a head. Batch: target, labels [B]."""

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        """Return one item per example: inputs, whether they were cut, and the label."""
        columns = [list(column) for column in zip(*(e.texts for e in examples), strict=True)]
        whole = self.tokenizer(*columns, truncation=False, verbose=False)["input_ids"]
        encoded = self.tokenizer(
            *columns,
            truncation=True,
            max_length=self.max_length,
            return_special_tokens_mask=True,
        )
        added = encoded.pop("special_tokens_mask")
        return [
            {
                "inputs": self._with_one_end({n: encoded[n][i] for n in encoded}, added[i]),
                "cut": len(ids) > self.max_length,
                "label": example.label,
            }
            for i, (example, ids) in enumerate(zip(examples, whole, strict=True))
        ]

    def _with_one_end(
        self, inputs: Mapping[str, list[int]], added: Sequence[int]
    ) -> dict[str, list[int]]:
        """Drop the end tokens that a text spells out, as "</s>".

        mT5's head reads the last end token, and takes no batch whose rows have different numbers.

        Args:
            inputs: the columns of one example's tokens.
            added: for each token, whether the tokenizer added it to the text.
        """
        end = self.tokenizer.eos_token_id
        kept = [own or i != end for i, own in zip(inputs["input_ids"], added, strict=True)]
        return {name: list(compress(column, kept)) for name, column in inputs.items()}

    def terms(self, item: Item) -> int:
        """Return 1 for an item with a label, and 0 for one without."""
        return int(item["label"] is not None)

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """Build the batch: padded `target` and `labels` [B], UNLABELED for items without one."""
        labels = [UNLABELED if item["label"] is None else item["label"] for item in items]
        return {"target": self.pad(items), "labels": torch.tensor(labels)}
