"""Write and compare parquet files: rows of a benchmark, a task's folders, predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from flare_exp.tasks import CUSTOM, TASKS, Benchmark

OWN_LABELS = ("positive", "negative", "positive")


def write_rows(path: Path, rows: Sequence[dict[str, Any]] | pa.Table) -> Path:
    """Write `path`, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows))
    pq.write_table(table, path)
    return path


def files_of(name: str, root: Path) -> list[str]:
    """The options with the files of a task that is not on the hub; no option for the others."""
    if name == CUSTOM:
        return [f"task.spec={own_data(root)}", "task.lang=far", "mt=toy_nllb"]
    task = TASKS[name]
    if not issubclass(task, Benchmark) or hasattr(task, "hub_id"):
        return []
    for lang in (task.english, *task.languages):
        (root / lang).mkdir(exist_ok=True)
    return [f"task.data_dir={root}"]


def assert_same_predictions(one: Path, other: Path, atol: float = 1e-5) -> None:
    """Assert that two predictions.parquet are equal, with probabilities up to rounding.

    Other parts of a batch, as of other processes or micro-batches, round in another way; training
    in 32-bit floats adds that up, and needs a larger `atol`.
    """
    tables = [pq.read_table(path) for path in (one, other)]
    if "probabilities" in tables[0].column_names:
        found = [torch.tensor(table["probabilities"].to_pylist()) for table in tables]
        torch.testing.assert_close(*found, rtol=0, atol=atol)
        tables = [table.drop_columns("probabilities") for table in tables]
    assert tables[0] == tables[1]


def own_data(folder: Path, **changes: Any) -> Path:
    """Write a small data set of one's own and return its description; None leaves a key out."""
    for name in ("train", "validation", "test", "far", "en"):
        rows = "".join(f"{i},{name} {i} day,{label}\n" for i, label in enumerate(OWN_LABELS))
        (folder / f"{name}.csv").write_text(f"id,text,label\n{rows}")
    english = {split: f"{split}.csv" for split in ("train", "validation", "test")}
    spec = {"files": {"en": english, "far": {"test": "far.csv"}}, "text": "text", "label": "label"}
    spec |= {"labels": ["negative", "positive"], **changes}
    path = folder / "mine.yaml"
    given = {key: value for key, value in spec.items() if value is not None}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path
