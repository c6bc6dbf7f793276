"""`python -m flare_exp analyse RUN [options]`: measure the layers of a finished run.

The model of the run folder RUN reads the first examples of its test set. For every fused block:
the mean activation of source and target in the bottleneck of query and value. For every layer: the
cosine similarity of English and target states, before and after the transfer. Methods that fuse
nothing have the similarities alone.

  --rows N        test examples to read, from the first on [100]
  --lang LANG     language of the test examples, for a run with several
  --out FOLDER    where analysis.json and the figures go [RUN/analysis]

Examples:
  python -m flare_exp analyse outputs/my_run
  python -m flare_exp analyse outputs/my_run --rows 500 --out outputs/layers

docs/report.md defines every number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flare_exp.cli.commandline import parsed
from flare_exp.errors import UserError
from flare_exp.experiment.runs import quiet_as
from flare_exp.utils.files import new_folder_problem

if TYPE_CHECKING:
    from flare_exp.experiment.analysis import Analysis

VALUES = ("--rows", "--lang", "--out")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the words of the command line.

    Raises:
        UserError: an option or its value is wrong; one message names all mistakes.
    """
    given, problems = parsed(arguments, "runs", VALUES)
    if len(given.runs) != 1:
        problems.append("name one run: python -m flare_exp analyse <run folder>")
    rows = given.rows or ("100" if given.rows is None else "1")
    if not (rows.isascii() and rows.isdigit() and int(rows)):
        problems.append(f"--rows {rows}: must be a whole number, 1 or more")
    if given.out and (problem := new_folder_problem(Path(given.out))):
        problems.append(f"--out {given.out}: {problem}")
    if problems:
        raise UserError("; ".join(problems))
    given.rows, given.run = int(rows), Path(given.runs[0]).expanduser()
    given.out = Path(given.out).expanduser() if given.out else given.run / "analysis"
    return given


def main(arguments: Sequence[str]) -> int:
    """Analyze a run, print tables and write numbers and figures; return the exit code."""
    given = parse(arguments)
    quiet_as(given.run, [])
    from flare_exp.experiment.analysis import analyze

    write(analyze(given.run, given.rows, sys.stdout.isatty(), given.lang), given.out)
    return 0


def write(analysis: Analysis, folder: Path) -> None:
    """Print an analysis, and write analysis.json and figures into a folder, which is made.

    Raises:
        UserError: they cannot be written.
    """
    from flare_exp.report import drawing, layers
    from flare_exp.report.writers import terminal
    from flare_exp.utils.files import write_json

    console = terminal.make_console()
    for table in layers.tables_of(analysis):
        terminal.show(table, console)
    try:
        folder.mkdir(exist_ok=True)
        write_json(folder / "analysis.json", asdict(analysis))
        for one in layers.drawings_of(analysis):
            drawing.write(one, folder)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    names = [f"{one.name}.svg and .png" for one in layers.drawings_of(analysis)]
    print(f"wrote {folder}: analysis.json, {', '.join(names)}")
