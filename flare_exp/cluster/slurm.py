"""Run the jobs of a grid on a SLURM cluster.

`-m hydra/launcher=slurm` submits the jobs and waits; `python -m flare_exp submit` does not wait.

submitit makes the job array. Each job runs the configuration as it was composed at submission, so
that editing a file later changes nothing. A job that SLURM warns (SIGUSR1, before its time limit or
a preemption) keeps its state and goes back into the queue (flare_exp.utils.signals). submitit's own
handler for another signal would start it from the beginning.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flare_exp.config.composition import literal
from flare_exp.config.schema import Config
from flare_exp.errors import UserError
from flare_exp.experiment import downloads, run_state
from flare_exp.utils import signals

LARGEST = 1000  # jobs of an array; SLURM's MaxArraySize is 1001 by default
POLL = 5.0  # seconds between two queries of the queue
SUBMITTED = "submitted.jsonl"  # in a grid's folder: SLURM's number, folder and overrides of a job
# The shell ignores the signals until Python has started. From then on they are blocked and stay
# pending until the job checks for them.
BLOCKED = """import os, signal, sys
signals = signal.SIGUSR1, signal.SIGTERM
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
for s in signals: signal.signal(s, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""
PYTHON = shlex.join(
    ["sh", "-c", 'trap "" USR1 TERM; exec "$0" "$@"', sys.executable, "-c", BLOCKED]
)


@dataclass(frozen=True)
class Job:
    """One job: its configuration, its folder and its overrides."""

    config: Config
    folder: Path
    overrides: Sequence[str]


def resources(launcher: Mapping[str, Any], jobs: Sequence[Job]) -> dict[str, Any]:
    """Return the resources to request from SLURM, as arguments of submitit.

    They follow from `hydra.launcher` and the jobs' trainer options. A job is one task per node,
    which starts a process for each further device itself.

    Raises:
        UserError: the jobs need different machines, or nodes or tasks do not fit the trainer.
    """
    machines = {(t.accelerator, t.devices, t.nodes) for t in (job.config.trainer for job in jobs)}
    if len(machines) > 1:
        raise UserError(
            "the jobs of one submission ask SLURM for the same: trainer.accelerator, "
            "trainer.devices and trainer.nodes cannot differ; submit them one after the other"
        )
    trainer = jobs[0].config.trainer
    asked = {
        k: v
        for k, v in launcher.items()
        if v is not None and k not in ("_target_", "submitit_folder", "max_num_timeout")
    }
    if asked.get("tasks_per_node", 1) != 1:
        raise UserError(
            f"hydra.launcher.tasks_per_node={asked['tasks_per_node']}: must be 1; a task starts "
            "the processes of its node itself (trainer.devices)"
        )
    if asked.get("nodes", 1) not in (1, trainer.nodes):
        raise UserError(
            f"hydra.launcher.nodes={asked['nodes']} and trainer.nodes={trainer.nodes}: set "
            "trainer.nodes, which the launcher follows"
        )
    asked["nodes"] = trainer.nodes
    if trainer.nodes > 1:
        # when one machine fails, the others must not wait for it
        asked["srun_args"] = ["--kill-on-bad-exit=1"]
    given = {"gpus_per_node", "gres", "gpus_per_task"} & asked.keys()
    if trainer.accelerator != "cpu" and not given:
        asked["gpus_per_node"] = trainer.devices
    common = {
        "timeout_min",
        "cpus_per_task",
        "gpus_per_node",
        "tasks_per_node",
        "mem_gb",
        "nodes",
        "name",
        "stderr_to_stdout",
    }
    return {k if k in common else f"slurm_{k}": v for k, v in asked.items()}


def submit(jobs: Sequence[Job], launcher: Mapping[str, Any]) -> list[str]:
    """Submit jobs in as many arrays as SLURM's limit makes necessary, and return their ids.

    The arrays share the number of jobs that run at the same time (`array_parallelism`).

    Raises:
        UserError: SLURM or submitit refuses, with the reason. Arrays before the refused one are in
            the queue, and the message names them.
    """
    asked, folder = resources(launcher, jobs), Path(launcher["submitit_folder"]).absolute()
    parts = [jobs[i : i + LARGEST] for i in range(0, len(jobs), LARGEST)]
    if at_once := asked.get("slurm_array_parallelism"):
        asked["slurm_array_parallelism"] = max(1, at_once // len(parts))
    arrays: list[str] = []
    for part in parts:
        try:
            arrays.append(_submit_array(part, asked, folder))
        except UserError as error:
            there = f"; in the queue: {', '.join(arrays)}" if arrays else ""
            raise UserError(f"{error}{there}") from error
    return arrays


def _submit_array(jobs: Sequence[Job], asked: Mapping[str, Any], folder: Path) -> str:
    """Submit one array of jobs and return its id. `folder`: for the files of submitit."""
    import submitit

    for job in jobs:
        run_state.add(job.folder, run_state.State("waiting", "submitted to SLURM"))
    with signals.deferred("SLURM has answered"):  # jobs that are not noted are submitted again
        try:
            executor = submitit.AutoExecutor(
                cluster="slurm",
                folder=folder,
                slurm_python=PYTHON,
            )
            executor.update_parameters(**asked)
            with signals.interrupts_held_back():  # from sbatch, too
                made = executor.map_array(run, jobs)
        except Exception as error:  # submitit raises many kinds, RuntimeError and its own
            for job in jobs:
                run_state.add(job.folder, run_state.State("missing", "SLURM did not take it"))
            reason = getattr(error, "stderr", None) or str(error)
            raise UserError(f"SLURM does not take the jobs: {str(reason).strip()}") from error
        with (jobs[0].folder.parent / SUBMITTED).open("a") as file:
            for job, one in zip(jobs, made, strict=True):
                file.write(json.dumps([one.job_id, job.folder.name, list(job.overrides)]) + "\n")
    return made[0].job_id.partition("_")[0]


def queued(jobs: Sequence[Job]) -> dict[Path, str]:
    """Return folder -> SLURM job, for the jobs of a grid that wait in the queue or run.

    Raises:
        UserError: the queue cannot be read, or it has a job in one of these folders with other
            options.
    """
    file = jobs[0].folder.parent / SUBMITTED
    noted = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        with suppress(ValueError):  # a line that was cut off
            number, folder, overrides = json.loads(line)
            noted[number] = folder, overrides
    there = _listed(sorted({number.partition("_")[0] for number in noted})) if noted else []
    own, found = {job.folder.name: job for job in jobs}, {}
    for number in there:
        folder, overrides = noted.get(number, ("", []))
        if folder not in own:
            continue
        if overrides != list(own[folder].overrides):
            raise UserError(
                f"{own[folder].folder}: SLURM job {number} is in the queue for this folder, with "
                f"other options ({' '.join(overrides)}); wait for it, end it (scancel {number}), "
                "or give another output_dir"
            )
        found[own[folder].folder] = number
    return found


def _listed(arrays: Sequence[str]) -> list[str]:
    """Return the jobs of this user in SLURM's queue that are tasks of these arrays."""
    command = ["squeue", "-h", "-r", "-u", getpass.getuser(), "-j", ",".join(arrays), "-o", "%i"]
    # SQUEUE_STATES and others would hide jobs
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"SLURM's queue cannot be read: {error}") from error
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue: {done.stderr.strip()}")
    return done.stdout.split()


def run(job: Job) -> None:
    """Run one job on a node; exit with code 1 if it fails."""
    from omegaconf import OmegaConf

    from flare_exp.experiment.runs import attempt_in_grid, run_if_secondary_node

    own = literal(asdict(replace(job.config, output_dir=str(job.folder))))
    config = OmegaConf.merge(OmegaConf.structured(Config), own)
    if run_if_secondary_node(config):
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        logging.StreamHandler(sys.stdout),
        logging.FileHandler(job.folder / "flare_exp.log"),
    ]
    logging.basicConfig(
        level=logging.INFO,
        format="[%(asctime)s] %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    done = (job.folder / "metrics.json").is_file()
    if reason := (
        None if done else downloads.checked([config], job.overrides, False)
    ) or attempt_in_grid(config, job.folder):
        logging.getLogger(__name__).error("%s", reason)
        raise SystemExit(1)


def wait(jobs: Sequence[Job], arrays: Sequence[str]) -> None:
    """Wait until SLURM has finished arrays, and print the number of jobs in each state.

    Raises:
        UserError: the queue cannot be read.
    """
    said = ""
    while True:
        active = _listed(arrays)
        if (
            now := run_state.counts({job.folder: run_state.read(job.folder) for job in jobs})
        ) != said:
            print(f"[{time.strftime('%H:%M:%S')}] {now}", flush=True)
            said = now
        if not active:
            return
        signals.raise_if_signalled("while it waited")
        time.sleep(POLL)


def ended(state: run_state.State) -> run_state.State:
    """Return the state of a job that SLURM has finished: without a result, it has failed."""
    if state.state in ("running", "waiting"):
        return replace(
            state, state="failed", reason=f"SLURM job {state.slurm_job} ended without a result"
        )
    return state
