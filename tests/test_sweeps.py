"""sweeps/: every run of a grid and of its twin on the generated world composes, as a W&B agent and
as multirun.py start it; every command of the scripts does.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys

import assembly
import pytest
import yaml
from omegaconf import OmegaConf
from sweep_agent import Agent, sweep_files

from flare_exp.cli.commandline import normalized
from flare_exp.config import composition, validation
from flare_exp.config.options import flat
from flare_exp.tasks import TASKS

pytestmark = pytest.mark.xdist_group("sweeps")  # they share compositions

SWEEPS = composition.conf_dir().parent / "sweeps"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SWEEPS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


multirun = script("multirun")
GRIDS = [path for path in sweep_files() if yaml.safe_load(path.read_text())["method"] == "grid"]
TABLES = [path for path in GRIDS if path.stem != "toy"]


def values_of(rule):
    """Values of a parameter; of a distribution, its ends."""
    return [rule["min"], rule["max"]] if "min" in rule else multirun.choices(rule)


def words(parameters):
    return [f"{k}={','.join(map(str, values_of(rule)))}" for k, rule in parameters.items()]


def last(parameters):
    return {name: values_of(rule)[-1] for name, rule in parameters.items()}


def check(process):
    """The job and the problems of what an agent starts."""
    environment, interpreter, *module = process.command[:4]
    assert (environment, interpreter, module) == ("/usr/bin/env", "python", ["-m", "flare_exp"])
    (job,), problems = validation.validate(normalized(process.command[4:]), multirun=False)
    return job, problems


def languages_of(job):
    """The languages of a job's task, without the one that needs a pre-training of its own."""
    return [lang for lang in TASKS[job.task.name].languages if lang != "half"]


def plain(job):
    return assembly.comparable(OmegaConf.to_object(job))


@pytest.mark.parametrize("path", sweep_files(), ids=lambda path: path.stem)
def test_every_run_of_a_sweep_composes(path, tmp_path, monkeypatch):
    sweep = yaml.safe_load(path.read_text())
    parameters = sweep["parameters"]
    assert not any(None in values_of(rule) for rule in parameters.values()), (
        "an agent writes None, which is a word for Hydra: use the word null"
    )
    assert assembly.problems(words(parameters)) == set()
    values = last(parameters)  # one run as the agent starts it
    job, problems = check(Agent(sweep, tmp_path, monkeypatch).start(values, "run7"))
    assert not problems
    assert job.logger.name == "wandb"
    assert job.output_dir == "outputs/sweeps/run7"
    assert plain(job) == assembly.assembled(values)
    if "task.lang" in parameters:
        assert parameters["task.lang"]["values"] == languages_of(job)
    searches, main_metric = sweep["method"] != "grid", TASKS[job.task.name].metric
    assert (
        sweep["metric"]["name"] == ("transfer/validation/" if searches else "test/") + main_metric
    )
    assert sweep["metric"]["goal"] == "maximize"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_run_of_a_twin_composes(path):
    sweep = multirun.read(path)
    twin = multirun.twin(sweep)
    parameters = twin["parameters"]
    assert assembly.problems(words(parameters)) == set()
    given = [f"{name}={value}" for name, value in last(parameters).items()]
    (job,), problems = validation.validate(multirun.overrides(twin, "x", given), multirun=True)
    assert not problems
    assert plain(job) == assembly.assembled(last(parameters))
    assert parameters["task.lang"]["values"] == languages_of(job)
    assert twin["metric"]["name"] == f"test/{TASKS[job.task.name].metric}"
    for name, rule in sweep["parameters"].items():
        if name != "task.lang":
            new = "mt.pretrain.hidden_size" if name == "mt" else name
            assert len({*values_of(parameters[new])}) == len(values_of(rule))
    assert (job.task.name[:4], job.model.name[:4]) == ("toy_", "tiny")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_sweep_says_how_many_runs_it_has_and_how_to_start_them(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    (count,) = re.findall(r"([\d,]+) runs\.$", lines[0])
    axes = assembly.axes(multirun.overrides(multirun.read(path), "x"))
    assert int(count.replace(",", "")) == len(list(assembly.runs(axes)))
    assert f"wandb sweep sweeps/{path.name}" in "".join(lines)
    flags = []
    for line in lines:
        if "multirun.py" not in line:
            continue
        _, _, file, *rest = shlex.split(line.lstrip("# "), comments=True)
        assert file == f"sweeps/{path.name}"
        flags.append([text for text in rest if "=" not in text])
        if given := [text for text in rest if "=" in text]:
            assert not assembly.problems(multirun.overrides(multirun.read(path), "x", given))
    assert flags[:3] == [[], ["--with", "submit"], ["--toy"]]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (
            ["fusions_nusax", "task.lang=ace", "mt=gold", "fusion=add,mul"],
            "-m output_dir=outputs/sweeps/fusions_nusax task=nusax model=xlmr_large seed=0,1,2 "
            "task.lang=ace mt=gold fusion=add,mul",
        ),
        (
            ["mt_size_xnli", "--toy", "--with", "submit", "seed=0"],
            "submit output_dir=outputs/sweeps/toy/mt_size_xnli task=toy_nli model=tiny mt=toy_nllb "
            "mt.pretrain.hidden_size=64,80,96,128 method=lora,flare,flare_mt task.lang=near,far "
            "seed=0",
        ),
    ],
)
def test_a_sweep_file_becomes_a_command(arguments, printed, capsys):
    name, *rest = arguments
    assert multirun.main([str(SWEEPS / f"{name}.yaml"), *rest, "--print"]) == 0
    assert capsys.readouterr().out == f"python -m flare_exp {printed}\n"


def test_a_twin_is_a_sweep_of_its_own(capsys):
    assert multirun.main([str(SWEEPS / "rank.yaml"), "--toy", "--print-sweep"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == multirun.twin(multirun.read(SWEEPS / "rank.yaml"))
    assert printed["parameters"]["task"] == {"value": "toy_sentiment"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search.yaml"], "only a sweep with `method: grid` can run without W&B"),
        (["xlni.yaml"], "No such file or directory; files: sweeps/*.yaml"),
        (["xnli.yaml", "flare"], "flare: not of the form key=value"),
    ],
)
def test_what_cannot_become_a_command_is_refused(arguments, message, capsys):
    name, *rest = arguments
    with pytest.raises(SystemExit) as exit:
        multirun.main([str(SWEEPS / name), *rest])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_every_table_of_the_paper_has_its_sweeps():
    found = {path.stem for path in sweep_files()}
    benchmarks = {"nusax", "tydiqa", "xnli"}
    kinds = ("fusions", "mt_size", "flare_mt")
    assert found >= benchmarks | {f"{kind}_{task}" for kind in kinds for task in benchmarks}
    assert found >= {"source_layer", "rank"}


def as_dict(job):
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
    (found,) = assembly.problems(words({name: {"value": v} for name, v in values.items()}))
    assert problem in found


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        ("task=xnli,tydiqa method=lora,ensemble", "method=ensemble with task=tydiqa: "),
        ("model=tiny,gemma2 method=full,flare", "method=full with model.quantize=nf4: "),
        ("task=toy_nli method=lora,flare_mt", "method=flare_mt with mt=toy: "),
        ("method=lora,flare fusion.source_layer=same,next", "fusion.source_layer=next: "),
        ("task=nusax task.lang=ace,sw", "task.lang=sw: "),
        ("task=nusax seed=0,-1", "seed=-1: "),
    ],
)
def test_an_impossible_run_of_a_grid_is_found(axes, problem):
    assert any(found.startswith(problem) for found in assembly.problems(axes.split()))


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


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder of data and checkpoints, with a python that writes its words into $LOG and ends
    with $CODE where they match $FAILS, and with an apertium.
    """
    root = tmp_path_factory.mktemp("reader")
    for task, languages in {
        "nusax": ("eng", "ace", "jav", "ban"),
        "sib200": ("eng_Latn", "jav_Latn", "spa_Latn"),
        "xnli": ("en", "es", "sw"),
        "tydiqa": ("en", "sw"),
        "xquad": ("en", "es"),
    }.items():
        for lang in languages:
            (root / task / lang).mkdir(parents=True)
    (root / "bin").mkdir()
    for name, text in {
        "python": """printf '%s\\037' "$@" >> "$LOG"; echo >> "$LOG"
case "$*" in *${FAILS:-nothing}*) exit ${CODE:-0};; esac""",
        "apertium": "cat",
    }.items():
        (root / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (root / "bin" / name).chmod(0o755)
    return root


def started(reader, path, tmp_path, **environment):
    """The process of a script, and the words of each command of flare_exp that it starts."""
    log, folders = tmp_path / "log", dict.fromkeys(("E5", "MINILM", "DATA"), str(reader))
    done = subprocess.run(
        [path],
        capture_output=True,
        text=True,
        env={
            **folders,
            "PATH": f"{reader}/bin:{os.environ['PATH']}",
            "PYTHON": f"{reader}/bin/python",
            "OUT": str(tmp_path),
            "LOG": str(log),
            **environment,
        },
    )
    lines = [line.split("\x1f")[:-1] for line in log.read_text().splitlines()]
    return done, [words[2:] for words in lines if words[:2] == ["-m", "flare_exp"]]


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.sh")), ids=lambda path: path.stem)
def test_every_command_of_a_script_composes(path, reader, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{reader}/bin:{os.environ['PATH']}")
    done, commands = started(reader, path, tmp_path)
    assert done.returncode == 0, done.stderr
    folders = []
    for flag, *words in commands:
        if flag == "report":
            continue
        words = normalized(words if flag == "-m" else [flag, *words], flag == "-m")
        places = [word for word in words if word.startswith("output_dir=")]
        folders += places
        words = [word for word in words if word not in places]
        assert assembly.problems(words, multirun=flag == "-m") == set(), words
    assert folders
    assert len({*folders}) == len(folders)
    if path.stem in ("evidence", "reliability"):
        assert f"{len(folders)} runs, one after the other." in path.read_text()


def test_the_evidence_goes_on_after_a_failed_run_and_ends_when_it_is_stopped(reader, tmp_path):
    path, last = SWEEPS / "evidence.sh", "xquad/es_apertium_flare_s0"
    failed = {"FAILS": "task.lang=spa_Latn", "CODE": "1"}
    done, commands = started(reader, path, tmp_path, **failed)
    assert done.returncode == 1
    assert done.stderr.count("failed: ") == 15
    assert f"failed: {tmp_path}/sib200/spa_Latn_apertium_ensemble_s2" in done.stderr
    assert commands[-1][-1] == f"output_dir={tmp_path}/{last}"
    (tmp_path / "log").unlink()
    done, commands = started(reader, path, tmp_path, **{**failed, "CODE": "130"})
    assert done.returncode == 130
    assert "spa_Latn_apertium_zero_shot_s0" in commands[-1][-1]
