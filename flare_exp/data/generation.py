"""Prepare examples as prompts for generative models."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flare_exp.data.preprocessing import Item, Preprocessor, readable
from flare_exp.tasks import Answer, Example, Task


class GenerationPreprocessor(Preprocessor):
    """A prompt that a generative model continues with the answer and EOS.

    The longest field is cut where the prompt is too long.

    Batch: target (prompts, padded on the family's side), answer (input_ids and attention_mask [B,
    A], right-padded), labels [B] of a classification task.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int):
        super().__init__(task, tokenizer, max_length)
        # prompts have no trailing space, so a decoder's answer begins with one, as in running text
        self.space = " " if tokenizer.padding_side == "left" else ""

    @property
    def order(self) -> Sequence[int]:
        """Return the numbers of the fields in the order of the prompt."""
        named = (name for _, name, _, _ in string.Formatter().parse(self.task.prompt) if name)
        return [self.task.fields.index(name) for name in named]

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        """Return one item per example: the prompt's inputs and the tokens of the answer.

        Raises:
            UserError: a prompt does not fit even with empty texts.
        """
        items = []
        for example, (texts, inputs) in zip(
            examples, self._fitted(examples, self.prompt), strict=True
        ):
            gold, fitting = self.task.gold(example), self._readable(example, texts)
            answer = fitting[0].text if fitting else gold[0] if gold else None
            items.append(
                {
                    "inputs": inputs,
                    "cut": texts != example.texts,
                    "cut_off": bool(example.answers) and not fitting,
                    "label": example.label,
                    "answer": [] if answer is None else self.answer(answer),
                }
            )
        return items

    def _readable(self, example: Example, texts: Sequence[str]) -> list[Answer]:
        """Return the answers that are not known to be cut away from the context."""
        if self.task.context is None:
            return []
        whole, left = len(example.texts[self.task.context]), len(texts[self.task.context])
        first = whole - left if self.tokenizer.truncation_side == "left" else 0
        return readable(example.answers, first, first + left)

    def prompt(self, texts: Sequence[str]) -> str:
        """Fill the texts into the task's prompt."""
        return self.task.prompt.format(**dict(zip(self.task.fields, texts, strict=True)))

    def answer(self, text: str) -> list[int]:
        """Return the token ids of an answer and EOS.

        For a decoder, these are the tokens that follow the prompt's last words when both are one
        text: some tokenizers begin every text with a space of their own.
        """
        stub = self.task.prompt.rpartition("\n")[2] if self.space else ""
        before, whole = (
            self.tokenizer(t, add_special_tokens=False)["input_ids"]
            for t in (stub, stub + self.space + text)
        )
        if whole[: len(before)] != before:  # one token covers the prompt's end and the answer
            before, whole = (
                [],
                self.tokenizer(self.space + text, add_special_tokens=False)["input_ids"],
            )
        return [*whole[len(before) :], self.tokenizer.eos_token_id]

    def terms(self, item: Item) -> int:
        """Count the tokens of the answer, EOS included."""
        return len(item["answer"])

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """Build the batch: padded prompts and answers, and the labels of a classification task."""
        batch = {
            "target": self.pad(items),
            "answer": padded_answers([item["answer"] for item in items]),
        }
        return (
            {**batch, "labels": torch.tensor([item["label"] for item in items])}
            if self.task.labels
            else batch
        )


def padded_answers(answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Pad answers with 0 on the right: input_ids and attention_mask [B, A]."""
    width = max(1, *map(len, answers))
    ids, mask = (
        torch.zeros(len(answers), width, dtype=torch.long),
        torch.zeros(len(answers), width, dtype=torch.long),
    )
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(answer, dtype=torch.long)
        mask[row, : len(answer)] = 1
    return {"input_ids": ids, "attention_mask": mask}
