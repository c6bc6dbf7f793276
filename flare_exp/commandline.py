"""The command line: read with Hydra's own parser, explained by --help, refused with all its mistakes in one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from flare_exp import config

# Subcommand -> its flags, and what it does, for --help. Each is a module flare_exp.<name> with `main(arguments) -> exit code`.
COMMANDS = {
    "plan": (("-m", "--multirun"), "what a run or a grid (-m) would build, need and take, without running it"),
    "prefetch": (("-m", "--multirun"), "fetch models and data from the hub, for runs without network"),
    "report": ((), "tables of finished runs: mean and standard deviation over seeds"),
    "status": (("--timeline",), "what has become of the jobs of a grid"),
}
EXAMPLES = """\
  python -m flare_exp                                             FLARE on the embedded world, no network needed
  python -m flare_exp method=lora task.lang=near seed=1           plain LoRA, the near language, another seed
  python -m flare_exp -m method=zero_shot,lora,flare seed=0,1,2   a grid; shared stages run once
  python -m flare_exp fusion=cross_attn fusion.heads=2 trainer.max_epochs=3
  python -m flare_exp method=flare_mt mt=toy_nllb                 the source is a translation model's encoder
  python -m flare_exp model=tiny_decoder task=toy_qa              a Llama that writes answers
  python -m flare_exp model=llama31 task=xnli task.lang=sw        4-bit weights, LoRA in all linear layers
  python -m flare_exp model=custom model.path=<checkpoint> task=nusax task.data_dir=<folder> task.lang=jav"""


def normalised(argv: Sequence[str]) -> list[str]:
    """A command line as Hydra wants it: flags before overrides, and task.train_split=validation[:2000] in quotes."""
    overrides = [a for a in argv if "=" in a and not a.startswith("-")]
    flags = [a for a in argv if a not in overrides]
    return flags + [_quoted(a) for a in overrides]


def _quoted(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}='{value}'" if key.endswith("_split") and "[" in value and value[0] not in "'\"" else override


def overrides(arguments: Sequence[str]) -> list[str]:
    """The key=value words of a Hydra command line, read with Hydra's own parser."""
    from hydra._internal.utils import get_args_parser

    known, _ = get_args_parser().parse_known_args(list(arguments))
    return list(known.overrides)


def refuse(problems: Sequence[str]) -> int:
    """Say what is wrong with a command line; gives the exit code."""
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"flare_exp: {count} in the command line", file=sys.stderr)
    for problem in problems:
        print(f"  - {problem}", file=sys.stderr)
    print("Nothing was run. See: python -m flare_exp --help", file=sys.stderr)
    return 2


def show_help() -> None:
    """Print it, or as much as a reader takes (`--help | head`)."""
    try:
        print(help_text(), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit complains


def help_text() -> str:
    """Groups with the options' first comment lines, every key with its help, five commands."""
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
    for group, options in config.groups().items():
        lines.append(f"  {group}")
        lines += [f"    {name:<20}{_comment(group, name)}" for name in options]
    lines += ["", "Options (default; a model, task or experiment may set another):"]
    for key, f in config.keys().items():
        text = f.metadata.get("help", "")
        if not text or key.endswith(".name") or key == "experiment":
            continue
        default = "" if f.default in ("???", None) or "dataclasses" in repr(f.default) else f" [{f.default}]"
        allowed = f.metadata.get("choices", f.metadata.get("each", ()))
        choices = f" ({', '.join(map(str, allowed))})" if len(allowed) > 1 else ""
        lines.append(f"  {key:<30}{text}{choices}{default}")
    return "\n".join([*lines, "", "-m runs every combination of comma-separated values; --cfg job shows a configuration."])


def _comment(group: str, name: str) -> str:
    for line in (config.conf_dir() / group / f"{name}.yaml").read_text().splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line[2:]
    return ""
