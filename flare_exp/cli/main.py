"""`python -m flare_exp key=value ...`: check every override, then hand over to Hydra.

Hydra stops at its first error and lets `--cfg` bypass the program, so the command line is checked
here beforehand. Nothing heavy is imported before that check.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flare_exp import __version__
from flare_exp.cli import commandline
from flare_exp.config import composition, quoting, validation
from flare_exp.errors import UserError
from flare_exp.experiment import downloads
from flare_exp.experiment.runs import (
    attempt,
    attempt_in_grid,
    check_content,
    check_folder,
    check_writable,
    crashed,
    missing_folders,
    remove_empty,
    run_if_secondary_node,
    unused,
)
from flare_exp.utils import signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: done. 1: a failed grid or a crash. 2: a mistake in the command line, data or files. 128 + n:
    stopped by signal n.

    Args:
        argv: words of the command line; None: those of this process.
    """
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # during a run, flare_exp.experiment.runs says what is kept
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return 130


def _main(given: list[str]) -> int:
    """Run a subcommand, show the help or the version, or run what a command line configures."""
    if given and given[0] in commandline.COMMANDS:
        code = 0
        with commandline.piped():
            code = _command(given[0], given[1:])
        return code
    signals.block_signals()
    wait = given[:1] != ["submit"]
    arguments = commandline.normalized(
        given if wait else ["-m", "hydra/launcher=slurm", *given[1:]]
    )
    if any(a in ("--help", "-h") for a in arguments):
        commandline.show(commandline.help_text() if wait else commandline.SUBMIT)
        return 0
    if "--version" in arguments:  # Hydra would print its own version
        print(f"flare_exp {__version__}")
        return 0
    return _checked(given, arguments, wait)


def _checked(given: list[str], arguments: list[str], wait: bool) -> int:
    """Check every override; then show the configuration, or start a single run or a grid.

    Args:
        given: words of the command line.
        arguments: the same, as Hydra is to read them.
        wait: whether to wait for jobs on SLURM.
    """
    unknown = commandline.unknown_command(given) if wait else None
    flags = [a for a in arguments if a.startswith("-")]
    overrides = commandline.overrides(arguments)
    multirun = any(f in ("-m", "--multirun") for f in flags)
    named = any(composition.key_of(o) == "output_dir" for o in overrides)
    if multirun and not named:
        # one folder for all jobs of the grid
        overrides.append("output_dir=" + time.strftime("outputs/%Y-%m-%d_%H-%M-%S_grid"))
        arguments.append(overrides[-1])
    jobs, problems = validation.validate(
        [o for o in overrides if not (unknown and o == given[0])], multirun
    )
    if len(folders := {str(job.output_dir) for job in jobs if job}) > 1:
        problems.append(
            f"output_dir={','.join(sorted(folders))}: a grid has one folder, in which each job has "
            "its own; give one"
        )
    problems = [*([unknown] if unknown else []), *commandline.flag_problems(arguments), *problems]
    if problems:
        return commandline.refuse(problems)
    if commandline.only_shown(arguments):
        return _hand_over(arguments)
    if not multirun and run_if_secondary_node(jobs[0]):
        return 0
    folder = Path(str(jobs[0].output_dir)).expanduser()
    new = missing_folders([folder])
    if not named:
        folder = unused(folder)
        new = [folder, *new]
    # the name may hold the time, so it is fixed once
    for job in jobs:
        job.output_dir = composition.literal(str(folder))
    arguments, overrides = (_in_folder(words, folder) for words in (arguments, overrides))
    grid = _Grid(folder, jobs, composition.job_overrides(overrides)) if multirun else None
    on_slurm = "hydra/launcher=slurm" in overrides
    if (code := _refused(given, jobs, folder, new, grid, on_slurm)) is not None:
        return code
    if grid:
        grid.begin()
    return _on_slurm(grid, wait) if grid and on_slurm else _hand_over(arguments, grid)


def _in_folder(words: Sequence[str], folder: Path) -> list[str]:
    """Return the words of a command line with `folder` as their only output_dir."""
    kept = [word for word in words if composition.key_of(word) != "output_dir"]
    return [*kept, quoting.quoted(f"output_dir={composition.literal(str(folder))}", False)]


def _launcher_problems(jobs: Sequence[Any], grid: _Grid | None, on_slurm: bool) -> list[str]:
    """Return a message if the jobs and the launcher do not fit each other."""
    if on_slurm and not grid:
        return [
            "hydra/launcher=slurm: a launcher starts the jobs of a grid; add -m (it may be a grid "
            "of one)"
        ]
    if grid and not on_slurm and any(job.trainer.nodes > 1 for job in jobs):
        return [
            "trainer.nodes with -m: the jobs of a grid on several machines need "
            "hydra/launcher=slurm"
        ]
    return []


def _refused(
    given: Sequence[str],
    jobs: Sequence[Any],
    folder: Path,
    new: Sequence[Path],
    grid: _Grid | None,
    on_slurm: bool,
) -> int | None:
    """Return an exit code if the jobs cannot run here or lack downloads; None: they can start.

    Folders that the checks have made, and those of `new`, are removed if the jobs cannot start.
    """
    places = {folder / str(n): jobs[n] for n in grid.numbers} if grid else {folder: jobs[0]}
    left = [job for place, job in places.items() if not (place / "metrics.json").is_file()]
    names = dict.fromkeys(str(job.cache_dir) for job in left)
    caches = [Path(name).expanduser() for name in names]
    new = [*new, *missing_folders(caches)]
    problems = _launcher_problems(jobs, grid, on_slurm) or list(
        grid.problems() if grid else check_folder(jobs[0], folder)
    )
    problems += [problem for cache in caches for problem in check_writable(cache, "cache_dir")]
    if problems:
        remove_empty(new)
        return commandline.refuse(problems)
    if left and (message := downloads.checked(left, given, grid is not None)):
        remove_empty(new)
        print(f"flare_exp: {message}", file=sys.stderr)
        return 2
    return None


def _command(name: str, arguments: Sequence[str]) -> int:
    """Run a subcommand; a user's mistake, or a stop by a signal, is printed as one message."""
    import importlib

    module = importlib.import_module(f"flare_exp.cli.{name.replace('-', '_')}")
    if {"--help", "-h"}.intersection(arguments):
        print(str(module.__doc__).strip())
        return 0
    known, _ = commandline.COMMANDS[name]
    try:
        if known is None:
            return module.main(list(arguments))
        if unknown := [a for a in arguments if a.startswith("-") and a not in known]:
            raise UserError(
                f"{unknown[0]}: there is no such flag; allowed: {', '.join((*known, '--help'))}"
            )
        return module.main(commandline.normalized(arguments, name == "prefetch"))
    except UserError as error:
        print(f"flare_exp {name}: {error}", file=sys.stderr)
        return 2
    except signals.StopRequested as error:  # while it built an embedded model, or a program ran
        print(f"flare_exp {name}: {error}", file=sys.stderr)
        return 128 + error.by


class _Grid:
    """The jobs of a multirun, as composed at its start.

    Files that are edited later do not change the jobs.
    """

    def __init__(self, folder: Path, jobs: Sequence[Any], cells: Sequence[Sequence[str]]):
        self.folder, self.jobs, self.cells = folder, jobs, cells
        self.skipped = [
            n for n, job in enumerate(jobs) if composition.without_fusion(job, cells[n])
        ]
        self.numbers = [n for n in range(len(jobs)) if n not in self.skipped]

    def problems(self) -> Iterator[str]:
        """Yield a message if the folder is not writable, and for every job folder in other use."""
        if unwritable := list(check_writable(self.folder)):
            yield from unwritable
            return
        for n in self.numbers:
            yield from check_content(self.jobs[n], self.folder / str(n))

    def announcement(self, number: int) -> str:
        """Return a line that names a job by the overrides that not all jobs share."""
        common = set.intersection(*map(set, self.cells)) if len(self.cells) > 1 else set()
        own = " ".join(o for o in self.cells[number] if o not in common)
        return f"job {self.numbers.index(number) + 1} of {len(self.numbers)}: {own}"

    def begin(self) -> None:
        """Print which jobs are skipped, and write the list of jobs for `status`."""
        from flare_exp.experiment import run_state

        for method in dict.fromkeys(self.jobs[n].method.name for n in self.skipped):
            print(
                f"skipped: method={method} has no fusion, so the cells that combine it with "
                "fusion=... or source=robust are left out"
            )
        run_state.write_grid(self.folder, {n: self.cells[n] for n in self.numbers})


def _on_slurm(grid: _Grid, wait: bool) -> int:
    """Submit the jobs that are not done, and wait for them if asked; return the exit code."""
    from flare_exp.cli import report, status
    from flare_exp.cluster import slurm
    from flare_exp.experiment import run_state

    jobs = _slurm_jobs(grid)
    try:
        done = all((job.folder / "metrics.json").is_file() for job in jobs)
        queued = {} if done else slurm.queued(jobs)
        before = {job.folder: run_state.read(job.folder) for job in jobs}
        ended = [job for job in jobs if job.folder not in queued]
        missing = [job for job in ended if before[job.folder].state not in ("done", "running")]
        arrays = sorted({job.partition("_")[0] for job in queued.values()})
        also = f"; {len(queued)} of them are in SLURM's queue already" if queued else ""
        print(f"{grid.folder}: {len(jobs)} jobs, {run_state.counts(before)}{also}")
        if missing:
            made = slurm.submit(missing, composition.launcher(grid.cells[0]))
            arrays += made
            print(
                f"submitted as SLURM job array {', '.join(made)}; see: python -m flare_exp status "
                f"{grid.folder}"
            )
    except UserError as error:
        print(f"flare_exp: {error}", file=sys.stderr)
        return 2
    if arrays and not wait:
        return 0
    awaited = [job for job in jobs if job in missing or job.folder in queued]
    if awaited:
        try:
            slurm.wait(awaited, arrays)
        except (KeyboardInterrupt, signals.StopRequested, UserError) as error:
            print(
                f"\nno longer waiting{f' ({error})' if str(error) else ''}; the jobs go on "
                f"(scancel {' '.join(arrays)} ends them)",
                file=sys.stderr,
            )
            return 130
    states = before | {job.folder: slurm.ended(run_state.read(job.folder)) for job in awaited}
    status.print_table(states, {job.folder: list(job.overrides) for job in jobs})
    if any(s.state == "done" for s in states.values()):
        report.print_report([str(grid.folder)], mixed=True)
    return 0 if all(s.state == "done" for s in states.values()) else 1


def _slurm_jobs(grid: _Grid) -> list[Any]:
    """Return the jobs of a grid as they are submitted."""
    from omegaconf import OmegaConf

    from flare_exp.cluster import slurm

    return [
        slurm.Job(
            OmegaConf.to_object(grid.jobs[n]),  # type: ignore[arg-type]
            (grid.folder / str(n)).absolute(),
            grid.cells[n],
        )
        for n in grid.numbers
    ]


def _hand_over(arguments: Sequence[str], grid: _Grid | None = None) -> int:
    """Let Hydra run the jobs; return the exit code."""
    import hydra

    composition.register_schema()
    sys.argv = [sys.argv[0], *arguments]
    outcome = _Outcome(grid)
    hydra.main(version_base="1.3", config_path=str(composition.conf_dir()), config_name="config")(
        outcome.job
    )()
    return outcome.report()


class _Outcome:
    """Runs Hydra's jobs and records the failed ones, so that a grid goes on after a failure."""

    def __init__(self, grid: _Grid | None):
        self.grid = grid
        self.failed: list[tuple[Path, str]] = []
        self.crashed = False

    def job(self, cfg: Any) -> None:
        """Run one of Hydra's jobs; a failure is printed and recorded."""
        from hydra.core.hydra_config import HydraConfig

        hydra_cfg, cfg = HydraConfig.get(), composition.with_simple_language(cfg)
        folder = Path(hydra_cfg.runtime.output_dir)
        if self.grid is None:
            try:
                self._remember(folder, attempt(cfg, folder))
            except Exception as error:
                self.crashed = True
                self._remember(folder, crashed(error, folder))
            return
        number = hydra_cfg.job.num
        if number in self.grid.numbers:
            print(self.grid.announcement(number), flush=True)
            self._remember(folder, attempt_in_grid(self.grid.jobs[number], folder))

    def _remember(self, folder: Path, reason: str | None) -> None:
        """Print and record the reason of a failure; None is no failure."""
        if reason is not None:
            self.failed.append((folder, reason))
            print(f"flare_exp: {reason}", file=sys.stderr)

    def report(self) -> int:
        """Print the results and failures of a grid; return the exit code."""
        if self.grid and len(self.failed) < len(self.grid.numbers):
            from flare_exp.cli.report import print_report

            # a grid may well have options of the data; its table says so
            print_report([str(self.grid.folder)], mixed=True)
        if self.failed and self.grid:
            print(
                f"{len(self.failed)} of {len(self.grid.numbers)} jobs of the grid failed:",
                file=sys.stderr,
            )
            for folder, reason in self.failed:
                log = folder / "flare_exp.log"
                print(
                    f"  {folder}: {reason}{'' if str(log) in reason else f'; see {log}'}",
                    file=sys.stderr,
                )
            return 1
        if self.crashed:
            return 1
        return 2 if self.failed else 0
