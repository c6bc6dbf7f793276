"""Prepare examples for a head that marks the answer in the context, and extract its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flare_exp.data.preprocessing import (
    Item,
    Prediction,
    Preprocessor,
    after_marks,
    part_read,
    readable,
)
from flare_exp.errors import UserError
from flare_exp.tasks import Answer, Example, Task
from flare_exp.tasks.examples import INVISIBLE


class ExtractiveQAPreprocessor(Preprocessor):
    """Extractive question answering by a start/end head: (question, context).

    A context that is too long is cut or, with a `stride`, read in overlapping windows, as in the
    scripts published for SQuAD and TyDiQA. Each window has the whole question and `stride` tokens
    of the window before. A window that does not hold the answer is trained to point at the row's
    first special token, so that spans of different windows can be compared by their scores. That
    token is `[CLS]` or `<s>`; mT5 has none at the start, so it is the `</s>` that ends the
    question.

    A question is cut only where it would leave the context too little room: less than half of the
    tokens, without windows.

    Batch: target, offsets [B, T, 2] (characters of the context; -1 outside it), span [B, 2] (first
    and last token of the first answer that fits; `null` twice where an answer is in another window;
    -1 when all are cut off or lost), null [B] (the first special token; -1 without windows),
    contexts (texts).

    Args:
        task: as of any `Preprocessor`.
        tokenizer: as of any `Preprocessor`.
        max_length: as of any `Preprocessor`; with windows the length of a window.
        stride: tokens that two successive windows share; None for no windows.

    Raises:
        UserError: the windows are too small for the stride.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        stride: int | None = None,
    ):
        super().__init__(task, tokenizer, max_length)
        self.stride = stride
        self._check_windows()

    @property
    def room(self) -> int:
        """Return the tokens of a window beside the special ones."""
        return self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)

    def _check_windows(self) -> None:
        if self.stride is not None and self.room < self.stride + 2:
            raise UserError(
                f"task.doc_stride={self.stride}: windows of {self.max_length} tokens have room for "
                f"{self.room} beside the special ones, "
                "and a question needs some of it; choose less"
            )

    def with_max_length(self, max_length: int) -> ExtractiveQAPreprocessor:
        """Return the same preprocessor with other windows.

        Raises:
            UserError: they are too small for the stride.
        """
        made = super().with_max_length(max_length)
        made._check_windows()
        return made

    @property
    def order(self) -> Sequence[int]:
        """Return the numbers of the fields, with the context last."""
        context = self.task.fields.index("context")
        return (*(i for i in range(len(self.task.fields)) if i != context), context)

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        """Return one item per example or, with a stride, one per window."""
        return self._encode(examples, self.stride)

    def encode_sources(self, examples: Sequence[Example]) -> list[Item]:
        """Return one item per example, without windows."""
        return self._encode(examples, None)

    def _encode(self, examples: Sequence[Example], stride: int | None) -> list[Item]:
        questions, contexts = (
            list(column)
            for column in zip(*(self._question_first(e) for e in examples), strict=True)
        )
        whole = self.tokenizer(
            questions, contexts, truncation=False, verbose=False, return_offsets_mapping=True
        )
        asked = [
            self._question(example, question, stride or 0)
            if len(ids) > self.max_length
            else question
            for example, question, ids in zip(examples, questions, whole["input_ids"], strict=True)
        ]
        windows = {} if stride is None else {"stride": stride, "return_overflowing_tokens": True}
        encoded = self.tokenizer(
            asked,
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            return_offsets_mapping=True,
            **windows,
        )
        spans = encoded.pop("offset_mapping")
        owners = (
            range(len(examples)) if stride is None else encoded.pop("overflow_to_sample_mapping")
        )
        items = []
        for row, i in enumerate(owners):
            example, context, parts = examples[i], contexts[i], encoded.sequence_ids(row)
            offsets, window = context_offsets(spans[row], parts, context), (0, len(context))
            long = len(whole["input_ids"][i]) > self.max_length
            if long:
                every = context_offsets(whole["offset_mapping"][i], whole.sequence_ids(i), context)
                window = part_read(offsets, every, context)
            null = -1 if stride is None else parts.index(None)
            fitting = readable(example.answers, *window)
            elsewhere = null if not fitting and example.answers else -1
            items.append(
                {
                    "example": i,
                    "window": window,
                    "offsets": offsets,
                    "context": context,
                    "null": null,
                    "inputs": {name: encoded[name][row] for name in encoded},
                    "cut": long and (stride is None or asked[i] != questions[i]),
                    "cut_off": bool(example.answers) and not fitting,
                    "span": next(
                        (token_span(offsets, a) for a in fitting if a.start >= 0),
                        (elsewhere, elsewhere),
                    ),
                }
            )
        return items

    def _question_first(self, example: Example) -> list[str]:
        return [example.texts[i] for i in self.order]

    def _question(self, example: Example, question: str, stride: int) -> str:
        """Return the question, cut if it would leave the context too little room.

        It is called for examples that are too long.

        Raises:
            UserError: there is no room for a question and a context.
        """
        if self.room < 2:
            raise self._too_short(example)
        context = self._tokens(self._question_first(example)[1])
        keep = max((self.room - stride) // 2, self.room - context)
        while self._tokens(question) > keep:  # a text that was cut may have other tokens
            question = self._shortened(question, keep)
        return question

    def joint(self, target: Item, source: Item) -> Item:
        """Return a target that is read together with its source, which has no answer to find.

        All families with a span head are padded on the right, so the target comes first and its
        positions stay the same.
        """
        item = super().joint(target, source)
        added = len(item["inputs"]["input_ids"]) - len(target["offsets"])
        return {**item, "offsets": [*target["offsets"], *[(-1, -1)] * added]}

    def terms(self, item: Item) -> int:
        """Return 2 (start and end), or 0 for an answer that is cut off or lost."""
        return 2 if item["span"][0] >= 0 else 0

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """Build the batch: target, offsets, span, null and contexts (shapes: see the class)."""
        target = self.pad(items)
        offsets = torch.full((*target["input_ids"].shape, 2), -1)
        for row, item in zip(offsets, items, strict=True):
            row[: len(item["offsets"])] = torch.tensor(item["offsets"])
        numbers = {name: torch.tensor([item[name] for item in items]) for name in ("span", "null")}
        return {
            "target": target,
            "offsets": offsets,
            **numbers,
            "contexts": [item["context"] for item in items],
        }


def context_offsets(
    offsets: Sequence[tuple[int, int]], sequence_ids: Sequence[int | None], context: str
) -> list[tuple[int, int]]:
    """Return the characters of the context that each token covers.

    White space and invisible signs at either end do not count: tokenizers differ in which token has
    the space before a word. The marks of a last letter count, although some tokenizers leave them
    out. Tokens of the question, special tokens and tokens without visible signs get (-1, -1).
    """
    found = []
    for (start, end), part in zip(offsets, sequence_ids, strict=True):
        if part == 1:
            while start < end and _is_blank(context[start]):
                start += 1
            while start < end and _is_blank(context[end - 1]):
                end -= 1
        inside = part == 1 and start < end
        found.append((start, after_marks(context, end)) if inside else (-1, -1))
    return found


def _is_blank(character: str) -> bool:
    return character.isspace() or character in INVISIBLE


def token_span(offsets: Sequence[tuple[int, int]], answer: Answer) -> tuple[int, int]:
    """Return the first and the last token of an answer, or (-1, -1) if no token covers it."""
    end = answer.start + len(answer.text.rstrip())
    inside = [
        i for i, (first, last) in enumerate(offsets) if 0 <= first < end and last > answer.start
    ]
    return (inside[0], inside[-1]) if inside else (-1, -1)


def best_spans(
    start: Tensor, end: Tensor, offsets: Tensor, contexts: Sequence[str], longest: int
) -> list[Prediction]:
    """Return the best legal span of each row.

    A legal span has start <= end, at most `longest` tokens, and lies inside the context. Its score
    is the sum of its two logits, as in the scripts published for SQuAD, so that rows of one example
    are comparable. Every legal pair is scored, so the best one cannot be missed as with an n-best
    list.

    Args:
        start: logits [B, T] of the first token.
        end: logits [B, T] of the last token.
        offsets: [B, T, 2] characters of the context; -1 outside it.
        contexts: text of each row's context.
        longest: maximum number of tokens of a span.
    """
    legal = offsets[..., 0] >= 0
    start, end = (x.float().masked_fill(~legal, float("-inf")) for x in (start, end))
    width = start.shape[1]
    best, first, last = (
        start.new_full((len(start),), float("-inf")),
        *torch.zeros(2, len(start), dtype=torch.long),
    )
    first, last = first.to(start.device), last.to(start.device)
    for extra in range(min(longest, width)):
        score, at = (start[:, : width - extra] + end[:, extra:]).max(dim=1)
        better = score > best
        best, first, last = (
            torch.where(better, new, old)
            for new, old in ((score, best), (at, first), (at + extra, last))
        )
    rows = torch.arange(len(start), device=start.device)
    begin, stop = offsets[rows, first, 0].tolist(), offsets[rows, last, 1].tolist()
    found = torch.isfinite(best).tolist()
    return [
        Prediction(text[b:s] if ok else "", score)
        for text, b, s, ok, score in zip(contexts, begin, stop, found, best.tolist(), strict=True)
    ]
