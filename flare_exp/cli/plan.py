"""`python -m flare_exp plan [-m] [memory=80GB] key=value ...`: show what a run would build.

Shows, before a run or a grid is started, what it would build, need and take. With memory=, also the
largest data.micro_batch_size that fits a device of that size.

Nothing is fetched or built. Costs are measured on a few batches of every stage. They are counted
from shapes where a model is not on this machine: docs/plan.md.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flare_exp.cli import commandline
from flare_exp.config import composition, schema, validation
from flare_exp.experiment.tested import stage_of
from flare_exp.planning.plans import COLUMNS, Job, fitting, looked_up, price, quietly


def main(arguments: Sequence[str]) -> int:
    """Print the plan of a command line and return the exit code.

    0: done. 1: not even one row fits a given size of memory. 2: the command line has mistakes.
    """
    limits = [a.partition("=")[2] for a in arguments if a.startswith("memory=")]
    overrides = commandline.overrides([a for a in arguments if not a.startswith("memory=")])
    multirun = any(a in ("-m", "--multirun") for a in arguments)
    composed, problems = validation.validate(overrides, multirun)
    problems += [
        f"memory={text}: must be a size above 0 like 80GB or 40GiB"
        for text in limits
        if not bytes_of(text)
    ]
    if problems:
        return commandline.refuse(problems)
    jobs = [
        (o, _typed(c)) for o, c in zip(composition.job_overrides(overrides), composed, strict=True)
    ]
    quietly(jobs[0][1])
    with tempfile.TemporaryDirectory(prefix="flare_exp_plan_") as scratch:
        found = looked_up(jobs, multirun, Path(scratch))
        price(found, Path(scratch))
        fits = [fitting(found, bytes_of(text), Path(scratch)) for text in limits]
    left_out = [o for o, cfg in jobs if multirun and composition.without_fusion(cfg, o)]
    show(found, len(left_out))
    for limit, sizes in zip(limits, fits, strict=True):
        for job, (rows, memory) in sizes.items():
            name = f"job {job}: " if multirun else ""
            if rows:
                print(f"{name}data.micro_batch_size={rows} fits {limit} ({size(memory)})")
            else:
                print(f"{name}not even data.micro_batch_size=1 fits {limit} ({size(memory)})")
    return 0 if all(rows for sizes in fits for rows, _ in sizes.values()) else 1


def _typed(composed: Any) -> schema.Config:
    """Convert a composed configuration to dataclasses."""
    from omegaconf import OmegaConf

    return OmegaConf.to_object(composed)  # type: ignore[return-value]


def bytes_of(text: str) -> int:
    """Return the bytes of a size like 80GB or 40GiB; 0 for any other text."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT])(i?)B", text)):
        return 0
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kMGT".index(unit) + 1))


def show(jobs: Sequence[Job], left_out: int) -> None:
    """Print the table, the sums and the notes."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_lines=True)
    for name in ("job", "overrides", *COLUMNS, "trained", "of all", "peak memory", "time"):
        table.add_column(
            name,
            justify="right"
            if name in ("job", "trained", "of all", "peak memory", "time")
            else "left",
        )
    for job in jobs:
        counts = job.parameters
        cells = [
            str(job.number),
            escape("\n".join(job.overrides)) or "(default)",  # [a,b] is no markup
            *(column(job, name) for name in COLUMNS),
        ]
        cells += [
            *(f"{counts[name]:,}" if counts else "-" for name in ("trainable", "total")),
            size(job.estimate.memory) if job.estimate else "-",
        ]
        table.add_row(*cells, duration(job.seconds) if job.fits else "-")
    console = Console(width=150)
    if jobs:
        console.print(table, highlight=False)
        for line in [*sums(jobs), *notes(jobs)]:
            console.print(line, highlight=False, markup=False)
    if left_out:
        console.print(
            f"cells left out: {left_out}, which combine fusion=... or source=robust with a method "
            "without fusion",
            highlight=False,
        )


def column(job: Job, name: str) -> str:
    """Return the states and the time of the artifacts of one column of a job."""
    every = {n for names in COLUMNS.values() for n in names}
    stages = {n: stage_of(n) for n in job.made}
    names = [
        n for n, s in stages.items() if (s in COLUMNS[name] if COLUMNS[name] else s not in every)
    ]
    if not names:
        return "-"
    states = [job.state(n) for n in names]
    said = [f"{states.count(s)} {s}" if len(set(states)) > 1 else s for s in dict.fromkeys(states)]
    taken = (
        sum(job.estimate.seconds.get(n, 0.0) for n in job.todo & {*names}) if job.estimate else 0.0
    )
    return "\n".join(said) + (f"\n{duration(taken)}" if job.fits and job.todo & {*names} else "")


def sums(jobs: Sequence[Job]) -> list[str]:
    """Return lines with the totals over all jobs: artifacts, time, memory, disk and downloads."""
    every = [job.state(name) for job in jobs for name in job.made]
    built, todo = every.count("built"), sum(len(job.todo) for job in jobs)
    shared = sum(len(job.owners) for job in jobs) - todo
    downloads = {place: count for job in jobs for place, count in job.download.items()}
    estimates = [(job.todo, job.estimate) for job in jobs if job.estimate]
    disk = sum(made.disk.get(name, 0) for names, made in estimates for name in names)
    # what a training keeps on the way is gone when the next one begins
    kept = [made.passing.get(name, 0) for names, made in estimates for name in names]
    disk += max(kept, default=0)
    return [
        f"jobs: {len(jobs)}, with {todo} artifacts to build, {shared} shared, {built} built",
        f"time: {duration(sum(job.seconds for job in jobs))} one job after the other",
        f"peak memory: {size(max((made.memory for _, made in estimates), default=0))}",
        f"disk: {size(disk)} in {jobs[0].cfg.cache_dir}, and less in the run folders; downloads: "
        f"{size(sum(downloads.values()))}",
    ]


def notes(jobs: Sequence[Job]) -> list[str]:
    """Return the notes on jobs that were not asked for, and on the numbers, each once."""
    needed: dict[str, list[str]] = {}
    for job in jobs:
        if job.needed:
            needed.setdefault(job.needed, []).append(str(job.number))
    numbers = [note for job in jobs if job.estimate for note in job.estimate.notes]
    return [
        *(f"job {', '.join(own)}: {why}" for why, own in needed.items()),
        *dict.fromkeys(numbers),
    ]


def size(count: float) -> str:
    """Return a number of bytes with a decimal unit."""
    if count == math.inf:
        return "more than there is"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min"
        if hours
        else f"{minutes} min {rest:02} s"
        if minutes
        else f"{rest} s"
    )
