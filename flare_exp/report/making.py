"""Make the report of some folders: read, check, compare, and gather the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flare_exp.config.methods import ENSEMBLE, METHODS
from flare_exp.report.cells import Cell, cells_of
from flare_exp.report.comparability import code_notes, differences
from flare_exp.report.comparisons import Comparer, Comparison, Ranking, rankings
from flare_exp.report.published import published_table
from flare_exp.report.readings import readings
from flare_exp.report.runs import READING, Run, by_language, mean_of_languages, read, run_folders
from flare_exp.report.tables import (
    Table,
    differences_table,
    lacking_notes,
    ranks_table,
    runs_table,
    scores_table,
)
from flare_exp.utils.suggestions import nearest

BASELINE = "lora"
SHOWN = 3  # the most differences that a message names
GOLD = "mt=gold: test sources are the data's own English, so what reads them is an upper bound."


@dataclass(frozen=True)
class Section:
    """Hold what a report says of one task.

    Args:
        task: its name.
        cells: its cells, in the order of rows.
        comparisons: of cells with the baseline.
        tables: scores by language if there are several, runs, and differences if there are any.
        sentences: what the tables show, in words.
        means: cells of the means over the languages of a run.
    """

    task: str
    cells: Sequence[Cell]
    comparisons: Sequence[Comparison]
    tables: Sequence[Table]
    sentences: Sequence[str]
    means: Sequence[Cell] = ()


@dataclass(frozen=True)
class Report:
    """A section for each task, tables over all tasks, and notes below them."""

    sections: Sequence[Section]
    tables: Sequence[Table]
    rankings: Sequence[Ranking]
    notes: Sequence[str]

    def all_tables(self) -> list[Table]:
        """Return every table, in order."""
        return [*(t for section in self.sections for t in section.tables), *self.tables]


def make_report(
    folders: Sequence[str],
    baseline: str | None = None,
    mixed: bool = False,
    published: bool = False,
) -> tuple[Report, list[str]]:
    """Read the runs below some folders, and compare them.

    Args:
        folders: folders of runs, or of grids.
        baseline: the method that others are compared with; None: LoRA where it is.
        mixed: show runs in one table that `differences` says not to compare, with a note.
        published: add the paper's numbers.

    Returns:
        the report, and what keeps it from being shown, a message each.
    """
    whole, left_out = _runs(folders)
    runs = [own for run in whole for own in by_language(run)]
    tasks, problems = cells_of(runs)
    means, _ = cells_of([mean for run in whole if (mean := mean_of_languages(run))])
    absent = [folder for folder in folders if not Path(folder).is_dir()]
    problems += [f"{folder}: there is no such folder" for folder in absent]
    if not runs and not absent:
        problems = [*left_out, f"there is no finished run in {', '.join(folders)}"]
    cells = [cell for own in tasks.values() for cell in own]
    if baseline and runs:
        problems += _baseline_problems(baseline, cells)
    if problems:
        return Report((), (), (), ()), problems
    notes = code_notes(cells)
    differing = [line for own in tasks.values() for line in differences(own)]
    sections = []
    for task, own in tasks.items():
        comparer = Comparer(own, baseline or BASELINE)
        sections.append(_section(task, own, means.get(task, ()), comparer.compare()))
        differing += [p for p in comparer.problems if not differing]
        notes += [n for n in comparer.notes if n not in differing]
    if differing and not mixed:
        return Report((), (), (), ()), [_refusal(differing)]
    notes = [*(f"Mixed: {line}." for line in differing), *notes]
    ranked = rankings(tasks)
    tables = [table for table in (ranks_table(ranked),) if table]
    tables += [published_table(tasks)] if published else []
    notes += [n for r in ranked if not r.ranks for n in lacking_notes(r)]
    notes += [GOLD] if any(map(_reads_gold, runs)) else []
    return Report(sections, tables, ranked, [*notes, *left_out]), []


def _reads_gold(run: Run) -> bool:
    """Return whether one of the translation systems of a run is the benchmark itself."""
    options = run.options
    systems = [options["mt.name"], options.get("mt.fallback")]
    systems += (options.get("source.systems") or ()) if run.has("source.systems") else ()
    return "gold" in systems


def _refusal(differing: Sequence[str]) -> str:
    """Return the message about runs that must not be compared."""
    more = f"; and {len(differing) - SHOWN} differences more" if len(differing) > SHOWN else ""
    return (
        f"{'; '.join(differing[:SHOWN])}{more}. Such runs are not compared: give folders of "
        "comparable runs, or add --mixed"
    )


def _runs(folders: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Return the finished runs below some folders, and a line for each that is left out."""
    runs, left_out = [], []
    for folder in run_folders(folders):
        if (folder / READING).is_file():
            left_out.append(f"left out: {folder}: an export, whose run counts where it is")
            continue
        try:
            runs.append(read(folder))
        except ValueError as error:
            left_out.append(f"left out: {folder}: {error}")
    return runs, left_out


def _baseline_problems(baseline: str, cells: Sequence[Cell]) -> list[str]:
    """Return a message if there is no run of a baseline that was asked for."""
    there = list(dict.fromkeys(name for cell in cells for name in (cell.method, cell.label)))
    if baseline in there:
        return []
    exists = baseline in (*METHODS, ENSEMBLE)
    known = "no run here has this method" if exists else "there is no such method"
    return [
        f"--baseline {baseline}: {known}; choose one of {', '.join(there)}"
        f"{nearest(baseline, there)}"
    ]


def _section(
    task: str, cells: Sequence[Cell], means: Sequence[Cell], found: Sequence[Comparison]
) -> Section:
    """Gather the tables and sentences of one task. `means`: of runs with several languages."""
    metric = cells[0].first.metric
    tables = []
    if len({cell.lang for cell in cells}) > 1:
        tables.append(scores_table(task, cells, metric, found))
    tables.append(runs_table(task, [*cells, *means], metric))
    if found:
        tables.append(differences_table(task, metric, found))
    return Section(task, cells, found, tables, readings(cells, metric), means)
