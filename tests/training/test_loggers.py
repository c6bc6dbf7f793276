"""W&B runs: what they are called and hold, that they are taken up again, that an agent's run is its
own, that W&B may fail.
"""

import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import processes
import pytest
import yaml
from runs import TINY, command, launch, result
from sweep_agent import Agent, sweep_files

from flare_exp.config import validation
from flare_exp.experiment import pipeline
from flare_exp.training.tracking import Tracker


class FakeRun:
    """A W&B run that remembers what it is told."""

    def __init__(self, resumed=False, **summary):
        self.resumed, self.summary, self.history, self.offline, self.id = (
            resumed,
            summary,
            [],
            False,
            "x",
        )

    def log(self, point):
        self.history.append(point)

    def define_metric(self, *_, **__):
        pass

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def started(monkeypatch):
    """Arguments of every `wandb.init`; the runs come from `started.run`."""
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    calls = SimpleNamespace(given=[], run=FakeRun())
    monkeypatch.setattr("wandb.init", lambda **given: calls.given.append(given) or calls.run)
    return calls


def composed(*overrides):
    from omegaconf import OmegaConf

    (job,), problems = validation.validate(overrides, multirun=False)
    assert not problems
    return OmegaConf.to_object(job)


def test_what_a_run_is_called_comes_from_the_configuration():
    options = pipeline.wandb_options(
        composed("logger=wandb", "task=nusax", "seed=3", "fusion=mul", "model=xlmr_large")
    )
    assert options == {
        "project": "flare_exp",
        "entity": None,
        "group": "nusax-ace-xlmr_large",
        "job_type": "flare",
        "mode": None,
        "name": "flare_mul-nllb_3b3-seed3",
        "tags": ["nusax", "ace", "xlmr_large", "nllb_3b3"],
    }
    assert (
        pipeline.wandb_options(composed("logger=wandb", "method=lora"))["name"] == "lora-toy-seed0"
    )
    own = composed(
        "logger=wandb",
        "logger.group=g",
        "logger.job_type=j",
        "logger.run_name=n",
        "logger.tags=[t]",
        "logger.mode=offline",
    )
    assert pipeline.wandb_options(own) == {
        "project": "flare_exp",
        "entity": None,
        "group": "g",
        "job_type": "j",
        "name": "n",
        "tags": ["t"],
        "mode": "offline",
    }
    assert pipeline.wandb_options(composed("offline=true", "logger=wandb"))["mode"] == "offline"
    assert pipeline.wandb_options(composed()) is None


def test_the_project_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert pipeline.wandb_options(composed("logger=wandb"))["project"] == "theirs"
    assert (
        pipeline.wandb_options(composed("logger=wandb", "logger.project=mine"))["project"] == "mine"
    )


def test_online_without_network_is_refused():
    _, problems = validation.validate(
        ["offline=true", "logger=wandb", "logger.mode=online"], multirun=False
    )
    assert problems == ["logger.mode=online with offline=true: choose one"]


def test_a_run_folder_keeps_the_id_of_its_wandb_run(started, tmp_path):
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        with Tracker(tmp_path / folder, {}, {}):
            pass
    first, again, other = (given["id"] for given in started.given)
    assert first == again != other
    assert all(given["resume"] == "allow" for given in started.given)


def test_an_agents_run_is_its_own(started, tmp_path, monkeypatch):
    with Tracker(tmp_path, {}, {}):
        pass
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    with Tracker(tmp_path, {}, {}):
        pass
    assert started.given[1]["id"] is None, "W&B takes it from the environment"
    monkeypatch.delenv("WANDB_RUN_ID")
    with Tracker(tmp_path, {}, {}):
        pass
    assert started.given[2]["id"] == "agents", "and by hand it goes on as the same run"


def test_a_stage_that_starts_anew_draws_no_point_twice(started, tmp_path):
    started.run = FakeRun(resumed=True, **{"transfer/step": 5})
    with Tracker(tmp_path, {}, {}) as tracker:
        (_, curves) = tracker.loggers("transfer", tmp_path)
        for step in (3, 5, 7):
            curves.log_metrics({"train/loss": 0.5}, step)
        tracker.loggers("finetune", tmp_path)[1].log_metrics({"train/loss": 0.5}, 3)
        # the next member of an ensemble
        tracker.loggers("transfer", tmp_path)[1].log_metrics({"train/loss": 0.5}, 1)
    # at the last step known there may be more to say
    assert [
        (name, point[name])
        for point in started.run.history
        for name in point
        if name.endswith("/step")
    ] == [
        ("transfer/step", 5),
        ("transfer/step", 7),
        ("finetune/step", 3),
        ("transfer/step", 1),
    ]
    assert started.run.history[0]["transfer/train/loss"] == 0.5


def test_only_what_is_asked_to_track_talks_to_wandb(started, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    with Tracker(tmp_path, {}, None) as tracker:
        assert len(tracker.loggers("transfer", tmp_path)) == 1
        tracker.summary({"test/accuracy": 1.0})
    assert not started.given


def test_a_failure_of_wandb_to_start_is_told_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    def fail(**_):
        raise RuntimeError("no network")

    monkeypatch.setattr("wandb.init", fail)
    with Tracker(tmp_path, {}, {}) as tracker:
        (curves,) = tracker.loggers("transfer", tmp_path)
        curves.log_metrics({"train/loss": 1.0}, 0)
        tracker.summary({"test/accuracy": 1.0})
    assert [r.getMessage() for r in caplog.records] == [
        "W&B failed and is off for the rest of this run: no network"
    ]


def test_a_failure_of_wandb_is_told_once_and_no_more_is_said(started, tmp_path, caplog):
    def fail(_):
        raise RuntimeError("no network\nat all")

    started.run.log = fail
    with Tracker(tmp_path, {}, {}) as tracker:
        tracker.point("transfer", {"train/loss": 1.0}, 0)
        tracker.point("transfer", {"train/loss": 1.0}, 1)
        tracker.summary({"test/accuracy": 1.0})
    assert [r.getMessage() for r in caplog.records] == [
        "W&B failed and is off for the rest of this run: no network"
    ]
    assert not started.run.summary


# --- with W&B itself, offline --------------------------------------------------------------------


def records(log):
    """(type, content) of what W&B wrote to a file."""
    wandb = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    lines = subprocess.run(wandb, capture_output=True, text=True, check=True).stdout.splitlines()
    return [(line["type"], line[line["type"]]) for line in map(json.loads, lines)]


def merged(found, kind):
    return {k: v for name, content in found if name == kind for k, v in content["update"].items()}


@pytest.mark.slow
@pytest.mark.xdist_group("pipeline")
def test_an_offline_run_holds_name_configuration_curves_and_results(cache_dir, tmp_path):
    out = tmp_path / "out"
    done = launch(
        cache_dir, out, "logger=wandb", "logger.mode=offline", "seed=3", WANDB_MODE="online"
    )
    assert done.returncode == 0, done.stderr
    (log,) = out.glob("wandb/offline-run-*/run-*.wandb")
    assert f"wandb sync {log.parent}" in (out / "flare_exp.log").read_text()
    found = records(log)
    (run,) = (content for name, content in found if name == "run")
    assert (
        run["run_id"],
        run["display_name"],
        run["run_group"],
        run["job_type"],
        run["project"],
    ) == (
        (out / "wandb_id").read_text(),
        "flare_add_relu-toy-seed3",
        "toy_sentiment-far-tiny",
        "flare",
        "flare_exp",
    )
    settings = run["config"]["update"]
    assert (settings["transfer.epochs"], settings["fusion.name"], settings["seed"]) == (
        2,
        "add_relu",
        3,
    )
    summary, measured = merged(found, "summary"), result(out)
    for block in ("test", "english", "zero_shot"):
        assert {k: summary[f"{block}/{k}"] for k in measured[block]} == pytest.approx(
            measured[block]
        )
    history = [content["item"] for name, content in found if name == "history"]
    for stage in ("finetune", "transfer"):
        scores = [
            point[f"{stage}/validation/macro_f1"]
            for point in history
            if f"{stage}/validation/macro_f1" in point
        ]
        assert len(scores) == 2, "one per epoch"
        assert summary[f"{stage}/validation/macro_f1"] == pytest.approx(max(scores), abs=1e-5), (
            "of the weights that were kept"
        )
        steps = [point[f"{stage}/step"] for point in history if f"{stage}/step" in point]
        assert steps == sorted(steps)
        assert steps[-1] == 3, "counted from 0 in each stage"
    # every sweep's metric is one of these, up to the metric of its task
    logged = {name.replace("macro_f1", "*") for name in summary}
    assert {
        yaml.safe_load(f.read_text())["metric"]["name"].rpartition("/")[0] + "/*"
        for f in sweep_files()
    } <= logged


@pytest.mark.slow
@pytest.mark.xdist_group("pipeline")
def test_a_run_that_was_killed_goes_on_as_the_same_run(cache_dir, tmp_path):
    overrides = ("logger=wandb", "logger.mode=offline", "seed=4")
    log = tmp_path / "flare_exp.log"
    killed = processes.Run(command(cache_dir, f"output_dir={tmp_path}", *overrides))
    while "finetune: " not in (log.read_text() if log.exists() else ""):
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    first = (tmp_path / "wandb_id").read_text()
    done = launch(cache_dir, tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "wandb_id").read_text() == first
    parts = sorted(tmp_path.glob(f"wandb/offline-run-*-{first}"))
    assert len(parts) == 2
    assert f"wandb sync {parts[0]} {parts[1]}" in log.read_text()


def watched(folder):
    """Begin a run in `folder` that writes the settings of each process, and its calls of
    wandb.init, to folder/witness.
    """
    import wandb

    def tell(name, what):
        (folder / "witness" / f"{name}-{os.getpid()}").write_text(json.dumps(what))

    def settle(cfg, real=pipeline.resolve_hardware):
        cfg = real(cfg)
        tell("settled", asdict(cfg))
        return cfg

    def init(*args, real=wandb.init, **given):
        tell("init", given["name"])
        return real(*args, **given)

    os.chdir(folder)
    pipeline.resolve_hardware, wandb.init = settle, init


def started_by(agent, folder, cache, values):
    """The folder of a tiny run that W&B's agent has started."""
    tiny = dict(o.split("=") for o in [*TINY, f"cache_dir={cache}"])
    process = agent.start({**tiny, **values}, run_id="agents01")
    start = ["/usr/bin/env", "python", "-m", "flare_exp"]
    assert process.command[: len(start)] == start
    run = processes.Run(
        [*processes.PROGRAM, *process.command[len(start) :]],
        {**process.env, "WANDB_MODE": "offline"},
        before=functools.partial(watched, folder),
    )
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    return folder / "outputs" / "sweeps" / "agents01"


@pytest.mark.slow
@pytest.mark.xdist_group("pipeline")
def test_what_an_agent_starts_is_its_run_with_its_values_in_every_process(
    cache_dir, tmp_path, monkeypatch
):
    """One of the processes talks to W&B."""
    (sweep,) = (yaml.safe_load(f.read_text()) for f in sweep_files() if f.stem == "toy")
    (witness := tmp_path / "witness").mkdir()
    values = {
        "trainer": "ddp_cpu",
        "task.lang": "near",
        "method": "lora",
        "transfer.lr": 0.001,
        "seed": 1,
    }
    out = started_by(Agent(sweep, tmp_path, monkeypatch), tmp_path, cache_dir, values)
    measured = result(out)
    assert (measured["lang"], measured["method"], measured["seed"]) == ("near", "lora", 1)
    leader, follower = (json.loads(f.read_text()) for f in witness.glob("settled-*"))
    assert leader == follower
    assert (
        leader["method"]["name"],
        leader["transfer"]["lr"],
        leader["seed"],
        leader["trainer"]["devices"],
    ) == (
        "lora",
        0.001,
        1,
        2,
    )
    assert len(list(witness.glob("init-*"))) == 1
    (log,) = out.glob("wandb/offline-run-*/*.wandb")
    assert log.name == "run-agents01.wandb"
    (run,) = (content for name, content in records(log) if name == "run")
    assert (run["run_id"], run["sweep_id"], run["display_name"]) == (
        "agents01",
        "sweep1",
        "lora-toy-seed1",
    )
    settings = run["config"]["update"]
    assert (settings["method"], settings["method.name"], settings["task.lang"]) == (
        "lora",
        "lora",
        "near",
    )
    assert settings["mt.noise"] == 0.1, "nothing is lost below the groups that the sweep sets"
