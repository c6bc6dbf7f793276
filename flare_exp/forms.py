"""Forms: how an example becomes what a model reads, and what a model says becomes text.

One class per form of `backbones.Backbone`. A form encodes examples (`encode`) and pads a batch of them (`collate`); texts over
`max_length` tokens are cut and counted, and so are answers that were cut off with them.

Shapes: B examples, T target tokens, S source tokens, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flare_exp.errors import UserError
from flare_exp.tasks import Answer, Example, Task

Item = dict[str, Any]


class Form:
    """What the forms share.

    Args:
        task: gives fields, labels and the prompt.
        tokenizer: of the backbone, padding on its family's side.
        max_length: longest input in tokens.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        """One item per example: `inputs` (tokenizer output, lists), `cut` (text was cut), and what the form learns from."""
        raise NotImplementedError  # pragma: no cover

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """The batch without its source: `target` (tokenizer output [B, T]) and what the form learns from."""
        raise NotImplementedError  # pragma: no cover

    def pad(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Tokenizer output [B, longest] of some items' inputs."""
        return dict(self.tokenizer.pad([item["inputs"] for item in items], return_tensors="pt"))

    def _too_short(self, example: Example) -> UserError:
        return UserError(f"data.max_length={self.max_length}: {example.id} does not fit, whatever is cut; choose a larger one")


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

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        return {"target": self.pad(items), "labels": torch.tensor([item["label"] for item in items])}


class SpanForm(Form):
    """Extractive question answering by a start/end head: (question, context), the context is cut where it is too long.

    Batch: target, offsets [B, T, 2] (characters of the context; -1 outside it), span [B, 2] (first and last token of the
    first answer; -1 when it is cut off or lost), contexts (texts).
    """

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        questions, contexts = [e.texts[1] for e in examples], [e.texts[0] for e in examples]
        whole = self.tokenizer(questions, contexts, truncation=False, verbose=False)["input_ids"]
        asked = self.tokenizer(questions, verbose=False)["input_ids"]
        for example, question in zip(examples, asked, strict=True):
            if len(question) + 4 > self.max_length:
                raise self._too_short(example)
        encoded = self.tokenizer(
            questions, contexts, truncation="only_second", max_length=self.max_length, return_offsets_mapping=True
        )
        spans = encoded.pop("offset_mapping")
        items = []
        for i, example in enumerate(examples):
            offsets = context_offsets(spans[i], encoded.sequence_ids(i), contexts[i])
            span = token_span(offsets, example.answers[0]) if example.answers else (-1, -1)
            items.append({
                "inputs": {name: encoded[name][i] for name in encoded}, "cut": len(whole[i]) > self.max_length,
                "cut_off": bool(example.answers) and span[0] < 0, "span": span, "offsets": offsets, "context": contexts[i],
            })  # fmt: skip
        return items

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        target = self.pad(items)
        offsets = torch.full((*target["input_ids"].shape, 2), -1)
        for row, item in zip(offsets, items, strict=True):
            row[: len(item["offsets"])] = torch.tensor(item["offsets"])
        span = torch.tensor([item["span"] for item in items])
        return {"target": target, "offsets": offsets, "span": span, "contexts": [item["context"] for item in items]}


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


def token_span(offsets: Sequence[tuple[int, int]], answer: Answer) -> tuple[int, int]:
    """First and last token of an answer; (-1, -1) when its place is not known, or it ends after the last token of the context.

    Characters that a tokenizer has no token for (spaces, format characters) may stand anywhere.
    """
    end = answer.start + len(answer.text.rstrip())
    inside = [i for i, (first, last) in enumerate(offsets) if 0 <= first < end and last > answer.start]
    if answer.start < 0 or not inside or max(last for _, last in offsets) < end:
        return -1, -1
    return inside[0], inside[-1]


def best_spans(start: Tensor, end: Tensor, offsets: Tensor, contexts: Sequence[str], longest: int) -> list[str]:
    """The text of the best legal span of each example: start <= end, at most `longest` tokens, inside the context.

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
    return [text[b:s] if ok else "" for text, b, s, ok in zip(contexts, begin, stop, found, strict=True)]


class PromptForm(Form):
    """A prompt that a generative model continues with the answer and EOS; the first field is cut where it is too long.

    Batch: target (prompts, padded on the family's side), answer (input_ids and attention_mask [B, A], right-padded), labels
    [B] of a classification task.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int):
        super().__init__(task, tokenizer, max_length)
        # after a prompt without trailing space, a decoder's answer begins with one, as in running text
        self.space = " " if tokenizer.padding_side == "left" else ""

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        whole = self.tokenizer([self.prompt(e.texts) for e in examples], truncation=False, verbose=False)
        items = []
        for i, example in enumerate(examples):
            texts, inputs = example.texts, {name: whole[name][i] for name in ("input_ids", "attention_mask")}
            while len(inputs["input_ids"]) > self.max_length:
                texts = (self._shortened(example, texts[0], len(inputs["input_ids"])), *texts[1:])
                inputs = dict(self.tokenizer(self.prompt(texts)))
            gold = self.task.gold(example)
            reach = example.answers and example.answers[0].start + len(example.answers[0].text) > len(texts[0])
            items.append({
                "inputs": {name: inputs[name] for name in ("input_ids", "attention_mask")}, "cut": texts != example.texts,
                "cut_off": bool(reach), "label": example.label, "answer": self.answer(gold[0]) if gold else [],
            })  # fmt: skip
        return items

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

    def _shortened(self, example: Example, text: str, length: int) -> str:
        """`text` without as many tokens as are too many."""
        ends = [end for _, end in self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
        keep = len(ends) - (length - self.max_length)
        if keep < 1 or ends[keep - 1] >= len(text):
            raise self._too_short(example)
        return text[: ends[keep - 1]]

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        batch = {"target": self.pad(items), "answer": padded_answers([item["answer"] for item in items])}
        return {**batch, "labels": torch.tensor([item["label"] for item in items])} if self.task.labels else batch


class SourceTextForm(Form):
    """A text for a translation model's encoder, whose tokenizer it takes: the task's texts as one. Nothing is learned from it."""

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        texts = [" ".join(e.texts) for e in examples]
        whole = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        return [
            {"inputs": {name: encoded[name][i] for name in ("input_ids", "attention_mask")}, "cut": len(ids) > self.max_length}
            for i, ids in enumerate(whole)
        ]


def padded_answers(answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Answers right-padded with 0: input_ids and attention_mask [B, A]."""
    width = max(1, *map(len, answers))
    ids, mask = torch.zeros(len(answers), width, dtype=torch.long), torch.zeros(len(answers), width, dtype=torch.long)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(answer, dtype=torch.long)
        mask[row, : len(answer)] = 1
    return {"input_ids": ids, "attention_mask": mask}


FORM_CLASSES: dict[str, type[Form]] = {"label": LabelForm, "span": SpanForm, "prompt": PromptForm}
