"""Keep the state of a run in its folder: waiting, running, stopped, failed or done."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flare_exp.errors import UserError
from flare_exp.experiment.checksums import damage
from flare_exp.utils import signals
from flare_exp.utils.leases import LEASE, MARGIN, Lease, held_by_another, holder_is_gone
from flare_exp.utils.signals import StopRequested

log = logging.getLogger(__name__)

GRID, STATES, SIGN = "grid.json", "states.jsonl", ".running"
STYLES = {
    "done": "green",
    "running": "cyan",
    "waiting": "blue",
    "stopped": "yellow",
    "failed": "red",
    "missing": "red",
}


@dataclass(frozen=True)
class State:
    """State of a job: one of STYLES, why, and where it runs or ran."""

    state: str
    reason: str = ""
    host: str = ""
    pid: int = 0
    slurm_job: str = ""


def write_grid(folder: Path, jobs: Mapping[int, Sequence[str]]) -> None:
    """Remember which jobs a grid has: number -> overrides."""
    partial = folder / f".{GRID}.{os.getpid()}"
    partial.write_text(
        json.dumps([{"job": number, "overrides": list(o)} for number, o in jobs.items()], indent=1)
    )
    partial.replace(folder / GRID)


def write(folder: Path, state: str, reason: str = "") -> None:
    """Leave the state of the run in `folder`, which this process runs."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = (
        f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else os.environ.get("SLURM_JOB_ID", "")
    )
    add(folder, State(state, reason, socket.gethostname(), os.getpid(), job))


def add(folder: Path, state: State) -> None:
    """Add a state to the history of the run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": round(time.time(), 1), **asdict(state)}) + "\n"
    with (folder / STATES).open("a+b") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":
            line = "\n" + line  # a full disk has cut the last line off
        file.write(line.encode())


def history(folder: Path) -> list[tuple[float, State]]:
    """Return when the run in `folder` came into which state."""
    try:
        lines = (folder / STATES).read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):  # a line that was cut off
            facts = json.loads(line)
            found.append((facts.pop("time"), State(**facts)))
    return found


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Give a sign of life in `folder` while its run goes on.

    Raises:
        UserError: another process is running there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lease = Lease(folder / SIGN)
    _take(lease, folder)

    def leave(state: str, reason: str = "") -> None:
        if lease.is_held:  # not if another process has taken over
            write(folder, state, reason)

    try:
        leave("running")
        yield
        leave("done")
    except BaseException as error:
        interrupted = isinstance(
            error, (KeyboardInterrupt, SystemExit)
        )  # Lightning turns Ctrl-C into an exit
        reason = (
            "stopped by SIGINT"
            if interrupted
            else str(error).split("\n")[0] or type(error).__name__
        )
        with suppress(OSError):  # the disk may be full
            leave(
                "stopped" if interrupted or isinstance(error, StopRequested) else "failed",
                reason,
            )
        raise
    finally:
        lease.release()


def check_alone(folder: Path) -> None:
    """Check before results are written that no other process has taken the run over.

    Raises:
        UserError: one has.
    """
    if held_by_another(folder / SIGN) or (folder / "metrics.json").is_file():
        raise UserError(
            f"output_dir={folder}: this process gave no sign of life for {LEASE:.0f} s, "
            f"and another one has taken the run over; see: python -m flare_exp status {folder}"
        )


def _take(lease: Lease, folder: Path) -> None:
    """Take the lease of a run's folder, also from a process that was killed.

    Raises:
        UserError: another process is running there.
    """
    said = False
    while not lease.acquire(0.5):
        if lease.other_is_alive:
            raise UserError(
                f"output_dir={folder}: another process is running there; see: python -m flare_exp "
                f"status {folder}"
            )
        if not said:
            log.info(
                "%s: a process of another machine, or one that was killed, has begun this run; "
                "waiting up to %.0f s for a sign of its life",
                folder,
                lease.duration * MARGIN,
            )
            said = True
        signals.raise_if_signalled("before the run")


def read(folder: Path) -> State:
    """Read the state of the run in `folder`."""
    if (folder / "metrics.json").is_file():
        problems = damage(folder, trusted=0)
        return (
            State("failed", f"damaged: {problems[0]}; the same command makes it again")
            if problems
            else State("done")
        )
    try:
        states = [state for _, state in history(folder)]
    except (OSError, ValueError) as error:
        return State("failed", f"{folder / STATES} is unreadable ({error})")
    if not states and (folder / STATES).is_file():
        return State("failed", f"{folder / STATES} is unreadable (no whole line)")
    found = states[-1] if states else State("missing", "not begun")
    if found.state == "running" and not _alive(folder):
        return State(
            "failed",
            f"killed on {found.host} (process {found.pid})",
            found.host,
            found.pid,
            found.slurm_job,
        )
    return found


def _alive(folder: Path) -> bool:
    """Return whether the process that runs in a folder gives signs of life."""
    if holder_is_gone(folder / SIGN):
        return False
    try:
        return time.time() - (folder / SIGN).stat().st_mtime < LEASE
    except FileNotFoundError:
        return False


def jobs_of(folder: Path) -> dict[Path, list[str]]:
    """List the run folders of a grid with their overrides; of a single run its own folder.

    Raises:
        UserError: there is neither a grid nor a run.
    """
    try:
        grid = json.loads((folder / GRID).read_text())
        return {folder / str(job["job"]): job["overrides"] for job in grid}
    except FileNotFoundError:
        if any((folder / name).is_file() for name in ("config.yaml", STATES)):
            return {folder: []}
        raise UserError(
            f"{folder}: no run and no grid lies there (neither config.yaml nor {GRID})"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / GRID} is unreadable ({error})") from error


def counts(states: dict[Path, State]) -> str:
    """Count states in words, for example "4 done, 1 running, 1 failed"."""
    found = [s.state for s in states.values()]
    return ", ".join(f"{found.count(name)} {name}" for name in STYLES if name in found)
