"""Print a report on a terminal, or as plain text."""

from __future__ import annotations

import sys
import textwrap
from typing import TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from flare_exp.report.making import Report
from flare_exp.report.tables import Table, Value

UNFOLDED = 500  # columns where the text is not shown on a terminal: no table is folded
STYLES = {"": "", "best": "bold", "second": "underline"}
WIDTH = 100  # of sentences
WIDE = 1000  # more than any table takes


def make_console(file: TextIO | None = None) -> Console:
    """Return what prints on the terminal, or into a file; other output is as wide as its tables."""
    shown = file is None and sys.stdout.isatty()
    return Console(file=file, width=None if shown else UNFOLDED)


def write(report: Report, console: Console) -> None:
    """Print tables, the sentences below them, and notes."""
    for section in report.sections:
        for table in section.tables:
            show(table, console)
        for line in section.sentences:
            _say(line, console)
    for table in report.tables:
        show(table, console)
    for line in report.notes:
        # a folder's name is not broken
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show(table: Table, console: Console) -> None:
    """Print one table and its notes; costs come apart where the terminal is too narrow."""
    parts = [table]
    if _width(table, console) > console.width:
        narrower = table.without_constants("model", "lang")
        fits = _width(narrower, console) <= console.width
        parts = [narrower] if fits else narrower.costs_apart()
    for part in parts:
        console.print(_rich(part))
    for note in table.notes:
        _say(note, console)


def _width(table: Table, console: Console) -> int:
    """Return the columns that a table takes if nothing in it is folded."""
    return Measurement.get(console, console.options.update(max_width=WIDE), _rich(table)).maximum


def _rich(table: Table) -> RichTable:
    """Return the table in the form that rich prints."""
    shown = RichTable(title=Text(table.title), title_justify="left")
    for column in table.columns:
        shown.add_column(
            Text(column.name), justify="right" if column.numeric else "left", overflow="fold"
        )
    for row in table.rows:
        shown.add_row(*map(_text, row))
    return shown


def _text(value: Value) -> Text:
    """Return a value as styled text; names are no markup."""
    return Text(value.text + "*" * value.star, style=STYLES[value.mark])


def _say(line: str, console: Console) -> None:
    console.print(textwrap.fill(line, WIDTH), highlight=False, markup=False)
