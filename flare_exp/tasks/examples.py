"""Hold labeled examples and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flare_exp.artifacts import digest_of

# format characters that no word needs: soft hyphen, zero-width space, word joiner, byte order mark,
# directions. The joiners U+200C and U+200D are not here, since words of some scripts end in one.
INVISIBLE = frozenset(
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068"
    "\u2069\ufeff"
)


@dataclass(frozen=True)
class Answer:
    """An answer's text and the character of the context where it starts; -1 if it is not there."""

    text: str
    start: int


@dataclass(frozen=True)
class Example:
    """One labeled example.

    `id` is `<task>/<lang>/<split>/<row>` and unique. `key` is the same for translations of one
    another in a parallel benchmark. `texts` are in the order of `Task.fields`. `label` indexes
    `Task.labels` (classification). `answers` are the accepted spans of the context (question
    answering); the first one is trained on, and none means that the answer was lost in translation.
    """

    id: str
    key: str
    texts: tuple[str, ...]
    label: int | None = None
    answers: tuple[Answer, ...] = ()

    @property
    def lang(self) -> str:
        """Return the language that the id names."""
        return self.id.split("/")[1]

    @property
    def split(self) -> str:
        """Return the split that the id names."""
        return self.id.split("/")[2]

    @property
    def row(self) -> int:
        """Return the number of the row, from 0; that of a translation (`into`) is no number."""
        return int(self.id.rpartition("/")[2])

    def into(self, lang: str) -> Example:
        """Return a translation with an id that names its language, not that of its original."""
        task, own, split, row = self.id.split("/")
        return replace(self, id=f"{task}/{lang}/{split}/{row} of {own}")


def fingerprint(examples: Sequence[Example]) -> str:
    """Return a hash that identifies a data set.

    It covers ids, keys, texts, labels and answers, in order.
    """
    return digest_of(
        [
            [e.id, e.key, *e.texts, e.label, *([a.text, a.start] for a in e.answers)]
            for e in examples
        ]
    )[:16]


def read_answers(column: dict[str, list[Any]] | None) -> tuple[Answer, ...]:
    """Convert answers from SQuAD's form {text[], answer_start[]}."""
    spans = column or {"text": [], "answer_start": []}
    return tuple(
        Answer(text, start)
        for text, start in zip(spans["text"], spans["answer_start"], strict=True)
    )
