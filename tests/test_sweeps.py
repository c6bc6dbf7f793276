"""sweeps/: what a W&B agent would run composes, and the scripts that read runs tell cells apart and draw what is there."""

import importlib.util
import itertools
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import yaml

from flare_exp import config
from flare_exp.commandline import normalised
from flare_exp.tasks import TASKS


def sweep_files():
    return sorted((config.conf_dir().parent / "sweeps").glob("*.yaml"))


class Agent:
    """W&B's own agent, up to the moment where it starts a process."""

    def __init__(self, sweep, folder, monkeypatch):
        from wandb import wandb_agent

        for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets these here too
            monkeypatch.setenv(name, "")
        monkeypatch.setenv("WANDB_DIR", str(folder))
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
        monkeypatch.setattr(wandb_agent, "AgentProcess", SimpleNamespace)
        self.program, self.agent = sweep["program"], wandb_agent.Agent(api=None, queue=None, sweep_id="sweep1")
        self.agent._sweep_command = list(sweep["command"])

    def start(self, values, run_id="run1"):
        """The process of a run: `command`, `env`."""
        given = {name: {"value": value} for name, value in values.items()}
        answer = self.agent._process_command({"type": "run", "run_id": run_id, "program": self.program, "args": given})
        assert "exception" not in answer, answer
        return self.agent._run_processes[run_id]


def cells(parameters):
    """Values of runs: every combination of groups' options and, along the way, every value of the rest (of a distribution, the
    ends)."""
    options = {name: choices(rule) for name, rule in parameters.items()}
    groups = [name for name in options if name in config.groups()]
    combinations = list(itertools.product(*(options[name] for name in groups)))
    for i in range(max(len(combinations), *map(len, options.values()))):
        along = {name: values[i % len(values)] for name, values in options.items()}
        yield {**along, **dict(zip(groups, combinations[i % len(combinations)], strict=True))}


def choices(rule):
    return [rule["value"]] if "value" in rule else rule.get("values") or [rule["min"], rule["max"]]


def check(process):
    """The job and the problems of what an agent starts."""
    environment, interpreter, *module = process.command[:4]
    assert (environment, interpreter, module) == ("/usr/bin/env", "python", ["-m", "flare_exp"])
    (job,), problems = config.check(normalised(process.command[4:]), multirun=False)
    return job, problems


@pytest.mark.parametrize("path", sweep_files(), ids=lambda path: path.stem)
def test_every_run_of_a_sweep_composes(path, tmp_path, monkeypatch):
    sweep = yaml.safe_load(path.read_text())
    agent = Agent(sweep, tmp_path, monkeypatch)
    for values in cells(sweep["parameters"]):
        assert None not in values.values(), "an agent writes None, which is a word for Hydra: use the word null"
        job, problems = check(agent.start(values, "run7"))
        assert not problems
        assert job.logger.name == "wandb"
        assert job.output_dir == "outputs/sweeps/run7"
        for name, value in values.items():
            assert value == (getattr(job, name).name if name in config.groups() else config.flat(as_dict(job))[name])
    searches, main_metric = sweep["method"] != "grid", TASKS[job.task.name].metric
    assert sweep["metric"]["name"] == ("transfer/validation/" if searches else "test/") + main_metric
    assert sweep["metric"]["goal"] == "maximize"


def as_dict(job):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(job, resolve=True)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"transfer.rl": 0.1}, "transfer.rl: there is no such option; did you mean transfer.lr?"),
        ({"method": "lora", "fusion": "mul"}, "fusion=mul with method=lora"),
        ({"trainer.enable_progress_bar": "no way"}, "trainer.enable_progress_bar=no way"),
    ],
)
def test_a_mistake_in_a_sweep_is_found(values, problem, tmp_path, monkeypatch):
    _, problems = check(Agent(yaml.safe_load(sweep_files()[0].read_text()), tmp_path, monkeypatch).start(values))
    assert len(problems) == 1
    assert problem in problems[0]


def test_every_kind_of_value_survives_the_agent(tmp_path, monkeypatch):
    agent = Agent(yaml.safe_load(sweep_files()[0].read_text()), tmp_path, monkeypatch)
    values = {"optim.eps": 1e-09, "transfer.lr": 2e-05, "trainer.enable_progress_bar": False, "mt.errors": ["drop", "swap"],
              "task.train_split": "train[:10]", "fusion.heads": "null", "logger.run_name": "two words"}  # fmt: skip
    job, problems = check(agent.start(values))
    assert not problems
    found = config.flat(as_dict(job))
    assert {name: found[name] for name in values} == {**values, "fusion.heads": None}
    assert os.environ["WANDB_RUN_ID"] == "run1"


def script(name):
    path = config.conf_dir().parent / "sweeps" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder, method, score, mt="gold", noise=0.0, chrf=None, seed=0, **source):
    metrics = {
        "task": "toy_sentiment", "lang": "far", "model": "tiny", "method": method, "mt": mt, "seed": seed,
        "fusion": None if method == "lora" else "add_relu", "test": {"accuracy": 0.1, "macro_f1": score},
        "english": {"accuracy": 0.9, "macro_f1": 0.9}, "seconds": {"transfer": 1.0},
        "translation": {"noise": noise, "chrf++": {} if chrf is None else {"en": chrf + 5, "far": chrf}},
        "source": {"shuffle": False, "empty": False, **source},
    }  # fmt: skip
    place = folder / f"{method}-{mt}-{noise}-{chrf}-{seed}-{'-'.join(source)}"
    place.mkdir(parents=True)
    (place / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        run(tmp_path, "lora", 0.4 + seed / 10, seed=seed)
        run(tmp_path, "flare", 0.8 + seed / 10, seed=seed)
        for mt_score in (60.0, 90.0):
            for method, score in (("lora", 0.3), ("flare", 0.6), ("flare_mt", 0.5)):
                run(tmp_path, method, score, "toy_nllb", chrf=mt_score, seed=seed)
        run(tmp_path, "flare", 0.35, "toy_nllb", chrf=90.0, seed=seed, shuffle=True)
        for method, score in (("lora", 0.2), ("flare", 0.5)):
            run(tmp_path, method, score, noise=0.4, chrf=50.0, seed=seed)
    return tmp_path


def test_gains_are_over_lora_on_the_same_translations_and_seed(runs):
    plot = script("plot_mt")
    gains = plot.gains(plot.read(runs))["toy_sentiment"]
    by_label = {label: points for (_, _, label), points in gains.items()}
    assert set(by_label) == {"FLARE", "FLARE MT", "FLARE, another example's source"}
    assert by_label["FLARE"] == {100.0: [pytest.approx(40)] * 2, 60.0: [pytest.approx(30)] * 2, 90.0: [pytest.approx(30)] * 2}
    assert by_label["FLARE MT"][60.0] == [pytest.approx(20)] * 2
    assert by_label["FLARE, another example's source"][90.0] == [pytest.approx(5)] * 2
    noisy = {label: points for (_, _, label), points in plot.noisy(plot.read(runs))["toy_sentiment"].items()}
    assert noisy["LoRA"] == {0.0: [pytest.approx(40), pytest.approx(50)], 40.0: [pytest.approx(20)] * 2}


def test_the_figures_are_drawn(runs, capsys):
    pytest.importorskip("matplotlib")
    script("plot_mt").main(runs)
    for name in ("gain_by_quality.png", "noise.png"):
        assert (runs / name).stat().st_size > 5000
        assert name in capsys.readouterr().out or name == "noise.png"


# --- the table of runs -----------------------------------------------------------------------------------------------


def finished(folder, *overrides, score=0.5, metrics=None):
    """A run folder as a run leaves it, as far as the table reads it."""
    (job,), problems = config.check(normalised(overrides), multirun=False)
    assert not problems
    folder.mkdir(parents=True)
    measured = {
        "task": job.task.name, "lang": job.task.lang, "model": job.model.name, "mt": job.mt.name,
        "method": job.method.name, "seed": job.seed, "test": {"accuracy": 0.1, "macro_f1": score},
        "fusion": job.fusion.name if job.method.name in config.FUSING_METHODS else None,
        "english": {"accuracy": 0.9, "macro_f1": 0.9}, "seconds": {"transfer": 1.0}, **(metrics or {}),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(job)))
    (folder / "metrics.json").write_text(json.dumps(measured))
    return folder


def table(capsys, *folders):
    """The exit code, and what is printed with the cells of its rows."""
    code = script("summarise").main([str(folder) for folder in folders])
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line[:1] in "│┃"]
    rows = [[part.strip() for part in re.split("[│┃]", line)[1:-1]] for line in lines]
    return code, printed, rows


def test_runs_that_differ_in_any_option_are_different_cells(tmp_path, capsys):
    for layer, base in (("ahead", 0.8), ("same", 0.6)):
        for seed in (0, 1):
            options = [f"fusion.source_layer={layer}", f"seed={seed}", f"output_dir={layer}{seed}"]
            finished(tmp_path / f"{layer}{seed}", *options, score=base + seed / 10)
    code, printed, rows = table(capsys, tmp_path)
    assert code == 0, printed.err
    head, *cells = rows
    assert head[:6] == ["model", "lang", "mt", "method", "fusion.source_layer", "seeds"]
    column = head.index("macro_f1")
    found = {row[4]: (row[5], row[column]) for row in cells}
    assert found == {"ahead": ("0,1", "85.0 ± 7.1"), "same": ("0,1", "65.0 ± 7.1")}


def test_only_options_that_differ_from_the_shipped_ones_need_a_column(tmp_path, capsys):
    """The defaults of a model or task, and what cannot change a result, tell no cells apart."""
    finished(tmp_path / "0", "model=tiny", "trainer=cpu", "data.workers=1")
    finished(tmp_path / "1", "model=tiny_decoder", "trainer=cpu", "output_dir=elsewhere")
    finished(tmp_path / "2", "model=tiny", "trainer=cpu", "seed=1", "trainer.devices=2", "trainer.strategy=ddp")
    finished(tmp_path / "3", "model=tiny", "trainer=cpu", "method=lora")
    finished(tmp_path / "4", "model=tiny", "trainer=cpu", "source.shuffle=true")
    measured = {"translation": {"noise": 0.4, "chrf++": {"en": 55.0, "far": 50.0}}}
    finished(tmp_path / "5", "trainer=cpu", "mt=gold", "mt.noise=0.4", "method=lora", metrics=measured)
    _, _, (head, *cells) = table(capsys, tmp_path)
    assert head[:5] == ["model", "lang", "mt", "method", "seeds"]
    assert {tuple(row[:5]) for row in cells} == {
        ("tiny", "far", "toy, 10% noise", "flare (add_relu)", "0,1"),
        ("tiny_decoder", "far", "toy, 10% noise", "flare (add_relu)", "0"),
        ("tiny", "far", "toy, 10% noise", "lora", "0"),
        ("tiny", "far", "toy, 10% noise", "flare (add_relu, shuffle source)", "0"),
        ("tiny", "far", "gold, 40% noise, chrF++ 50", "lora", "0"),
    }


def test_a_second_run_of_a_cell_and_seed_is_an_error_that_names_both(tmp_path, capsys):
    finished(tmp_path / "one", "seed=3", score=0.8)
    finished(tmp_path / "two", "seed=3", "logger=wandb", score=0.6)
    code, printed, rows = table(capsys, tmp_path)
    assert code == 2
    assert rows == []
    assert str(tmp_path / "one") in printed.err
    assert str(tmp_path / "two") in printed.err
    assert "seed 3" in printed.err
    # one folder that is given twice is one run
    assert table(capsys, tmp_path / "one", tmp_path / "one")[0] == 0


def test_half_and_damaged_runs_are_named_and_the_rest_is_shown(tmp_path, capsys):
    finished(tmp_path / "whole", metrics={"test": {"accuracy": 0.1, "macro_f1": 0.5, "new": 0.7}})
    finished(tmp_path / "older", "seed=1")
    damaged = {
        "torn": lambda run: (run / "metrics.json").write_text('{"task": "toy_sen'),
        "empty": lambda run: (run / "metrics.json").write_text("{}"),
        "list": lambda run: (run / "metrics.json").write_text("[1]"),
        "running": lambda run: (run / "metrics.json").unlink(),
        "bare": lambda run: (run / "config.yaml").unlink(),
        "cut": lambda run: (run / "config.yaml").write_text("model: {name: ["),
        "nothing": lambda run: (run / "config.yaml").write_text(""),
    }
    for seed, (name, damage) in enumerate(damaged.items(), start=2):
        damage(finished(tmp_path / name, f"seed={seed}"))
    wandb_file = tmp_path / "whole/wandb/run-1/files/config.yaml"
    wandb_file.parent.mkdir(parents=True)
    wandb_file.write_text("seed: {value: 0}")
    code, printed, (head, *cells) = table(capsys, tmp_path)
    assert code == 0
    assert [row[head.index("seeds")] for row in cells] == ["0,1"]
    assert cells[0][head.index("new")] == "-", "a metric that only some runs have is no mean over all"
    left_out = [line for line in printed.out.splitlines() if line.startswith("left out: ")]
    assert sorted(line.split(": ")[1] for line in left_out) == sorted(str(tmp_path / n) for n in damaged)
    assert table(capsys, tmp_path / "torn")[0] == 2, "no run at all"
    assert table(capsys, tmp_path / "nowhere")[0] == 2
