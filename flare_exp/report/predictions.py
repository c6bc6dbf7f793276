"""Read the predictions of a run, and make its metric a function of resampled test examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flare_exp.experiment.checksums import damage
from flare_exp.report.runs import Run
from flare_exp.report.statistics import Metric, macro_f1_metric, mean_metric

FILE = "predictions.parquet"
SHOWN = 3  # the most ids that a message lists
ROUNDED = 1e-5  # metrics.json has six decimals


@dataclass(frozen=True)
class Predictions:
    """The test examples of a run, sorted by id.

    Args:
        ids: id of each example.
        gold: its right answer: a label, or the accepted texts.
        predicted: the prediction.
    """

    ids: list[str]
    gold: list[Any]
    predicted: list[str]


def read_predictions(run: Run) -> Predictions:
    """Read predictions.parquet of a run; of several languages, those of its own.

    Raises:
        ValueError: the file is missing, damaged or has other columns; the message names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run.folder / FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if problems := damage(run.folder, only=[FILE]):
        raise ValueError(f"{run.folder}: {problems[0]}")
    try:
        rows = pq.read_table(path, columns=["id", "gold", "prediction"]).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path} is unreadable ({error})") from None
    if "languages" in run.metrics:
        rows = [row for row in rows if row["id"].split("/")[1] == run.lang]
    rows.sort(key=lambda row: row["id"])
    ids, gold, predicted = ([row[c] for row in rows] for c in ("id", "gold", "prediction"))
    return Predictions(ids, gold, predicted)


def mismatch(one: Predictions, other: Predictions) -> str | None:
    """Return how the test examples of two runs differ, or None if they are the same."""
    if one.ids != other.ids:
        alone = [_listed(sorted({*a.ids} - {*b.ids})) for a, b in ((one, other), (other, one))]
        return f"examples only in the first: {alone[0]}; only in the second: {alone[1]}"
    rows = zip(one.ids, one.gold, other.gold, strict=True)
    if changed := [id for id, a, b in rows if a != b]:
        return f"the gold answer differs for: {_listed(changed)}"
    return None


def _listed(ids: Sequence[str]) -> str:
    """Return the first of some ids, and how many there are."""
    more = f", ... ({len(ids)} in all)" if len(ids) > SHOWN else ""
    return (", ".join(ids[:SHOWN]) or "none") + more


def metric_of(run: Run, found: Predictions) -> Metric:
    """Return the task's metric on resampled examples of a run.

    Raises:
        ValueError: the metric is none that can be computed on resampled examples.
    """
    name, labels, task = run.metric, run.labels, run.metrics["task"]
    if name == "accuracy":
        return mean_metric(np.array(found.gold) == np.array(found.predicted))
    if name == "macro_f1":
        number = {label: i for i, label in enumerate(labels)}
        if unknown := {*found.gold} - {*labels}:
            raise ValueError(f"{task} has no class {min(map(str, unknown))}")
        gold = np.array([number[label] for label in found.gold])
        return macro_f1_metric(gold, np.array([number.get(p, -1) for p in found.predicted]))
    if name in ("exact_match", "f1"):
        # imports torch, which tables of classification do without
        from flare_exp.tasks.metrics import answers

        pairs = zip(found.predicted, found.gold, strict=True)
        return mean_metric(np.array([answers([text], [golds])[name] for text, golds in pairs]))
    raise ValueError(f"{task}: {name} cannot be computed on resampled examples")


def check_score(run: Run, value: float) -> None:
    """Check that the predictions have the score that metrics.json says.

    Raises:
        ValueError: they have another one.
    """
    name = run.metric
    stored = run.metrics["test"][name]
    if abs(value - stored) > ROUNDED:
        raise ValueError(
            f"{run.folder}: {FILE} has {name} {value:.6f}, metrics.json {stored:.6f}; the run "
            "was scored by other code"
        )
