"""Being stopped from outside, at a point where nothing is lost.

SLURM warns a job before its time limit or a preemption with SIGUSR1 (`--signal=USR1@300`); SIGTERM asks any process to end.
Neither interrupts anything: a run looks for them where its state can be kept, at the boundary of a training step and before each
stage.

They stay blocked, and pending, instead of having a handler: they can come while Python still imports, or while a library holds
a lock, and neither is disturbed. Every process that is started later inherits this, so that a signal to all of a job's processes
reaches the one that leads, and ends none of the others.
"""

from __future__ import annotations

import os
import signal
import subprocess

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stopped(Exception):
    """A signal asked the run to stop; what it had done is kept."""

    def __init__(self, by: signal.Signals, where: str):
        super().__init__(f"stopped by {by.name} {where}; the same command goes on from there")
        self.by = by


def listen() -> None:
    """Keep SIGNALS from ending this process at once. Call it before any thread starts: one that does not block a signal
    receives it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def asked() -> signal.Signals | None:
    """The signal that asked this process to stop, if one did."""
    pending = signal.sigpending()
    return next((s for s in SIGNALS if s in pending), None)


def check(where: str) -> None:
    """Raise Stopped if a signal asked for it. `where` continues "stopped by SIGTERM"."""
    if by := asked():
        raise Stopped(by, where)


def requeue() -> str | None:
    """Put the SLURM job that this process runs in back into the queue; returns its id, None outside of SLURM.

    SLURM ends the job's processes as soon as it is done.

    Raises:
        RuntimeError: SLURM refuses, with its reason.
    """
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return None
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        raise RuntimeError(f"SLURM job {job} could not be requeued: {reason}") from error
    return job
