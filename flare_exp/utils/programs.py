"""Run another program as a filter: bytes in, bytes out, within limits of time and size."""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flare_exp.utils import signals

CHUNK = 1 << 16
KEPT = 1 << 13  # bytes of standard error that are kept for messages


def program_of(command: str) -> str:
    """Return the name of the program of a command, without its folder and its arguments.

    Arguments may hold paths, or keys of a service.
    """
    return Path((shlex.split(command) or [""])[0]).name


@dataclass
class Outcome:
    """Hold what a program left.

    Attributes:
        output: its standard output.
        errors: the end of its standard error.
        problem: why it did not end well, as the end of a sentence that begins with the program;
            None if its exit status is 0.
    """

    output: bytearray = field(default_factory=bytearray)
    errors: bytearray = field(default_factory=bytearray)
    problem: str | None = None

    @property
    def last_words(self) -> str:
        """Return the last five lines of standard error, else of standard output, as one line."""
        for stream in (self.errors, self.output[-KEPT:]):
            text = stream.decode("utf-8", "replace")
            plain = "".join(c if c.isprintable() else "\n" for c in text)
            if lines := [line.strip() for line in plain.split("\n") if line.strip()]:
                return " / ".join(lines[-5:])[-600:]
        return ""


def run_filter(
    command: Sequence[str],
    data: bytes,
    *,
    seconds: float,
    limit: int,
    heard: Callable[[bytes], None] | None = None,
) -> Outcome:
    """Run a program without a shell, write `data` to it and read what it writes.

    The program is a process group of its own, which is killed when the call ends, however it ends:
    Ctrl-C, a signal that asks this process to stop, or an error leave no process behind.

    Args:
        command: the program and its arguments.
        data: its standard input.
        seconds: time after which it is killed.
        limit: bytes of standard output after which it is killed.
        heard: called with every piece of standard output.

    Raises:
        OSError: the program cannot be started.
        StopRequested: a signal asked this process to stop.
    """
    outcome = Outcome()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,  # Ctrl-C is for this process
    )
    end = time.monotonic() + seconds
    try:
        try:
            outcome.problem = _exchange(process, memoryview(data), outcome, end, limit, heard)
            if outcome.problem is None:
                status = process.wait(max(0.0, end - time.monotonic()))
                outcome.problem = _described(status) if status else None
        except (TimeoutError, subprocess.TimeoutExpired):
            outcome.problem = f"had not ended after {seconds:g} s and was killed"
    finally:
        _kill(process)
    return outcome


def _exchange(
    process: subprocess.Popen[bytes],
    data: memoryview,
    outcome: Outcome,
    end: float,
    limit: int,
    heard: Callable[[bytes], None] | None,
) -> str | None:
    """Write and read until the program has closed its streams; return why that was stopped.

    Raises:
        TimeoutError: it has not closed them at the time `end`.
    """
    assert process.stdin
    assert process.stdout
    assert process.stderr
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            signals.raise_if_signalled("while a command translated")
            if (left := end - time.monotonic()) <= 0:
                raise TimeoutError
            for key, _ in selector.select(min(left, 0.5)):
                if key.fileobj is process.stdin:
                    data = _written(process.stdin.fileno(), data)
                    if not data:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                piece = os.read(key.fd, CHUNK)
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    outcome.errors = (outcome.errors + piece)[-KEPT:]
                else:
                    outcome.output += piece
                    if heard:
                        heard(piece)
                    if len(outcome.output) > limit:
                        return f"wrote more than {limit:,} bytes and was killed"
    return None


def _written(stream: int, data: memoryview) -> memoryview:
    """Write as much as fits into a pipe and return the rest; nothing if no one reads it."""
    try:
        return data[os.write(stream, data[:CHUNK]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and what it has started, and close the pipes to it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()


def _described(status: int) -> str:
    """Describe an exit status other than 0."""
    if status > 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
