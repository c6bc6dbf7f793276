"""Processes for the tests, forked from a server that has imported the libraries once.

A fresh interpreter imports for several seconds before a tiny run of two seconds begins. A forked
process has the same isolation: its own memory, environment, signals and exit code. The server is
itself forked from the process of the tests, before the first test. Use `subprocess` where a fresh
interpreter is itself tested (what is imported when, environment variables that libraries read on
import, peak memory).
"""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import multiprocessing.util
import os
import random
import resource
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import pytest
import torch

CONTEXT = multiprocessing.get_context("forkserver")
# what a run imports, also in its course; nothing that starts a thread
PRELOADED = [
    "flare_exp.experiment.pipeline",
    "flare_exp.experiment.notes",
    "flare_exp.cli.report",
    "flare_exp.report.writers.terminal",
    "flare_exp.cli.prefetch",
    "hydra.main",
    "hydra._internal.hydra",
    "hydra.core.override_parser.overrides_parser",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher",
    "lightning.pytorch",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "pandas",
    "pyarrow.dataset",
    "sacrebleu",
    "peft.tuners.lora.bnb",
    "transformers.models.xlm_roberta.modeling_xlm_roberta",
    "transformers.models.xlm_roberta.tokenization_xlm_roberta",
    "torch.utils.serialization",
    "warm_server",
]
CONTEXT.set_forkserver_preload(PRELOADED)
PROGRAM = [sys.executable, "-m", "flare_exp"]


def start_server() -> None:
    """Fork the server from this process instead of letting it import the libraries again.

    Call it before this process has a thread: what is forked has none of them, but their locks.
    """
    with pytest.MonkeyPatch.context() as patch:
        # it warns of the semaphores of runs that tests kill
        patch.setenv("PYTHONWARNINGS", "ignore::UserWarning")
        resource_tracker.ensure_running()
        patch.setattr(multiprocessing.util, "spawnv_passfds", _fork_server)
        forkserver.ensure_running()


def _fork_server(_: bytes, arguments: Sequence[str], kept: Sequence[int]) -> int:
    """Run the server's command in a forked process; return its id.

    It waits until a first process is asked for, or the process of the tests is gone.
    """
    if pid := os.fork():
        return pid
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # that of the tests' terminal
        logging.getLogger().handlers.clear()
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        # Files of pytest and of its connections are replaced, not closed: an object that still has
        # the number of one would write to the next file with this number, or close that.
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in map(int, os.listdir("/dev/fd")):
            if number > 2 and number not in kept:
                with suppress(OSError):  # that of the list itself is gone
                    os.fstat(number)
                    os.dup2(nothing, number)
        listener, _ = kept
        if listener in select.select(kept, [], [])[0]:
            exec(arguments[-1])
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)


def _main(
    words: Sequence[str],
    env: Mapping[str, str],
    out: str,
    err: str,
    ignored: Sequence[int],
    fresh_workers: bool,
    largest_file: int | None,
    before: Callable[[], None] | None,
) -> None:
    """Become `python -m flare_exp *words`."""
    missing = [
        name
        for name in PRELOADED
        if name.startswith(("flare_exp", "warm_server")) and name not in sys.modules
    ]
    assert not missing, f"the server could not import {missing} (it says nothing itself)"
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for number, file in enumerate((os.devnull, out, err)):
        place = os.open(
            file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        os.dup2(place, number)
        os.close(place)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job has it ignored
    for each in ignored:
        signal.signal(each, signal.SIG_IGN)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["flare_exp", *words]
    if before:
        before()
    if not fresh_workers:
        from flare_exp.experiment.launch import WorkerSpec

        WorkerSpec.start = lambda place, **options: _ForkedWorker(place, **options)  # type: ignore[assignment,return-value]
    try:
        runpy.run_module("flare_exp", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


class _ForkedWorker:
    """What `WorkerSpec.start` gives: a further process of a run, forked from rank 0.

    It has the part of subprocess.Popen that is used.
    """

    def __init__(self, place: Any, stdout: IO[str] | None = None, stderr: IO[str] | None = None):
        self.returncode: int | None = None
        self._lock = threading.Lock()
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(write)
            self._run_worker(place, read, stdout)
        os.close(read)
        self.stdin = os.fdopen(write, "wb")

    def _run_worker(self, place: Any, stdin: int, log: IO[str] | None) -> NoReturn:
        """Forget what a fresh interpreter would not know: signal handlers and random states."""
        code = 1
        try:
            os.setsid()
            os.dup2(stdin, 0)
            if log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            random.seed()
            np.random.seed()
            torch.seed()
            sys.argv = ["-c", json.dumps(asdict(place))]
            from flare_exp.experiment import worker

            worker.worker_main()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        until = None if timeout is None else time.monotonic() + timeout
        while self._reap(os.WNOHANG if until else 0) is None:
            if time.monotonic() > until:  # type: ignore[operator]
                raise subprocess.TimeoutExpired("follower", timeout)  # type: ignore[arg-type]
            time.sleep(0.02)
        return self.returncode

    def _reap(self, how: int) -> int | None:
        with self._lock:
            if self.returncode is None and (found := os.waitpid(self.pid, how))[0]:
                self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Run:
    """A run of flare_exp in a process of its own, with the part of subprocess.Popen that the tests
    use.

    Args:
        words: a whole command, `python -m flare_exp ...`.
        env: the whole environment; None: that of this process.
        merged: write errors to the standard output.
        ignored: signals that the process ignores from its start.
        fresh_workers: start the run's further processes as flare_exp does, in fresh interpreters,
            instead of forking them.
        largest_file: bytes that a file of the process may have, as `ulimit -f` sets them.
        before: called in the process before the run; what it patches is so in forked workers, too.

    """

    def __init__(
        self,
        words: Sequence[str],
        env: Mapping[str, str] | None = None,
        merged: bool = False,
        ignored: Sequence[int] = (),
        fresh_workers: bool = False,
        largest_file: int | None = None,
        before: Callable[[], None] | None = None,
    ):
        assert list(words[:3]) == PROGRAM, words
        folder = Path(tempfile.mkdtemp(prefix="flare_exp_run_"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._out = folder / "out"
        self._err = self._out if merged else folder / "err"
        self._merged = merged
        given = (
            list(words[3:]),
            dict(os.environ if env is None else env),
            str(self._out),
            str(self._err),
            ignored,
            fresh_workers,
            largest_file,
            before,
        )
        self._process = CONTEXT.Process(target=_main, args=given)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def alive(self, seconds: float | None) -> bool:
        """Wait for its end, at most so long; whether it goes on."""
        self._process.join(seconds)
        return self._process.exitcode is None

    def wait(self, timeout: float | None = None) -> int:
        if self.alive(timeout):
            raise subprocess.TimeoutExpired("flare_exp", timeout)
        return self._process.exitcode

    @property
    def said(self) -> str:
        """What it has written so far to its standard output."""
        return self._out.read_text() if self._out.exists() else ""

    def communicate(self, timeout: float | None = None) -> tuple[str, str | None]:
        self.wait(timeout)
        found = [file.read_text() if file.exists() else "" for file in (self._out, self._err)]
        return found[0], None if self._merged else found[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def run(
    words: Sequence[str], env: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess:
    """Run a command `python -m flare_exp ...` to its end."""
    process = Run(words, env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(words, process.returncode, out, err)
