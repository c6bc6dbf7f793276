"""Compare methods: the bootstrap of each against a baseline, and average ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flare_exp.report import statistics
from flare_exp.report.cells import Cell, is_setting, option_of, setting_of, variant_of, varying
from flare_exp.report.predictions import (
    Predictions,
    check_score,
    metric_of,
    mismatch,
    read_predictions,
)
from flare_exp.report.runs import Run
from flare_exp.report.statistics import Array, Difference, Metric


@dataclass(frozen=True)
class Comparison:
    """One cell against the baseline of its language.

    Args:
        cell: what is compared.
        baseline: what it is compared with.
        seeds: seeds that both have.
        examples: number of test examples.
        found: the difference of the task's metric.
        p_holm: its p-value, corrected for the method's comparisons in all languages.
    """

    cell: Cell
    baseline: Cell
    seeds: tuple[int, ...]
    examples: int
    found: Difference
    p_holm: float


class Comparer:
    """Compares the cells of one task with a baseline.

    Args:
        cells: all cells of the task.
        baseline: a method, or a method with its fusion as tables show it.

    Attributes:
        notes: what could not be compared, and why.
        problems: runs whose test examples differ.
    """

    def __init__(self, cells: Sequence[Cell], baseline: str):
        self.cells, self.baseline = cells, baseline
        self.options = varying(cells)
        self.notes: list[str] = []
        self.problems: list[str] = []

    def compare(self) -> list[Comparison]:
        """Return a comparison for each cell that has a baseline with the same test examples."""
        rivals: dict[Cell, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            if self._is_baseline(cell) or (base := self._baseline_of(cell)) is None:
                continue
            rivals[base].append(cell)
        found = [c for base, own in rivals.items() for c in self._against(base, own)]
        return self._corrected(found)

    def _is_baseline(self, cell: Cell) -> bool:
        return self.baseline in (cell.method, cell.label)

    def _baseline_of(self, cell: Cell) -> Cell | None:
        """Return the baseline with the setting of a cell.

        Of several, the one with the options of the cell's method is taken; without it there is
        none.
        """
        setting = setting_of(cell, self.options)
        there = [
            other
            for other in self.cells
            if self._is_baseline(other)
            and other.lang == cell.lang
            and setting_of(other, self.options) == setting
        ]
        if not there:
            self._note_options(cell)
        there = _trained_alike(cell, there)
        alike = [other for other in there if _shared(cell, other) == _shared(other, cell)]
        if len(there) > 1 and len(alike) != 1:
            self.notes.append(
                f"{cell.model}, {cell.lang}: {variant_of(cell, self.options)} is not compared, "
                f"because {len(there)} rows are {self.baseline} and none has its options"
            )
            return None
        return next(iter(alike or there), None)

    def _note_options(self, cell: Cell) -> None:
        """Note the options that a cell shares with no baseline of its model and translation."""
        near = [
            [k for k in self.options if is_setting(k) and option_of(cell, k) != option_of(other, k)]
            for other in self.cells
            if self._is_baseline(other)
            and (other.lang, other.model, other.mt) == (cell.lang, cell.model, cell.mt)
        ]
        if near:
            own = ", ".join(f"{key}={option_of(cell, key)}" for key in min(near, key=len))
            self._leave_out(cell, f"no row of {self.baseline} has {own}")

    def _against(self, base: Cell, cells: Sequence[Cell]) -> list[Comparison]:
        """Compare some cells with one baseline, on the same draws of test examples."""
        shared = [(cell, sorted({*cell.runs} & {*base.runs})) for cell in cells]
        for cell, seeds in shared:
            if not seeds:
                self._leave_out(cell, f"it shares no seed with {base.label}")
        try:
            expected = read_predictions(base.first)
        except ValueError as error:
            self.notes.append(f"{base.lang}: nothing is compared with {base.label}: {error}")
            return []
        metrics: dict[Any, Metric] = {}
        usable = []
        for cell, seeds in ((cell, seeds) for cell, seeds in shared if seeds):
            try:
                for run in (c.runs[seed] for c in (base, cell) for seed in seeds):
                    if run.folder not in metrics:
                        metrics[run.folder] = self._metric(run, base.first, expected)
                usable.append((cell, seeds))
            except ValueError as error:
                self._leave_out(cell, str(error))
        points, draws = _resampled(metrics, len(expected.ids))
        size = len(expected.ids)
        return [_comparison(base, cell, seeds, size, points, draws) for cell, seeds in usable]

    def _leave_out(self, cell: Cell, reason: str) -> None:
        """Note why a cell is not compared."""
        name = variant_of(cell, self.options)
        self.notes.append(f"{cell.model}, {cell.lang}: {name} is not compared: {reason}")

    def _metric(self, run: Run, base: Run, expected: Predictions) -> Metric:
        """Return the metric of a run on resampled examples.

        Raises:
            ValueError: it cannot be computed, or the test examples are not those of `base`.
        """
        found = read_predictions(run)
        if problem := mismatch(expected, found):
            message = f"{base.folder} and {run.folder} differ in test examples: {problem}"
            self.problems.append(message)
            raise ValueError(message)
        metric = metric_of(run, found)
        check_score(run, float(metric(np.ones((1, len(found.ids))))[0]))
        return metric

    def _corrected(self, found: Sequence[Comparison]) -> list[Comparison]:
        """Return the comparisons with Holm's correction over the languages of each method."""
        families: dict[tuple[Any, ...], list[Comparison]] = defaultdict(list)
        for comparison in found:
            cell = comparison.cell
            families[setting_of(cell, self.options), variant_of(cell, self.options)].append(
                comparison
            )
        return [
            replace(comparison, p_holm=float(p))
            for family in families.values()
            for comparison, p in zip(
                family, statistics.holm(np.array([c.found.p for c in family])), strict=True
            )
        ]


def _shared(cell: Cell, other: Cell) -> set[tuple[str, str]]:
    """Return the options of a cell that the method of another one has, too."""
    return {option for option in cell.changed if other.first.has(option[0])}


def _trained_alike(cell: Cell, others: Sequence[Cell]) -> list[Cell]:
    """Return those that were trained on the same languages, or that train on none.

    A cell that trains on none is compared with others, if none was trained on its language alone.
    """
    same = [other for other in others if other.trained_on == cell.trained_on]
    return same or [o for o in others if not (cell.first.trains and o.first.trains)]


def _resampled(
    metrics: Mapping[Any, Metric], examples: int
) -> tuple[dict[Any, float], dict[Any, Array]]:
    """Return each run's metric on its test set, and on the draws that all runs share, (B,)."""
    whole = np.ones((1, examples))
    points = {key: float(metric(whole)[0]) for key, metric in metrics.items()}
    if not metrics:
        return points, {}
    parts: dict[Any, list[Array]] = {key: [] for key in metrics}
    for counts in statistics.example_counts(examples):
        for key, metric in metrics.items():
            parts[key].append(metric(counts))
    return points, {key: np.concatenate(part) for key, part in parts.items()}


def _comparison(
    base: Cell,
    cell: Cell,
    seeds: Sequence[int],
    examples: int,
    points: Mapping[Any, float],
    draws: Mapping[Any, Array],
) -> Comparison:
    """Return the comparison of one cell, not yet corrected for several languages."""
    pairs = [(cell.runs[seed].folder, base.runs[seed].folder) for seed in seeds]
    found = statistics.paired_bootstrap(
        np.array([points[own] - points[other] for own, other in pairs]),
        np.stack([draws[own] - draws[other] for own, other in pairs], axis=1),
    )
    return Comparison(cell, base, tuple(seeds), examples, found, found.p)


@dataclass(frozen=True)
class Ranking:
    """Average ranks of the methods of one setting.

    Args:
        setting: model, translation and shared options.
        cells: the (task, language) pairs that are ranked over.
        ranks: method -> average rank, and the ends of its interval.
        lacking: method -> the cells that it lacks.
    """

    setting: tuple[str, ...]
    cells: tuple[tuple[str, str], ...]
    ranks: Mapping[str, tuple[float, float, float]]
    lacking: Mapping[str, tuple[tuple[str, str], ...]]


def rankings(tasks: Mapping[str, Sequence[Cell]]) -> list[Ranking]:
    """Rank the methods of each setting over its tasks and languages, by the mean over seeds.

    A method has the name of its row alone where it has one row in each task and language;
    otherwise its options belong to the name.

    Settings with less than two cells, or less than two methods that have every cell, have no
    ranks.
    """
    settings: dict[tuple[str, ...], list[tuple[Cell, str]]] = defaultdict(list)
    for cells in tasks.values():
        options = varying(cells)
        for cell in cells:
            settings[setting_of(cell, options)].append((cell, variant_of(cell, options)))
    found = []
    for setting, own in sorted(settings.items()):
        # tasks may differ in the options that tell their rows apart
        count = Counter((cell.task, cell.lang, cell.label) for cell, _ in own)
        repeated = {label for (_, _, label), number in count.items() if number > 1}
        methods: dict[str, dict[tuple[str, str], float]] = {}
        for cell, variant in own:
            name = variant if cell.label in repeated else cell.label
            values = [v for v in cell.values("test", cell.first.metric) if v is not None]
            if len(values) == len(cell.runs):
                methods.setdefault(name, {})[cell.task, cell.lang] = float(np.mean(values))
        found.append(_ranking(setting, methods))
    return found


def _ranking(
    setting: tuple[str, ...], methods: Mapping[str, Mapping[tuple[str, str], float]]
) -> Ranking:
    """Rank the methods of one setting."""
    cells = tuple(sorted({cell for own in methods.values() for cell in own}))
    lacking = {name: tuple(c for c in cells if c not in own) for name, own in methods.items()}
    complete = [name for name, lacks in lacking.items() if not lacks]
    lacking = {name: lacks for name, lacks in lacking.items() if lacks}
    if len(complete) < 2 or len(cells) < 2:
        return Ranking(setting, cells, {}, lacking)
    # scores of one metric are rounded to six decimals, so that equal ones tie
    table = np.round([[methods[name][cell] for cell in cells] for name in complete], 6)
    means, ends = statistics.average_ranks(table)
    found = {
        name: (float(means[i]), float(ends[i][0]), float(ends[i][1]))
        for i, name in enumerate(complete)
    }
    return Ranking(setting, cells, dict(sorted(found.items(), key=lambda item: item[1])), lacking)


def named(cells: Iterable[tuple[str, str]]) -> str:
    """Return (task, language) pairs as text."""
    return ", ".join(f"{task}/{lang}" for task, lang in cells)
