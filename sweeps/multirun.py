"""Run the grid of a W&B sweep file without W&B: one run after the other, or as SLURM jobs.

  python sweeps/multirun.py sweeps/nusax.yaml                     run after run; again: goes on
  python sweeps/multirun.py sweeps/nusax.yaml --with submit hydra.launcher.partition=gpu
  python sweeps/multirun.py sweeps/nusax.yaml --with plan         also: prefetch
  python sweeps/multirun.py sweeps/nusax.yaml model=xlmr_large    another value, or another option
  python sweeps/multirun.py sweeps/nusax.yaml --toy               the same on the generated world
  python sweeps/multirun.py sweeps/nusax.yaml --print             only show the command
  python sweeps/multirun.py sweeps/nusax.yaml --toy --print-sweep > twin.yaml    for `wandb sweep`

The runs are folders of outputs/sweeps/<name of the file>, or of `output_dir=...`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

# command -> words before the grid's
COMMANDS = {
    "run": ["-m"],
    "submit": ["submit"],
    "plan": ["plan", "-m"],
    "prefetch": ["prefetch"],
}
# option -> its value in the paper's tables -> the value on the generated world
TWINS = {
    "task": {"nusax": "toy_sentiment", "xnli": "toy_nli", "tydiqa": "toy_qa"},
    "model": {
        "xlmr_large": "tiny",
        "mt5_xl": "tiny_seq2seq",
        "llama31": "tiny_decoder",
        "gemma2": "tiny_gemma",
    },
}
LANGUAGES = ["near", "far"]
# translation model -> width of the tiny NLLB that replaces it
WIDTHS = {"nllb_600m": 64, "nllb_1b3_distilled": 80, "nllb_1b3": 96, "nllb_3b3": 128}


def choices(rule: dict[str, Any]) -> list[Any]:
    """Return the values of a parameter of a grid."""
    return [rule["value"]] if "value" in rule else rule["values"]


def rule_of(values: list[Any]) -> dict[str, Any]:
    """Return the parameter of a grid that has these values."""
    return {"value": values[0]} if len(values) == 1 else {"values": values}


def read(path: Path) -> dict[str, Any]:
    """Read the grid of a sweep file.

    Raises:
        ValueError: it is no grid.
    """
    try:
        sweep = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; files: sweeps/*.yaml") from None
    if not isinstance(sweep, dict) or sweep.get("method") != "grid":
        raise ValueError(f"{path}: only a sweep with `method: grid` can run without W&B")
    return sweep


def twin(sweep: dict[str, Any]) -> dict[str, Any]:
    """Return the same sweep on the generated world."""
    found: dict[str, dict[str, Any]] = {}
    for name, rule in sweep["parameters"].items():
        values = choices(rule)
        if name in TWINS:
            found[name] = rule_of([TWINS[name].get(value, value) for value in values])
        elif name == "task.lang":
            found[name] = rule_of(LANGUAGES)
        elif name == "mt":
            found[name] = {"value": "toy_nllb"}
            found["mt.pretrain.hidden_size"] = rule_of([WIDTHS[value] for value in values])
        else:
            found[name] = rule
    return {**sweep, "name": f"generated world: {sweep['name']}", "parameters": found}


def word(value: Any) -> str:
    """Return a value as a word of the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(word, value))}]" if isinstance(value, list) else str(value)


def overrides(sweep: dict[str, Any], folder: str, given: Sequence[str] = ()) -> list[str]:
    """Return the grid as words of a command line; the last axis varies fastest.

    Args:
        sweep: a grid.
        folder: the parent of the run folders.
        given: key=value words, which replace what the sweep has for the same key.
    """
    own = {"output_dir": folder} | {
        name: ",".join(map(word, choices(rule))) for name, rule in sweep["parameters"].items()
    }
    replaced = {text.partition("=")[0] for text in given}
    return [*(f"{name}={value}" for name, value in own.items() if name not in replaced), *given]


def command(words: Sequence[str], kind: str = "run") -> list[str]:
    """Return the command that runs, submits, plans or prefetches a grid."""
    return [sys.executable, "-m", "flare_exp", *COMMANDS[kind], *words]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a sweep, sweeps/*.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace or add values")
    parser.add_argument("--with", dest="kind", choices=COMMANDS, default="run", help="[run]")
    parser.add_argument("--toy", action="store_true", help="the twin on the generated world")
    parser.add_argument("--print", action="store_true", help="show the command")
    parser.add_argument("--print-sweep", action="store_true", help="show the sweep file for W&B")
    args = parser.parse_intermixed_args(arguments)
    if wrong := [text for text in args.overrides if "=" not in text]:
        parser.error(f"{wrong[0]}: not of the form key=value")
    try:
        sweep = read(args.file)
    except ValueError as error:
        parser.error(str(error))
    if args.toy:
        sweep = twin(sweep)
    if args.print_sweep:
        print(yaml.safe_dump(sweep, sort_keys=False, width=1000), end="")
        return 0
    folder = f"outputs/sweeps/{'toy/' if args.toy else ''}{args.file.stem}"
    words = command(overrides(sweep, folder, args.overrides), args.kind)
    if args.print:
        print(shlex.join(["python", *words[1:]]))
        return 0
    os.execv(words[0], words)


if __name__ == "__main__":
    sys.exit(main())
