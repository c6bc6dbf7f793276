"""Define how examples become inputs of a model: the parts that all task types share."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flare_exp.errors import UserError
from flare_exp.tasks import Answer, Example, Task

Item = dict[str, Any]
P = TypeVar("P", bound="Preprocessor")
LONGEST_WORD = 50  # characters in which a space is looked for


class Prediction(NamedTuple):
    """A model's prediction for a row.

    Attributes:
        text: the label or the answer.
        score: compares the rows of one example.
        probabilities: of the task's labels, in their order; empty for answers.
    """

    text: str
    score: float = 0.0
    probabilities: tuple[float, ...] = ()


class Preprocessor:
    """Base class that turns examples into the inputs of a model.

    Args:
        task: gives fields, labels and the prompt.
        tokenizer: the backbone's tokenizer, padding on its family's side; long texts are cut on its
            `truncation_side`.
        max_length: longest input in tokens.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length

    @property
    def order(self) -> Sequence[int]:
        """Return the numbers of the task's fields in the order in which the model reads them."""
        return range(len(self.task.fields))

    def with_max_length(self: P, max_length: int) -> P:
        """Return the same preprocessor with another longest input."""
        made = copy.copy(self)
        made.max_length = max_length
        return made

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        """Return one item per example.

        An item has `inputs` (tokenizer output, lists), `cut` (True if text was cut), and the labels
        or answers to train on. A preprocessor that reads long examples in windows makes several
        successive items of one; these have `example` (its number) and `window` (first and last
        character of the context).
        """
        raise NotImplementedError  # pragma: no cover

    def encode_sources(self, examples: Sequence[Example]) -> list[Item]:
        """Return one item per example; its text is cut where it is too long."""
        return self.encode(examples)

    def joint(self, target: Item, source: Item) -> Item:
        """Return a target that is read together with its source, as one input (input_fusion).

        The source has the side away from the end that the model answers at: it follows the target
        in an encoder, and precedes the prompt of a decoder. Each of the two was cut by itself, so
        that both methods with a source read the same of it. One of the two loses its first special
        token (`[CLS]`, `<s>`, BOS): an input begins with one.
        """
        tokens, beside = target["inputs"], source["inputs"]
        first = self.tokenizer.padding_side == "left"
        parts = [beside["input_ids"], tokens["input_ids"]][:: 1 if first else -1]
        between = self.separator if first else []
        beginnings = ([self.tokenizer.cls_token_id], [self.tokenizer.bos_token_id])
        skipped = int(parts[1][:1] in beginnings)
        ids = [*parts[0], *between, *parts[1][skipped:]]
        inputs = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if "token_type_ids" in tokens:
            added = len(ids) - len(tokens["input_ids"])
            inputs["token_type_ids"] = [*tokens["token_type_ids"], *[1] * added]
        return {**target, "inputs": inputs, "cut": target["cut"] or source["cut"]}

    @property
    def separator(self) -> list[int]:
        """Return the tokens between a source and the prompt that follows it: an empty line."""
        return self.tokenizer("\n\n", add_special_tokens=False)["input_ids"]

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """Build the batch without its source.

        The batch has `target` (tokenizer output [B, T]) and the labels or answers to train on.
        """
        raise NotImplementedError  # pragma: no cover

    def terms(self, item: Item) -> int:
        """Count the terms of an item's loss; the loss of a batch is their mean."""
        raise NotImplementedError  # pragma: no cover

    def pad(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Pad the inputs of some items to tokenizer output [B, longest]."""
        return dict(self.tokenizer.pad([item["inputs"] for item in items], return_tensors="pt"))

    def _fitted(
        self, examples: Sequence[Example], joined: Callable[[Sequence[str]], str]
    ) -> Iterator[tuple[tuple[str, ...], dict[str, list[int]]]]:
        """Yield the texts of each example, cut until they fit when joined, and their token ids.

        Each surplus token is taken from the text that is longest at that point. The token ids come
        with their attention mask.

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
        """Return the first `keep` tokens of a text, or the last ones if truncation is on the left.

        A text that has no more tokens is returned whole. A letter keeps its marks, so what is
        returned may have more tokens than `keep`; it is shorter than the text all the same.
        """
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        spans = encoded["offset_mapping"]
        if len(spans) <= keep:
            return text
        if self.tokenizer.truncation_side == "left":
            # several tokens may stand for one character
            starts = [start for start, _ in spans[len(spans) - keep :] if start > 0]
            return text[after_marks(text, starts[0]) :] if starts else ""
        ends = [last for _, end in spans[:keep] if (last := after_marks(text, end)) < len(text)]
        return text[: ends[-1]] if ends else ""

    def _too_short(self, example: Example) -> UserError:
        return UserError(
            f"data.max_length={self.max_length}: {example.id} does not fit, whatever is cut; "
            "choose a larger one"
        )


def after_marks(text: str, at: int) -> int:
    """Return the place behind the combining marks that stand at a place of a text."""
    while at < len(text) and unicodedata.category(text[at])[0] == "M":
        at += 1
    return at


def longest_first(lengths: Sequence[int], surplus: int) -> list[int]:
    """Return the lengths after removing `surplus` tokens, each from the longest text at that point.

    No length falls below 0.
    """
    left = list(lengths)
    for _ in range(min(surplus, sum(left))):
        left[left.index(max(left))] -= 1
    return left


def readable(answers: Sequence[Answer], first: int, last: int) -> list[Answer]:
    """Return the answers that are not known to reach outside characters `first` to `last`.

    The characters are those of the context.
    """
    return [
        a
        for a in answers
        if a.start < 0 or (first <= a.start and a.start + len(a.text.rstrip()) <= last)
    ]


def part_read(
    offsets: Sequence[tuple[int, int]], every: Sequence[tuple[int, int]], context: str
) -> tuple[int, int]:
    """Return the first and the last character of the context that a part of its tokens covers.

    Characters without a token (spaces, format characters) belong to the part that reaches the end
    where they stand.

    Args:
        offsets: offsets of the part's tokens (`context_offsets`).
        every: offsets of all the context's tokens.
        context: the text of the context.
    """
    (first, last), (start, end) = (
        (min((a for a, _ in spans if a >= 0), default=0), max((b for _, b in spans), default=0))
        for spans in (offsets, every)
    )
    return (0 if first <= start else first), (len(context) if last >= end else last)


def same_part(source: Example, target: Example, field: int, window: tuple[int, int]) -> Example:
    """Return the source with its context cut to the relative place of a window of the target.

    The place is measured in characters. The cut is widened to whole words where there are spaces,
    unless source and target have the same context (the source of a translation encoder): then it is
    the window itself.

    Args:
        source: the example to cut.
        target: the example that the window belongs to.
        field: number of the text that is the context.
        window: first and last character of the window in the target's context.
    """
    own, other = target.texts[field], source.texts[field]
    first, last = (at * len(other) // max(1, len(own)) for at in window)
    if own != other:
        first, last = _word_start(other, first), _word_end(other, last)
    if window[1] >= len(own):
        last = len(other)
    return replace(
        source,
        texts=(*source.texts[:field], other[first:last], *source.texts[field + 1 :]),
        answers=(),
    )


def _word_start(text: str, at: int) -> int:
    """Return where the word at a place begins; the place itself in a text without spaces."""
    space = text.rfind(" ", max(0, at - LONGEST_WORD), at + 1)
    return space + 1 if space >= 0 else (0 if at < LONGEST_WORD else at)


def _word_end(text: str, at: int) -> int:
    """Return where the word at a place ends; the place itself in a text without spaces."""
    space = text.find(" ", at, at + LONGEST_WORD)
    return space if space >= 0 else (len(text) if len(text) - at < LONGEST_WORD else at)


class SourceTextPreprocessor(Preprocessor):
    """A text for a translation model's encoder, encoded with that model's tokenizer.

    Nothing is trained on it. The task's texts are joined by spaces in the order in which the
    target's preprocessor reads them, so that the positions of the two correspond as far as
    possible. The longest text is cut where the whole is too long.

    Args:
        task: as of any `Preprocessor`.
        tokenizer: as of any `Preprocessor`.
        max_length: as of any `Preprocessor`.
        order: field order of the target's preprocessor.
        codes: language -> the tokenizer's code of it. With several, the id of an example names its
            language.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        order: Sequence[int],
        codes: Mapping[str, str] | None = None,
    ):
        super().__init__(task, tokenizer, max_length)
        self._order, self.codes = order, codes or {}

    @property
    def order(self) -> Sequence[int]:
        """Return the field order of the target's preprocessor."""
        return self._order

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        """Return one item per example: the inputs, and whether a text was cut.

        Raises:
            UserError: not even empty texts fit.
        """
        if len(self.codes) < 2:
            return self._encoded(examples, *self.codes.values())
        found: dict[int, Item] = {}
        for lang, code in self.codes.items():
            own = [i for i, e in enumerate(examples) if e.lang == lang]
            items = self._encoded([examples[i] for i in own], code) if own else []
            found |= dict(zip(own, items, strict=True))
        return [found[i] for i in range(len(examples))]

    def _encoded(self, examples: Sequence[Example], code: str | None = None) -> list[Item]:
        """Return one item per example. `code`: the tokenizer's code of their language."""

        def joined(texts: Sequence[str]) -> str:
            return " ".join(texts[i] for i in self.order)

        if code:
            # other preprocessors may share the tokenizer
            self.tokenizer.src_lang = code
        fitted = self._fitted(examples, joined)
        return [
            {"inputs": inputs, "cut": texts != e.texts}
            for e, (texts, inputs) in zip(examples, fitted, strict=True)
        ]
