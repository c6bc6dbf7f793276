"""Collate rows of tokens for the objectives of pre-training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flare_exp.toy.tokenizers import SENTINELS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def masked(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """Return a collator for masked language modeling."""
    from transformers import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25)
    return lambda rows: collate([{"input_ids": row} for row in rows])


def causal(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """Return a collator for next-token prediction up to the end of the document."""

    def collate(rows: list[list[int]]) -> dict[str, Tensor]:
        ended = [[*row, tokenizer.eos_token_id] for row in rows]
        return {"input_ids": padded(ended, tokenizer.eos_token_id), "labels": padded(ended, -100)}

    return collate


def span_corruption(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """Return a collator for T5's objective (arXiv 1910.10683).

    Spans of tokens are replaced by sentinels in the input; the target is each sentinel with its
    span.
    """
    import torch

    vocab = tokenizer.get_vocab()
    sentinels = [vocab[f"<extra_id_{i}>"] for i in range(SENTINELS)]

    def corrupt(row: list[int]) -> tuple[list[int], list[int]]:
        kept: list[int] = []
        lost: list[int] = []
        spans, i = iter(sentinels), 0
        while i < len(row) - 1:  # the last token ends the sequence
            if torch.rand(()) < 0.15:
                length = min(int(torch.randint(1, 4, ())), len(row) - 1 - i)
                sentinel = next(spans)
                kept.append(sentinel)
                lost += [sentinel, *row[i : i + length]]
                i += length
            if i < len(row) - 1:  # two spans never touch
                kept.append(row[i])
                i += 1
        return [*kept, row[-1]], [*lost, next(spans), row[-1]]

    def collate(rows: list[list[int]]) -> dict[str, Tensor]:
        kept, lost = zip(*map(corrupt, rows), strict=True)
        ids = padded(kept, tokenizer.pad_token_id)
        return {
            "input_ids": ids,
            "attention_mask": (ids != tokenizer.pad_token_id).long(),
            "labels": padded(lost, -100),
        }

    return collate


def padded(rows, value: int) -> Tensor:
    """Return rows as one tensor, padded with `value` to the longest row."""
    import torch

    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )
