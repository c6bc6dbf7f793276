"""`python -m flare_exp report [FOLDER ...] [options]`: print tables of finished runs.

The runs below the folders are read; without a folder, those below outputs/. Runs that differ in
nothing but the seed share a row, with mean and standard deviation over seeds. Every option that
differs between rows gets a column. Two runs of one row and one seed are an error, and so are runs
of one table that differ in data, translation, split, checkpoint or code.

  --baseline METHOD   compare the others with this method, test example by test example: difference,
                      95 % interval, p-value, and p-value corrected for several languages [lora].
                      With a fusion: --baseline "flare (add)"
  --format FORMAT     terminal, csv, markdown, latex or html [terminal, or by the ending of --out]
  --out FILE          write to this file (.txt, .csv, .md, .tex, .html)
  --figures FOLDER    write the figures that the runs allow, as SVG and PNG; HTML has them in it
  --pack FILE         write the runs to an archive (.tar.xz) without texts and paths; whoever
                      unpacks it can make the same report
  --published         put the numbers of the paper (arXiv 2501.06892) beside ours, marked as quoted
  --mixed             show runs that differ in one of these in one table, with a note

Examples:
  python -m flare_exp report outputs/grid
  python -m flare_exp report outputs/grid --baseline zero_shot --out table.tex
  python -m flare_exp report outputs/grid --figures outputs/figures
  python -m flare_exp report outputs/grid --pack grid.tar.xz
  python -m flare_exp report outputs/xnli outputs/nusax --published --out report.html

docs/report.md defines every number.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flare_exp.cli.commandline import parsed
from flare_exp.errors import UserError
from flare_exp.report.making import Report, make_report
from flare_exp.report.packing import ENDING, pack
from flare_exp.utils.files import new_folder_problem
from flare_exp.utils.suggestions import allowed

if TYPE_CHECKING:
    from flare_exp.report.drawing import Drawing

# ending of a file -> format
FORMATS = {
    ".txt": "terminal",
    ".csv": "csv",
    ".md": "markdown",
    ".tex": "latex",
    ".html": "html",
}
VALUES = ("--baseline", "--format", "--out", "--figures", "--pack")  # options that take a value
FLAGS = ("--published", "--mixed")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the words of the command line.

    Raises:
        UserError: an option or its value is wrong; one message names all mistakes.
    """
    given, problems = parsed(arguments, "folders", VALUES, FLAGS)
    if given.out:
        problems += _out_problems(Path(given.out), given.format)
    if given.pack:
        problems += _pack_problems(Path(given.pack))
    if given.figures and (problem := new_folder_problem(Path(given.figures))):
        problems.append(f"--figures {given.figures}: {problem}")
    if given.format and given.format not in FORMATS.values():
        problems.append(f"--format {given.format}: {allowed(given.format, [*FORMATS.values()])}")
    if problems:
        raise UserError("; ".join(problems))
    given.folders = given.folders or ["outputs"]
    given.format = given.format or FORMATS[Path(given.out or ".txt").suffix or ".txt"]
    return given


def _out_problems(path: Path, format: str | None) -> list[str]:
    """Return what is wrong with the file that is to be written."""
    if path.is_dir():
        return [f"--out {path}: is a folder; name a file"]
    if not path.parent.is_dir():
        return [f"--out {path}: there is no folder {path.parent}"]
    if format is None and path.suffix not in FORMATS:
        return [f"--out {path}: give --format, or a file that ends in {', '.join(FORMATS)}"]
    return []


def _pack_problems(path: Path) -> list[str]:
    """Return what is wrong with the archive that is to be written."""
    if path.is_dir() or not path.name.endswith(ENDING):
        return [f"--pack {path}: name a file that ends in {ENDING}"]
    if not path.parent.is_dir():
        return [f"--pack {path}: there is no folder {path.parent}"]
    return []


def main(arguments: Sequence[str]) -> int:
    """Report the runs below the given folders, or below outputs/; return the exit code."""
    given = parse(arguments)
    code = print_report(
        given.folders,
        given.format,
        given.out,
        baseline=given.baseline,
        mixed=given.mixed,
        published=given.published,
        figures=given.figures,
    )
    if given.pack and not code:
        _pack(given.folders, Path(given.pack))
    return code


def _pack(folders: Sequence[str], archive: Path) -> None:
    """Write the runs to an archive.

    Raises:
        UserError: a run is damaged, or the archive cannot be written.
    """
    try:
        count = pack(folders, archive)
    except OSError as error:
        raise UserError(f"--pack {archive}: cannot be written ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--pack {archive}: {error}") from None
    print(f"wrote {archive}: {count} runs", file=sys.stderr)


def print_report(
    folders: Sequence[str],
    format: str = "terminal",
    out: str | None = None,
    *,
    baseline: str | None = None,
    mixed: bool = False,
    published: bool = False,
    figures: str | None = None,
) -> int:
    """Print or write a report, and its figures into a folder; return the exit code.

    The exit code is 2 without a run, with a folder that does not exist, with two runs of one cell
    and seed, or with runs that are not comparable.
    """
    report, problems = make_report(folders, baseline, mixed, published)
    for problem in problems:
        print(f"flare_exp report: {problem}", file=sys.stderr)
    if problems:
        return 2
    if format == "csv":  # a table alone has no place for notes
        for note in report.notes:
            print(f"flare_exp report: {note}", file=sys.stderr)
    drawings = _drawings(report) if figures or format == "html" else []
    if format == "terminal" and out is None:
        _print(report)
    else:
        _write(text_of(report, format, drawings), out)
    if figures:
        write_figures(drawings, Path(figures))
    return 0


def _write(text: str, out: str | None) -> None:
    """Print a text, or write it to a file.

    Raises:
        UserError: the file cannot be written.
    """
    if out is None:
        print(text, end="")
        return
    from flare_exp.utils.files import write_text

    try:
        write_text(Path(out), text)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    print(f"wrote {out}")


def _drawings(report: Report) -> list[Drawing]:
    """Choose the figures of a report; those that it lacks are named on the error output."""
    from flare_exp.report.figures import figures_of

    drawings, lacking = figures_of(report)
    if lacking:
        print(f"left out: no figure for {'; '.join(lacking)}", file=sys.stderr)
    return drawings


def write_figures(drawings: Sequence[Drawing], folder: Path) -> None:
    """Write figures into a folder, which is made, and name them on the error output.

    Raises:
        UserError: they cannot be written.
    """
    from flare_exp.report import drawing

    try:
        folder.mkdir(exist_ok=True)
        for one in drawings:
            drawing.write(one, folder)
            print(f"wrote {folder / one.name}.svg and .png: {one.title}", file=sys.stderr)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def _print(report: Report) -> None:
    """Print a report on the terminal."""
    from flare_exp.report.writers import terminal

    terminal.write(report, terminal.make_console())


def text_of(report: Report, format: str, drawings: Sequence[Drawing] = ()) -> str:
    """Return a report as the text of a format; a page has the figures in it."""
    from flare_exp.report.writers import latex, page, plain, terminal

    if format == "terminal":
        file = io.StringIO()
        terminal.write(report, terminal.make_console(file))
        return file.getvalue()
    if format == "html":
        return page.page(report, _inline(drawings))
    writers = {"csv": plain.csv_text, "markdown": plain.markdown, "latex": latex.latex}
    return writers[format](report)


def _inline(drawings: Sequence[Drawing]) -> dict[str, str]:
    """Return title and caption -> SVG element of each figure."""
    if not drawings:
        return {}
    from flare_exp.report.drawing import draw, svg_text

    return {
        f"{d.title}. {d.caption}": svg_text(draw(d), d.title, d.caption, d.name) for d in drawings
    }
