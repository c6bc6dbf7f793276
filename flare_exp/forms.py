"""Forms: how an example becomes what a model reads, and what a model says becomes text.

One class per form of `backbones.Backbone`. A form encodes examples (`encode`) and pads a batch of them (`collate`); texts over
`max_length` tokens are cut and counted. An answer is cut off, and counted, if its example's text was cut and no accepted answer
is left; one whose place in the context is not known is never cut off.

Shapes: B examples, T target tokens, S source tokens, A answer tokens.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
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
            texts, inputs = example.texts, {name: whole[name][i] for name in ("input_ids", "attention_mask")}
            while (surplus := len(inputs["input_ids"]) - self.max_length) > 0:
                if not any(texts):
                    raise self._too_short(example)
                lengths = longest_first([self._tokens(text) for text in texts], surplus)
                texts = tuple(self._shortened(text, keep) for text, keep in zip(texts, lengths, strict=True))
                again = self.tokenizer(joined(texts), verbose=False)
                inputs = {name: again[name] for name in inputs}
            yield texts, inputs

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _shortened(self, text: str, keep: int) -> str:
        """The first (or last, by the truncation side) `keep` tokens of a text; the whole one if it has no more."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
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
        return UserError(f"data.max_length={self.max_length}: {example.id} does not fit, whatever is cut; choose a larger one")


def longest_first(lengths: Sequence[int], surplus: int) -> list[int]:
    """Lengths after `surplus` tokens are gone, each taken from the text that is longest then; none falls below 0."""
    left = list(lengths)
    for _ in range(min(surplus, sum(left))):
        left[left.index(max(left))] -= 1
    return left


def readable(answers: Sequence[Answer], first: int, last: int) -> list[Answer]:
    """Answers that are not known to reach outside characters `first` to `last` of the context."""
    return [a for a in answers if a.start < 0 or (first <= a.start and a.start + len(a.text.rstrip()) <= last)]


class LabelForm(Form):
    """Classification by a head. Batch: target, labels [B]."""

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        columns = [list(column) for column in zip(*(e.texts for e in examples), strict=True)]
        whole = self.tokenizer(*columns, truncation=False, verbose=False)["input_ids"]
        encoded = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        return [
            {"inputs": {name: encoded[name][i] for name in encoded}, "cut": len(ids) > self.max_length, "label": example.label}
            for i, (example, ids) in enumerate(zip(examples, whole, strict=True))
        ]

    def terms(self, item: Item) -> int:
        return 1

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        return {"target": self.pad(items), "labels": torch.tensor([item["label"] for item in items])}


class SpanForm(Form):
    """Extractive question answering by a start/end head: (question, context).

    A context that is too long is cut, or, with a `stride`, read in overlapping windows, as in the scripts published for SQuAD
    and TyDiQA: each window has the whole question and `stride` tokens of the window before. A window that does not hold the
    answer is trained to point at the row's first special token ([CLS] or <s>; mT5, which begins with none, has the </s> that
    ends the question), so that spans of different windows can be compared by their scores.

    A question is cut only where it would leave the context too little room: less than half of the tokens, without windows.

    Batch: target, offsets [B, T, 2] (characters of the context; -1 outside it), span [B, 2] (first and last token of the
    first answer that fits; `null` twice where an answer is in another window; -1 when all are cut off or lost), null [B]
    (the first special token; -1 without windows), contexts (texts).

    Args:
        task, tokenizer, max_length: as of any form; with windows max_length is theirs.
        stride: tokens that two successive windows share; None: no windows.

    Raises:
        UserError: the windows are too small for the stride.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int | None = None):
        super().__init__(task, tokenizer, max_length)
        self.stride = stride
        self.room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
        if stride is not None and self.room < stride + 2:
            raise UserError(
                f"task.doc_stride={stride}: windows of {max_length} tokens have room for {self.room} beside the special ones, "
                "and a question needs some of it; choose less"
            )

    @property
    def order(self) -> Sequence[int]:
        context = self.task.fields.index("context")
        return (*(i for i in range(len(self.task.fields)) if i != context), context)

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        return self._encode(examples, self.stride)

    def encode_sources(self, examples: Sequence[Example]) -> list[Item]:
        return self._encode(examples, None)

    def _encode(self, examples: Sequence[Example], stride: int | None) -> list[Item]:
        questions, contexts = (list(column) for column in zip(*(self._question_first(e) for e in examples), strict=True))
        whole = self.tokenizer(questions, contexts, truncation=False, verbose=False, return_offsets_mapping=True)
        asked = [
            self._question(example, question, stride or 0) if len(ids) > self.max_length else question
            for example, question, ids in zip(examples, questions, whole["input_ids"], strict=True)
        ]
        windows = {} if stride is None else {"stride": stride, "return_overflowing_tokens": True}
        encoded = self.tokenizer(
            asked, contexts, truncation="only_second", max_length=self.max_length, return_offsets_mapping=True, **windows
        )
        spans = encoded.pop("offset_mapping")
        owners = range(len(examples)) if stride is None else encoded.pop("overflow_to_sample_mapping")
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
            items.append({
                "example": i, "window": window, "offsets": offsets, "context": context, "null": null,
                "inputs": {name: encoded[name][row] for name in encoded},
                "cut": long and (stride is None or asked[i] != questions[i]),
                "cut_off": bool(example.answers) and not fitting,
                "span": next((token_span(offsets, a) for a in fitting if a.start >= 0), (elsewhere, elsewhere)),
            })  # fmt: skip
        return items

    def _question_first(self, example: Example) -> list[str]:
        return [example.texts[i] for i in self.order]

    def _question(self, example: Example, question: str, stride: int) -> str:
        """The question of an example that is too long, cut where it leaves the context too little room."""
        if self.room < 2:
            raise self._too_short(example)
        context = self._tokens(self._question_first(example)[1])
        return self._shortened(question, max((self.room - stride) // 2, self.room - context))

    def terms(self, item: Item) -> int:
        """Count start and end; an answer that is cut off or lost has none."""
        return 2 if item["span"][0] >= 0 else 0

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        target = self.pad(items)
        offsets = torch.full((*target["input_ids"].shape, 2), -1)
        for row, item in zip(offsets, items, strict=True):
            row[: len(item["offsets"])] = torch.tensor(item["offsets"])
        numbers = {name: torch.tensor([item[name] for item in items]) for name in ("span", "null")}
        return {"target": target, "offsets": offsets, **numbers, "contexts": [item["context"] for item in items]}


def context_offsets(
    offsets: Sequence[tuple[int, int]], sequence_ids: Sequence[int | None], context: str
) -> list[tuple[int, int]]:
    """Characters of the context that each token stands for, without white space at either end; (-1, -1) for tokens of the
    question, special tokens and tokens of white space alone. Tokenizers differ in whose the space before a word is."""
    found = []
    for (start, end), part in zip(offsets, sequence_ids, strict=True):
        while start < end and context[start : start + 1].isspace() and part == 1:
            start += 1
        while start < end and context[end - 1 : end].isspace() and part == 1:
            end -= 1
        found.append((start, end) if part == 1 and start < end else (-1, -1))
    return found


def part_read(offsets: Sequence[tuple[int, int]], every: Sequence[tuple[int, int]], context: str) -> tuple[int, int]:
    """The first and the last character of a context that a part of its tokens stand for.

    Characters without a token (spaces, format characters) belong to the part that reaches the end where they stand.

    Args:
        offsets: of the part (`context_offsets`).
        every: of all the context's tokens.
    """
    (first, last), (start, end) = (
        (min((a for a, _ in spans if a >= 0), default=0), max((b for _, b in spans), default=0)) for spans in (offsets, every)
    )
    return (0 if first <= start else first), (len(context) if last >= end else last)


def token_span(offsets: Sequence[tuple[int, int]], answer: Answer) -> tuple[int, int]:
    """First and last token of an answer that the tokens stand for; (-1, -1) when none does."""
    end = answer.start + len(answer.text.rstrip())
    inside = [i for i, (first, last) in enumerate(offsets) if 0 <= first < end and last > answer.start]
    return (inside[0], inside[-1]) if inside else (-1, -1)


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
    return replace(source, texts=(*source.texts[:field], other[first:last], *source.texts[field + 1 :]), answers=())


def best_spans(start: Tensor, end: Tensor, offsets: Tensor, contexts: Sequence[str], longest: int) -> list[Prediction]:
    """The best legal span of each row: start <= end, at most `longest` tokens, inside the context.

    Its score is the sum of its two logits, as in the scripts published for SQuAD, so that rows of one example are comparable.
    Every legal pair is scored, so no n-best list can miss the best.

    Args:
        start, end: logits [B, T]; offsets: [B, T, 2].
    """
    legal = offsets[..., 0] >= 0
    start, end = (x.float().masked_fill(~legal, float("-inf")) for x in (start, end))
    width = start.shape[1]
    best, first, last = start.new_full((len(start),), float("-inf")), *torch.zeros(2, len(start), dtype=torch.long)
    first, last = first.to(start.device), last.to(start.device)
    for extra in range(min(longest, width)):
        score, at = (start[:, : width - extra] + end[:, extra:]).max(dim=1)
        better = score > best
        best, first, last = (torch.where(better, new, old) for new, old in ((score, best), (at, first), (at + extra, last)))
    rows = torch.arange(len(start), device=start.device)
    begin, stop = offsets[rows, first, 0].tolist(), offsets[rows, last, 1].tolist()
    found = torch.isfinite(best).tolist()
    return [
        Prediction(text[b:s] if ok else "", score)
        for text, b, s, ok, score in zip(contexts, begin, stop, found, best.tolist(), strict=True)
    ]


class PromptForm(Form):
    """A prompt that a generative model continues with the answer and EOS; the longest field is cut where it is too long.

    Batch: target (prompts, padded on the family's side), answer (input_ids and attention_mask [B, A], right-padded), labels
    [B] of a classification task.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int):
        super().__init__(task, tokenizer, max_length)
        # after a prompt without trailing space, a decoder's answer begins with one, as in running text
        self.space = " " if tokenizer.padding_side == "left" else ""

    @property
    def order(self) -> Sequence[int]:
        named = (name for _, name, _, _ in string.Formatter().parse(self.task.prompt) if name)
        return [self.task.fields.index(name) for name in named]

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        items = []
        for example, (texts, inputs) in zip(examples, self._fitted(examples, self.prompt), strict=True):
            gold, fitting = self.task.gold(example), self._readable(example, texts)
            answer = fitting[0].text if fitting else gold[0] if gold else None
            items.append({
                "inputs": inputs, "cut": texts != example.texts, "cut_off": bool(example.answers) and not fitting,
                "label": example.label, "answer": [] if answer is None else self.answer(answer),
            })  # fmt: skip
        return items

    def _readable(self, example: Example, texts: Sequence[str]) -> list[Answer]:
        """Answers that are not known to be cut away from the context."""
        if self.task.context is None:
            return []
        whole, left = len(example.texts[self.task.context]), len(texts[self.task.context])
        first = whole - left if self.tokenizer.truncation_side == "left" else 0
        return readable(example.answers, first, first + left)

    def prompt(self, texts: Sequence[str]) -> str:
        """The task's prompt, filled in."""
        return self.task.prompt.format(**dict(zip(self.task.fields, texts, strict=True)))

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer and EOS. A decoder's are those that follow the prompt's last words in one text: some tokenizers
        begin every text with a space of their own."""
        stub = self.task.prompt.rpartition("\n")[2] if self.space else ""
        before, whole = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (stub, stub + self.space + text))
        if whole[: len(before)] != before:  # the answer's first piece reaches into the prompt
            before, whole = [], self.tokenizer(self.space + text, add_special_tokens=False)["input_ids"]
        return [*whole[len(before) :], self.tokenizer.eos_token_id]

    def terms(self, item: Item) -> int:
        """Count the tokens of the answer, EOS included."""
        return len(item["answer"])

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        batch = {"target": self.pad(items), "answer": padded_answers([item["answer"] for item in items])}
        return {**batch, "labels": torch.tensor([item["label"] for item in items])} if self.task.labels else batch


class SourceTextForm(Form):
    """A text for a translation model's encoder, whose tokenizer it takes. Nothing is learned from it.

    The task's texts are joined by spaces in the order in which the target's form reads them, so that positions of the two
    correspond as far as they can; the longest one is cut where that is too long.

    Args:
        task, tokenizer, max_length: as of any form.
        order: of the target's form.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, order: Sequence[int]):
        super().__init__(task, tokenizer, max_length)
        self._order = order

    @property
    def order(self) -> Sequence[int]:
        return self._order

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        def joined(texts: Sequence[str]) -> str:
            return " ".join(texts[i] for i in self.order)

        fitted = self._fitted(examples, joined)
        return [{"inputs": inputs, "cut": texts != e.texts} for e, (texts, inputs) in zip(examples, fitted, strict=True)]


def padded_answers(answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Answers right-padded with 0: input_ids and attention_mask [B, A]."""
    width = max(1, *map(len, answers))
    ids, mask = torch.zeros(len(answers), width, dtype=torch.long), torch.zeros(len(answers), width, dtype=torch.long)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(answer, dtype=torch.long)
        mask[row, : len(answer)] = 1
    return {"input_ids": ids, "attention_mask": mask}


FORM_CLASSES: dict[str, type[Form]] = {"label": LabelForm, "span": SpanForm, "prompt": PromptForm}
