"""Convert tables to rows and check their cells.

Damaged data are reported in one message with file, row and column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flare_exp.errors import UserError, first_line

# kinds of the cells of a column
TEXT, ID, LABEL, NAME, ANSWERS = "text", "id", "label", "name", "answers"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_answers(value: Any) -> bool:
    """Return True if a value has SQuAD's form {text[], answer_start[]}."""
    if not isinstance(value, dict):
        return False
    texts, starts = value.get("text"), value.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return False
    return all(map(_is_text, texts)) and all(map(_is_integer, starts))


# kind of a column -> the check of a cell, and the expected content for messages
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    TEXT: (_is_text, "text"),
    ID: (lambda value: _is_text(value) or _is_integer(value), "text or an integer"),
    LABEL: (_is_integer, "an integer"),  # number of a class
    NAME: (_is_text, "the name of a class"),
    ANSWERS: (
        _is_answers,
        "{text: [text, ...], answer_start: [integer, ...]} with two lists of the same length",
    ),
}


def check_row(row: Mapping[str, Any], kinds: Mapping[str, str], place: str, number: int) -> None:
    """Check the cells of one row.

    Args:
        row: column -> cell.
        kinds: column -> kind of its cells, a key of KINDS.
        place: the file or data set, for the message.
        number: number of the row in it, from 0.

    Raises:
        UserError: a cell is not of its column's kind.
    """
    for name, kind in kinds.items():
        fits, expected = KINDS[kind]
        if not fits(row[name]):
            raise bad_cell(place, number, name, f"{shown(row[name])} instead of {expected}")


def bad_cell(place: str, number: int, column: str, problem: str) -> UserError:
    """Build the error for one cell."""
    return UserError(f"{place}, row {number} (from 0), column {column}: {problem}")


def shown(value: Any) -> str:
    """Format a cell for a message, cut to 60 characters, with its type if that is not obvious."""
    if value is None:
        return "null"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return (
        text if isinstance(value, (str, int, float, bytes)) else f"{text} ({type(value).__name__})"
    )


def rows_of(table: Any, columns: Sequence[str], place: str) -> list[dict[str, Any]]:
    """Convert some columns of a pyarrow table to rows of Python values.

    Raises:
        UserError: a column is missing or occurs twice, or a cell cannot be converted (for example
            text that is not UTF-8).
    """
    names = list(table.column_names)
    if missing := [c for c in columns if c not in names]:
        raise UserError(
            f"{place} lacks the column(s) {', '.join(missing)}; it has {', '.join(names)}"
        )
    if twice := [c for c in columns if names.count(c) > 1]:
        raise UserError(f"{place} has several columns with the name {twice[0]}")
    values = [_values(table.column(c), c, place) for c in columns]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*values, strict=True)]


def _values(column: Any, name: str, place: str) -> list[Any]:
    import pyarrow as pa

    failures = (ValueError, OverflowError, pa.ArrowException)  # UnicodeDecodeError is a ValueError
    try:
        return column.to_pylist()
    except failures:
        for number, cell in enumerate(column):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                raise bad_cell(
                    place, number, name, f"text that is not valid UTF-8 ({error.reason})"
                ) from error
            except failures as error:
                raise bad_cell(place, number, name, first_line(error)) from error
        raise
