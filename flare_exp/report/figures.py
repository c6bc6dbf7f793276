"""Choose the figures of a report, as data that `flare_exp.report.drawing` draws.

The numbers are those of the report: differences with their bootstrap intervals, means and standard
deviations over seeds, seconds. Learning curves are read from the run folders.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flare_exp.report.cells import Cell, is_setting, option_of, variant_of, varying
from flare_exp.report.comparisons import Comparison
from flare_exp.report.drawing import Drawing, Line
from flare_exp.report.making import Report
from flare_exp.report.runs import TIMED, Run
from flare_exp.report.tables import moments
from flare_exp.tasks import TASKS
from flare_exp.translation.base import BENCHMARK

HUMAN = 100.0  # chrF++ of a human translation with itself
SIZE = re.compile(r"(?:^|_)(?:(\d+)b(\d*)|(\d+)m)(?:_|$)")
INTERVAL = "Bars are 95 % intervals of the paired bootstrap."
DEVIATION = "mean and standard deviation over seeds"


def figures_of(report: Report) -> tuple[list[Drawing], list[str]]:
    """Choose the figures that the runs of a report have the numbers for.

    Returns:
        the figures, and a phrase for each that is left out, with the reason.
    """
    drawings: list[Drawing] = []
    lacking: list[str] = []
    for section in report.sections:
        own = _Section(section.task, section.cells, section.comparisons)
        for kind, make in MAKERS.items():
            try:
                drawings += make(own).parts()
            except Lacking as reason:
                lacking.append(f"{section.task}-{kind} ({reason})")
    return drawings, lacking


class Lacking(Exception):
    """The runs do not have what a figure needs; the text says what."""


@dataclass(frozen=True)
class _Section:
    """The cells and comparisons of one task."""

    task: str
    cells: Sequence[Cell]
    comparisons: Sequence[Comparison]

    @property
    def metric(self) -> str:
        """Return the task's main metric."""
        return self.cells[0].first.metric

    @property
    def options(self) -> list[str]:
        """Return the options that differ between cells."""
        return varying(self.cells)

    def variant(self, cell: Cell) -> str:
        """Return the method with the options that belong to it: the label of its line."""
        return variant_of(cell, self.options)

    def style(self, cell: Cell) -> int:
        """Return the number of a method's line, which is the same in all figures of the task."""
        return list(dict.fromkeys(map(self.variant, self.cells))).index(self.variant(cell))

    def panel(self, cell: Cell, without: Callable[[str], bool] = lambda _: False) -> str:
        """Return the title of a cell's panel: model, language, and the setting that is compared on.

        Args:
            cell: the cell.
            without: whether an option is on the axis, and so no part of the setting.
        """
        noise = "" if without("mt.noise") else cell.mt.partition(",")[2].strip()
        where = str(cell.first.options.get("mt.noise_in", "all"))
        if without("mt.noise") and where != "all":
            noise = f"noise in {where}"
        name = "" if without("mt.name") else option_of(cell, "mt.name")
        shown = [key for key in self.options if is_setting(key) and cell.first.has(key)]
        more = [f"{key}={option_of(cell, key)}" for key in shown if not without(key)]
        return ", ".join(filter(None, [cell.model, cell.lang, name, noise, *more]))


# --- gain over the baseline -----------------------------------------------------------------------


def gain_by_quality(own: _Section) -> Drawing:
    """Return the gain over the baseline against chrF++ of the translations.

    Within a panel the translations differ. Where each language has one translation alone, the
    points of a method are the languages.

    Raises:
        Lacking: there are no two qualities.
    """
    found = [(c, x) for c in own.comparisons if (x := _quality(c.cell)) is not None]
    panels = _gain_panels(own, found, lambda key: key.startswith("mt.") and "noise" not in key)
    where = "training data, else of the test data"
    caption = f"chrF++ is that of the translated {where}; human translations have 100. {INTERVAL}"
    if not panels:
        points_of = _by_language(own, found)
        if not points_of:
            raise Lacking(
                "needs translations of at least two qualities at one rate of wrong words, chrF++"
            )
        panels, caption = points_of, f"Each point is a language. {caption}"
    return _gain(own, "quality", panels, caption, "chrF++ of the translations")


def gain_by_noise(own: _Section) -> Drawing:
    """Return the gain over the baseline against the rate of wrong words in the translations.

    Raises:
        Lacking: there are no two rates.
    """
    found = [(c, 100 * float(c.cell.first.options.get("mt.noise") or 0)) for c in own.comparisons]
    panels = _gain_panels(own, found, lambda key: key == "mt.noise")
    if not panels:
        raise Lacking("needs at least two values of mt.noise")
    return _gain(own, "noise", panels, INTERVAL, "wrong words in the translations, mt.noise (%)")


def gain_by_size(own: _Section) -> Drawing:
    """Return the gain over the baseline against the parameters of the translation model.

    Raises:
        Lacking: there are no models of two sizes.
    """
    found = [(c, x) for c in own.comparisons if (x := parameters(option_of(c.cell, "mt.name")))]
    on_axis = ("mt.name", "mt.path", "mt.revision")
    panels = _gain_panels(own, found, lambda key: key in on_axis)
    if not panels:
        raise Lacking("needs translation models of at least two sizes")
    label = "parameters of the translation model (billions)"
    return _gain(own, "size", panels, INTERVAL, label, log=True)


def parameters(mt: str) -> float | None:
    """Return the billions of parameters that the name of a translation model says, or None."""
    if (match := SIZE.search(mt)) is None:
        return None
    billions, tenths, millions = match.groups()
    return int(millions) / 1000 if millions else float(f"{billions}.{tenths or 0}")


def _quality(cell: Cell) -> float | None:
    """Return the mean chrF++ of a cell's translations; None if it is not known.

    That of human translations is not measured: it is 100.
    """
    scores = [run.chrf for run in cell.runs.values()]
    known = [score for score in scores if score is not None]
    if known:
        return statistics.mean(known) if len(known) == len(scores) else None
    clean = not cell.first.options.get("mt.noise")
    human = option_of(cell, "mt.name") in BENCHMARK and not getattr(
        TASKS.get(cell.task), "machine_splits", ()
    )
    return HUMAN if human and clean else None


def _gain(
    own: _Section,
    name: str,
    panels: Sequence[tuple[str, Sequence[Line]]],
    caption: str,
    x: str,
    log: bool = False,
) -> Drawing:
    """Return a figure of gains over the baseline."""
    against = " or ".join(dict.fromkeys(c.baseline.label for c in own.comparisons))
    title = f"{own.task}: gain over {against} against {x}"
    y = f"gain over {against} (points of {own.metric})"
    return Drawing(f"{own.task}-gain-{name}", title, caption, x, y, panels, log=log, zero=True)


def _gain_panels(
    own: _Section, found: Iterable[tuple[Comparison, float]], on_axis: Callable[[str], bool]
) -> list[tuple[str, list[Line]]]:
    """Return the panels in which some method has two places on the axis.

    Args:
        own: the task.
        found: comparisons with their places.
        on_axis: whether an option differs along the axis; all others differ between panels.
    """
    panels: dict[str, dict[str, list[tuple[float, Comparison]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for comparison, x in found:
        title = own.panel(comparison.cell, on_axis)
        panels[title][own.variant(comparison.cell)].append((x, comparison))
    shown = []
    for title, methods in panels.items():
        if any(len({x for x, _ in points}) > 1 for points in methods.values()):
            lines = [_gain_line(own, points) for points in methods.values()]
            shown.append((title, sorted(lines, key=lambda line: line.style)))
    return shown


def _by_language(
    own: _Section, found: Iterable[tuple[Comparison, float]]
) -> list[tuple[str, list[Line]]]:
    """Return a panel for each setting, with a point for each language and method."""
    panels: dict[str, dict[str, list[tuple[float, Comparison]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for comparison, x in found:
        cell = comparison.cell
        title = own.panel(cell).replace(f", {cell.lang}", "", 1)
        panels[title][own.variant(cell)].append((x, comparison))
    return [
        (title, [_gain_line(own, points, joined=False) for points in methods.values()])
        for title, methods in panels.items()
        if any(len({x for x, _ in points}) > 1 for points in methods.values())
    ]


def _gain_line(
    own: _Section, points: Iterable[tuple[float, Comparison]], joined: bool = True
) -> Line:
    """Return the line of a method: differences in points, with their intervals."""
    ordered = sorted(points, key=lambda point: point[0])
    cell = ordered[0][1].cell
    found = [c.found for _, c in ordered]
    return Line(
        own.variant(cell),
        [x for x, _ in ordered],
        [100 * d.mean for d in found],
        [100 * d.low for d in found],
        [100 * d.high for d in found],
        own.style(cell),
        joined,
    )


# --- costs and learning curves --------------------------------------------------------------------


def quality_by_cost(own: _Section) -> Drawing:
    """Return the test score against the seconds of transfer and test.

    Raises:
        Lacking: no panel has two methods.
    """
    panels: dict[str, list[Line]] = defaultdict(list)
    for cell in own.cells:
        scores = [score for score in cell.values("test", own.metric) if score is not None]
        spent = [sum(run.metrics["seconds"][stage] for stage in TIMED) for run in cell.by_seed]
        if len(scores) == len(spent) and min(spent) > 0:
            y, low, high = _spread([100 * score for score in scores])
            x = [statistics.mean(spent)]
            panels[own.panel(cell)].append(
                Line(own.variant(cell), x, [y], [low], [high], own.style(cell), joined=False)
            )
    shown = [(title, lines) for title, lines in panels.items() if len(lines) > 1]
    if not shown:
        raise Lacking("needs two methods of one setting")
    caption = (
        f"The score is {DEVIATION}. The time is the mean over seeds of what transfer and test took "
        "when they were built; English fine-tuning, which all methods share, and translation are "
        "left out."
    )
    x_label, y_label = "seconds of transfer and test", f"test {own.metric} (%)"
    title = f"{own.task}: {y_label} against {x_label}"
    name = f"{own.task}-cost"
    return Drawing(name, title, caption, x_label, y_label, shown, kind="points", log=True)


def learning_curves(own: _Section) -> Drawing:
    """Return the validation score after each epoch of the transfer.

    Raises:
        Lacking: no method has two epochs.
    """
    panels: dict[str, list[Line]] = defaultdict(list)
    # a training on several languages has one curve, of their mean
    for cell in (cell for cell in own.cells if "languages" not in cell.first.metrics):
        curves = [curve(run, own.metric) for run in cell.by_seed]
        epochs = sorted(set.intersection(*map(set, curves)))
        if epochs:
            spread = [_spread([100 * one[epoch] for one in curves]) for epoch in epochs]
            y, low, high = ([*ends] for ends in zip(*spread, strict=True))
            if len(curves) == 1:
                low, high = [], []
            panels[own.panel(cell)].append(
                Line(own.variant(cell), epochs, y, low, high, own.style(cell))
            )
    shown = [
        (title, lines) for title, lines in panels.items() if any(len(line.x) > 1 for line in lines)
    ]
    if not shown:
        raise Lacking("needs validation scores of at least two epochs in curves/transfer.csv")
    y_label = f"validation {own.metric} (%)"
    title = f"{own.task}: {y_label} of each epoch of the transfer"
    caption = "Lines are means over seeds; bands are standard deviations over seeds."
    name = f"{own.task}-learning"
    return Drawing(name, title, caption, "epoch", y_label, shown, kind="band", whole=True)


def curve(run: Run, metric: str) -> dict[float, float]:
    """Return epoch -> validation score of a run's transfer; empty if there is none.

    Epochs are counted from 1.
    """
    try:
        with (run.folder / "curves" / "transfer.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {
            int(row["epoch"]) + 1: float(row[f"validation/{metric}"])
            for row in rows
            if row.get(f"validation/{metric}")
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of some values, and the mean minus and plus the standard deviation."""
    mean, deviation = (one or 0.0 for one in moments(values))
    return mean, mean - deviation, mean + deviation


MAKERS: Mapping[str, Callable[[_Section], Any]] = {
    "gain-quality": gain_by_quality,
    "gain-noise": gain_by_noise,
    "gain-size": gain_by_size,
    "cost": quality_by_cost,
    "learning": learning_curves,
}
