"""Every command that README and docs show is one that the program takes."""

import json
import os
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest
from page import PAGES
from tables import own_data
from tutorial import NOTEBOOK

from flare_exp.cli import analyse, check_data, commandline, export, predict, report, serve
from flare_exp.config import composition, validation

ROOT = composition.conf_dir().parent
PARSED = {
    "analyse": analyse,
    "check-data": check_data,
    "export": export,
    "predict": predict,
    "report": report,
    "serve": serve,
}
START = re.compile(r"^ {4,}(?:\$ |srun )?python -m flare_exp ?")


def commands(page: Path) -> list[str]:
    """The arguments of each indented command of a page; a backslash continues a line."""
    text = page.read_text()
    if page.suffix == ".ipynb":  # the cells are indented, and what a pipe follows is left out
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
        text = textwrap.indent(re.sub(r" [|>] .*", "", "\n".join(cells)), "    ")
    text = text.replace("\\\n", " ")
    return [line[match.end() :] for line in text.splitlines() if (match := START.match(line))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a reader puts in place of <a folder>: data of some benchmarks, or a checkpoint."""
    root = tmp_path_factory.mktemp("reader")
    languages = ("xnli/en", "xnli/sw", "tydiqa/en", "tydiqa/sw", "xquad/en", "xquad/es")
    for place in (*languages, "sib200/eng_Latn", "sib200/jav_Latn"):
        (root / place).mkdir(parents=True)
    splits = {split: f"{split}.csv" for split in ("train", "validation", "test")}
    own = own_data(root, files={"en": splits, "far": splits}, id="id", parallel="true")
    own.rename(root / "reviews.yaml")
    (root / "outputs").mkdir()
    (root / "apertium").write_text("#!/bin/sh\n")  # a program that a page calls
    (root / "apertium").chmod(0o755)
    for name in ("en_train.csv", "far_test.csv", "more.jsonl"):
        (root / name).touch()
    return root


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: page.name)
def test_the_commands_of_a_page_are_taken(page, folder, monkeypatch):
    monkeypatch.chdir(folder)  # where the descriptions of a reader's own data are
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")  # and the programs
    for text in commands(page):
        if (
            "=<name>" in text or "<overrides" in text
        ):  # of something that the reader has yet to write
            continue
        first, *rest = shlex.split(re.sub("<[^>]*>", str(folder), text), comments=True) or [
            "--help"
        ]
        if first in commandline.COMMANDS or first == "submit":
            command, arguments = first, rest
        else:
            command, arguments = "run", [first, *rest]
        if command in PARSED:
            PARSED[command].parse(arguments)
        if command in ("status", *PARSED):
            continue
        if command == "plan":
            arguments = [a for a in arguments if not a.startswith("memory=")]
        if command == "submit":
            arguments.append("hydra/launcher=slurm")
        multirun = command in ("submit", "prefetch") or "-m" in arguments
        overrides = commandline.overrides(commandline.normalized(arguments))
        _, problems = validation.validate(overrides, multirun)
        assert not problems, f"{page.name}: {text}"


def test_the_first_look_is_a_grid_of_four_methods():
    printed = subprocess.run(
        ["make", "-n", "-C", str(ROOT), "run"], capture_output=True, text=True, check=True
    ).stdout
    (command,) = [line for line in printed.splitlines() if "-m flare_exp" in line]
    overrides = commandline.overrides(shlex.split(command.partition("flare_exp ")[2]))
    jobs, problems = validation.validate(overrides, multirun=True)
    assert not problems
    assert [job.method.name for job in jobs] == ["zero_shot", "translate_test", "lora", "flare"]


def test_the_pages_have_commands():
    assert len(commands(PAGES[0])) >= 10
    assert sum(len(commands(page)) for page in PAGES) > 50
    assert len(commands(NOTEBOOK)) == 5


def test_every_option_of_the_table_of_deviations_exists():
    """Those of one cell are given together.

    A benchmark and a fusion that have them all are beside them.
    """
    cells = re.findall(r"`([^`]*=[^`]*)`", (ROOT / "docs/deviations.md").read_text())
    assert len(cells) > 15
    for cell in cells:
        given = ["task=xnli", "fusion=cross_attn", *cell.split()]
        _, problems = validation.validate(commandline.normalized(given), multirun=False)
        assert not problems, cell
