"""Read a command line with Hydra's own parser, explain it in --help, and report its mistakes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from flare_exp.config import composition, schema
from flare_exp.config.quoting import quoted
from flare_exp.errors import UserError
from flare_exp.utils.suggestions import nearest

# Subcommand -> its flags (None: it reads its words itself) and its help. Each is a module
# flare_exp.cli.<name> with a function `main(arguments) -> exit code`.
COMMANDS: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "analyse": (
        None,
        "activations in the bottleneck, and similarity of English and target states, by layer",
    ),
    "check-data": (
        None,
        "look at your own data (task=custom): labels, scripts, repeated rows, every problem",
    ),
    "export": (
        None,
        "a folder of a finished run to share: adapter, model card; also to the hub, also as LoRA",
    ),
    "plan": (
        ("-m", "--multirun"),
        "what a run or a grid (-m) would build, need and take, without running it",
    ),
    "predict": (None, "labels or answers of new texts, with the model of a finished run"),
    "prefetch": (
        ("-m", "--multirun"),
        "fetch models and data from the hub, for runs without network",
    ),
    "report": (
        None,
        "tables of finished runs, with intervals and ranks, also as CSV, LaTeX, HTML",
    ),
    "serve": (None, "the same over HTTP, with a page to try it by hand"),
    "status": (("--timeline",), "what has become of the jobs of a grid"),
}
SUBMIT = """\
`python -m flare_exp submit key=value ...`: give the jobs of a grid to SLURM, and do not wait \
for them.

The same as `-m hydra/launcher=slurm`, which waits: one job array, from which finished and \
running jobs are left out, so that the
same command starts what is left. The cluster's own options are \
hydra.launcher.partition=..., hydra.launcher.timeout_min=... and
so on (conf/hydra/launcher/slurm.yaml). What has become of the jobs: \
python -m flare_exp status <output_dir>. docs/cluster.md"""
EXAMPLES = """\
  python -m flare_exp                                             FLARE on the \
embedded world, no network needed
  python -m flare_exp method=lora task.lang=near seed=1           plain LoRA, \
the near language, another seed
  python -m flare_exp -m method=zero_shot,lora,flare seed=0,1,2   a grid; shared stages run once
  python -m flare_exp fusion=cross_attn fusion.heads=2 trainer.max_epochs=3
  python -m flare_exp method=flare_mt mt=toy_nllb                 the source is \
a translation model's encoder
  python -m flare_exp model=tiny_decoder task=toy_qa              a Llama that writes answers
  python -m flare_exp model=llama31 task=xnli task.lang=sw        4-bit weights, \
LoRA in all linear layers
  python -m flare_exp model=custom model.path=./my_model task=nusax task.data_dir=./my_data \
task.lang=jav mt=gold
      An own checkpoint (a folder, or a hub id, which is downloaded) and own files, \
my_data/<language>/<split>.parquet.
      mt=gold takes the benchmark's human translations; without it, nusax is translated by \
NLLB 3.3B (13 GB)."""


def normalized(argv: Sequence[str], multirun: bool = False) -> list[str]:
    """Return a command line in the form that Hydra expects.

    Flags come before overrides. Slices, paths and texts that look like numbers are quoted where
    Hydra's grammar needs it, and mt=[a,b] is written out.

    Args:
        argv: the words of the command line.
        multirun: commas separate several values, as with -m.
    """
    overrides = [a for a in argv if "=" in a and not a.startswith("-")]
    flags = [
        # a bare one would take the first override for its value
        "--info=all" if a in ("--info", "-i") and _is_option(behind) else a
        for a, behind in zip(argv, [*argv[1:], "-"], strict=False)
        if a not in overrides
    ]
    several = multirun or bool({"-m", "--multirun"}.intersection(flags))
    return flags + [quoted(word, several) for a in overrides for word in written_out(a)]


def _is_option(word: str) -> bool:
    """Return whether a word is a flag or an override, and no value of a flag."""
    return word.startswith("-") or "=" in word


def written_out(override: str) -> list[str]:
    """Write mt=[a,b] as mt=a source.systems=[b]; return any other override as it is.

    Hydra would merge the two files of conf/mt into one translation system.
    """
    if not (found := re.fullmatch(r"mt=\[([^][,]+),([^][]+)\]", override)):
        return [override]
    return [f"mt={found[1].strip()}", f"source.systems=[{found[2].strip()}]"]


def _read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read a command line as Hydra does; the second value holds words that it does not know."""
    from hydra._internal.utils import get_args_parser

    return get_args_parser().parse_known_args(list(arguments))


def overrides(arguments: Sequence[str]) -> list[str]:
    """Return the key=value words of a Hydra command line, read with Hydra's own parser."""
    known, _ = _read(arguments)
    return list(known.overrides)


# Flags of Hydra that would run another configuration than the checked one.
ELSEWHERE = ("config_path", "config_name", "config_dir", "experimental_rerun")


def only_shown(arguments: Sequence[str]) -> bool:
    """Return whether a Hydra command line asks for the configuration instead of a run."""
    known, _ = _read(arguments)
    return bool(known.cfg or known.info)


def flag_problems(arguments: Sequence[str]) -> list[str]:
    """Return a message for each flag that Hydra does not have, and for flags that exclude others.

    Hydra raises an error for the latter.
    """
    known, unknown = _read(arguments)
    problems = [
        f"{flag}: there is no such flag; options are given as key=value, without dashes"
        for flag in unknown
    ]
    problems += [
        f"--{name.replace('_', '-')}={value}: the configuration is conf/config.yaml of the program"
        for name in ELSEWHERE
        if (value := getattr(known, name))
    ]
    if known.resolve and not known.cfg:
        problems.append("--resolve: it goes with --cfg, e.g. --cfg job --resolve")
    shown = [f"--{name}" for name in ("cfg", "info") if getattr(known, name)]
    if len(shown) > 1 or (shown and known.multirun):
        given = " with ".join([*(["-m"] if known.multirun else []), *shown])
        problems.append(f"{given}: choose one; `plan -m ...` shows the jobs of a grid")
    return problems


def unknown_command(arguments: Sequence[str]) -> str | None:
    """Return a message if the command line begins with an unknown command, else None."""
    word = arguments[0] if arguments else ""
    if not word or "=" in word or not word[0].isalpha():
        return None
    known = [*COMMANDS, "submit"]
    listed = f"{', '.join(known)}{nearest(word, known)}"
    return f"{word}: not of the form key=value, and no command; commands: {listed}"


def refuse(problems: Sequence[str]) -> int:
    """Print the problems of a command line and return the exit code."""
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"flare_exp: {count} in the command line", file=sys.stderr)
    for problem in problems:
        print(f"  - {problem}", file=sys.stderr)
    print("Nothing was run. See: python -m flare_exp --help", file=sys.stderr)
    return 2


@contextmanager
def piped() -> Iterator[None]:
    """Print as much as the reader of the output takes (`report | head`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # otherwise Python's flush at exit reports the broken pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(text: str) -> None:
    """Print a text, or as much of it as the reader takes."""
    with piped():
        print(text)


def help_text() -> str:
    """Return the text of --help.

    It lists examples, commands, groups with the first comment line of each option's file, and every
    key with its help.
    """
    lines = [
        "usage: python -m flare_exp [-m] [--cfg job] [group=option ...] [key=value ...]",
        "",
        "Examples:",
        EXAMPLES,
        "",
        "Commands:",
        *(f"  python -m flare_exp {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
        "  python -m flare_exp submit     -m hydra/launcher=slurm, without waiting for the jobs",
        "",
        "Groups:",
    ]
    for group, options in composition.groups().items():
        lines.append(f"  {group}")
        lines += [f"    {name:<20}{_comment(group, name)}" for name in options]
    lines += ["", "Options [default; a model, task or experiment may set another]:"]
    defaults = schema.dataclass_defaults()
    for key, f in schema.keys().items():
        text = f.metadata.get("help", "")
        if not text or key.endswith(".name") or key == "experiment":
            continue
        default = _default(defaults.get(key, "???"), f.metadata)
        lines.append(f"  {key:<30}{text}{_allowed(f.metadata)}{default}")
    return "\n".join(
        [
            *lines,
            "",
            "-m runs every combination of comma-separated values; --cfg job shows a configuration.",
        ]
    )


def _allowed(rules: Mapping[str, Any]) -> str:
    """Return the values that an option takes, in parentheses; "" where its help says it."""
    if len(names := rules.get("choices", rules.get("each", ()))) > 1:
        return f" ({', '.join(map(str, names))})"
    least = f"above {rules['above']}" if "above" in rules else rules.get("min")
    most = rules.get("max")
    if least is None:
        return ""
    if most is None:
        return f" ({least})" if "above" in rules else f" ({least} or more)"
    return f" ({least}, at most {most})" if "above" in rules else f" ({least} to {most})"


def _default(value: Any, rules: Mapping[str, Any]) -> str:
    """Return the default of an option, in brackets; "" if a model or the user gives it."""
    if value == "???" or (value == 0 and (rules.get("min", 0) > 0 or "above" in rules)):
        return ""
    return f" [{'null' if value is None else value}]".replace("'", "")


def _comment(group: str, name: str) -> str:
    """Return the first comment line of an option's file."""
    for line in (composition.conf_dir() / group / f"{name}.yaml").read_text().splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line[2:]
    return ""


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are messages of the program."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake instead of printing a usage line."""
        raise UserError(message)


def parsed(
    arguments: Sequence[str], places: str, values: Sequence[str], flags: Sequence[str] = ()
) -> tuple[argparse.Namespace, list[str]]:
    """Read the words of a subcommand that has options with values.

    Args:
        arguments: the words.
        places: name under which words that are no options are kept.
        values: options that take a value; None where they are not given.
        flags: options that take none.

    Returns:
        what is given, and a message for each mistake.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(places, nargs="*")
    for name in values:
        parser.add_argument(name, nargs="?", const="")
    for name in flags:
        parser.add_argument(name, action="store_true")
    given, unknown = parser.parse_known_intermixed_args(list(arguments))
    known = [*values, *flags, "--help"]
    problems = [
        f"{word}: there is no such flag; allowed: {', '.join(known)}"
        f"{nearest(word.partition('=')[0], known)}"
        for word in unknown
        if word.startswith("-")
    ]
    problems += [
        f"{name}: needs a value"
        for name in values
        if getattr(given, name[2:].replace("-", "_")) == ""
    ]
    return given, problems
