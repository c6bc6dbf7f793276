"""Define tasks: a loader of typed examples with its labels, languages and metric."""

from __future__ import annotations

import functools
import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flare_exp.errors import UserError
from flare_exp.tasks.examples import Example
from flare_exp.tasks.reading import read_hub, read_parquet
from flare_exp.tasks.tables import LABEL, NAME, bad_cell, shown

log = logging.getLogger(__name__)

ROLES = ("train", "validation", "test")


@dataclass(frozen=True)
class Slice:
    """Rows of a split: `split`, `split[:n]`, `split[n:]` or `split[n:m]`."""

    split: str
    start: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Parse a slice.

        Raises:
            ValueError: the text is not a slice, or the slice is empty.
        """
        match = re.fullmatch(r"([A-Za-z_]\w*)(?:\[(\d*):(\d*)\])?", text)
        if not match:
            raise ValueError(
                f"{text!r} is not a split; write e.g. train, validation[:2000] or validation[2000:]"
            )
        split, start, stop = match.groups()
        parsed = cls(split, int(start or 0), int(stop) if stop else None)
        if parsed.stop is not None and parsed.stop <= parsed.start:
            raise ValueError(f"{text!r} is empty")
        return parsed

    def overlaps(self, other: Slice) -> bool:
        """Return True if the two slices have rows in common."""
        ends = [float("inf") if s.stop is None else s.stop for s in (self, other)]
        return self.split == other.split and self.start < ends[1] and other.start < ends[0]


class Task(ABC):
    """Loads a benchmark's examples by language and role (train, validation, test).

    Args:
        splits: the slice of the benchmark for each role. Validation may be None: there is none.
            `english_test` is the test role in English, if it is another slice than `test`.
        limit: only the first `limit` examples of every role.
    """

    name: ClassVar[str]
    english: ClassVar[str]  # the benchmark's own code for English
    languages: ClassVar[tuple[str, ...]]
    # names of an example's texts; for question answering ("context", "question")
    fields: ClassVar[tuple[str, ...]]
    prompt: ClassVar[str]  # generative form: a template over the fields; the answer follows it
    # classification: the names of the classes, which are a generative model's answers
    labels: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str]  # the metric of model selection and of the result tables
    parallel: ClassVar[bool] = False  # rows with one key are translations of one another
    machine_splits: ClassVar[tuple[str, ...]] = ()  # splits that a machine translated from English

    def __init__(self, splits: Mapping[str, str | None] | None = None, limit: int | None = None):
        given = {**{role: role for role in ROLES}, **(splits or {})}
        self.splits = {role: Slice.parse(text) for role, text in given.items() if text is not None}
        self.splits.setdefault("english_test", self.splits["test"])
        self.limit = limit

    @property
    def training_roles(self) -> tuple[str, ...]:
        """Return the roles that training reads: train, and validation if there is one."""
        return tuple(role for role in ROLES[:2] if role in self.splits)

    @property
    def context(self) -> int | None:
        """Return the number of the text that holds the answers, or None."""
        return self.fields.index("context") if "context" in self.fields else None

    def translated_by(self, example: Example, lang: str) -> str:
        """Return who wrote the counterpart of `example` in `lang`: "human" or "machine".

        This is for parallel benchmarks. English text is always human.
        """
        machine = lang != self.english and example.split in self.machine_splits
        return "machine" if machine else "human"

    def gold(self, example: Example) -> tuple[str, ...]:
        """Return the right predictions: the label's name, or the texts of the accepted answers."""
        return (
            tuple(a.text for a in example.answers)
            if example.label is None
            else (self.labels[example.label],)
        )

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Compute the benchmark's metrics, as fractions in 0..1, of one prediction per example."""
        from flare_exp.tasks import metrics

        gold = [self.gold(example) for example in examples]
        if not self.labels:
            return metrics.answers(predictions, gold) | metrics.squad(predictions, gold)
        return metrics.classification(predictions, [names[0] for names in gold], self.labels)

    @abstractmethod
    def read(self, lang: str, split: str) -> list[Example]:
        """Return every example of one split, in file order."""

    def load(self, lang: str, role: str) -> list[Example]:
        """Return the examples of `role` in `lang`.

        Training examples that share a context with examples held out are left out (`shared`).

        Raises:
            UserError: the slice is outside the split, or all of its examples are left out.
        """
        if role == "test" and lang == self.english:
            role = "english_test"
        part, rows = self.splits[role], self._slice(lang, role)
        if role == "train" and (shared := {e.id for e in self.shared(lang)}):
            rows = [e for e in rows if e.id not in shared]
            warn_once(
                f"{self.name}/{lang}/train: {len(shared)} training examples ask about a context of "
                f"{' or '.join(self._held_out(lang).values())}: left out"
            )
        if not (rows := rows[: self.limit]):
            raise UserError(self._none(lang, role, part))
        return rows

    def _none(self, lang: str, role: str, part: Slice) -> str:
        """Return the message for a role whose slice holds no example."""
        if not (there := len(self.read(lang, part.split))):
            return f"{self._place(lang, part.split)} has no rows"
        asked = f"{part.split}[{part.start}:{part.stop or ''}]"
        if self._slice(lang, role):
            held_out = " or ".join(self._held_out(lang).values())
            return (
                f"task.{role}_split={asked} of {lang}: every example asks about a context of "
                f"{held_out}, so none is left to train on; choose parts that share no context"
            )
        return f"task.{role}_split={asked} of {lang} holds no example: the split has {there} rows"

    def _place(self, lang: str, split: str) -> str:
        """Return the name of a split, for messages."""
        return f"{self.name}/{lang}/{split}"

    def shared(self, lang: str) -> list[Example]:
        """Return the training examples that `load` leaves out.

        They are those with a context of validation or of the English test, where these are parts of
        the same split.
        """
        field, roles = self.context, self._held_out(lang)
        if field is None or not roles:
            return []
        # an empty text is an unknown one, so it is no shared context
        contexts = {e.texts[field] for role in roles for e in self.load(lang, role)} - {""}
        return [e for e in self._slice(lang, "train") if e.texts[field] in contexts]

    def _held_out(self, lang: str) -> dict[str, str]:
        """Return the roles that are parts of the training split -> their names in messages."""
        names = {"validation": "validation"}
        if lang == self.english:
            names["english_test"] = "the English test"
        split = self.splits["train"].split
        return {
            r: n for r, n in names.items() if r in self.splits and self.splits[r].split == split
        }

    def _slice(self, lang: str, role: str) -> list[Example]:
        part = self.splits[role]
        return self.read(lang, part.split)[part.start : part.stop]


class Benchmark(Task):
    """A published data set: `<data_dir>/<lang>/<split>.parquet`, or the hub at a pinned revision.

    The files have the hub's columns.
    """

    hub_id: ClassVar[str]
    revision: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]  # name -> kind of its cells (flare_exp.tasks.tables)
    # split -> published number of rows, or of rows by language; for plans without the data
    sizes: ClassVar[dict[str, Any]] = {}

    def __init__(self, data_dir: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.data_dir = Path(data_dir).expanduser() if data_dir else None

    @abstractmethod
    def example(self, id: str, row: dict[str, Any]) -> Example:
        """Convert one row to an example."""

    def label_of(self, name: str) -> int:
        """Return the number of a class, or -1 for an unknown name, which `read` refuses."""
        return self.labels.index(name) if name in self.labels else -1

    def read(self, lang: str, split: str) -> list[Example]:
        """Return every example of one split, in file order.

        Raises:
            UserError: the data are unreadable, a cell has the wrong type, two rows share a key, or
                a label is out of range.
        """
        origin = f"{self.name}/{lang}/{split}"
        rows = self.rows(lang, split)
        examples = [self.example(f"{origin}/{i}", row) for i, row in enumerate(rows)]
        if twice := [key for key, count in Counter(e.key for e in examples).items() if count > 1]:
            same = [i for i, e in enumerate(examples) if e.key == twice[0]]
            said = (
                f"rows {same[0]} and {same[1]} (from 0)" if len(same) == 2 else f"{len(same)} rows"
            )
            raise UserError(
                f"{self._place(lang, split)}: {said} have the id {twice[0]}, so they cannot be "
                "told apart"
            )
        if wrong := [
            i
            for i, e in enumerate(examples)
            if self.labels and e.label not in range(len(self.labels))
        ]:
            column, kind = next(c for c in self.columns.items() if c[1] in (LABEL, NAME))
            names = ", ".join(self.labels)
            known = f"0..{len(self.labels) - 1} ({names})" if kind == LABEL else names
            problem = f"{shown(rows[wrong[0]][column])} is none of {known}"
            raise bad_cell(self._place(lang, split), wrong[0], column, problem)
        return examples

    def _place(self, lang: str, split: str) -> str:
        """Return the file or data set of a split, for messages."""
        if self.data_dir:
            return f"task.data_dir: {self.data_dir / lang / f'{split}.parquet'}"
        return f"the data set {self.hub_id} ({self.hub_config(lang)}, {split})"

    def rows(self, lang: str, split: str) -> list[dict[str, Any]]:
        """Read the rows of a split from `data_dir`, or from the hub without one."""
        if self.data_dir:
            return read_parquet(self.data_dir / lang / f"{split}.parquet", self.columns)
        return self.hub_rows(lang, split)

    @classmethod
    def hub_config(cls, lang: str) -> str:
        """Return the configuration of the hub's data set that holds a language."""
        return lang

    def hub_rows(self, lang: str, split: str) -> list[dict[str, Any]]:
        """Read the rows of a split from the hub."""
        return read_hub(self.hub_id, self.hub_config(lang), split, self.revision, self.columns)


def check_labels(task: Task, examples: Sequence[Example], others: Sequence[Example]) -> None:
    """Check that rows of a parallel benchmark that translate one another have the same label.

    Args:
        task: the benchmark.
        examples: rows of one language.
        others: rows of another language. A row without a counterpart of the same split and key is
            not checked.

    Raises:
        UserError: some labels differ; the message names the first five.
    """
    there = {(e.split, e.key): e for e in others}
    both = [(e, there[e.split, e.key]) for e in examples if (e.split, e.key) in there]
    if wrong := [(e, o) for e, o in both if task.labels and e.label != o.label]:
        own, other = (e.lang for e in wrong[0])
        named = [
            f"{e.split} {e.key} ({task.gold(e)[0]} in {own}, {task.gold(o)[0]} in {other})"
            for e, o in wrong[:5]
        ]
        raise UserError(
            f"{task.name}: {len(wrong)} of {len(both)} rows have another label in {own} than in "
            f"{other}, though they translate "
            f"one another: {', '.join(named)}{', ...' if len(wrong) > 5 else ''}"
        )


def doubts(task: Task, examples: Sequence[Example]) -> dict[str, Any]:
    """Count the examples and classes that make a readable split of little use.

    Returns:
        `empty`: examples with a text of white space alone; `unanswered`: examples without an answer
            that has words; `missing`: names of classes without an example. Only the entries that
            are not zero or empty.
    """
    asked = [] if task.labels else examples
    found = {
        "empty": sum(not all(text.strip() for text in e.texts) for e in examples),
        "unanswered": sum(not any(a.text.strip() for a in e.answers) for e in asked),
        "missing": [
            name
            for number, name in enumerate(task.labels)
            if number not in {e.label for e in examples}
        ],
    }
    return {name: value for name, value in found.items() if value}


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning about data once, although several stages read the data."""
    log.warning("%s", message)
