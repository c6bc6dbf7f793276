"""Wrong command lines of `export`: one message each."""

from pathlib import Path

import pytest

from flare_exp.cli.export import parse
from flare_exp.errors import UserError


def test_all_mistakes_of_a_command_line_are_in_one_message():
    with pytest.raises(UserError) as found:
        parse(["rum=a", "x", "format=gguf", "base=./folder", "push=me", "dry_run=no", "--pull"])
    known = "run, to, format, base, mt_base, license, push, dry_run, private"
    assert str(found.value).split("; ") == [
        "--pull: there is no such flag",
        "allowed: --push, --help",
        "did you mean --push?",
        "rum=a: not an option=value",
        f"options: {known}",
        "did you mean run?",
        "x: not an option=value",
        f"options: {known}",
        "base=./folder: must be a hub id, owner/name, with @<commit> or without",
        "push=me: must be a repository of the hub, owner/name",
        "format=gguf: must be one of flare, lora",
        "dry_run=no: must be true or false",
        "to: name the folder of the export, to=<folder>",
        "base, format: for a new export",
        "give run=, too, or leave it out",
    ]
    with pytest.raises(UserError, match=r"run: name a run folder.*upload to=$"):
        parse(["to=a"])


def test_several_runs_are_given_with_or_without_brackets():
    for words in ("run=[a/0,a/1]", "run=a/0,a/1"):
        given = parse([words, "to=b"])
        assert given.runs == [Path("a/0"), Path("a/1")]
        assert (given.dry_run, given.private, given.license) == (True, True, "unknown")
    assert parse(["--push", "me/it", "to=b"]).push == "me/it"
