"""`python -m flare_exp export run=RUN to=FOLDER [options]`: make a finished run shareable.

FOLDER gets the adapter in PEFT's format, the English adapter or model below it, what is needed to
read texts in the same way (reading.json), and a model card (README.md). No path of this machine is
in it. flare_exp.load("FOLDER") loads it.

  run=RUN            the run folder; [A,B,C]: runs that differ in the seed alone. The model of the
                     first is exported, and the scores of all are reported
  to=FOLDER          a new folder
  format=lora        one plain LoRA, which PEFT loads without flare_exp; the English fine-tuning is
                     in it. Not for adapters that fuse [flare]
  base=ID[@COMMIT]   hub id of the base model, if the run read it from a folder; its commit, if it
                     is not the newest
  mt_base=ID[@COMMIT]  the same for the translation model; method=flare_mt needs it
  license=NAME       the hub's name of a license, e.g. apache-2.0, cc-by-4.0 [unknown]
  push=OWNER/NAME    the hub repository for the folder, also --push OWNER/NAME. Without run=, the
                     folder is one that was exported before. Its model card may have been edited
  dry_run=false      really upload [true: only list files, sizes and visibility]
  private=false      make a new repository public [true]

Examples:
  python -m flare_exp export run=outputs/my_run to=outputs/shared license=apache-2.0
  python -m flare_exp export run=[outputs/grid/0,outputs/grid/1] to=outputs/shared
  python -m flare_exp export run=outputs/my_lora to=outputs/lora format=lora
  python -m flare_exp export to=outputs/shared push=me/my-adapter
  python -m flare_exp export to=outputs/shared push=me/my-adapter dry_run=false

docs/export.md has more.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from flare_exp.cli.commandline import parsed
from flare_exp.errors import UserError
from flare_exp.utils.suggestions import nearest

OPTIONS = (
    "run", "to", "format", "base", "mt_base", "license", "push", "dry_run", "private",
)  # fmt: skip
FORMATS = ("flare", "lora")
ONLY_NEW = ("base", "mt_base", "format", "license")
SWITCHES = {"true": True, "false": False}
HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"
RULES = {
    "base": (rf"{HUB_ID}(@[0-9a-f]{{40}})?", "a hub id, owner/name, with @<commit> or without"),
    "mt_base": (rf"{HUB_ID}(@[0-9a-f]{{40}})?", "a hub id, owner/name, with @<commit> or without"),
    "push": (r"\w[\w.-]*/\w[\w.-]*", "a repository of the hub, owner/name"),
    "license": (r"[a-z0-9][a-z0-9.-]*", "the hub's name of a license, e.g. apache-2.0, or unknown"),
    "format": ("|".join(FORMATS), f"one of {', '.join(FORMATS)}"),
    "dry_run": ("true|false", "true or false"),
    "private": ("true|false", "true or false"),
}
DEFAULTS = {"format": "flare", "license": "unknown", "dry_run": "true", "private": "true"}


def parse(arguments: Sequence[str]) -> Namespace:
    """Read the words of the command line.

    Raises:
        UserError: an option or its value is wrong; one message names all mistakes.
    """
    found, problems = parsed(arguments, "words", ("--push",))
    given = {"push": found.push} if found.push else {}
    for word in found.words:
        key, equals, value = word.partition("=")
        if key not in OPTIONS or not equals:
            known = f"{', '.join(OPTIONS)}{nearest(key, OPTIONS)}"
            problems.append(f"{word}: not an option=value; options: {known}")
        elif not value:
            problems.append(f"{key}: needs a value")
        else:
            given[key] = value
    for key, (pattern, allowed) in RULES.items():
        if key in given and not re.fullmatch(pattern, given[key]):
            problems.append(f"{key}={given[key]}: must be {allowed}")
    runs = [name.strip() for name in given.pop("run", "").strip("[]").split(",") if name.strip()]
    if not Path(given.get("to", "")).name:
        problems.append("to: name the folder of the export, to=<folder>")
    if not runs and "push" not in given:
        problems.append("run: name a run folder, run=<folder>, or push=<repository> to upload to=")
    if not runs and (unused := [key for key in ONLY_NEW if key in given]):
        problems.append(f"{', '.join(unused)}: for a new export; give run=, too, or leave it out")
    if problems:
        raise UserError("; ".join(problems))
    whole = {**dict.fromkeys(("base", "mt_base", "push")), **DEFAULTS, **given}
    switches = {key: SWITCHES[str(whole[key])] for key in ("dry_run", "private")}
    places = {"to": Path(str(given["to"])).expanduser()}
    return Namespace(**{**whole, **switches, **places}, runs=[Path(r).expanduser() for r in runs])


def main(arguments: Sequence[str]) -> int:
    """Export a run, or push what was exported; return the exit code."""
    given = parse(arguments)
    if given.runs:
        from flare_exp.export.writing import Request, export

        options = (given.format, given.base, given.mt_base, given.license, given.push)
        for note in export(Request(given.runs, given.to, *options)):
            print(f"note: {note}", file=sys.stderr)
    if given.push is None:
        show(given.to)
        if given.license == "unknown":
            print("license: unknown; give license=<name>, or write it into README.md")
        return 0
    upload(given)
    return 0


def show(folder: Path) -> None:
    """Print the files of an exported folder, and their sizes."""
    from flare_exp.cli.plan import size
    from flare_exp.export.pushing import files_of

    files = files_of(folder)
    for name, count in files.items():
        print(f"{size(count):>8}  {name}")
    print(f"{size(sum(files.values())):>8}  {len(files)} files in {folder}")


def upload(given: Namespace) -> None:
    """Print what is uploaded, and upload it unless it is a dry run."""
    from flare_exp.export import pushing

    pushing.check(given.to)
    show(given.to)
    visibility = "private" if given.private else "public"
    print(f"to the model repository {given.push}; {visibility}, unless it is there already")
    if given.dry_run:
        print("a dry run: nothing was sent; to send it: dry_run=false, without run=")
    else:
        print(f"sent: {pushing.push(given.to, given.push, given.private)}")
