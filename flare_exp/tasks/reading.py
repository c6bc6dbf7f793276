"""Read the rows of a benchmark from a local file or from the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flare_exp.errors import UserError, first_line
from flare_exp.hub import load_hub
from flare_exp.tasks.tables import check_row, rows_of


def read_parquet(
    path: Path, columns: Sequence[str] | Mapping[str, str], option: str = "task.data_dir"
) -> list[dict[str, Any]]:
    """Read rows of a local parquet file.

    Args:
        path: the file.
        columns: names of the columns; or names and kinds (flare_exp.tasks.tables), and then every
            cell is checked for its kind.
        option: the option that names the file's folder, for the message.

    Raises:
        UserError: the file is missing or damaged, a column is missing, or a cell is wrong; the
            message names file, row and column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(
            f"{option}: there is no {path}; expected <data_dir>/<language>/<split>.parquet"
        )
    try:
        table = pq.ParquetFile(path).read()
    # a damaged schema raises UnicodeDecodeError, which is a ValueError
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{option}: {path} is not a readable parquet file ({reason})") from error
    return _checked(
        rows_of(table, list(columns), f"{option}: {path}"), columns, f"{option}: {path}"
    )


def _checked(
    rows: list[dict[str, Any]], columns: Sequence[str] | Mapping[str, str], place: str
) -> list[dict[str, Any]]:
    if isinstance(columns, Mapping):
        for number, row in enumerate(rows):
            check_row(row, columns, place, number)
    return rows


def read_hub(
    hub_id: str, config: str, split: str, revision: str, columns: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Read rows of a hub data set at a pinned revision.

    Raises:
        UserError: the data set cannot be reached, has no such config, split or column, or a cell is
            wrong.
    """
    table, place = (
        load_hub(hub_id, config, revision, split),
        f"the data set {hub_id} ({config}, {split})",
    )
    if missing := [c for c in columns if c not in table.column_names]:
        lacking = (
            f"it lacks the column(s) {', '.join(missing)}; it has {', '.join(table.column_names)}"
        )
        raise UserError(f"{place} could not be loaded: {lacking}")
    return _checked(table.select_columns(list(columns)).to_list(), columns, place)
