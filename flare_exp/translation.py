"""Machine translation of benchmark texts: English training data into the target language, target test data into English.

Here: a parallel benchmark's own human translations, as they are (mt=gold, an upper bound) or corrupted by a known
error rate (mt=toy).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from flare_exp.errors import UserError
from flare_exp.tasks import Example, Task


class Translator(Protocol):
    """Turns examples of one language into the same examples (ids, keys, labels) in another."""

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]: ...


class ParallelTranslator:
    """Looks translations up among the benchmark's parallel rows, then corrupts each word with probability `noise`.

    Args:
        task: a parallel benchmark.
        noise: share of words that are dropped, swapped with the next or replaced by another word of the language.
        seed: of the corruption; independent of the training seed.
    """

    def __init__(self, task: Task, noise: float = 0.0, seed: int = 0):
        if not task.parallel:
            raise UserError(f"mt=gold and mt=toy need a parallel benchmark; {task.name} is not one")
        self.task, self.noise, self.seed = task, noise, seed

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Examples in `lang`, in the order of `examples`.

        Raises:
            UserError: an example has no counterpart in `lang`.
        """
        splits = sorted({_split(example) for example in examples})
        found = {(split, row.key): row.texts for split in splits for row in self.task.read(lang, split)}
        missing = [e.id for e in examples if (_split(e), e.key) not in found]
        if missing:
            raise UserError(f"{len(missing)} examples have no translation into {lang} in {self.task.name}, e.g. {missing[0]}")
        translated = [replace(e, texts=found[_split(e), e.key]) for e in examples]
        if not self.noise:
            return translated
        vocabulary = sorted({word for texts in found.values() for text in texts for word in text.split()})
        return [
            replace(
                e,
                texts=tuple(corrupt(t, self.noise, vocabulary, f"{self.seed}|{lang}|{e.id}|{i}") for i, t in enumerate(e.texts)),
            )
            for e in translated
        ]


def corrupt(text: str, rate: float, vocabulary: Sequence[str], seed: str) -> str:
    """`text` with each word, with probability `rate`, dropped, swapped with the next one or replaced by a word of
    `vocabulary` (a third each). The same seed gives the same result; the last word left is never dropped."""
    rng = random.Random(seed)
    words: list[str] = []
    rest = text.split()
    while rest:
        word = rest.pop(0)
        if rng.random() < rate:
            error = rng.choice(["drop", "swap", "replace"])
            if error == "replace":
                word = rng.choice(vocabulary)
            elif error == "swap" and rest:
                word, rest[0] = rest[0], word
            elif error == "drop" and (words or rest):
                continue
        words.append(word)
    return " ".join(words)


def _split(example: Example) -> str:
    return example.id.split("/")[2]
