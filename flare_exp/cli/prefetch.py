"""`python -m flare_exp prefetch [-m] key=value ...`: fetch from the Hugging Face hub.

Fetches everything that runs of this command line need, for machines without network. Backbone,
translation model and data go into the caches of the hub's libraries (HF_HOME), where runs with
offline=true find them. Values with commas are grids. With offline=true it only shows what is there
and what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flare_exp import hub
from flare_exp.config import validation
from flare_exp.errors import UserError
from flare_exp.experiment.downloads import cache_names, download, hub_resources_of_jobs, inspect


def main(arguments: Sequence[str]) -> int:
    """Fetch what the runs need and return the exit code: 0 if everything is there, else 1."""
    overrides = [a for a in arguments if not a.startswith("-")]
    jobs, problems = validation.validate(overrides, multirun=True)
    if problems:
        raise UserError(
            "\n  - ".join(["the command line has mistakes; nothing was fetched", *problems])
        )
    only_look = hub.offline(any(job.offline for job in jobs))
    wanted = hub_resources_of_jobs(jobs)
    if not wanted:
        print(
            "Nothing comes from the hub: models and data of this command line are embedded, or in "
            "local folders."
        )
        return 0
    # otherwise the hub's libraries would try each need for half a minute
    if not only_look and (silent := hub.unreachable()):
        print(f"flare_exp prefetch: {silent}; nothing was fetched", file=sys.stderr, flush=True)
        only_look = hub.offline(True)
    outcomes = [(need, *(inspect(need) if only_look else download(need))) for need in wanted]
    _print(outcomes)
    return 1 if any(found.lacks for _, found, _ in outcomes) else 0


def _print(outcomes: Sequence[tuple[hub.HubResource, hub.CacheStatus, str]]) -> None:
    """Print a table of the needs and their state, and how many are missing."""
    from rich import box
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(
        "what",
        "where from",
        "revision",
        "size",
        "state",
        title="from the Hugging Face hub",
        box=box.SIMPLE_HEAD,
    )
    table.columns[3].justify = "right"
    for need, found, state in outcomes:
        revision = (found.commit or need.revision or "main")[:12]
        table.add_row(
            need.what, need.origin, revision, decimal(found.size) if found.size else "", state
        )
    console = Console(
        width=max(130, Console().width) if not sys.stdout.isatty() else None, markup=False
    )
    console.print(table)
    left = sum(bool(found.lacks) for _, found, _ in outcomes)
    end = (
        f"{left} of {len(outcomes)} not there" if left else "Runs with offline=true find everything"
    )
    console.print(
        f"{end}; caches: {cache_names([need for need, _, _ in outcomes])}",
        highlight=False,
        soft_wrap=True,
    )
