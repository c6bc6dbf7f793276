"""Predict for the rows of a file, or again for the test set of a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flare_exp.artifacts import digest_of, file_sha256
from flare_exp.data.dataset import PairedDataset
from flare_exp.data.rows import Row
from flare_exp.errors import UserError
from flare_exp.experiment.predicting import LoadedRun, Result
from flare_exp.serving.output import Columns, Output, Rows

Advance = Callable[[int], None]


def predict_rows(run: LoadedRun, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Yield a record for each row, in their order and in bounded memory."""
    kept, texts, sources = itertools.tee(rows, 3)
    given = (row.source for row in sources) if run.reads_sources else None
    found = run.stream((row.texts for row in texts), given)
    for row, result in zip(kept, found, strict=True):
        yield record(run, row, result)


def record(run: LoadedRun, row: Row, result: Result) -> dict[str, Any]:
    """Return what is written about a row."""
    fields = run.task.fields
    source = dict(zip(run.sources.columns, result.source or (), strict=True))
    back = {"english_prediction": result.english_prediction} if run.translates_back else {}
    return {
        **({} if row.id is None else {"id": row.id}),
        **dict(zip(fields, row.texts, strict=True)),
        **source,
        **said(run, result),
        **back,
        "cut": result.cut,
    }


def said(run: LoadedRun, result: Result) -> dict[str, Any]:
    """Return the prediction; of a label with the probabilities of all labels."""
    if not run.task.labels:
        return {"prediction": result.prediction}
    every = {label: result.probabilities.get(label) for label in run.task.labels}
    return {
        "prediction": result.prediction,
        "probability": result.probability,
        "probabilities": every,
    }


def columns(run: LoadedRun, id_type: type | None) -> Columns:
    """Return column -> type of a table of records."""
    fields, labels = run.task.fields, run.task.labels
    texts = [*fields, *run.sources.columns, "prediction"]
    numbers = ["probability", *(f"probability_{label}" for label in labels)] if labels else []
    return {
        **({} if id_type is None else {"id": id_type}),
        **dict.fromkeys(texts, str),
        **dict.fromkeys(numbers, float),
        **({"english_prediction": str} if run.translates_back else {}),
        "cut": bool,
    }


def identity(folder: Path, options: Sequence[str], content: str) -> str:
    """Return what predictions depend on: the run, options, and the content of the input."""
    run = {name: file_sha256(folder / name) for name in ("config.yaml", "metrics.json")}
    return digest_of([run, list(options), content])


def write_predictions(
    run: LoadedRun, rows: Iterable[Row], id_type: type | None, output: Output, advance: Advance
) -> None:
    """Predict for the rows that the output does not have yet, and write them all.

    Args:
        run: the run.
        rows: all rows.
        id_type: type of their ids; None: they have none.
        output: where the predictions go.
        advance: gets the number of rows that were predicted.
    """
    left = itertools.islice(rows, output.done, None)
    _keep(predict_rows(run, left), output, advance)
    output.finish(columns=columns(run, id_type))


def write_test_predictions(run: LoadedRun, output: Output, advance: Advance) -> None:
    """Predict for the run's own test set, and write its predictions.parquet again.

    On the machine of the run, a parquet file equals the run's byte for byte.

    Raises:
        UserError: the test data, or their translations, are not those of the run.
    """
    tests, stored = run.test_set(), stored_predictions(run)
    if not same_texts(run, tests, stored):
        raise UserError(
            "split=test: the test data, or their translations, are not those that the run read; "
            "give back its data, or predict for a file"
        )
    found = run.test_predictions(tests, output.done)
    _keep(([one.text, one.probabilities] for one in found), output, advance)
    output.finish(lambda kept: _again(run, stored, kept))


def stored_predictions(run: LoadedRun) -> list[dict[str, Any]]:
    """Return the rows of a run's predictions.parquet that are in the language it was loaded for."""
    rows = pq.read_table(run.folder / "predictions.parquet").to_pylist()
    return [row for row in rows if row["id"].split("/")[1] == run.run.cfg.task.lang]


def same_texts(
    run: LoadedRun, tests: Sequence[PairedDataset], stored: Sequence[dict[str, Any]]
) -> bool:
    """Return whether a test set has the texts and sources of the rows of a predictions.parquet.

    A file without any source is that of a mean over several predictors, or of a method that reads
    none: texts alone are compared. Of several passes over a run that made one, the one that reads
    sources is compared.
    """
    sourced = any(row["source"] is not None for row in stored)
    if sourced:
        tests = [next((one for one in tests if any(p.source for p in one.pairs)), tests[0])]
    found = run.written(tests)
    return len(stored) == len(found) and all(
        row["target"] == text and (not sourced or row["source"] == source)
        for (text, source), row in zip(found, stored, strict=True)
    )


def _again(run: LoadedRun, stored: Sequence[dict[str, Any]], kept: Iterable[Any]) -> Rows:
    """Put new predictions into the rows of the run; `kept`: text and probabilities of each."""
    found = list(kept)
    texts = [text for text, _ in found]
    shown = run.translator.into_target(texts) if run.translates_back else texts
    for row, text, answer, (_, probabilities) in zip(stored, texts, shown, found, strict=True):
        row["prediction"] = answer
        if "english_prediction" in row:
            row["english_prediction"] = text
        if "probabilities" in row:
            row["probabilities"] = probabilities
    return stored


def _keep(rows: Iterator[Any], output: Output, advance: Advance) -> None:
    """Append rows batch by batch, as they come."""
    while part := list(itertools.islice(rows, output.batch)):
        output.append(part)
        advance(len(part))
