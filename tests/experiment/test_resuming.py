"""A run that is stopped at any step, or killed, ends as one that never was (I12)."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import processes
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from runs import last_of_each
from small_checkpoints import tiny_checkpoint
from tables import assert_same_predictions

from flare_exp.cli.main import main
from flare_exp.config import validation
from flare_exp.data.sampling import (
    LengthBucketedBatchSampler,
    RankShardBatchSampler,
    ResumableDataLoader,
)
from flare_exp.errors import out_of_room
from flare_exp.experiment import pipeline, run_state, runs
from flare_exp.training import checkpointing
from flare_exp.training.distributed import SINGLE_PROCESS
from flare_exp.utils import signals

SMALL = [
    "task.limit=100",
    "finetune.epochs=2",
    "transfer.epochs=2",
    "transfer.lr=1e-3",
    "data.batch_size=20",
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "model=custom",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny XLM-R with dropout, whose masks must be those of an uninterrupted run."""
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def arguments(checkpoint, folder, *overrides):
    place = [
        f"model.path={checkpoint}",
        f"cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'out'}",
    ]
    return last_of_each([*SMALL, *place, *overrides])


def run(checkpoint, folder, *overrides):
    (job,), problems = validation.validate(arguments(checkpoint, folder, *overrides), False)
    assert not problems
    (folder / "out").mkdir(parents=True, exist_ok=True)
    return pipeline.run(OmegaConf.to_object(job), folder / "out")


def left(folder):
    """What a run leaves, by name: bytes of weights and predictions, rows of the curves.

    The mean loss of an epoch is left out: Lightning begins it anew when an epoch goes on."""
    found = {
        name: (folder / "out" / name).read_bytes()
        for name in (
            "english/adapter_model.safetensors",
            "adapter/adapter_model.safetensors",
            "predictions.parquet",
        )
    }
    for stage in ("finetune", "transfer"):
        with (folder / "out" / "curves" / f"{stage}.csv").open(newline="") as file:
            rows = [
                {k: v for k, v in row.items() if k != "train/loss_epoch"}
                for row in csv.DictReader(file)
            ]
        found[stage] = [
            row for row in rows if any(v for k, v in row.items() if k not in ("epoch", "step"))
        ]
    return found


@pytest.mark.slow
def test_i12_stopped_at_any_step_equals_uninterrupted(checkpoint, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    run(checkpoint, tmp_path / "whole")
    looks, stops = (
        0,
        {1, 3, 8, 9, 12, 16},
    )  # looks for a signal: before a stage, after each step but the last of an epoch

    def asked():
        nonlocal looks
        looks += 1
        return signal.SIGUSR1 if looks in stops else None

    monkeypatch.setattr(signals, "pending_signal", asked)
    for _ in stops:
        with pytest.raises(signals.StopRequested, match="stopped by SIGUSR1"):
            run(checkpoint, tmp_path / "parts")
    run(checkpoint, tmp_path / "parts")
    assert left(tmp_path / "parts") == left(tmp_path / "whole")
    assert caplog.text.count("goes on after") >= 3
    assert not list((tmp_path / "parts").rglob("state.ckpt"))
    assert not list((tmp_path / "parts").rglob("*.before.csv"))


@pytest.mark.slow
def test_a_step_read_in_micro_batches_is_the_same_step_and_their_size_may_change_on_the_way(
    tmp_path, monkeypatch, caplog
):
    """Without dropout, whose masks follow from the order of the passes.

    64 bits are rounded to 32 where a training goes on.
    """
    caplog.set_level("INFO")
    exact = [
        "trainer.precision=64-true",
        "trainer.gradient_clip_val=0.01",
        "trainer.limit_train_batches=4",
    ]
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", **settings)
    run(checkpoint, tmp_path / "whole", *exact)
    looks, stops = (
        0,
        {2, 5, 8},
    )  # looks for a signal: before a stage, after each step but the last of an epoch

    def asked():
        nonlocal looks
        looks += 1
        return signal.SIGUSR1 if looks in stops else None

    monkeypatch.setattr(signals, "pending_signal", asked)
    for size in ("7", "null", "3"):
        with pytest.raises(signals.StopRequested):
            run(checkpoint, tmp_path / "parts", *exact, f"data.micro_batch_size={size}")
    run(checkpoint, tmp_path / "parts", *exact, "data.micro_batch_size=20")
    assert caplog.text.count("goes on after") >= 2
    expected, found = (left(tmp_path / name) for name in ("whole", "parts"))
    assert_same_predictions(
        *(tmp_path / name / "out" / "predictions.parquet" for name in ("whole", "parts"))
    )
    for name in expected:
        if name.endswith(".safetensors"):
            before, after = (safetensors.torch.load(left[name]) for left in (expected, found))
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)
    for stage in ("finetune", "transfer"):
        assert [{k: float(v) if v else v for k, v in row.items()} for row in found[stage]] == [
            {k: pytest.approx(float(v), rel=1e-6) if v else v for k, v in row.items()}
            for row in expected[stage]
        ]


def test_a_signal_stops_a_training_whose_epochs_are_one_step(checkpoint, tmp_path, monkeypatch):
    asked = iter([None] * 3)
    monkeypatch.setattr(signals, "pending_signal", lambda: next(asked, signal.SIGTERM))
    with pytest.raises(signals.StopRequested, match="before this training, which keeps no"):
        run(checkpoint, tmp_path, "data.batch_size=100", "finetune.epochs=50")


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "by"), [("cpu", signal.SIGINT), ("ddp_cpu", signal.SIGUSR1)])
def test_a_signal_stops_and_the_same_command_goes_on(checkpoint, tmp_path, trainer, by):
    """Also with several processes, all of which get the signal, as from SLURM.

    Then in the background, where a shell has SIGINT ignored.
    """

    def start(folder, epochs=200, **options):
        words = arguments(
            checkpoint,
            folder,
            f"trainer={trainer}",
            f"finetune.epochs={epochs}",
            "method=zero_shot",
        )
        return processes.Run([*processes.PROGRAM, *words], merged=True, **options)

    process = start(tmp_path, fresh_workers=True)
    wait_for(lambda: list(tmp_path.glob("cache/finetune/.*/checkpoints")), process)
    group = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for pid in [*group, process.pid]:
        os.kill(int(pid), by)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + by, said
    assert said.count(f"flare_exp: stopped by {by.name} after ") == 1
    assert "Traceback" not in said
    assert run_state.read(tmp_path / "out").reason.startswith(f"stopped by {by.name} after ")
    assert len(group) == (trainer == "ddp_cpu")
    assert not list(tmp_path.glob("out/process*.log"))
    (state,) = tmp_path.glob("cache/finetune/.*/state.ckpt")
    steps = checkpointing.steps_kept(state)
    assert steps > 5
    process = start(tmp_path, ignored=[signal.SIGINT])
    wait_for(lambda: "goes on after" in (tmp_path / "out" / "flare_exp.log").read_text(), process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # to train, as a rule
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert f"finetune: goes on after {steps} steps" in said
    assert process.returncode == 128 + signal.SIGTERM, said
    (state,) = tmp_path.glob("cache/finetune/.*/state.ckpt")
    assert checkpointing.steps_kept(state) >= steps


@pytest.mark.slow
def test_killed_without_a_warning_goes_on_from_the_last_state(checkpoint, tmp_path):
    words = arguments(
        checkpoint,
        tmp_path,
        "trainer.checkpoint_minutes=0.001",
        "method=zero_shot",
        "finetune.epochs=40",
    )
    process = processes.Run([*processes.PROGRAM, *words])
    wait_for(lambda: list(tmp_path.glob("cache/finetune/.*/state.ckpt")), process)
    process.kill()
    process.wait()
    (state,) = tmp_path.glob("cache/finetune/.*/state.ckpt")
    steps = checkpointing.steps_kept(state)
    done = processes.run([*processes.PROGRAM, *words], timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"finetune: goes on after {steps} steps" in done.stdout
    with (tmp_path / "out" / "curves" / "finetune.csv").open(newline="") as file:
        validated = [int(row["epoch"]) for row in csv.DictReader(file) if row["validation/loss"]]
    assert validated == list(range(40))  # no row is lost, none is there twice


@pytest.fixture
def disk(tmp_path):
    """A small file system: its folder, and a function that sets its size in kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("file systems cannot be mounted here")

    def resize(kilobytes):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)

    yield folder, resize
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("filled", ["cache", "out"])
def test_a_full_disk_at_any_stage_is_one_message_and_the_same_command_goes_on(
    checkpoint, tmp_path, disk, filled
):
    """The disk grows a little whenever it was full, so that it is full in one stage after the
    other.
    """
    place, resize = disk
    run(checkpoint, tmp_path / "whole")
    room = tmp_path / "room"
    if filled == "out":
        shutil.copytree(tmp_path / "whole" / "cache", room / "cache")
    folders = {name: (place if name == filled else room) / name for name in ("cache", "out")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    given = [
        *SMALL,
        f"model.path={checkpoint}",
        f"cache_dir={folders['cache']}",
        f"output_dir={folders['out']}",
    ]
    (job,), _ = validation.validate(given, False)
    reasons, kilobytes = [], 16
    while (reason := runs.attempt(job, folders["out"])) is not None:
        reasons.append(reason)
        assert "No space left on device" in reason
        assert len(reason.splitlines()) == 1
        assert str(place) in reason
        assert reason.endswith("when there is room, the same command goes on")
        assert not (folders["out"] / "metrics.json").exists()
        assert {p.name for p in folders["out"].iterdir()} <= {"config.yaml", "states.jsonl"}
        for manifest in folders["cache"].glob("*/[!.]*/manifest.json"):
            files = json.loads(manifest.read_text())["files"]
            assert all(
                (manifest.parent / name).stat().st_size == facts["bytes"]
                for name, facts in files.items()
            )
        assert not [path for path in folders["cache"].rglob("*.part*") if path.is_file()]
        assert kilobytes < 20_000, reasons
        kilobytes = round(1.5 * kilobytes)
        resize(kilobytes)
    assert len(reasons) >= 2
    if filled == "cache":
        kinds = {
            kind
            for kind in ("finetune", "transfer", "test", "translation")
            for r in reasons
            if f"artifact {kind}/" in r
        }
        assert len(kinds) >= 2, reasons
    for name in (
        "english/adapter_model.safetensors",
        "adapter/adapter_model.safetensors",
        "predictions.parquet",
    ):
        assert (folders["out"] / name).read_bytes() == (
            tmp_path / "whole" / "out" / name
        ).read_bytes()


def test_libraries_errors_of_a_full_disk_are_told():
    wrapped = RuntimeError("could not be saved")
    wrapped.__cause__ = OSError(28, os.strerror(28))
    for error in (
        wrapped.__cause__,
        wrapped,
        Exception("I/O error: No space left on device (os error 28)"),
    ):
        assert out_of_room(error) == "No space left on device"
    assert out_of_room(ValueError("no")) is None


def test_a_crash_is_one_line_and_its_traceback_is_in_the_log(tmp_path, monkeypatch, capsys):
    def crash(*_):
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr(runs, "run_job", crash)
    assert main([f"output_dir={tmp_path}"]) == 1
    said = capsys.readouterr()
    assert (
        said.err.splitlines()[-1]
        == f"flare_exp: ZeroDivisionError: by; the traceback is in {tmp_path / 'flare_exp.log'}"
    )
    assert "Traceback" not in said.out + said.err
    log = (tmp_path / "flare_exp.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "in crash" in log
    assert run_state.read(tmp_path).state == "failed"


def test_ctrl_c_asks_once_and_interrupts_the_second_time(capfd, interruptible):
    signals.block_signals()
    with signals.deferred():
        assert signals.pending_signal() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.pending_signal() is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("once more ends at once") == 1
    with pytest.raises(KeyboardInterrupt):  # nothing is trained: nothing is lost
        os.kill(os.getpid(), signal.SIGINT)
    signals.block_signals()
    assert signals.pending_signal() is None


def test_ctrl_c_before_anything_runs_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(validation, "validate", interrupt)
    assert main([f"output_dir={tmp_path / 'out'}"]) == 130
    assert capsys.readouterr().err == "\nstopped by Ctrl-C\n"


def test_ctrl_c_while_libraries_are_imported_stops_after_them(
    tmp_path, capfd, interruptible, monkeypatch
):
    monkeypatch.setattr(runs, "quiet", lambda cfg: os.kill(os.getpid(), signal.SIGINT))
    signals.block_signals()
    job = validation.validate([f"output_dir={tmp_path}"], False)[0][0]
    with pytest.raises(SystemExit) as stop:
        runs.attempt(job, tmp_path)
    assert stop.value.code == 130
    said = capfd.readouterr().err
    assert "Ctrl-C: stops when the libraries are imported" in said
    assert "stopped by SIGINT before the first stage; the same command goes on" in said
    assert "Traceback" not in said
    signals.block_signals()


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.pending_signal() is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_the_command_exits_ends_it_without_a_traceback():
    program = (
        "import atexit, signal, sys, time; import flare_exp.__main__ as command; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "command.main = lambda: 0; atexit.register(time.sleep, 60); "
        "atexit.register(print, 'exits', flush=True); sys.exit(command.run())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "exits\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (-signal.SIGINT, "")


def test_states_are_kept_as_often_as_two_percent_of_the_time_allows(monkeypatch):
    now = 0.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    pace = signals.Pace(1.0)
    assert pace.affordable  # what it takes is not known yet
    now = 61.0
    assert pace.due
    with pace.keeping():
        now += 3.0
    now += 100.0
    assert not pace.due
    assert not pace.affordable
    now += 51.0
    assert pace.due


def test_a_state_is_kept_after_every_epoch(checkpoint, tmp_path, monkeypatch):
    kept = []
    save = checkpointing.StepCheckpoint.save
    monkeypatch.setattr(
        checkpointing.StepCheckpoint,
        "save",
        lambda self, trainer: kept.append(trainer.global_step) or save(self, trainer),
    )
    monkeypatch.setattr(signals, "TIME_SHARE", 1e9)  # whatever it takes
    run(checkpoint, tmp_path, "finetune.epochs=3", "method=zero_shot")
    assert kept == [6, 11]  # with the first step after an epoch of 5


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_best_epoch_is_found_in_a_folder_of_another_name(tmp_path):
    """Lightning keeps real paths, and the folder may have been given as a link."""
    real, link = tmp_path / "real", tmp_path / "link"
    (real / ".new.part").mkdir(parents=True)
    link.symlink_to(real)
    before = os.path.realpath(real / ".old.part" / "checkpoints")
    state = {"dirpath": before, "best_model_path": f"{before}/a.ckpt", "best_model_score": 0.5}
    state["best_k_models"] = {f"{before}/a.ckpt": 0.5}
    progress = {"epoch_loop.batch_progress": {"current": {}, "total": {}}}
    checkpoint = {"callbacks": {"best": state}, "loops": {"fit_loop": progress}}
    checkpoint |= {"order": {}, "random": [None]}
    callback = checkpointing.StepCheckpoint(link / ".new.part" / "state.ckpt", SINGLE_PROCESS, 1)
    trainer = SimpleNamespace(accumulate_grad_batches=1)
    callback.on_load_checkpoint(trainer, None, checkpoint)
    now = os.path.realpath(real / ".new.part" / "checkpoints")
    assert state["dirpath"] == now
    assert [state["best_model_path"], *state["best_k_models"]] == [f"{now}/a.ckpt"] * 2
    assert state["best_model_score"] == 0.5


def test_a_superseded_epoch_stays_until_a_state_knows_the_better_one(tmp_path):
    """Only the one that the last state names: others are removed at once."""
    best = checkpointing.BestCheckpoint(dirpath=tmp_path, monitor="x")
    removed = []
    trainer = SimpleNamespace(strategy=SimpleNamespace(remove_checkpoint=removed.append))
    best.best_model_path = "epoch=0.ckpt"
    best.state_kept(trainer)
    best._remove_checkpoint(trainer, "epoch=0.ckpt")
    best._remove_checkpoint(trainer, "epoch=1.ckpt")
    assert removed == ["epoch=1.ckpt"]
    best.best_model_path = "epoch=2.ckpt"
    best.state_kept(trainer)
    best.state_kept(trainer)
    assert removed == ["epoch=1.ckpt", "epoch=0.ckpt"]
    best.load_state_dict({**best.state_dict(), "best_model_path": "epoch=3.ckpt"})
    best._remove_checkpoint(trainer, "epoch=3.ckpt")
    assert len(removed) == 2


def test_a_damaged_state_is_named_and_training_starts_anew(tmp_path, caplog):
    state = tmp_path / "state.ckpt"
    assert checkpointing.steps_kept(state) == 0
    torch.save({"global_step": 7, "random": [None], "sharded": False}, state)
    assert checkpointing.steps_kept(state) == 7
    state.write_bytes(state.read_bytes()[:100])
    assert checkpointing.steps_kept(state) == 0
    assert f"damaged state {state}" in caplog.text
    assert not state.exists()


@pytest.mark.parametrize(("processes", "sharded"), [(2, False), (1, True)])
def test_a_state_of_other_processes_is_named_and_training_starts_anew(
    tmp_path, caplog, processes, sharded
):
    state = tmp_path / "state.ckpt"
    torch.save({"global_step": 7, "random": [None], "sharded": False}, state)
    assert checkpointing.steps_kept(state, processes, sharded) == 0
    assert f"the state {state} is of fewer processes, or of another trainer.strategy" in caplog.text
    assert not state.exists()


def test_random_states_survive_weights_only(tmp_path):
    import random

    import numpy as np

    torch.save(checkpointing.random_state(), tmp_path / "state")
    drawn = torch.rand(3).tolist(), random.random(), np.random.rand()
    checkpointing.set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == drawn


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, asked):
        return asked[0]


@pytest.mark.parametrize(("workers", "passes"), [(0, 1), (1, 1), (0, 2)])
def test_a_loader_goes_on_within_an_epoch(workers, passes):
    """Between global batches: of one that is begun nothing has been learned."""

    def loader():
        order = LengthBucketedBatchSampler([1] * 10, 2, 0)
        order.set_epoch(3)
        return ResumableDataLoader(
            Numbers(),
            batch_sampler=RankShardBatchSampler(order, [1] * 10, passes=passes),
            num_workers=workers,
        )

    whole = [b.tolist() for b in loader()]
    first, second = loader(), loader()
    batches = iter(first)
    begun = [next(batches).tolist() for _ in range(3 * passes - 1)]
    assert begun == whole[: len(begun)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.batch_sampler.set_epoch(3)  # as Lightning does
    assert [b.tolist() for b in second] == whole[2 * passes :]
    assert len(second) == 5 * passes
    assert len(list(second)) == 5 * passes  # the next pass is a whole one


def test_curves_are_continued(tmp_path):
    curves = tmp_path / "metrics.csv"
    curves.write_text("epoch,step,a\n0,9,1\n0,19,2\n")
    with checkpointing.continued_curves(curves, 15):
        assert not curves.exists()
        curves.write_text("epoch,step,b\n0,19,3\n")
    with curves.open(newline="") as file:
        assert [(row["step"], row["a"], row["b"]) for row in csv.DictReader(file)] == [
            ("9", "1", ""),
            ("19", "", "3"),
        ]


def test_requeue_names_the_array_task(monkeypatch):
    called = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: called.append(words))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert signals.requeue() is None
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert signals.requeue() == "8"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert signals.requeue() == "7_3"
    assert called == [["scontrol", "requeue", "8"], ["scontrol", "requeue", "7_3"]]


def test_slurm_may_refuse_to_requeue(monkeypatch):
    def refuse(words, **_):
        raise subprocess.CalledProcessError(
            1, words, stderr="Requested operation is presently disabled\n"
        )

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    with pytest.raises(
        RuntimeError,
        match="SLURM job 8 could not be requeued: Requested operation is presently disabled",
    ):
        signals.requeue()
