"""Write results to a file that a killed process goes on with.

While a file is being made, its rows are in `<file>.part`: JSON lines, below a line that says what
they belong to. A process that is killed leaves them, and the same command goes on after the last
whole batch.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from flare_exp.errors import UserError
from flare_exp.utils import files

CHUNK = 4096  # rows of a parquet file that are written together
Row = Mapping[str, Any]
Rows = Iterable[Row]
Columns = Mapping[str, type]
TYPES = {int: "int64", float: "float64", bool: "bool", str: "string"}


class Output:
    """Collect the rows of a file, and write it when all are there.

    Args:
        path: the file; its ending, a key of WRITERS, is its format.
        identity: what the rows depend on; rows of another identity are not gone on with.
        batch: rows that are predicted together.
    """

    def __init__(self, path: Path, identity: str, batch: int):
        self.path, self.batch = path, batch
        self.part = path.with_name(f"{path.name}.part")
        self.header = json.dumps({"flare_exp predict": identity}).encode() + b"\n"
        self.lock = FileLock(f"{self.part}.lock", timeout=0)

    def __enter__(self) -> Output:
        try:
            self.lock.acquire()
        except Timeout:
            raise UserError(f"out={self.path}: another process is writing it") from None
        try:
            self.done, end = self._kept()
        except BaseException:
            self._release()
            raise
        self.file: IO[bytes] = self.part.open("ab")
        self.file.truncate(end)
        if not end:
            self.file.write(self.header)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._release()

    def _release(self) -> None:
        self.lock.release()
        Path(self.lock.lock_file).unlink(missing_ok=True)

    def _kept(self) -> tuple[int, int]:
        """Return how many rows there are in whole batches, and the byte where they end.

        Raises:
            UserError: the rows belong to something else.
        """
        if not self.part.is_file():
            return 0, 0
        with self.part.open("rb") as file:
            first = file.readline()
            if first != self.header and self.header.startswith(first):
                return 0, 0  # nothing was kept yet
            if first != self.header:
                raise UserError(
                    f"out={self.path}: {self.part.name} beside it is the beginning of another "
                    "output (of another run, input or option); remove it, or choose another file"
                )
            end = file.tell()
            kept = 0, end
            for number, line in enumerate(file, 1):
                if not _is_whole(line):
                    break
                end += len(line)
                if number % self.batch == 0:
                    kept = number, end
        return kept

    def append(self, rows: Iterable[Any]) -> None:
        """Keep some rows, so that a kill does not lose them."""
        for row in rows:
            self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(
        self, made: Callable[[Iterator[Any]], Rows] = iter, columns: Columns | None = None
    ) -> None:
        """Write the file, and remove what was kept.

        Args:
            made: turns what was kept into rows.
            columns: of a flat table; see `write`.
        """
        with self.part.open("rb") as file:
            kept = map(json.loads, itertools.islice(file, 1, None))
            write(self.path, made(kept), columns)
        self.part.unlink()


def write(path: Path, rows: Rows, columns: Columns | None = None) -> None:
    """Write rows to a file in the format of its ending, atomically.

    Args:
        path: the file.
        rows: column -> value.
        columns: column -> type of its values, for a parquet file that is written in bounded
            memory; None: their types follow from all rows.
    """
    with files.replacing(path) as part:
        WRITERS[path.suffix.lower()](part, rows, columns)


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return False
    return line.endswith(b"\n")


def flat(row: Row) -> dict[str, Any]:
    """Return a row of a table: a mapping gets a column for each key, a list is JSON."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"probability_{key}": one for key, one in value.items()}
        else:
            found[name] = json.dumps(value) if isinstance(value, list) else value
    return found


def _json_lines(path: Path, rows: Rows, _: Columns | None) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _table(path: Path, rows: Rows, _: Columns | None, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for row in map(flat, rows):
            if writer is None:
                writer = csv.DictWriter(file, list(row), delimiter=delimiter)
                writer.writeheader()
            writer.writerow(row)


def _parquet(path: Path, rows: Rows, columns: Columns | None) -> None:
    if columns is None:
        files.write_parquet(path, list(rows))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, TYPES[kind]) for name, kind in columns.items()])
    table = map(flat, rows)
    with pq.ParquetWriter(path, schema) as writer:
        while chunk := list(itertools.islice(table, CHUNK)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


WRITERS: dict[str, Callable[[Path, Rows, Columns | None], None]] = {
    ".jsonl": _json_lines,
    ".csv": _table,
    ".tsv": functools.partial(_table, delimiter="\t"),
    ".parquet": _parquet,
}
