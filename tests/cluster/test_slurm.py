"""Grids on a real SLURM: frozen configurations, signals, kills, several devices and machines.

Skipped where there is none.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SHARED
from omegaconf import OmegaConf
from runs import last_of_each
from small_checkpoints import tiny_checkpoint
from tables import assert_same_predictions

from flare_exp.cluster import slurm
from flare_exp.config import composition, validation
from flare_exp.errors import UserError
from flare_exp.experiment import run_state
from flare_exp.utils import signals

START = SHARED.parent / "tools" / "slurm-local" / "start.sh"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of a SLURM client: a cluster that is there, or one of one node that is
    started for these tests.
    """
    if shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True).returncode == 0:
        yield dict(os.environ)
        return
    if (
        not shutil.which("slurmctld", path=f"/usr/sbin:/sbin:{os.environ['PATH']}")
        or not START.exists()
    ):
        pytest.skip("needs SLURM: a cluster, or slurm-wlm and munge with ../shared/tools")
    folder = Path("/tmp") / f"flare-slurm-{os.getpid()}"  # short: it holds sockets
    local = {**os.environ, "SLURM_LOCAL_PORT": "7817", "SLURM_LOCAL_CPUS": "4"}
    started = subprocess.run(
        [START, folder], env=local, timeout=120, capture_output=True, text=True
    )
    if started.returncode:
        pytest.skip(
            "needs SLURM, which could not be started here: "
            f"{(started.stderr or started.stdout).strip()}"
        )
    yield {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    subprocess.run([START.with_name("stop.sh"), folder], timeout=120, stdout=subprocess.DEVNULL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def grid(checkpoint, folder, *overrides):
    place = [
        f"model.path={checkpoint}",
        f"cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'grid'}",
    ]
    words = [
        "-m",
        "hydra/launcher=slurm",
        "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.mem_gb=2",
        "hydra.launcher.timeout_min=30",
        "trainer=cpu",
        "trainer.enable_progress_bar=false",
        "model=custom",
        "task.limit=100",
        "data.batch_size=20",
        "finetune.epochs=2",
        "method=lora",
        "transfer.epochs=2",
        *place,
        *overrides,
    ]
    return [sys.executable, "-m", "flare_exp", *last_of_each(words)]


def run(words, env):
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=400)


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def in_training(folder, seed):
    """Whether the job of a seed has trained for some epochs, and the process that does."""
    found = run_state.read(folder / "grid" / str(seed))
    return (
        found.pid
        if found.state == "running" and list(folder.glob("cache/finetune/.*/checkpoints"))
        else None
    )


@pytest.mark.slow
@pytest.mark.slurm
def test_jobs_that_are_warned_go_on_and_those_that_are_killed_are_repaired(
    cluster, checkpoint, tmp_path
):
    long = ["finetune.epochs=150", "seed=0,1"]
    whole = run(grid(checkpoint, tmp_path / "whole", *long), cluster)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    folder = tmp_path / "parts"
    waiting = subprocess.Popen(
        grid(checkpoint, folder, *long),
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: in_training(folder, 0) and in_training(folder, 1))
    array = run_state.read(folder / "grid" / "0").slurm_job.partition("_")[0]
    subprocess.run(["scancel", "--signal=USR1", f"{array}_0"], env=cluster, check=True)
    os.kill(in_training(folder, 1), signal.SIGKILL)
    said, _ = waiting.communicate(timeout=400)
    assert waiting.returncode == 1, said
    assert "1 done, 1 failed" in said
    log = (folder / "grid" / "0" / "flare_exp.log").read_text()
    assert "kept the state after" in log
    assert "finetune: goes on after" in log
    repaired = run(grid(checkpoint, folder, *long), cluster)
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert "2 jobs, 1 done, 1 failed" in repaired.stdout
    for seed in "01":
        for name in (
            "english/adapter_model.safetensors",
            "adapter/adapter_model.safetensors",
            "predictions.parquet",
        ):
            one, other = (tmp_path / place / "grid" / seed / name for place in ("whole", "parts"))
            assert one.read_bytes() == other.read_bytes(), f"{seed}/{name}"


@pytest.mark.slow
@pytest.mark.slurm
def test_what_was_submitted_is_what_runs_and_submit_does_not_wait(cluster, checkpoint, tmp_path):
    """Also with two processes in a job."""
    code = tmp_path / "code"
    for name in ("conf", "flare_exp"):
        shutil.copytree(Path(__file__).parents[2] / name, code / name)
    env = {**cluster, "PYTHONPATH": str(code)}
    words = grid(
        checkpoint, tmp_path, "seed=0", "trainer=ddp_cpu", "hydra.launcher.cpus_per_task=2"
    )
    hold = ["hydra.launcher.additional_parameters.begin=now+5"]
    submitted = run([*words[:3], "submit", *words[5:], *(f"+{h}" for h in hold)], env)
    assert submitted.returncode == 0, submitted.stderr
    assert run_state.read(tmp_path / "grid" / "0").state == "waiting"
    again = run([*words[:3], "submit", *words[5:], *(f"+{h}" for h in hold)], env)
    assert (again.returncode, again.stderr) == (0, "")
    assert "1 of them are in SLURM's queue already" in again.stdout
    assert "submitted as" not in again.stdout
    for file in (code / "conf" / "task").glob("toy*.yaml"):  # before the job starts
        file.write_text("name: nonsense\n")
    done = tmp_path / "grid" / "0" / "metrics.json"
    wait_for(done.is_file)
    assert json.loads(done.read_text())["task"] == "toy_sentiment"
    told = run([sys.executable, "-m", "flare_exp", "status", str(tmp_path / "grid")], cluster)
    assert told.returncode == 0
    assert "1 done" in told.stdout
    assert sorted(p.name for p in (tmp_path / "grid").iterdir() if p.is_dir()) == ["0", "slurm"]


@pytest.mark.slow
@pytest.mark.slurm
def test_two_machines_leave_what_one_leaves(cluster, checkpoint, tmp_path):
    """Two tasks of one node stand for them."""
    words = grid(checkpoint, tmp_path, "trainer.precision=64-true", "method=zero_shot")
    words = [
        w
        for w in words
        if not w.startswith(("-m", "hydra", "trainer=cpu", "output_dir", "cache_dir"))
    ]
    words = [words[0], "-m", *words[1:]]
    outs = [tmp_path / "one", tmp_path / "two"]
    for out, own in zip(
        outs, ([], ["trainer=ddp_cpu", "trainer.devices=1", "trainer.nodes=2"]), strict=True
    ):
        step = (
            ["srun", "--ntasks=2", "--nodes=1", "--mem=4G", "--kill-on-bad-exit=1"] if own else []
        )
        done = run(
            [
                *step,
                *words,
                *(own or ["trainer=cpu"]),
                f"output_dir={out}",
                f"cache_dir={out}_cache",
            ],
            cluster,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same_predictions(*(out / "predictions.parquet" for out in outs), atol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "one_cache", "two", "two_cache"]


def test_jobs_in_the_queue_are_found_by_their_numbers(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\necho \"$*\" > $(dirname $0)/asked; printf '8_0\\n8_1\\n9\\n10_0\\n'\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    every = [slurm.Job(None, tmp_path / str(n), [f"seed={n}"]) for n in range(4)]
    assert slurm.queued(every) == {}  # nothing was submitted, so SLURM is not asked
    assert not (tmp_path / "asked").exists()
    lines = [["7_0", "1", []], ["8_0", "0", ["seed=0"]], ["8_1", "2", ["seed=2"]]]
    noted = "".join(json.dumps(line) + "\n" for line in [*lines, ["9", "3", ["seed=3"]]])
    (tmp_path / slurm.SUBMITTED).write_text(noted + '["10_0", "cut')
    found = {tmp_path / "0": "8_0", tmp_path / "2": "8_1", tmp_path / "3": "9"}
    assert slurm.queued(every) == found
    assert "-j 7,8,9 " in (tmp_path / "asked").read_text()
    with pytest.raises(UserError, match=r"SLURM job 9 is in the queue .* \(seed=3\); wait for it"):
        slurm.queued([*every[:3], slurm.Job(None, tmp_path / "3", ["seed=4"])])
    squeue.write_text("#!/bin/sh\necho 'error: Invalid job id specified' >&2; exit 1\n")
    assert slurm.queued(every) == {}  # long gone
    squeue.write_text("#!/bin/sh\necho 'no answer' >&2; exit 1\n")
    with pytest.raises(UserError, match="squeue: no answer"):
        slurm.queued(every)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="SLURM's queue cannot be read"):
        slurm.queued(every)


def test_jobs_are_noted_though_ctrl_c_comes_when_slurm_has_taken_them(
    tmp_path, monkeypatch, interruptible
):
    """A terminal sends it to sbatch, too."""
    for name, body in (
        ("srun", ""),
        ("sbatch", "kill -INT $PPID $$; echo 'Submitted batch job 77'"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(signals, "_interrupted", threading.Event())
    given = [
        slurm.Job(job.config, tmp_path / str(n), [f"seed={n}"])
        for n, job in enumerate(jobs("seed=0,1", "trainer=cpu"))
    ]
    assert slurm.submit(given, {"submitit_folder": str(tmp_path / "slurm")}) == ["77"]
    noted = [json.loads(line) for line in (tmp_path / slurm.SUBMITTED).read_text().splitlines()]
    assert noted == [["77_0", "0", ["seed=0"]], ["77_1", "1", ["seed=1"]]]
    with pytest.raises(signals.StopRequested, match="stopped by SIGINT"):
        signals.raise_if_signalled("while it waited")


def test_a_signal_before_python_is_ready_waits():
    """SLURM may send it while Python still imports."""
    code = "import signal, time; print('up', flush=True); time.sleep(1); print(signal.sigpending())"
    words = shlex.split(slurm.PYTHON)
    for when in ("at once", "later"):
        process = subprocess.Popen([*words, "-u", "-c", code], stdout=subprocess.PIPE, text=True)
        if when == "later":
            assert process.stdout.readline() == "up\n"
        else:
            time.sleep(0.02)  # the shell needs a few milliseconds
        process.send_signal(signal.SIGUSR1)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 0, when
    assert "SIGUSR1" in said


def jobs(*overrides):
    composed, problems = validation.validate(list(overrides), True)
    assert not problems
    return [slurm.Job(OmegaConf.to_object(job), Path("x"), []) for job in composed]


def test_what_is_asked_of_slurm_follows_from_the_trainer():
    launcher = composition.launcher(
        ["hydra/launcher=slurm", "hydra.launcher.partition=p", "hydra.launcher.qos=q"]
    )
    asked = slurm.resources(launcher, jobs("trainer=ddp", "trainer.devices=4", "trainer.nodes=2"))
    assert (
        asked["nodes"],
        asked["gpus_per_node"],
        asked["slurm_partition"],
        asked["slurm_qos"],
    ) == (2, 4, "p", "q")
    assert asked["slurm_additional_parameters"] == {"signal": "USR1@300", "requeue": True}
    assert "gpus_per_node" not in slurm.resources(launcher, jobs("trainer=cpu"))
    assert "gpus_per_node" not in slurm.resources(
        {**launcher, "gres": "gpu:h100:1"}, jobs("trainer=gpu")
    )


@pytest.mark.parametrize(
    ("launcher", "overrides", "message"),
    [
        ({"tasks_per_node": 2}, [], r"hydra\.launcher\.tasks_per_node=2: must be 1"),
        ({"nodes": 2}, [], r"hydra\.launcher\.nodes=2 and trainer\.nodes=1: set trainer\.nodes"),
        ({}, ["trainer=cpu,gpu"], "cannot differ"),
    ],
)
def test_what_cannot_work_is_refused_before_submission(launcher, overrides, message):
    with pytest.raises(UserError, match=message):
        slurm.resources(launcher, jobs(*overrides))


def test_wrong_launcher_options_are_one_message(tmp_path):
    def say(*words):
        return subprocess.run(
            [sys.executable, "-m", "flare_exp", f"output_dir={tmp_path}", *words],
            capture_output=True,
            text=True,
        )

    done = say("-m", "hydra/launcher=slurm", "hydra.launcher.partitoin=x")
    assert done.returncode == 2
    assert "hydra.launcher.partitoin" in done.stderr
    assert "Traceback" not in done.stderr
    done = say("-m", "trainer=ddp_cpu", "trainer.nodes=2")
    assert done.returncode == 2
    assert "several machines need hydra/launcher=slurm" in done.stderr
    done = say("hydra/launcher=slurm")
    assert done.returncode == 2
    assert "add -m" in done.stderr


def test_without_slurm_there_is_one_message(tmp_path):
    python = Path(sys.executable).parent
    done = subprocess.run(
        [sys.executable, "-m", "flare_exp", "submit", f"output_dir={tmp_path}", "trainer=cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(python)},
    )
    assert done.returncode == 2
    assert 'SLURM does not take the jobs: Could not detect "srun"' in done.stderr
    assert run_state.read(tmp_path / "0").state == "missing"


def test_a_large_grid_is_submitted_in_several_arrays(tmp_path, monkeypatch):
    """As many jobs as SLURM takes in one (MaxArraySize)."""
    sizes, at_once, refuses = [], [], False

    class Executor:
        def __init__(self, **_):
            pass

        def update_parameters(self, slurm_array_parallelism, **_):
            at_once.append(slurm_array_parallelism)

        def map_array(self, _, jobs):
            if len(jobs) == 1 and refuses:
                raise RuntimeError("over the limit")
            sizes.append(len(jobs))
            return [SimpleNamespace(job_id=f"{len(sizes)}_{n}") for n in range(len(jobs))]

    monkeypatch.setattr("submitit.AutoExecutor", Executor)
    monkeypatch.setattr(slurm, "LARGEST", 2)
    given = [
        slurm.Job(job.config, tmp_path / str(n), [f"seed={n}"])
        for n, job in enumerate(jobs("seed=0,1,2,3,4", "trainer=cpu"))
    ]
    launcher = {"submitit_folder": str(tmp_path), "array_parallelism": 8}
    assert slurm.submit(given, launcher) == ["1", "2", "3"]
    assert sizes == [2, 2, 1]
    assert at_once == [2, 2, 2], "the arrays share what runs at the same time"
    noted = (tmp_path / slurm.SUBMITTED).read_text().splitlines()
    assert [json.loads(line)[:2] for line in noted] == [
        ["1_0", "0"],
        ["1_1", "1"],
        ["2_0", "2"],
        ["2_1", "3"],
        ["3_0", "4"],
    ]
    refuses = True
    with pytest.raises(UserError, match=r"over the limit; in the queue: 4, 5$"):
        slurm.submit(given, launcher)
