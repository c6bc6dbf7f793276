"""Draw the training curves of a run: loss and validation metric of both trainings."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {"finetune": "English fine-tuning", "transfer": "transfer to {lang}"}

Points = tuple[list[float], list[float]]  # steps and values


def draw_curves(folder: Path, target: Path, metric: str, lang: str) -> None:
    """Draw the CSV files of `folder` (`<stage>.csv`, as Lightning's CSVLogger writes them).

    A column per training. The upper panel has the loss of every tenth step and of the validation
    set, the lower panel `validation/<metric>`. Without any curve, no picture is written.

    Args:
        folder: holds `finetune.csv` and, where an adapter was trained, `transfer.csv`.
        target: the PNG file.
        metric: the metric that the task is judged by.
        lang: the target language.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = [stage for stage in TITLES if (folder / f"{stage}.csv").is_file()]
    if not stages:
        return
    width = 5.2 * len(stages)
    figure = Figure(figsize=(width, 5.4))
    canvas = FigureCanvasAgg(figure)
    # margins (in inches) and heights of titles are given: to compute them takes as long as to draw
    figure.subplots_adjust(0.8 / width, 0.55 / 5.4, 1 - 0.15 / width, 1 - 0.35 / 5.4, 0.06, 0.08)
    with rc_context({"axes.titley": 1.0}):
        panels = figure.subplots(2, len(stages), squeeze=False, sharex="col", sharey="row")
    for column, stage in enumerate(stages):
        with (folder / f"{stage}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        loss, score = panels[0, column], panels[1, column]
        _line(loss, points(rows, "train/loss_step"), color="tab:gray", alpha=0.6, label="training")
        _line(
            loss, points(rows, "validation/loss"), color="tab:blue", marker="o", label="validation"
        )
        _line(score, points(rows, f"validation/{metric}"), color="tab:blue", marker="o")
        loss.set_title(TITLES[stage].format(lang=lang))
        score.set_xlabel("optimizer step")
        for panel in (loss, score):
            panel.grid(alpha=0.3)
            panel.locator_params(nbins=5)
    panels[0, 0].set_ylabel("loss")
    if panels[0, 0].lines:
        panels[0, 0].legend()
    panels[1, 0].set_ylabel(f"validation {metric}")
    canvas.print_png(target)


def points(rows: Sequence[dict[str, str]], name: str) -> Points:
    """Return the steps at which a column has a value, and these values."""
    found = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return [step for step, _ in found], [value for _, value in found]


def _line(panel: Any, found: Points, **style: Any) -> None:
    if found[0]:
        panel.plot(*found, markersize=4, **style)
