"""Look translations up instead of making them: in a parallel benchmark, or in files.

A benchmark's own translations are human, except for the splits that the benchmark itself has
translated by machine (`Task.machine_splits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flare_exp.artifacts import file_sha256
from flare_exp.errors import UserError
from flare_exp.tasks import Example, Task, fingerprint
from flare_exp.tasks.base import check_labels, warn_once
from flare_exp.tasks.examples import read_answers
from flare_exp.tasks.reading import read_parquet
from flare_exp.tasks.tables import ANSWERS, TEXT, check_row
from flare_exp.translation.base import Translator


def has_split(task: type[Task] | Task, split: str, lang: str) -> bool:
    """Return whether a benchmark has a split in a language.

    `Benchmark.sizes` says so: a split with rows by language has none in the other languages.
    """
    sizes = getattr(task, "sizes", {}).get(split)
    return not isinstance(sizes, dict) or lang in sizes


class ParallelTranslator(Translator):
    """Translator that looks translations up among a parallel benchmark's rows."""

    def __init__(self, task: Task):
        if not task.parallel:
            raise UserError(f"mt=gold and mt=toy need a parallel benchmark; {task.name} is not one")
        self.task = task

    def identity(self, examples: Sequence[Example], lang: str) -> dict[str, Any]:
        """Return who translated (a human or a machine) and a fingerprint of the translations."""
        machine = self.task.translated_by(examples[0], lang) == "machine"
        by = "machine (benchmark)" if machine else "human"
        return {
            "by": by,
            "reference": fingerprint(list(self._counterparts(examples, lang).values())),
        }

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Return the examples in `lang`, in the order of `examples`.

        Raises:
            UserError: an example has no counterpart in `lang`, or one with another label.
        """
        found = self._counterparts(examples, lang)
        own = [found[e.split, e.key] for e in examples]
        return [
            replace(e, texts=o.texts, answers=o.answers) for e, o in zip(examples, own, strict=True)
        ]

    def _counterparts(
        self, examples: Sequence[Example], lang: str
    ) -> dict[tuple[str, str], Example]:
        """Return (split, key) -> example in `lang`, for all rows of the splits of `examples`."""
        splits = sorted({example.split for example in examples})
        found = {(split, row.key): row for split in splits for row in self.task.read(lang, split)}
        missing = [e.id for e in examples if (e.split, e.key) not in found]
        if missing:
            raise UserError(
                f"{len(missing)} examples have no translation into {lang} in {self.task.name}, "
                f"e.g. {missing[0]}"
            )
        check_labels(self.task, examples, list(found.values()))
        return found


class FileTranslator(Translator):
    """Translator that reads `<path>/mt_<from>-<to>/<split>.parquet`, row by row as the benchmark.

    For every field f of the task a file has the original in column f and the translation in
    f_translated. For question answering it also has answers_translated {text[], answer_start[]},
    with empty lists where the answer was lost in translation.

    Args:
        task: the benchmark.
        path: the folder.
        fallback: translates where the file of a direction is missing; None makes that an error.
    """

    def __init__(self, task: Task, path: Path, fallback: Translator | None = None):
        self.task, self.path, self.fallback = task, path, fallback

    def identity(self, examples: Sequence[Example], lang: str) -> dict[str, Any]:
        """Return the hash of the file, or the identity of the fallback if the file is missing.

        Raises:
            UserError: there is no file and no fallback, or a row is not the benchmark's.
        """
        place = self._place(examples, lang)
        if not isinstance(place, Path):
            return place.identity(examples, lang)
        self._read(place, examples)
        return {"by": "file", "sha256": file_sha256(place)}

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Return the examples in `lang`, in the order of `examples`.

        Raises:
            UserError: the file is missing, or a row of it is not the benchmark's; the message names
                file and row.
        """
        place = self._place(examples, lang)
        return (
            self._read(place, examples)
            if isinstance(place, Path)
            else place.translate(examples, lang)
        )

    def _place(self, examples: Sequence[Example], lang: str) -> Path | Translator:
        """Return the file of a direction, or the fallback if the file is missing."""
        own, split = examples[0].lang, examples[0].split
        file = self.path / f"mt_{own}-{lang}" / f"{split}.parquet"
        if file.is_file():
            return file
        own_rows = self.task.parallel and has_split(self.task, split, lang)
        if self.fallback is None or not own_rows:
            also = (
                ", or mt.fallback=gold for the benchmark's own translations"
                if own_rows
                else f"; {self.task.name} has no {split} in {lang} that could stand in"
                if self.fallback
                else ""
            )
            raise UserError(
                f"mt=file: there is no {file}; give the folder that holds it as mt.path{also}"
            )
        by = self.task.translated_by(examples[0], lang)
        warn_once(
            f"mt=file: there is no {file}; the benchmark's own {by} translations stand in "
            "(mt.fallback=gold)"
        )
        return self.fallback

    def _read(self, file: Path, examples: Sequence[Example]) -> list[Example]:
        spans = () if self.task.labels else ("answers_translated",)
        columns = (
            *self.task.fields,
            *(f"{field}_translated" for field in self.task.fields),
            *spans,
        )
        rows = read_parquet(file, columns, "mt.path")
        return [self._translated(file, rows, example) for example in examples]

    def _translated(self, file: Path, rows: Sequence[dict[str, Any]], example: Example) -> Example:
        number = example.row
        if number >= len(rows):
            raise UserError(
                f"mt.path: {file} ends at row {len(rows) - 1}; it has no translation of "
                f"{example.id}"
            )
        row = rows[number]
        for field, text in zip(self.task.fields, example.texts, strict=True):
            if row[field] != text:
                raise UserError(
                    f"mt.path: {file}, row {number}: {field} is not that of {example.id}: "
                    f"{str(row[field])[:60]!r}"
                )
        # only rows that are used are checked: others may have no translation
        kinds = {f"{field}_translated": TEXT for field in self.task.fields}
        if row.get("answers_translated") is not None:
            kinds["answers_translated"] = ANSWERS
        check_row(row, kinds, f"mt.path: {file}", number)
        texts = tuple(row[f"{field}_translated"] for field in self.task.fields)
        answers = () if self.task.labels else read_answers(row["answers_translated"])
        context = "" if self.task.context is None else texts[self.task.context]
        if wrong := [a for a in answers if a.start < 0 or not context.startswith(a.text, a.start)]:
            raise UserError(
                f"mt.path: {file}, row {number}: context_translated has no {wrong[0].text!r} at "
                f"{wrong[0].start}"
            )
        return replace(example, texts=texts, answers=answers)
