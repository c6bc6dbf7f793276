"""A data set of one's own, described by one YAML file (`flare_exp.tasks.spec`)."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flare_exp.errors import UserError
from flare_exp.languages import LANGUAGES
from flare_exp.tasks.base import Task
from flare_exp.tasks.examples import Answer, Example, read_answers
from flare_exp.tasks.records import Problem, Record, Records, read_records
from flare_exp.tasks.spec import Columns, DataSpec, HubSplit
from flare_exp.tasks.spec_reading import read_spec
from flare_exp.tasks.tables import ANSWERS, KINDS, shown
from flare_exp.utils.suggestions import nearest

LISTED = 10  # the most problems of one file that a refusal lists


class CustomTask(Task):
    """A data set of one's own.

    `described_by` makes the subclass of a description, which has the attributes of every task.
    """

    spec: ClassVar[DataSpec]
    # split -> rows by language, as Benchmark.sizes: a language that is not in it lacks the split
    sizes: ClassVar[Mapping[str, Mapping[str, int]]]

    @classmethod
    def described_by(cls, path: str) -> type[CustomTask]:
        """Return the class of the data set that a file describes.

        The languages of the data set are known to `flare_exp.languages` from then on.

        Raises:
            SpecError: the description is wrong; see `read_spec`.
        """
        return cls.of(read_spec(Path(os.path.expanduser(path))))

    @classmethod
    def of(cls, spec: DataSpec) -> type[CustomTask]:
        """Return the class of a data set."""
        LANGUAGES.update(spec.languages)
        splits = dict.fromkeys(split for own in spec.files.values() for split in own)
        attributes = {
            "__module__": __name__,
            "spec": spec,
            "name": spec.name,
            "english": spec.english,
            "languages": tuple(lang for lang in spec.files if lang != spec.english),
            "fields": tuple(spec.columns.texts),
            "labels": tuple(spec.columns.labels),
            "prompt": spec.prompt,
            "metric": spec.metric,
            "parallel": spec.parallel,
            "sizes": {
                split: {lang: 0 for lang, own in spec.files.items() if split in own}
                for split in splits
            },
        }
        return type("CustomTask", (cls,), attributes)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._read: dict[tuple[str, str], list[Example]] = {}

    def read(self, lang: str, split: str) -> list[Example]:
        """Return every example of one split, in file order. A file is read once.

        Raises:
            UserError: there is no such split, or something is wrong with its rows; the message
                names rows and columns.
        """
        if (lang, split) not in self._read:
            found = self.examine(lang, split)
            if self.parallel and lang != self.english and split in self.spec.files[self.english]:
                self.check_partners(found, self.read(self.english, split))
            if wrong := [problem for problem in found.problems if problem.fatal]:
                raise UserError(refusal(wrong))
            self._read[lang, split] = found.examples
        return self._read[lang, split]

    def examine(self, lang: str, split: str) -> Examined:
        """Read one split, and find everything that is wrong or doubtful in its file.

        Raises:
            UserError: there is no such split.
        """
        own = self.spec.files[lang]
        if split not in own:
            raise UserError(
                f"task.spec: {self.name} has no split {split} in {lang}; it has {', '.join(own)}"
            )
        return examined(own[split], self.spec.columns, f"{self.name}/{lang}/{split}")

    def check_partners(
        self, found: Examined, english: Sequence[Example], whole: bool = True
    ) -> None:
        """Add a problem for each row of a parallel data set that translates no English row.

        A row with another label than its English one is a problem, too.

        Args:
            found: the rows of another language.
            english: the English rows.
            whole: whether these are all; otherwise a row may translate one that is not there.
        """
        if not english:  # its own problems say why
            return
        labels = {e.key: e.label for e in english}
        other = self._place(self.english, english[0].split)
        columns = self.spec.columns
        for e in found.examples:
            if e.key not in labels:
                if whole:
                    said = f"{e.key!r} is no id of {other}, but parallel is true"
                    found.blame(e, columns.id, said)
            elif e.label != labels[e.key]:
                names = [self.labels[number or 0] for number in (e.label, labels[e.key])]
                said = f"is {names[0]}, but the row with the id {e.key!r} of {other} is {names[1]}"
                found.blame(e, columns.label, said)

    def _place(self, lang: str, split: str) -> str:
        """Return the file or data set of a split, for messages."""
        return str(self.spec.files[lang][split])


@dataclass
class Examined:
    """Hold what is in one split.

    Args:
        place: the file or data set.
        examples: the rows that can be used.
        problems: what is wrong or doubtful.
        lines: number of a row, from 1 -> its first line in a text file.
    """

    place: str
    examples: list[Example]
    problems: list[Problem]
    lines: Mapping[int, int | None]

    def blame(self, example: Example, column: str | None, text: str) -> None:
        """Add a fatal problem of an example."""
        row = example.row + 1
        self.problems.append(Problem(self.place, text, row, self.lines.get(row), column))


def examined(place: Path | HubSplit, columns: Columns, origin: str) -> Examined:
    """Read one split; nothing is raised. `origin`: see `examples_of`."""
    found = read_records(place, columns)
    examples = examples_of(found, columns, origin)
    lines = {record.row: record.line for record in found.rows}
    return Examined(found.place, examples, found.problems, lines)


def refusal(problems: Sequence[Problem]) -> str:
    """Return the message about data that cannot be used."""
    more = len(problems) - LISTED
    return "\n  - ".join(
        [
            f"{problems[0].place} cannot be used: {_count(len(problems), 'problem')}",
            *map(str, sorted(problems, key=lambda problem: problem.row or 0)[:LISTED]),
            *([f"... and {more} more (python -m flare_exp check-data)"] if more > 0 else []),
        ]
    )


def _count(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def examples_of(found: Records, columns: Columns, origin: str) -> list[Example]:
    """Convert rows to examples, and add to `found.problems` what is wrong in their cells.

    Rows with a fatal problem become no example.

    Args:
        found: the rows.
        columns: the columns that are read, and the names of the labels.
        origin: `<task>/<lang>/<split>`, the beginning of the ids.
    """
    reader, examples = _CellReader(found, columns), []
    for record in found.rows:
        try:
            examples.append(reader.example(record, f"{origin}/{record.row - 1}"))
        except _Unusable as error:
            found.blame(record, error.column, error.text)
    return examples


def label_text(cell: Any) -> str | None:
    """Return the text of a label's cell; None: it holds none.

    Tables write whole numbers as floats in a column that lacks a cell.
    """
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell) if isinstance(cell, (str, int)) else None


class _Unusable(Exception):
    """A cell that cannot be used."""

    def __init__(self, column: str, text: str):
        super().__init__(text)
        self.column, self.text = column, text


class _CellReader:
    """Converts the cells of rows; those that cannot be used raise `_Unusable`."""

    def __init__(self, found: Records, columns: Columns):
        self.found, self.columns = found, columns
        self.numbers = {
            raw: number for number, values in enumerate(columns.labels.values()) for raw in values
        }
        self.first: dict[str, Record] = {}  # key -> the row that has it

    def example(self, record: Record, id: str) -> Example:
        """Convert a row."""
        key, texts = self._key(record), self._texts(record)
        if self.columns.label is not None:
            return Example(id, key, texts, label=self._label(record.cells[self.columns.label]))
        return Example(id, key, texts, answers=self._answers(record, texts[0]))

    def _key(self, record: Record) -> str:
        """Return the id of a row: that of its column, or its number from 0."""
        name = self.columns.id
        if name is None:
            return str(record.row - 1)
        value = record.cells[name]
        if value == "":
            raise _Unusable(name, "is empty")
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise _Unusable(name, f"{shown(value)} instead of text or an integer")
        if (other := self.first.setdefault(str(value), record)) is not record:
            at = f" (line {other.line})" if other.line else ""
            raise _Unusable(name, f"{value!r} is the id of row {other.row}{at}, too")
        return str(value)

    def _texts(self, record: Record) -> tuple[str, ...]:
        """Return the texts of a row; an empty one is a warning."""
        for name in self.columns.texts.values():
            text = record.cells[name]
            if not isinstance(text, str):
                raise _Unusable(name, f"{shown(text)} instead of text")
            if not text.strip():
                self.found.blame(record, name, "is empty", fatal=False)
        return tuple(record.cells[name] for name in self.columns.texts.values())

    def _label(self, cell: Any) -> int:
        """Return the number of a label."""
        raw = label_text(cell)
        if raw in self.numbers:
            return self.numbers[raw]
        if isinstance(cell, float) and str(cell) in self.numbers:
            return self.numbers[str(cell)]
        if raw and re.fullmatch(r"-?\d+\.0+", raw) and raw.partition(".")[0] in self.numbers:
            return self.numbers[raw.partition(".")[0]]
        if cell is None or cell == "" or cell != cell:
            raise _Unusable(str(self.columns.label), "has no label")
        known = ", ".join(self.numbers)
        said = f"is none of {known}" if known else "instead of text or a whole number"
        text = f"{shown(cell)} {said}{self._meant(str(cell) if raw is None else raw)}"
        raise _Unusable(str(self.columns.label), text)

    def _meant(self, raw: str) -> str:
        """Return what was probably meant by a label that is spelled in another way."""
        names = list(self.columns.labels)
        near = [name for name in names if name.lower() == raw.strip().lower()]
        if near:
            return f"; if it is {near[0]}: labels: {{{near[0]}: [{near[0]}, {raw!r}], ...}}"
        numbered = len(names) < 2 or any(name.isdigit() for name in self.numbers)
        if re.fullmatch(r"-?\d+(\.0+)?", raw) and not numbered:
            pair = f"{names[0]}: 0, {names[1]}: 1"
            return f"; if numbers stand for the labels: labels: {{{pair}, ...}}"
        return nearest(raw, list(self.numbers))

    def _answers(self, record: Record, context: str) -> tuple[Answer, ...]:
        """Return the accepted answers: SQuAD's {text[], answer_start[]}, or one text."""
        column = str(self.columns.answers)
        cell = record.cells[column]
        if isinstance(cell, str) and cell.lstrip().startswith("{"):
            with contextlib.suppress(ValueError):  # an answer that begins with a brace
                cell = json.loads(cell)
        if isinstance(cell, str):
            answers: tuple[Answer, ...] = (self._placed(record, cell, context),)
        elif KINDS[ANSWERS][0](cell):
            answers = read_answers(cell)
        else:
            expected = f"the answer's text, or {KINDS[ANSWERS][1]}"
            raise _Unusable(column, f"{shown(cell)} instead of {expected}")
        if not answers or not all(answer.text.strip() for answer in answers):
            raise _Unusable(column, "has no answer")
        for answer in answers:
            self._check(answer, context)
        return answers

    def _placed(self, record: Record, text: str, context: str) -> Answer:
        """Return an answer with its place: that of its column, or the first in the context."""
        name = self.columns.answer_start
        if name is not None:
            value = record.cells[name]
            if not re.fullmatch(r"\d+", str(value)):
                raise _Unusable(name, f"{shown(value)} instead of a character's number from 0")
            return Answer(text, int(value))
        if text and (places := context.count(text)) > 1:
            said = (
                f"{shown(text)} is in the context {places} times and the first is taken; "
                "answer_start: <column> says which one is meant"
            )
            self.found.blame(record, self.columns.answers, said, fatal=False)
        return Answer(text, context.find(text))

    def _check(self, answer: Answer, context: str) -> None:
        """Check that the context has the text of an answer where it is said to be."""
        if answer.start >= 0 and context.startswith(answer.text, answer.start):
            return
        place = context.find(answer.text)
        if place < 0:
            said = f"the context does not hold the answer {shown(answer.text)}"
            raise _Unusable(str(self.columns.answers), said)
        there = context[max(answer.start, 0) :][: len(answer.text)]
        raise _Unusable(
            str(self.columns.answer_start or self.columns.answers),
            f"the answer {shown(answer.text)} does not start at {answer.start}, where the context "
            f"has {shown(there)}, but at {place}; characters count from 0",
        )
