"""Read texts of one's own from a file, and check them before a model is loaded."""

from __future__ import annotations

import csv
import functools
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flare_exp.errors import UserError, first_line
from flare_exp.utils.suggestions import nearest

SHOWN = 5  # problems that a message names, and rows of each
ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """Hold a text of a file.

    Attributes:
        texts: by field, in the order of Task.fields.
        source: their translations, in the order of the columns; None: they are to be made.
        id: from the column `id`; None without one.
    """

    texts: tuple[str, ...]
    source: tuple[str, ...] | None = None
    id: str | int | None = None


class Reader:
    """Read rows of a file, in their order and in bounded memory.

    Args:
        path: a file that ends in one of ENDINGS; its first line names the columns of a table.
        fields: names of a text's fields, which are columns.
        option: the option that names the file, for messages.
        sources: columns of the source texts; None: those of the English text; empty: none is read,
            and of those of the English text is only seen whether they are there.
        ids: whether the ids of the rows are of use; otherwise `check` takes any.
    """

    def __init__(
        self,
        path: Path,
        fields: Sequence[str],
        option: str = "file",
        sources: Sequence[str] | None = None,
        ids: bool = True,
    ):
        self.path, self.fields, self.ids = path, fields, ids
        self.place = f"{option}={path}"
        self.sources = source_columns(fields) if sources is None else sources
        # both are known after `check`; the type is that of the first row, None without an id
        self.id_type: type | None = None
        self.has_sources = False

    def __iter__(self) -> Iterator[Row]:
        for _, record in self._records():
            yield self._row(record)

    def check(self, no_translator: str | None = None) -> int:
        """Read the whole file once, and return the number of its rows.

        Args:
            no_translator: why each row needs a source; None: a source that is not there is made.

        Raises:
            UserError: the file cannot be read, lacks a column, or has wrong rows; the message
                names the first of them, and each problem once.
        """
        count, wrong = 0, 0
        problems: Counter[str] = Counter()  # problem -> number of its rows
        places: dict[str, list[str]] = defaultdict(list)  # problem -> the first of them
        for place, record in self._records():
            if not count and record.get("id") is not None:
                self.id_type = type(record["id"])
            count += 1
            if found := self._problem(record, no_translator is not None):
                wrong += 1
                if found in problems or len(problems) < SHOWN:
                    problems[found] += 1
                    places[found] += [place][: SHOWN - len(places[found])]
        if problems:
            said = [f"{_rows(places[text], n, count)}: {text}" for text, n in problems.items()]
            rest = wrong - problems.total()
            more = f"; {rest} more rows are wrong" if rest else ""
            why = f" ({no_translator})" if no_translator else ""
            raise UserError(f"{self.place}: {'; '.join(said)}{more}{why}")
        if not count:
            raise UserError(f"{self.place}: there is no row in it")
        return count

    def _problem(self, record: Record, needs_source: bool) -> str | None:
        """Return what is wrong with a row."""
        if lacking := [name for name in self.fields if name not in record]:
            near = "".join(nearest(name, [*map(str, record)]) for name in lacking)
            return f"has no {' and no '.join(lacking)}; it has {', '.join(map(str, record))}{near}"
        there = [name for name in self._columns if record.get(name) not in (None, "")]
        self.has_sources |= bool(there)
        given = {name: record[name] for name in there if name in self.sources}
        if found := text_problem({**{name: record[name] for name in self.fields}, **given}):
            return found
        if lacking := [name for name in self.sources if name not in given]:
            if given or needs_source:
                return f"has no {' and no '.join(lacking)}"
        return self._id_problem(record.get("id")) if self.ids else None

    def _id_problem(self, value: Any) -> str | None:
        if (kind := None if value is None else type(value)) is not self.id_type:
            return f"id: {str(value)[:60]!r} is of another type than that of the first row"
        if kind not in (None, str, int) or (kind is int and abs(value) >= 2**63):
            return f"id: {str(value)[:60]} is neither text nor a whole number of 64 bits"
        return _encoding_problem("id", value) if kind is str else None

    def _row(self, record: Record) -> Row:
        source = tuple(record.get(name) or "" for name in self.sources)
        texts = tuple(record[name] for name in self.fields)
        return Row(texts, source if source and all(source) else None, record.get("id"))

    @property
    def _columns(self) -> Sequence[str]:
        """Return the columns of the source texts, also where they are not read."""
        return self.sources or source_columns(self.fields)

    def _records(self) -> Iterator[tuple[str, Record]]:
        """Yield each record with the name of its place in the file."""
        readers: dict[str, Callable[[Path, str], Iterator[tuple[str, Record]]]] = {
            ".jsonl": _json_lines,
            ".parquet": functools.partial(
                _parquet, fields=self.fields, others=(*self._columns, "id")
            ),
        }
        read = readers.get(self.path.suffix.lower(), _table)
        import pyarrow as pa

        try:
            yield from read(self.path, self.place)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.place}: is not UTF-8 ({error.reason})") from None
        except (OSError, ValueError, OverflowError, csv.Error, pa.ArrowException) as error:
            said = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"{self.place}: cannot be read ({said})") from None


def _rows(places: Sequence[str], count: int, total: int) -> str:
    """Name some rows of a file.

    Args:
        places: the first of them.
        count: how many they are.
        total: how many rows the file has.
    """
    if count == total > 1:
        return f"every one of {total} rows"
    more = count - len(places)
    return ", ".join(places) + (f" and {more} more" if more else "")


def path_problem(path: Path) -> str | None:
    """Return why a file of texts cannot be read; None: it is there and has a known ending."""
    if path.suffix.lower() not in ENDINGS:
        return f"must end in {', '.join(ENDINGS)}"
    return None if path.is_file() else "there is no such file"


def source_columns(fields: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of the English text: `source`, or `source_<field>` of several fields."""
    return ("source",) if len(fields) == 1 else tuple(f"source_{field}" for field in fields)


def text_problem(given: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the first text that a model cannot read; None: nothing is.

    Args:
        given: name -> text.
    """
    for name, text in given.items():
        if not isinstance(text, str):
            return f"{name}: {str(text)[:60]} is not text"
        if not text.strip():
            return f"{name}: is empty"
        if found := _encoding_problem(name, text):
            return found
    return None


def _encoding_problem(name: str, text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{name}: half a surrogate pair is not text"
    return None


def _json_lines(path: Path, place: str) -> Iterator[tuple[str, Record]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = first_line(error)
                raise UserError(f"{place}: line {number} is not JSON ({reason})") from None
            if not isinstance(record, dict):
                raise UserError(f"{place}: line {number} is no object {{column: value}}")
            yield f"line {number}", record


def _table(path: Path, place: str) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(2**31 - 1)  # of any length, as in the other formats
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        names = next(filter(None, rows), [])
        _check_names(names, place)
        for cells in filter(None, rows):
            if len(cells) != len(names):
                raise UserError(
                    f"{place}: line {rows.line_num} has {len(cells)} columns, the first line "
                    f"has {len(names)}; quote a text that holds {delimiter!r}"
                )
            yield f"line {rows.line_num}", dict(zip(names, cells, strict=True))


def _parquet(
    path: Path, place: str, fields: Sequence[str], others: Sequence[str]
) -> Iterator[tuple[str, Record]]:
    """Yield the records of a parquet file, with the cells of `fields` and `others` alone.

    Records that lack a field have the names of all columns, for messages, and no cells.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = list(file.schema_arrow.names)
        _check_names(names, place)
        if not set(fields) <= set(names):
            for number in range(file.metadata.num_rows):
                yield f"row {number} (from 0)", dict.fromkeys(names)
            return
        numbers = itertools.count()
        columns = [name for name in names if name in (*fields, *others)]
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                yield f"row {next(numbers)} (from 0)", record


def _check_names(names: Sequence[str], place: str) -> None:
    """Raise UserError if two columns have the same name."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{place}: several columns have the name {twice[0]!r}")
