"""Write the rows of a benchmark as a parquet file, and the folders that a task asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flare_exp.tasks import TASKS, Benchmark


def write_rows(path: Path, rows: Sequence[dict[str, Any]] | pa.Table) -> Path:
    """Write `path`, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows))
    pq.write_table(table, path)
    return path


def files_of(name: str, root: Path) -> list[str]:
    """The option with the files of a task that is not on the hub; no option for the others."""
    task = TASKS[name]
    if not issubclass(task, Benchmark) or hasattr(task, "hub_id"):
        return []
    for lang in (task.english, *task.languages):
        (root / lang).mkdir(exist_ok=True)
    return [f"task.data_dir={root}"]
