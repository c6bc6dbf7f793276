"""Gather the runs that differ in nothing but the seed in one cell, and name the cells in tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flare_exp.config.methods import ENSEMBLE, METHODS
from flare_exp.report.runs import Run

# sections of options that say what is compared on (`is_setting`)
SETTING = ("model.", "task.", "mt.", "data.", "finetune.", "decode.", "trainer.")


@dataclass(frozen=True, eq=False)
class Cell:
    """The runs that differ in nothing but the seed.

    Args:
        task: the task.
        name: model, language, translation and method, as a table shows them.
        changed: option and value for each option that differs from the shipped ones.
        runs: seed -> run.
    """

    task: str
    name: tuple[str, str, str, str]
    changed: frozenset[tuple[str, str]]
    runs: dict[int, Run] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """Return the name of the model."""
        return self.name[0]

    @property
    def lang(self) -> str:
        """Return the target language."""
        return self.name[1]

    @property
    def mt(self) -> str:
        """Return the translation system, with its noise."""
        return self.name[2]

    @property
    def label(self) -> str:
        """Return the method with its fusion, as a table shows it."""
        return self.name[3]

    @property
    def trained_on(self) -> tuple[str, ...]:
        """Return the languages that were trained on; empty: its own alone, or none."""
        return self.first.trained_on

    @property
    def first(self) -> Run:
        """Return one of the runs, for what all of them share."""
        return next(iter(self.runs.values()))

    @property
    def method(self) -> str:
        """Return the name of the method."""
        return self.first.method

    @property
    def by_seed(self) -> list[Run]:
        """Return the runs in the order of the seeds."""
        return [self.runs[seed] for seed in sorted(self.runs)]

    def values(self, block: str, metric: str) -> list[float | None]:
        """Return a metric of every run, in the order of the seeds.

        Args:
            block: "test", "english" or "zero_shot".
            metric: name of the metric; a run without it has None.
        """
        return [run.metrics[block].get(metric) for run in self.by_seed]

    def place(self) -> tuple[Any, ...]:
        """Return the sort key of the cell: model, language, translation, then the method."""
        model, lang, mt, label = self.name
        order = [*METHODS, ENSEMBLE]
        return model, lang, mt, order.index(self.method), label, sorted(self.changed)


def cells_of(runs: Sequence[Run]) -> tuple[dict[str, list[Cell]], list[str]]:
    """Return task -> its cells in order, and a message for every run that repeats a seed."""
    found: dict[tuple[Any, ...], Cell] = {}
    problems = []
    for run in runs:
        key = (run.metrics["task"], run.name, frozenset(run.changed.items()))
        cell = found.setdefault(key, Cell(*key))
        first = cell.runs.setdefault(run.metrics["seed"], run)
        # a grid may vary options that this method does not have: its runs are then the same
        if first is not run and not first.unused_options_differ(run):
            problems.append(
                f"{first.folder} and {run.folder}: two runs of one configuration with seed "
                f"{run.metrics['seed']}; give the folder of one of them"
            )
    tasks: dict[str, list[Cell]] = defaultdict(list)
    for cell in sorted(found.values(), key=lambda cell: (cell.task, *cell.place())):
        tasks[cell.task].append(cell)
    return dict(tasks), problems


def varying(cells: Sequence[Cell]) -> list[str]:
    """Return the options that need a column, since they tell some of the cells apart."""
    keys = sorted({key for cell in cells for key, _ in cell.changed})
    return [
        key
        for key in keys
        if len({dict(cell.changed).get(key) for cell in cells if cell.first.has(key)}) > 1
    ]


def option_of(cell: Cell, key: str) -> str:
    """Return the value of an option as a table shows it; "-": the method has no such option."""
    return str(cell.first.options.get(key, "-")) if cell.first.has(key) else "-"


def is_setting(key: str) -> bool:
    """Return whether an option says what is compared on; all others belong to the method."""
    return key.startswith(SETTING) and key != "task.temperature"


def setting_of(cell: Cell, options: Iterable[str]) -> tuple[str, ...]:
    """Return what a cell shares with those that it is compared with.

    That is model, translation, and those of `options` that do not belong to the method.
    """
    own = [key for key in options if is_setting(key) and cell.first.has(key)]
    shown = [f"{key}={option_of(cell, key)}" for key in own]
    return cell.model, cell.mt, *shown


def variant_of(cell: Cell, options: Iterable[str]) -> str:
    """Return the method with those of `options` that belong to it, which name it in a table."""
    own = [
        key
        for key in options
        if not is_setting(key) and key in cell.first.options and cell.first.has(key)
    ]
    return ", ".join([cell.label, *(f"{key}={option_of(cell, key)}" for key in own)])
