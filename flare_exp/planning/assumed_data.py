"""Let a benchmark that is not here have as many rows as were published, without text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flare_exp.errors import UserError
from flare_exp.tasks import Answer, Example, Task
from flare_exp.tasks.base import Benchmark
from flare_exp.translation.base import Translator
from flare_exp.translation.lookup import FileTranslator

FEW = 256  # rows that stand for a split that is not here


class Sampled(list):
    """Rows of which each stands for `times` of the benchmark's."""

    def __init__(self, rows: Sequence[Example], times: float):
        super().__init__(rows)
        self.times = times


def with_sizes(task: Task, few: int = FEW) -> Task:
    """Let a benchmark that is not here have rows without text.

    `few` rows are made in place of as many as were published. `task.assumed`: (language, role) ->
    the published number of rows that those few represent.
    """
    assumed: dict[tuple[str, str], int] = {}
    task.assumed = assumed  # type: ignore[attr-defined]
    if not isinstance(task, Benchmark) or task.data_dir:
        return task
    read, load, sizes = task.read, task.load, task.sizes
    absent: dict[tuple[str, str], int] = {}

    @functools.cache
    def rows(lang: str, split: str) -> list[Example]:
        try:
            return read(lang, split)
        except UserError:
            if split not in sizes:
                raise
        count = absent[lang, split] = (
            sizes[split][lang] if isinstance(sizes[split], dict) else sizes[split]
        )
        parts = [part for part in task.splits.values() if part.split == split]
        kept = sorted(
            {i for part in parts for i in range(count)[part.start : part.stop][: task.limit][:few]}
        )
        blank, meaning = (
            ("",) * len(task.fields),
            {"label": 0} if task.labels else {"answers": (Answer("", 0),)},
        )
        return [Example(f"{task.name}/{lang}/{split}/{i}", str(i), blank, **meaning) for i in kept]

    @functools.cache
    def some(lang: str, role: str) -> list[Example]:
        part = task.splits["english_test" if role == "test" and lang == task.english else role]
        found = rows(lang, part.split)
        chosen = range(absent.get((lang, part.split), 0))[part.start : part.stop][: task.limit]
        if not chosen:
            return load(lang, role)
        assumed[lang, role] = len(chosen)
        kept = [
            replace(e, id=f"{e.id} of {len(chosen)}") for e in found if int(e.key) in chosen[:few]
        ]
        return Sampled(kept, len(chosen) / len(kept))

    task.read, task.load = rows, some  # type: ignore[method-assign]
    some(task.english, "train")  # tells whether the benchmark is here
    return task


class AssumedFiles(FileTranslator):
    """Translations in files, which are not asked for rows without text."""

    def _read(self, file: Path, examples: Sequence[Example]) -> list[Example]:
        assumed = not any(examples[0].texts)
        return [*examples] if assumed else super()._read(file, examples)


def with_assumed_rows(translator: Translator) -> Translator:
    """Let a translator take rows without text, whose translations have none either."""
    if isinstance(translator, FileTranslator):
        return AssumedFiles(translator.task, translator.path, translator.fallback)
    return translator
