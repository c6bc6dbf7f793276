"""`python -m flare_exp status <folder>`: show the state of a run, or of the jobs of a grid.

The state is read from the folders alone, on any machine that sees them. --timeline also shows what
happened when. Exit code 0: all jobs are done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from flare_exp.errors import UserError
from flare_exp.experiment.run_state import STYLES, State, counts, history, jobs_of, read


def print_table(states: dict[Path, State], overrides: dict[Path, list[str]]) -> None:
    """Print a line for each job, and the number of jobs in each state.

    Args:
        states: folder of a job -> its state.
        overrides: folder of a job -> its overrides; those that all jobs share are left out.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    common = set.intersection(*map(set, overrides.values())) if len(overrides) > 1 else set()
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("job", "state", "overrides", "why, log"):
        table.add_column(name, overflow="fold")
    for folder, found in states.items():
        where = (
            f"{found.slurm_job and f'SLURM job {found.slurm_job}'} {found.host}".strip()
            if found.state == "running"
            else ""
        )
        log = (
            str(folder / "flare_exp.log")
            if found.state in ("failed", "stopped") and found.host
            else ""
        )
        said = "; ".join(filter(None, (found.reason, where, log)))
        own = " ".join(o for o in overrides[folder] if o not in common)
        # overrides such as [a,b] are no markup
        state = f"[{STYLES[found.state]}]{found.state}[/]"
        table.add_row(folder.name, state, escape(own), escape(said))
    console = Console(width=None if os.isatty(1) else 160)
    console.print(table)
    console.print(counts(states))


def print_timeline(folders: Iterable[Path]) -> None:
    """Print the events of all jobs in order of time."""
    events = [(when, folder.name, state) for folder in folders for when, state in history(folder)]
    for when, name, state in sorted(events, key=lambda event: event[0]):
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
        where = (
            f"SLURM job {state.slurm_job}"
            if state.slurm_job
            else f"process {state.pid}"
            if state.pid
            else ""
        )
        print(
            (
                f"{stamp}  job {name:<4} {state.state:<8} "
                f"{'; '.join(filter(None, (where, state.reason)))}"
            ).rstrip()
        )


def main(arguments: Sequence[str]) -> int:
    """Print the table and return the exit code: 0 when all jobs are done, else 1."""
    places = [a for a in arguments if a != "--timeline"]
    if len(places) != 1:
        raise UserError(
            "name one folder: python -m flare_exp status [--timeline] <folder of a run or a grid>"
        )
    overrides = jobs_of(Path(places[0]).expanduser())
    if "--timeline" in arguments:
        print_timeline(overrides)
    states = {folder: read(folder) for folder in overrides}
    print_table(states, overrides)
    return 0 if all(s.state == "done" for s in states.values()) else 1
