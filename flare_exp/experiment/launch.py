"""Start the processes of a run: one per device.

Global batches are shared among the processes. The process that the user started is rank 0; on
several machines, that of the first SLURM task is. It starts the other processes of its machine. The
further tasks start those of their machines (`run_secondary_node`). Every rank executes the same
pipeline. Rank 0 alone builds an artifact, while the others wait until it is there. Training and
prediction are collective (`ArtifactStore.get(..., collective=True)`). So nothing but the
configuration is handed to another process, no process is forked after CUDA has started, and each
process loads its own copy of the weights on its own device.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from flare_exp.config.schema import Config
from flare_exp.errors import UserError
from flare_exp.training.distributed import SINGLE_PROCESS, DistributedContext
from flare_exp.utils.signals import StopRequested

LOCALHOST = "127.0.0.1"
PATIENCE = timedelta(days=30)  # of a process that waits for rank 0, which may be translating
GRACE = 20  # seconds that rank 0 has to notice by itself that another process is gone


@contextmanager
def launch_workers(cfg: Config, folder: Path) -> Iterator[DistributedContext]:
    """Start the other processes of a settled configuration, and end them on exit.

    They write to `folder`/process<rank>.log, which stays there when they fail.

    Raises:
        UserError: another process failed, or there are not as many SLURM tasks as machines.
    """
    t = cfg.trainer
    size = t.devices * t.nodes
    if size == 1:
        yield SINGLE_PROCESS
        return
    host, port = address(t.nodes)
    store = dist.TCPStore(host, port, size, is_master=True, wait_for_workers=False)
    places = [
        WorkerSpec(rank, size, t.devices, host, store.port, t.accelerator)
        for rank in range(t.devices)
    ]
    others = [_Worker(place, folder) for place in places[1:]]
    ended = threading.Event()
    threading.Thread(target=_watch, args=(others, ended), daemon=True).start()
    try:
        distributed = join(places[0], store)
        distributed.broadcast((cfg, folder))
        yield distributed
        destroy_process_groups()
        for other in others:
            other.finish()
    except (UserError, StopRequested):
        raise
    except Exception as error:  # as a rule a broken connection: the reason is elsewhere
        if failure := _failure(others, wait=5):
            raise UserError(failure) from error
        raise
    finally:
        ended.set()
        for other in others:
            other.end()
        if dist.is_initialized():  # the run failed, and a grid's next job begins in this process
            with suppress(Exception):
                destroy_process_groups()


@dataclass(frozen=True)
class WorkerSpec:
    """Place of a process among those of a run, and the address of rank 0."""

    rank: int
    size: int
    devices: int
    host: str
    port: int
    accelerator: str

    def connect(self) -> dist.Store:
        """Connect with rank 0, which checks its data before it opens the store."""
        return dist.TCPStore(self.host, self.port, self.size, timeout=PATIENCE)

    def start(self, **options) -> subprocess.Popen:
        """Start the process that goes there."""
        code = "from flare_exp.experiment.worker import worker_main; worker_main()"
        path = os.pathsep.join(
            p for p in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if p
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(asdict(self))],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
            **options,  # Ctrl-C is for rank 0
        )


def address(nodes: int) -> tuple[str, int]:
    """Return where rank 0 waits for the others; port 0: any that is free."""
    if nodes == 1:
        return LOCALHOST, 0
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if (tasks := os.environ.get("SLURM_NTASKS")) != str(nodes):
        there = f"this one has {tasks}" if tasks else "this is none"
        raise UserError(
            f"trainer.nodes={nodes}: needs a SLURM job step with {nodes} tasks, one per node, "
            f"and {there}; start it with srun --nodes={nodes} --ntasks-per-node=1 "
            "--kill-on-bad-exit=1, or submit it with -m hydra/launcher=slurm"
        )
    nodelist = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    # the same on all machines, another one for every job, and for every step of a job
    numbers = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    own = sum(int(number) for number in numbers if number.isdecimal())
    return SLURMEnvironment.resolve_root_node_address(nodelist), 15000 + own % 10000


def run_secondary_node(machine: int, devices: int, nodes: int, accelerator: str) -> None:
    """Run the processes of a further machine of a run; rank 0 is elsewhere.

    What they print goes to this task's log.

    Raises:
        SystemExit: one of them failed.
    """
    host, port = address(nodes)
    on = "gpu" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    ranks = range(machine * devices, (machine + 1) * devices)
    processes = [
        WorkerSpec(rank, devices * nodes, devices, host, port, on).start() for rank in ranks
    ]
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        time.sleep(0.5)
    failed = any(process.poll() for process in processes)  # also by a signal
    for process in processes:
        process.kill()
        process.wait()
    if failed:
        raise SystemExit(1)


def join(place: WorkerSpec, store: dist.Store) -> DistributedContext:
    """Join the process groups of a run as one of its processes."""
    on_gpu = place.accelerator == "gpu"
    if on_gpu:
        torch.cuda.set_device(place.rank % place.devices)  # what "cuda" means in this process
    # on GPUs processes meet during training only, where nobody keeps the others waiting
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=None if on_gpu else PATIENCE,
    )
    return DistributedContext(
        place.rank, place.size, place.devices, dist.new_group(backend="gloo", timeout=PATIENCE)
    )


def destroy_process_groups() -> None:
    """Destroy the process groups.

    DDP reducers are collected first: a reducer that outlives its Gloo group destroys it while it
    holds the GIL, and can deadlock with a Gloo thread.
    """
    gc.collect()
    dist.destroy_process_group()


class _Worker:
    """Another process of this machine, seen from rank 0."""

    def __init__(self, place: WorkerSpec, folder: Path):
        self.name, self.log = (
            f"process {place.rank} of {place.size} (counted from 0)",
            folder / f"process{place.rank}.log",
        )
        with self.log.open("w") as log:
            self.process = place.start(stdout=log, stderr=log)

    @property
    def failure(self) -> str | None:
        """Return why the process failed, if it did."""
        if (code := self.process.poll()) in (None, 0):
            return None
        said = self.log.read_text(errors="replace").strip().splitlines()
        reason = (
            f"ended by {signal.Signals(-code).name}"
            if code < 0
            else said[-1]
            if said
            else f"exit code {code}"
        )
        return f"{self.name} failed: {reason}; see {self.log}"

    def finish(self) -> None:
        """Let it come to its end; nothing that it still does matters."""
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            return
        if self.process.returncode == 0:
            self.log.unlink(missing_ok=True)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.log.unlink(missing_ok=True)
        self.process.wait()
        self.process.stdin.close()  # type: ignore[union-attr]


def _failure(others: list[_Worker], wait: float = 0) -> str | None:
    """Return the message of the process that failed first; wait some seconds for a failure."""
    until = time.monotonic() + wait
    while not (failed := [o for o in others if o.failure]) and time.monotonic() < until:
        time.sleep(0.1)
    return min(failed, key=lambda o: o.log.stat().st_mtime).failure if failed else None


def _watch(others: list[_Worker], ended: threading.Event) -> None:
    """End rank 0 when another process is gone and rank 0 does not notice.

    It may be computing, or waiting for something that NCCL never reports. Its lock then belongs to
    a dead process and is taken over.
    """
    while not ended.wait(0.5):
        if _failure(others):
            time.sleep(0.5)  # for the others that the first one's end has ended
            failure = _failure(others)
            if not ended.wait(GRACE):
                print(f"flare_exp: {failure}", file=sys.stderr, flush=True)
                os._exit(1)
