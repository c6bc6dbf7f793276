"""Define how examples become inputs of a model, and its outputs predictions: what all task types share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flare_exp.errors import UserError
from flare_exp.tasks import Answer, Example, Task

Item = dict[str, Any]


class Prediction(NamedTuple):
    """What a model says of a row, and how sure it is: comparable among the rows of one example."""

    text: str
    score: float = 0.0


class Form:
    """What the forms share.

    Args:
        task: gives fields, labels and the prompt.
        tokenizer: of the backbone, padding on its family's side; long texts are cut on its `truncation_side`.
        max_length: longest input in tokens.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length

    @property
    def order(self) -> Sequence[int]:
        """Numbers of the task's fields, in the order in which the model reads them."""
        return range(len(self.task.fields))

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        """One item per example: `inputs` (tokenizer output, lists), `cut` (text was cut), and what the form learns from.

        A form that reads long examples in windows makes several items of one, one after the other; they have `example` (its
        number) and `window` (first and last character of the context).
        """
        raise NotImplementedError  # pragma: no cover

    def encode_sources(self, examples: Sequence[Example]) -> list[Item]:
        """One item per example, whose text is cut where it is too long."""
        return self.encode(examples)

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """The batch without its source: `target` (tokenizer output [B, T]) and what the form learns from."""
        raise NotImplementedError  # pragma: no cover

    def terms(self, item: Item) -> int:
        """Count the terms of an item's loss; the loss of a batch is their mean."""
        raise NotImplementedError  # pragma: no cover

    def pad(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Tokenizer output [B, longest] of some items' inputs."""
        return dict(self.tokenizer.pad([item["inputs"] for item in items], return_tensors="pt"))

    def _fitted(
        self, examples: Sequence[Example], joined: Callable[[Sequence[str]], str]
    ) -> Iterator[tuple[tuple[str, ...], dict[str, list[int]]]]:
        """Yield the texts of each example, cut until what `joined` makes of them fits, and the tokenizer's output of that.

        Each token too many is taken from the text that is longest then.

        Raises:
            UserError: not even empty texts fit.
        """
        whole = self.tokenizer([joined(e.texts) for e in examples], truncation=False, verbose=False)
        for i, example in enumerate(examples):
            texts, inputs = (
                example.texts,
                {name: whole[name][i] for name in ("input_ids", "attention_mask")},
            )
            while (surplus := len(inputs["input_ids"]) - self.max_length) > 0:
                if not any(texts):
                    raise self._too_short(example)
                lengths = longest_first([self._tokens(text) for text in texts], surplus)
                texts = tuple(
                    self._shortened(text, keep) for text, keep in zip(texts, lengths, strict=True)
                )
                again = self.tokenizer(joined(texts), verbose=False)
                inputs = {name: again[name] for name in inputs}
            yield texts, inputs

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _shortened(self, text: str, keep: int) -> str:
        """The first (or last, by the truncation side) `keep` tokens of a text; the whole one if it has no more."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        spans = encoded["offset_mapping"]
        if len(spans) <= keep:
            return text
        if self.tokenizer.truncation_side == "left":
            # several tokens may stand for one character
            starts = [start for start, _ in spans[len(spans) - keep :] if start > 0]
            return text[starts[0] :] if starts else ""
        ends = [end for _, end in spans[:keep] if end < len(text)]
        return text[: ends[-1]] if ends else ""

    def _too_short(self, example: Example) -> UserError:
        return UserError(
            f"data.max_length={self.max_length}: {example.id} does not fit, whatever is cut; choose a larger one"
        )


def longest_first(lengths: Sequence[int], surplus: int) -> list[int]:
    """Lengths after `surplus` tokens are gone, each taken from the text that is longest then; none falls below 0."""
    left = list(lengths)
    for _ in range(min(surplus, sum(left))):
        left[left.index(max(left))] -= 1
    return left


def readable(answers: Sequence[Answer], first: int, last: int) -> list[Answer]:
    """Answers that are not known to reach outside characters `first` to `last` of the context."""
    return [
        a
        for a in answers
        if a.start < 0 or (first <= a.start and a.start + len(a.text.rstrip()) <= last)
    ]


def part_read(
    offsets: Sequence[tuple[int, int]], every: Sequence[tuple[int, int]], context: str
) -> tuple[int, int]:
    """The first and the last character of a context that a part of its tokens stand for.

    Characters without a token (spaces, format characters) belong to the part that reaches the end where they stand.

    Args:
        offsets: of the part (`context_offsets`).
        every: of all the context's tokens.
    """
    (first, last), (start, end) = (
        (min((a for a, _ in spans if a >= 0), default=0), max((b for _, b in spans), default=0))
        for spans in (offsets, every)
    )
    return (0 if first <= start else first), (len(context) if last >= end else last)


def same_part(source: Example, target: Example, field: int, window: tuple[int, int]) -> Example:
    """The source, its context cut to what stands where a window of the target's context does, measured in characters.

    That is whole words, but of the target's own context, which is a translation encoder's source, just the window.

    Args:
        field: which text is the context.
        window: first and last character of the target's.
    """
    own, other = target.texts[field], source.texts[field]
    first, last = (at * len(other) // max(1, len(own)) for at in window)
    if own != other:
        first = other.rfind(" ", 0, first + 1) + 1
        last = end if (end := other.find(" ", last)) >= 0 else len(other)
    if window[1] >= len(own):
        last = len(other)
    return replace(
        source,
        texts=(*source.texts[:field], other[first:last], *source.texts[field + 1 :]),
        answers=(),
    )


class SourceTextForm(Form):
    """A text for a translation model's encoder, whose tokenizer it takes. Nothing is learned from it.

    The task's texts are joined by spaces in the order in which the target's form reads them, so that positions of the two
    correspond as far as they can; the longest one is cut where that is too long.

    Args:
        task, tokenizer, max_length: as of any form.
        order: of the target's form.
    """

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, order: Sequence[int]
    ):
        super().__init__(task, tokenizer, max_length)
        self._order = order

    @property
    def order(self) -> Sequence[int]:
        return self._order

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        def joined(texts: Sequence[str]) -> str:
            return " ".join(texts[i] for i in self.order)

        fitted = self._fitted(examples, joined)
        return [
            {"inputs": inputs, "cut": texts != e.texts}
            for e, (texts, inputs) in zip(examples, fitted, strict=True)
        ]
