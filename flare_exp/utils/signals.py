"""Stop a run on a signal, at a point where nothing is lost.

SLURM warns a job before its time limit or a preemption with SIGUSR1 (`--signal=USR1@300`); SIGTERM
asks any process to end. Neither interrupts anything: a run checks for them where its state can be
kept, at the boundary of a training step and before each stage. Ctrl-C (SIGINT) works in the same
way during a training (`deferred`). Elsewhere it ends a run at once, because nothing is lost.

SIGUSR1 and SIGTERM have no handler. They are blocked and stay pending, because they can arrive
while Python still imports, or while a library holds a lock, and must disturb neither. Every process
that is started later inherits this. A signal to all processes of a job therefore reaches rank 0 and
ends none of the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
TIME_SHARE = 0.02  # largest share of a training's time for keeping its states
_interrupted = threading.Event()  # set by Ctrl-C, and where this process ends itself


class StopRequested(Exception):
    """A signal asked the run to stop; all finished work is kept."""

    def __init__(self, by: signal.Signals, where: str):
        super().__init__(f"stopped by {by.name} {where}; the same command goes on from there")
        self.by = by


def block_signals() -> None:
    """Block SIGNALS, so that they do not end this process at once.

    Call this before any thread starts: a thread that does not block a signal receives it.
    """
    _interrupted.clear()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def pending_signal() -> signal.Signals | None:
    """Return the signal that asked this process to stop, or None."""
    if _interrupted.is_set():
        return signal.SIGINT
    pending = signal.sigpending()
    return next((s for s in SIGNALS if s in pending), None)


def request_stop() -> None:
    """Ask this process to stop, as a signal does: what checks for signals ends."""
    _interrupted.set()


@contextmanager
def deferred(until: str = "this step is finished and kept") -> Iterator[None]:
    """Let Ctrl-C ask for a stop as the other signals do; a second Ctrl-C interrupts at once.

    `until` says for the message when the stop comes.
    If SIGINT is ignored, as in a process that a shell has started in the background, it stays
    ignored.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def interrupt(*_: object) -> None:
        if _interrupted.is_set():
            raise KeyboardInterrupt
        _interrupted.set()
        os.write(2, f"\nCtrl-C: stops when {until}; once more ends at once\n".encode())

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Hold Ctrl-C back from this thread, and from the programs that it starts meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Pace:
    """Schedule for keeping the state of a training.

    A state is due every `minutes`, or less often where keeping it takes more than TIME_SHARE of
    the time.
    """

    def __init__(self, minutes: float):
        self.seconds, self.took, self.last = 60 * minutes, 0.0, time.monotonic()

    @property
    def due(self) -> bool:
        """Return whether a state is to be kept now."""
        return self.affordable and time.monotonic() - self.last > self.seconds

    @property
    def affordable(self) -> bool:
        """Return whether enough time has passed since the last state.

        The time for keeping that state must be at most TIME_SHARE of the time since then.
        """
        return TIME_SHARE * (time.monotonic() - self.last) >= self.took

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Measure the time that keeping a state takes."""
        start = time.monotonic()
        yield
        self.last = time.monotonic()
        self.took = self.last - start


def raise_if_signalled(where: str) -> None:
    """Raise StopRequested if a signal asked for it; `where` continues "stopped by SIGTERM".

    Raises:
        StopRequested: a signal asked the run to stop.
    """
    if by := pending_signal():
        raise StopRequested(by, where)


def requeue() -> str | None:
    """Put the SLURM job of this process back into the queue and return its id; None outside SLURM.

    SLURM ends the job's processes as soon as the job is in the queue.

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
        subprocess.run(
            ["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        raise RuntimeError(f"SLURM job {job} could not be requeued: {reason}") from error
    return job
