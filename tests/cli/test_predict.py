"""`predict` and `serve` from the command line: mistakes, and what a killed command goes on with."""

import csv
import io
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from run_folders import finished, predicted, traced

import flare_exp
from flare_exp.cli import analyse, predict, serve
from flare_exp.cli.commandline import normalized
from flare_exp.cli.main import main
from flare_exp.cli.predict import parse
from flare_exp.config import validation
from flare_exp.errors import UserError
from flare_exp.experiment.overriding import overridden
from flare_exp.serving import prediction
from flare_exp.translation.command import CommandEngine
from flare_exp.utils.signals import StopRequested


def said(capsys, *words):
    code = main([*map(str, words)])
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    return line.removeprefix(f"flare_exp {words[0]}: ")


def test_texts_are_taken_literally(tmp_path):
    given = parse(["run=r", 'text=a, b="c" {d} $e', "mt.path=/a b/c", "out=x.csv"])
    assert given.texts == {"text": 'a, b="c" {d} $e'}
    assert given.options == ["mt.path='/a b/c'"]
    with pytest.raises(UserError) as failure:
        parse(["text=", "--all", "out=a", "out=b"])
    assert str(failure.value).split("; ") == [
        "text=: needs a value",
        "--all: there is no such flag",
        "allowed: --help",
        "out=: is given twice",
        "name a run: run=<run folder>",
    ]
    with pytest.raises(UserError, match="runs=: there is no such key; did you mean run"):
        parse(["runs=outputs/1", "text=a"])


def test_options_of_a_loaded_run_are_taken_literally():
    """In Python as on the command line, where they come quoted already."""
    (job,), _ = validation.validate([], multirun=False)
    cfg = OmegaConf.to_object(job)
    path = "~/a=b, c {d}"
    for word in (f"cache_dir={path}", *normalized([f"cache_dir={path}"])):
        assert overridden(cfg, [word]).cache_dir == str(Path(path).expanduser())
    assert overridden(cfg, ["mt=nllb_600m", "mt.revision=1.10"]).mt.revision == "1.10"
    with pytest.raises(UserError, match="offline: not of the form key=value"):
        overridden(cfg, ["offline"])


@pytest.fixture
def folder(tmp_path):
    return traced(predicted(finished(tmp_path / "run", "task=toy_nli", "method=lora"), [], []))


def test_all_mistakes_are_in_one_message(folder, tmp_path, capsys):
    (tmp_path / "old.csv").write_text("")
    line = said(
        capsys, "predict", f"run={folder}", "premis=a", "premise=b", f"out={tmp_path / 'old.csv'}",
        "mt=tony", "file=a.txt",
    )  # fmt: skip
    for problem in (
        "mt=tony: choose one of",
        "premis: there is no such key; run, file, split, out, premise, hypothesis, source_premise,",
        "did you mean premise?",
        'give one of premise="..." hypothesis="...", file=FILE and split=test',
        "file=a.txt: must end in .jsonl, .csv, .tsv, .parquet",
        "old.csv: is there already; choose another file, or remove it",
    ):
        assert problem in line
    assert said(capsys, "predict", f"run={folder}", "premise=b") == "hypothesis=: is missing"
    asked = f"run={folder}", "premise=a", "hypothesis=b"
    both = "source_premise=a", "source_hypothesis=b"
    assert said(capsys, "predict", *asked, both[0]) == "source_hypothesis=: is missing"
    assert "method=lora reads no source" in said(capsys, "predict", *asked, *both)
    assert "no finished run" in said(capsys, "predict", f"run={tmp_path}", "text=a")


def test_a_run_without_a_model_or_a_translator_is_refused(tmp_path, capsys):
    words = {"ensemble": ["method=ensemble"], "gold": ["mt=gold"]}
    for name, overrides in words.items():
        traced(predicted(finished(tmp_path / name, *overrides), [], []))
    (tmp_path / "ensemble" / "english").mkdir()
    line = said(capsys, "predict", f"run={tmp_path}/ensemble", "text=a")
    assert line.startswith(f"{tmp_path}/ensemble: adapter_lora is missing in it; give the run's")
    line = said(capsys, "predict", f"run={tmp_path}/gold", "text=a")
    assert line.startswith("mt=gold: the run's translations were looked up")


def test_wrong_options_of_the_server(monkeypatch, capsys):
    line = said(capsys, "serve", "prt=1", "port=70000", "max_texts=0", "run=r", "host=0.0.0.0")
    assert line.split("; ") == [
        "prt: there is no such key",
        f"{', '.join(serve.KEYS)}",
        "did you mean port?",
        "port=70000: must be a whole number, 0 to 65535",
        "max_texts=0: must be a whole number, 1 to 1000000000",
        "host=0.0.0.0: others can reach it, so it needs a token: set FLARE_EXP_TOKEN or token=...",
    ]
    for token in ("pässwort", "two\nlines", " s"):
        line = said(capsys, "serve", "run=r", f"token={token}")
        assert line.startswith("token: must be printable ASCII")
    line = said(capsys, "serve", "run=r", "max_waiting=100")
    assert line.startswith("max_texts=256 max_waiting=100: a request with more than 100 texts")
    monkeypatch.setenv("FLARE_EXP_TOKEN", "s")
    assert serve.token_of(serve.parse(["run=r", "host=0.0.0.0"])) == "s"
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert said(capsys, "serve", "run=r") == (
        "fastapi is not installed; pip install 'flare-exp[serve]'"
    )


def test_a_signal_while_a_model_is_built_is_one_line(monkeypatch, capsys):
    def stopped(_):
        raise StopRequested(signal.SIGINT, "after 5 steps of pre-training")

    monkeypatch.setattr(predict, "main", stopped)
    assert main(["predict", "run=r", "text=a"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flare_exp predict: stopped by SIGINT after 5 steps of pre-training;")


def test_a_program_translates_no_longer_than_a_request_waits():
    for own, expected in ((3600.0, 60), (5.0, 5.0)):
        machine = SimpleNamespace(model=CommandEngine("cat {from} {to}", timeout=own))
        serve._limit_translator(machine, 60)
        assert machine.model.timeout == expected


def test_a_port_that_another_server_takes_meanwhile_is_refused(capsys):
    """Both have bound it before one of them listens."""
    with serve._bound(serve.parse(["run=r", "port=0"])) as first:
        port = first.getsockname()[1]
        with serve._bound(serve.parse(["run=r", f"port={port}"])) as second:
            serve._listen(first, port)
            with pytest.raises(UserError, match=f"port={port}: another server has taken it"):
                serve._listen(second, port)


class Offline(Exception):
    """Carries whether the hub must not be asked."""


@pytest.fixture
def asked(monkeypatch):
    """Calls what loads a run; whether it goes without the hub, before anything heavy is read."""

    def stop(wanted):
        raise Offline(wanted)

    def call(load, *words):
        with pytest.raises(Offline) as said:
            load(*words)
        return said.value.args[0]

    monkeypatch.setattr("flare_exp.hub.offline", stop)
    monkeypatch.setitem(sys.modules, "flare_exp.experiment.loading", None)
    monkeypatch.delattr("flare_exp.experiment.loading", raising=False)
    return call


@pytest.mark.parametrize(
    ("stored", "words", "offline"),
    [
        ("offline: true", [], True),
        ("offline: false", [], False),
        ("seed: 1", [], False),
        ("offline: [", [], False),
        ("offline: true", ["offline=false"], False),
        ("offline: false", ["offline=false", "offline=On"], True),
        ("offline: false", ["offline=1"], True),
    ],
)
def test_a_run_is_loaded_offline_as_it_was_made_or_as_the_last_word_says(
    tmp_path, asked, stored, words, offline
):
    (tmp_path / "config.yaml").write_text(stored)
    assert asked(flare_exp.load, tmp_path, *words) is offline


def test_commands_go_without_the_hub_as_the_run_did(tmp_path, asked):
    (tmp_path / "config.yaml").write_text("offline: true")
    for command in (predict, serve):
        assert asked(command.main, [f"run={tmp_path}"]) is True
    assert asked(analyse.main, [str(tmp_path)]) is True


@pytest.mark.slow
@pytest.mark.xdist_group("serving")
def test_a_stopped_command_goes_on_and_ends_as_an_uninterrupted_one(
    flare_folder, toy_texts, tmp_path, monkeypatch, capsys
):
    rows = [{"id": f"n{i}", "text": text} for i, text in enumerate(toy_texts)]
    rows[3]["source"] = "given"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["predict", f"run={flare_folder}", f"file={tmp_path / 'a.jsonl'}"]
    assert main([*words, f"out={tmp_path / 'whole.csv'}"]) == 0
    predict_rows = prediction.predict_rows

    def stopped(run, rows):
        for number, row in enumerate(predict_rows(run, rows)):
            if number == 14:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(prediction, "predict_rows", stopped)
        assert main([*words, f"out={tmp_path / 'b.csv'}"]) == 130
    assert "what is predicted is kept" in capsys.readouterr().err
    assert not (tmp_path / "b.csv").exists()
    assert main([*words, f"out={tmp_path / 'b.csv'}"]) == 0
    assert "30 rows, 12 of them predicted before" in capsys.readouterr().out
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    with (tmp_path / "b.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row["text"] for row in found] == toy_texts
    assert found[3]["source"] == "given"
    assert "gold" not in found[0]


@pytest.mark.parametrize(("width", "seen"), [(80, False), (300, True)])
def test_a_narrow_terminal_shows_the_answer_whole(width, seen):
    labels = ["science/technology", "entertainment", *"abcde"]
    row = {"text": "a b " * 50, "source": "c d " * 50, "prediction": labels[0], "probability": 0.5}
    row |= {f"probability_{label}": 0.125 for label in labels} | {"cut": False}
    console = Console(width=width, file=io.StringIO())
    console.print(predict._fitting(console, [row], ["text"]))
    printed = console.file.getvalue()
    for words in ("a b ", "prediction", labels[0], "0.500"):
        assert words in printed
    for words in ("source", "probability_b", "0.125"):
        assert (words in printed) == seen
    assert ("out=FILE has the other columns" in printed) != seen


@pytest.mark.slow
@pytest.mark.xdist_group("serving")
def test_a_table_on_the_terminal(flare_folder, capsys):
    words = ["predict", f"run={flare_folder}", "text=[b]hello", "source=hi"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "[b]hello" in printed
    assert "probability_neutral" in printed
    assert main([*words[:2], "split=test"]) == 2
    assert "give out=FILE" in capsys.readouterr().err
