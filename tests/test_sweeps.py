"""sweeps/: what a W&B agent would run composes, and the scripts that read runs tell cells apart and
draw what is there.
"""

import importlib.util
import itertools
import json
import os
import sys

import pytest
import yaml
from sweep_agent import Agent, sweep_files

from flare_exp.cli.commandline import normalized
from flare_exp.config import composition, validation
from flare_exp.config.options import flat
from flare_exp.tasks import TASKS


def cells(parameters):
    """Values of runs: every combination of groups' options and, along the way, every value of the
    rest (of a distribution, the ends).
    """
    options = {name: choices(rule) for name, rule in parameters.items()}
    groups = [name for name in options if name in composition.groups()]
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
    (job,), problems = validation.validate(normalized(process.command[4:]), multirun=False)
    return job, problems


@pytest.mark.parametrize("path", sweep_files(), ids=lambda path: path.stem)
def test_every_run_of_a_sweep_composes(path, tmp_path, monkeypatch):
    sweep = yaml.safe_load(path.read_text())
    agent = Agent(sweep, tmp_path, monkeypatch)
    for values in cells(sweep["parameters"]):
        assert None not in values.values(), (
            "an agent writes None, which is a word for Hydra: use the word null"
        )
        job, problems = check(agent.start(values, "run7"))
        assert not problems
        assert job.logger.name == "wandb"
        assert job.output_dir == "outputs/sweeps/run7"
        for name, value in values.items():
            assert value == (
                getattr(job, name).name
                if name in composition.groups()
                else flat(as_dict(job))[name]
            )
    if "task.lang" in sweep["parameters"]:
        assert sweep["parameters"]["task.lang"]["values"] == list(TASKS[job.task.name].languages)
    searches, main_metric = sweep["method"] != "grid", TASKS[job.task.name].metric
    assert (
        sweep["metric"]["name"] == ("transfer/validation/" if searches else "test/") + main_metric
    )
    assert sweep["metric"]["goal"] == "maximize"


def test_every_table_of_the_paper_has_its_sweeps():
    found = {path.stem for path in sweep_files()}
    benchmarks = {"nusax", "tydiqa", "xnli"}
    assert found >= benchmarks | {
        f"{kind}_{task}" for kind in ("fusions", "mt_size") for task in benchmarks
    }


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
    _, problems = check(
        Agent(yaml.safe_load(sweep_files()[0].read_text()), tmp_path, monkeypatch).start(values)
    )
    assert len(problems) == 1
    assert problem in problems[0]


def test_every_kind_of_value_survives_the_agent(tmp_path, monkeypatch):
    agent = Agent(yaml.safe_load(sweep_files()[0].read_text()), tmp_path, monkeypatch)
    values = {
        "optim.eps": 1e-09,
        "transfer.lr": 2e-05,
        "trainer.enable_progress_bar": False,
        "mt.errors": ["drop", "swap"],
        "task.train_split": "train[:10]",
        "fusion.heads": "null",
        "logger.run_name": "two words",
    }
    job, problems = check(agent.start(values))
    assert not problems
    found = flat(as_dict(job))
    assert {name: found[name] for name in values} == {**values, "fusion.heads": None}
    assert os.environ["WANDB_RUN_ID"] == "run1"


def script(name):
    path = composition.conf_dir().parent / "sweeps" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder, method, score, mt="gold", noise=0.0, chrf=None, seed=0, **source):
    metrics = {
        "task": "toy_sentiment",
        "lang": "far",
        "model": "tiny",
        "method": method,
        "mt": mt,
        "seed": seed,
        "fusion": None if method == "lora" else "add_relu",
        "test": {"accuracy": 0.1, "macro_f1": score},
        "english": {"accuracy": 0.9, "macro_f1": 0.9},
        "seconds": {"transfer": 1.0},
        "translation": {
            "noise": noise,
            "chrf++": {} if chrf is None else {"en": chrf + 5, "far": chrf},
        },
        "source": {"shuffle": False, "empty": False, **source},
    }
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
    assert by_label["FLARE"] == {
        100.0: [pytest.approx(40)] * 2,
        60.0: [pytest.approx(30)] * 2,
        90.0: [pytest.approx(30)] * 2,
    }
    assert by_label["FLARE MT"][60.0] == [pytest.approx(20)] * 2
    assert by_label["FLARE, another example's source"][90.0] == [pytest.approx(5)] * 2
    unmeasured = {"task": "xnli", "lang": "sw", "mt": "gold", "translation": {"chrf++": {}}}
    assert plot.chrf(unmeasured) is None, "translated by machine, without a human reference"
    noisy = {
        label: points
        for (_, _, label), points in plot.noisy(plot.read(runs))["toy_sentiment"].items()
    }
    assert noisy["LoRA"] == {
        0.0: [pytest.approx(40), pytest.approx(50)],
        40.0: [pytest.approx(20)] * 2,
    }


def test_the_figures_are_drawn(runs, capsys):
    pytest.importorskip("matplotlib")
    script("plot_mt").main(runs)
    for name in ("gain_by_quality.png", "noise.png"):
        assert (runs / name).stat().st_size > 5000
        assert name in capsys.readouterr().out or name == "noise.png"
