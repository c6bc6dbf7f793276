"""`python -m flare_exp report <folder> ...`: print the finished runs below some folders as tables.

One table per task, with mean and standard deviation over seeds. Runs that differ in nothing but
the seed share a row. Every option that differs between rows gets a column. Two runs of one row and
one seed are an error.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from flare_exp.config import composition, schema, validation
from flare_exp.config.methods import METHODS
from flare_exp.config.options import flat
from flare_exp.errors import first_line
from flare_exp.experiment import run_state
from flare_exp.experiment.checksums import damage
from flare_exp.experiment.runs import VOLATILE
from flare_exp.tasks import TASKS

GROUPS = ("model", "task", "mt", "fusion", "method", "decode")
# options that the first columns show
NAMED = {*(f"{group}.name" for group in GROUPS if group != "decode"), "task.lang", "mt.noise"}
ABLATIONS = ("shuffle", "empty")
TIMED = ("transfer", "test")  # stages whose seconds are shown
TIE = 1.0  # points; smaller differences are called ties


@dataclass(frozen=True)
class Run:
    """One finished run: its folder, metrics.json, and config.yaml with dotted keys."""

    folder: Path
    metrics: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> tuple[str, str, str, str]:
        """Return model, language, translation and method, as the table shows them."""
        given = self.options
        noise = f", {given['mt.noise']:.0%} noise" if given.get("mt.noise") else ""
        method = str(given["method.name"])
        if self.fuses:
            ablation = "".join(f", {n} source" for n in ABLATIONS if given.get(f"source.{n}"))
            method += f" ({given['fusion.name']}{ablation})"
        return given["model.name"], given["task.lang"], f"{given['mt.name']}{noise}", method

    @property
    def fuses(self) -> bool:
        """Return whether the method fuses source and target."""
        return self.options["method.name"] in schema.FUSING_METHODS

    @functools.cached_property
    def changed(self) -> dict[str, str]:
        """Return the options that differ from the shipped ones, without those in `name`."""
        chosen = [(g, str(self.options.get(f"{g}.name"))) for g in GROUPS]
        shipped = defaults(
            *(f"{g}={name}" for g, name in chosen if name in composition.groups()[g])
        )
        ignored = VOLATILE | NAMED | {"seed", *(f"source.{name}" for name in ABLATIONS)}
        sections = () if self.fuses else ("fusion.", "source.")
        return {
            key: str(self.options.get(key, shipped.get(key)))
            for key in {**shipped, **self.options}
            if key not in ignored and not key.startswith(sections)
            if self.options.get(key, shipped.get(key)) != shipped.get(key)
        }

    @property
    def chrf(self) -> float | None:
        """Return chrF++ of the translated training data, or else of the translated test data."""
        scores = (self.metrics.get("translation") or {}).get("chrf++") or {}
        ordered = [scores.get(self.metrics["lang"]), *scores.values()]
        return next((score for score in ordered if score is not None), None)


@functools.cache
def defaults(*groups: str) -> dict[str, Any]:
    """Return the shipped configuration of some groups' options, with dotted keys."""
    from omegaconf import OmegaConf

    (job,), problems = validation.validate(groups, multirun=False)
    if job is None:
        raise ValueError(problems[0])
    return flat(OmegaConf.to_container(job, resolve=True))


def run_folders(folders: Sequence[str]) -> list[Path]:
    """Return the folders below `folders` that a run has begun, each once."""
    found = set()
    for folder in folders:
        for place, inside, files in os.walk(Path(folder).resolve()):
            if {"metrics.json", "config.yaml"}.intersection(files):
                found.add(Path(place))
                inside.clear()  # files inside a run, such as W&B's config.yaml, are no runs
    return sorted(found)


def read(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        ValueError: the run has no result, or a file is damaged; the message names the file.
    """
    if not (folder / "metrics.json").is_file():
        state = run_state.read(folder)
        raise ValueError(f"no result ({', '.join(filter(None, (state.state, state.reason)))})")
    if problems := damage(folder, only=["metrics.json", "config.yaml"]):
        raise ValueError(f"damaged: {problems[0]}")
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        _ = metrics["task"], metrics["lang"]
        _ = {**metrics["test"]}, {**metrics["english"]}, {**metrics["zero_shot"]}
        _ = [float(metrics["seconds"][stage]) for stage in TIMED], int(metrics["seed"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"metrics.json is damaged ({type(error).__name__}: {error})") from None
    try:
        run = Run(folder, metrics, flat(yaml.safe_load((folder / "config.yaml").read_text())))
        _ = run.name, run.changed
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = first_line(error)
        raise ValueError(f"config.yaml is damaged ({type(error).__name__}: {reason})") from None
    return run


Cells = dict[tuple[Any, ...], dict[int, Run]]


def cells_of(runs: Sequence[Run]) -> tuple[dict[str, Cells], list[str]]:
    """Return task -> cell -> seed -> run, and a message for every run that repeats a seed."""
    tasks: dict[str, Cells] = defaultdict(lambda: defaultdict(dict))
    problems = []
    for run in runs:
        cell = (*run.name, frozenset(run.changed.items()))
        seeds = tasks[run.metrics["task"]][cell]
        first = seeds.setdefault(run.metrics["seed"], run)
        if first is not run:
            problems.append(
                f"{first.folder} and {run.folder}: two runs of one configuration with seed "
                f"{run.metrics['seed']}; give the folder of one of them"
            )
    return tasks, problems


def spread(values: Sequence[float | None]) -> str:
    """Return mean and standard deviation in percent; "-" unless every run has a value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    deviation = f" ± {100 * statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{100 * statistics.mean(known):.1f}{deviation}"


def varying(cells: Cells) -> list[str]:
    """Return the options that need a column, since they tell some of the cells apart."""
    changed = [next(iter(seeds.values())).changed for seeds in cells.values()]
    keys = sorted({key for options in changed for key in options})
    return [key for key in keys if len({options.get(key) for options in changed}) > 1]


def rows(cells: Cells, options: Sequence[str], metrics: Sequence[str]) -> Iterator[list[str]]:
    """Yield a row of text for each cell."""
    for seeds in cells.values():
        runs = list(seeds.values())
        model, lang, mt, method = runs[0].name
        quality = [run.chrf for run in runs if run.chrf is not None]
        mt += f", chrF++ {statistics.mean(quality):.0f}" if quality else ""
        given = [str(runs[0].options.get(key, "-")) for key in options]
        scores = [
            spread([r.metrics[b].get(m) for r in runs])
            for b in ("test", "english")
            for m in metrics
        ]
        spent = [statistics.mean(run.metrics["seconds"][stage] for run in runs) for stage in TIMED]
        shown = [f"{seconds:.0f}" for seconds in spent]
        yield [model, lang, mt, method, *given, ",".join(map(str, sorted(seeds))), *scores, *shown]


def _place(item: tuple[tuple[Any, ...], dict[int, Run]]) -> tuple[Any, ...]:
    """Return the sort key of a row: model, language, translation, then the method."""
    (model, lang, mt, method, changed), seeds = item
    order = [*METHODS].index(next(iter(seeds.values())).options["method.name"])
    return model, lang, mt, order, method, sorted(changed)


def show(task: str, cells: Cells, console: Console) -> None:
    """Print the table of one task."""
    runs = [run for seeds in cells.values() for run in seeds.values()]
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics["test"]))
    title = f"{task}: test scores in % (mean ± standard deviation over seeds)"
    table = Table(title=title, title_justify="left")
    options = varying(cells)
    for name in ("model", "lang", "mt", "method", *options, "seeds"):
        table.add_column(name, overflow="fold")
    for name in (*metrics, *(f"English {name}" for name in metrics), "transfer s", "test s"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows(dict(sorted(cells.items(), key=_place)), options, metrics):
        table.add_row(*row)
    console.print(table)


def readings(cells: Cells, metric: str) -> list[str]:
    """Return a sentence per language and translation that compares FLARE with the baselines.

    Differences of at most TIE points count as ties. Rows without FLARE or without LoRA are left
    out.
    """
    groups: dict[tuple[Any, ...], dict[str, list[Run]]] = defaultdict(dict)
    for (model, lang, mt, method, changed), seeds in cells.items():
        fusing = sorted((k, v) for k, v in changed if k.startswith(("fusion.", "source.")))
        name = ", ".join([method, *(f"{key}={value}" for key, value in fusing)])
        groups[model, lang, mt, changed - {*fusing}][name] = list(seeds.values())
    found = []
    for (model, lang, *_), methods in groups.items():
        scores = {name: _mean(runs, "test", metric) for name, runs in methods.items()}
        fused = [name for name in scores if name.startswith("flare") and " source)" not in name]
        if not fused or "lora" not in scores:
            continue
        best = max(fused, key=scores.__getitem__)
        said = (
            f"{model}, {lang}: {best} has {metric} {scores[best]:.1f}, "
            f"{_against(scores, best, 'lora')}"
        )
        if "translate_test" in scores:
            said += f" and {_against(scores, best, 'translate_test')}. "
            zero_shot = _mean(methods[best], "zero_shot", metric)
            said += _why(scores[best] - scores["translate_test"], zero_shot, lang)
        found.append(f"{said}.{_caution(methods[best])}")
    return found


def _mean(runs: Sequence[Run], block: str, metric: str) -> float:
    """Return the mean of a metric over runs, in percent."""
    return 100 * statistics.mean(run.metrics[block][metric] for run in runs)


def _against(scores: Mapping[str, float], name: str, other: str) -> str:
    """Compare the score of a method with that of another method."""
    gain = scores[name] - scores[other]
    if abs(gain) <= TIE:
        return f"as much as {other} ({scores[other]:.1f})"
    return (
        f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'} {other} ({scores[other]:.1f})"
    )


def _why(gain: float, zero_shot: float, lang: str) -> str:
    """Explain the difference between FLARE and translate_test."""
    if gain > TIE:
        return "It uses the text itself besides its English translation"
    if gain < -TIE:
        return "Reading the English translation alone is better here"
    return (
        f"Both read the English translation. The model knows little of {lang} (zero-shot "
        f"{zero_shot:.1f}), so the text itself adds nothing to it"
        if zero_shot < 50
        else "The text itself adds nothing to its English translation here"
    )


def _caution(runs: Sequence[Run]) -> str:
    """Return a warning if there is only one seed."""
    return " One seed: differences of a few points mean nothing." if len(runs) == 1 else ""


def print_report(folders: Sequence[str]) -> int:
    """Print a table per task and its interpretation; return the exit code.

    The exit code is 2 without a run, with a folder that does not exist, or with two runs of one
    cell and seed.
    """
    # a table in a file is as wide as it needs to be
    console = Console(width=None if sys.stdout.isatty() else 500)
    runs, left_out = [], []
    for folder in run_folders(folders):
        try:
            runs.append(read(folder))
        except ValueError as error:
            left_out.append(f"left out: {folder}: {error}")
    tasks, problems = cells_of(runs)
    absent = [folder for folder in folders if not Path(folder).is_dir()]
    problems += [f"{folder}: there is no such folder" for folder in absent]
    if not runs and not absent:
        problems = [*left_out, f"there is no finished run in {', '.join(folders)}"]
    for problem in problems:
        print(f"flare_exp report: {problem}", file=sys.stderr)
    if problems:
        return 2
    for task, cells in sorted(tasks.items()):
        show(task, cells, console)
        for line in readings(cells, TASKS[task].metric):
            console.print(textwrap.fill(line, 100), highlight=False, markup=False)
    if any(run.options["mt.name"] == "gold" for run in runs):
        console.print(
            "mt=gold: test sources are the benchmark's own English, so what reads them is an "
            "upper bound.",
            highlight=False,
        )
    for line in left_out:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Report the runs below the given folders, or below outputs/; return the exit code."""
    return print_report(list(arguments) or ["outputs"])
