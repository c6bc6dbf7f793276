"""Wrong command lines of `analyse`, and runs that cannot be analyzed: one message each."""

import pytest
from run_folders import finished, predicted, traced

from flare_exp.cli.analyse import parse
from flare_exp.cli.main import main


def said(capsys, *words):
    code = main(["analyse", *map(str, words)])
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    return line.removeprefix("flare_exp analyse: ")


def test_all_mistakes_of_a_command_line_are_in_one_message(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert said(capsys) == "name one run: python -m flare_exp analyse <run folder>"
    line = said(capsys, "a", "b", "--row=3", "--rows", "0", "--out", tmp_path / "file")
    assert line.split("; ") == [
        "--row=3: there is no such flag",
        "allowed: --rows, --lang, --out, --help",
        "did you mean --rows?",
        "name one run: python -m flare_exp analyse <run folder>",
        "--rows 0: must be a whole number, 1 or more",
        f"--out {tmp_path / 'file'}: is a file",
        "name a folder",
    ]
    assert said(capsys, "a", "--out") == "--out: needs a value"


def test_the_numbers_go_into_the_run_folder_unless_another_is_named(tmp_path):
    given = parse([str(tmp_path)])
    assert (given.rows, given.out) == (100, tmp_path / "analysis")
    assert parse(["--out", str(tmp_path / "other"), "run"]).out == tmp_path / "other"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (None, "there is no finished run (metrics.json) in this folder"),
        (["method=ensemble", "method.of=[lora,flare]"], "is an ensemble of lora, flare"),
        (["source.empty=true"], "with source.empty=true the run read no source"),
        (["task.unseen=[near]"], "the run has several languages; choose one: --lang far"),
        (["method=input_fusion"], "method=input_fusion reads a text and its source as one input"),
    ],
)
def test_a_run_that_cannot_be_analyzed_is_refused(words, problem, tmp_path, capsys):
    place = tmp_path / "run"
    if words is not None:
        traced(predicted(finished(place, *words), [], []))
    line = said(capsys, place)
    assert problem in line
    assert str(place) in line
    assert not (place / "analysis").exists()
