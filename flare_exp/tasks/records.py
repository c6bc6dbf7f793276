"""Read the rows of a user's own files, and find every problem in them with file, row and column."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flare_exp.errors import UserError, first_line
from flare_exp.hub import load_hub
from flare_exp.tasks.spec import DELIMITERS, Columns, HubSplit

LONGEST_CELL = 10_000_000  # characters; csv's own limit is 131,072
UNDECODED = range(0xDC80, 0xDD00)  # how Python keeps bytes that are not UTF-8


@dataclass(frozen=True)
class Problem:
    """Something that is wrong in a data set, or doubtful.

    Args:
        place: the file or data set.
        text: what is wrong, and what is allowed.
        row: number of the row, from 1, without the header; None: not one row.
        line: number of the line in a text file, from 1.
        column: name of the column.
        fatal: whether training refuses the data; otherwise it is a warning.
    """

    place: str
    text: str
    row: int | None = None
    line: int | None = None
    column: str | None = None
    fatal: bool = True

    def __str__(self) -> str:
        at = [f"row {self.row}"] if self.row is not None else []
        if self.line is not None:
            at = [f"{at[0]} (line {self.line})" if at else f"line {self.line}"]
        at += [f"column {self.column}"] if self.column is not None else []
        return f"{', '.join([self.place, *at])}: {self.text}"


@dataclass(frozen=True)
class Record:
    """One row: its number from 1, its first line in a text file, and its cells by column."""

    row: int
    line: int | None
    cells: dict[str, Any]


@dataclass
class Records:
    """The rows of one split, and what is wrong with them."""

    place: str
    rows: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def report(self, text: str, **where: Any) -> None:
        """Add a problem."""
        self.problems.append(Problem(self.place, text, **where))

    def blame(self, record: Record, column: str | None, text: str, fatal: bool = True) -> None:
        """Add a problem of a cell, or of a whole row."""
        self.report(text, row=record.row, line=record.line, column=column, fatal=fatal)


def read_records(place: Path | HubSplit, columns: Columns) -> Records:
    """Read the rows of a split; nothing is raised, all problems are in the result."""
    found = Records(str(place))
    if isinstance(place, HubSplit):
        _read_hub(place, columns, found)
    elif place.suffix.lower() == ".parquet":
        _read_parquet(place, columns, found)
    elif (text := _text_of(place, found)) is not None:
        read = _read_lines if place.suffix.lower() == ".jsonl" else _read_table
        read(text, place, columns, found)
    if not found.rows and not found.problems:
        found.report("has no rows")
    return found


def columns_of(place: Path) -> list[str]:
    """Return the names of a file's columns, for suggestions; [] if they cannot be read."""
    found = Records(str(place))
    try:
        if place.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return list(pq.read_schema(place).names)
        text = _text_of(place, found) or ""
        if place.suffix.lower() == ".jsonl":
            first = json.loads(text.partition("\n")[0])
            return list(first) if isinstance(first, dict) else []
        return next(csv.reader(io.StringIO(text), delimiter=DELIMITERS[place.suffix.lower()]), [])
    except (OSError, ValueError, KeyError, RecursionError, csv.Error):
        return []


# --- text files ------------------------------------------------------------------------------


def _text_of(path: Path, found: Records) -> str | None:
    """Read a text file. Bytes that are not UTF-8 become surrogates, which cells are checked for."""
    try:
        content = path.read_bytes()
    except OSError as error:
        found.report(f"cannot be read ({error.strerror})")
        return None
    if not content.strip():
        found.report("is empty")
    elif content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        found.report("is not UTF-8: it looks like UTF-16, or is no text; save it as UTF-8")
    else:
        text = content.decode("utf-8", "surrogateescape")
        return text.removeprefix("\ufeff")  # a mark that Windows writes
    return None


def _read_table(text: str, path: Path, columns: Columns, found: Records) -> None:
    """Read a CSV or TSV file, whose first line names its columns."""
    delimiter = columns.delimiter or DELIMITERS[path.suffix.lower()]
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if columns.quotes else csv.QUOTE_NONE,
        strict=True,
    )
    line, row = 1, 0
    header: list[str] | None = None
    try:
        for cells in reader:
            first, line = line, reader.line_num + 1
            if not cells:  # an empty line
                continue
            if header is None:
                header = cells
                if not _has_columns(header, columns, found, delimiter):
                    return
                continue
            row += 1
            if len(cells) != len(header):
                found.report(_ragged(cells, header, delimiter), row=row, line=first)
                continue
            record = Record(row, first, dict(zip(header, cells, strict=True)))
            if (rows := _rows_in(cells, header, delimiter, columns)) > 1:
                said = f"reads as {rows} rows in quotes; if quotes are ordinary signs: quotes: no"
                found.blame(record, None, said, fatal=False)
            _keep(record, columns, found)
    except csv.Error as error:
        found.report(_malformed(error), row=row + 1, line=line)


def _rows_in(cells: Sequence[str], header: Sequence[str], delimiter: str, columns: Columns) -> int:
    """Count the rows that one row would be if its quotes were ordinary signs.

    A quote opens a text, and one in a text below closes it. It is one row unless each of its lines
    has all cells and a known label; without labels that cannot be told from a text of two lines.
    """
    if columns.label is None or not columns.labels:
        return 1
    lines = [line.split(delimiter) for line in delimiter.join(cells).splitlines()]
    if len(lines) < 2 or any(len(line) != len(header) for line in lines):
        return 1
    known = {value for values in columns.labels.values() for value in values}
    labels = {line[header.index(columns.label)] for line in lines}
    return len(lines) if known.issuperset(labels) else 1


def _ragged(cells: Sequence[str], header: Sequence[str], delimiter: str) -> str:
    name = "a tab" if delimiter == "\t" else f"{delimiter!r}"
    return (
        f"has {len(cells)} cells where the header has {len(header)}; a text with {name} or a line "
        'break in it must stand in double quotes ("...")'
    )


def _malformed(error: csv.Error) -> str:
    """Return what is wrong with the quotes of a row, after which nothing can be read."""
    if "unexpected end of data" in str(error) or "field limit" in str(error):
        said = 'a quote (") opens a cell and is never closed'
    elif "expected after" in str(error):
        said = 'a cell goes on after its closing quote ("); write a quote inside a cell as ""'
    else:
        said = str(error)
    return f"{said}. The rows below were not read. If quotes are ordinary signs here: quotes: no"


def _read_lines(text: str, path: Path, columns: Columns, found: Records) -> None:
    """Read a JSON lines file: an object on each line."""
    if text.lstrip().startswith("["):
        found.report("is one JSON list; JSON lines have an object on each line (jq -c '.[]')")
        return
    row, names = 0, dict[str, None]()
    kept: list[Record] = []
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        row += 1
        try:
            cells = json.loads(content)
        except (ValueError, RecursionError) as error:
            found.report(f"is no JSON: {first_line(error)}", row=row, line=line)
            continue
        if not isinstance(cells, dict):
            found.report(f"is no object {{...}}: {content.strip()[:40]}", row=row, line=line)
            continue
        names |= dict.fromkeys(cells)
        kept.append(Record(row, line, cells))
    if kept and _has_columns(list(names), columns, found):
        for record in kept:
            _keep(record, columns, found)


# --- tables of pyarrow -------------------------------------------------------------------------


def _read_parquet(path: Path, columns: Columns, found: Records) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        found.report(f"is not a readable parquet file ({first_line(error)})")
        return
    if _has_columns(list(table.column_names), columns, found):
        cells = {name: list(_cells(table.column(name))) for name in columns.names}
        _keep_all(cells, columns, found)


def _read_hub(split: HubSplit, columns: Columns, found: Records) -> None:
    try:
        table = load_hub(split.hub_id, split.config, split.revision, split.split)
    except UserError as error:
        found.report(
            f"could not be loaded: {first_line(error.__cause__ or error)}; without network, fetch "
            "it beforehand (python -m flare_exp prefetch)"
        )
        return
    if _has_columns(list(table.column_names), columns, found):
        _keep_all({name: list(table[name]) for name in columns.names}, columns, found)


def _keep_all(cells: dict[str, list[Any]], columns: Columns, found: Records) -> None:
    for number, values in enumerate(zip(*cells.values(), strict=True), 1):
        _keep(Record(number, None, dict(zip(cells, values, strict=True))), columns, found)


def _cells(column: Any) -> Iterator[Any]:
    """Yield the cells of a column of pyarrow; text that is not UTF-8 as bytes."""
    import pyarrow as pa

    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for cell in column:
            try:
                yield cell.as_py()
            except UnicodeDecodeError:
                yield cell.cast(pa.binary()).as_py().decode("utf-8", "surrogateescape")


# --- checks of all formats ---------------------------------------------------------------------


def _has_columns(
    names: Sequence[str], columns: Columns, found: Records, delimiter: str | None = None
) -> bool:
    """Report columns that are missing or there twice; return whether all can be read."""
    missing = [name for name in columns.names if name not in names]
    for name in missing:
        found.report(
            f"is missing; the file has {', '.join(map(repr, names))}"
            f"{_hint(name, names, delimiter)}",
            column=name,
        )
    twice = [name for name in columns.names if list(names).count(name) > 1]
    for name in twice:
        found.report("several columns have this name; rename one of them", column=name)
    return not missing and not twice


def _hint(name: str, names: Sequence[str], delimiter: str | None) -> str:
    """Return what may be the cause of a missing column."""
    import difflib

    near = difflib.get_close_matches(name, names, 1)
    near = near or [other for other in names if other.strip().lower() == name.lower()]
    if near:
        return f"; did you mean {near[0]!r}?"
    for other, said in ((";", "';'"), ("\t", "tab"), (",", "','"), ("|", "'|'")):
        if len(names) == 1 and delimiter != other and name in names[0].split(other):
            return f"; its cells seem to be separated otherwise: delimiter: {said}"
    return "; the first line must name the columns" if delimiter else ""


def _keep(record: Record, columns: Columns, found: Records) -> None:
    """Add a row whose cells are all there and are valid Unicode."""
    bad = False
    for name in columns.names:
        if name not in record.cells:
            found.blame(record, name, "is missing in this row")
            bad = True
        elif (wrong := _undecoded(record.cells[name])) is not None:
            found.blame(record, name, wrong)
            bad = True
    if not bad:
        found.rows.append(record)


def _undecoded(cell: Any) -> str | None:
    """Return what is wrong with the characters of a text; None: nothing."""
    if isinstance(cell, (dict, list)):
        inner: Iterable[Any] = cell.values() if isinstance(cell, dict) else cell
        return next((wrong for c in inner if (wrong := _undecoded(c)) is not None), None)
    if not isinstance(cell, str):
        return None
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        code = ord(cell[error.start])
        before = cell[max(0, error.start - 20) : error.start]
        after = f" after {before!r}" if before else ""
        if code in UNDECODED:
            return (
                f"the byte 0x{code - 0xDC00:02X}{after} is not UTF-8; save the file as UTF-8 "
                "(from Latin-1: iconv -f latin1 -t utf-8)"
            )
        return f"\\u{code:04x}{after} is half of a character; write the file as UTF-8 again"
    return None
