"""Leave the files of a finished run, and print its table."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flare_exp.artifacts import Artifact
from flare_exp.code import code_of
from flare_exp.config.languages import joined
from flare_exp.experiment.checksums import CHECKSUMS, folders, seal, seal_of
from flare_exp.experiment.curves import draw_curves
from flare_exp.experiment.provenance import provenance
from flare_exp.experiment.run_page import label_of, places_of, run_page
from flare_exp.experiment.tested import facts_of, write_predictions
from flare_exp.utils.files import write_json, write_text

LINKED_FROM = 50_000_000  # bytes; smaller files are copied


def write_outputs(
    folder: Path,
    measured: Mapping[str, Any],
    made: Mapping[str, Artifact],
    tests: Mapping[str, Artifact],
    data: Mapping[str, Any],
    metric: str,
) -> None:
    """Fill a run folder from the artifacts of its stages. `tests`: language -> its test.

    metrics.json comes last: it says that the run is complete. `adapter/` and `english/` are the
    transfer and the English model as saved (PEFT or transformers format). `curves/` has their
    training metrics. `curves.png` shows them, with the task's `metric`.
    """
    with _taken_back(folder):
        (folder / "curves").mkdir(exist_ok=True)
        trained = {name: a for name, a in made.items() if a.kind in ("finetune", "transfer")}
        for name, artifact in trained.items():
            saved = next(p for p in artifact.path.iterdir() if p.is_dir())
            place = folder / place_of(name, saved)
            shutil.copytree(saved, place, dirs_exist_ok=True, copy_function=link_weights)
            curve = folder / "curves" / f"{name.replace(' ', '_')}.csv"
            shutil.copyfile(artifact.path / "metrics.csv", curve)
        write_predictions(tests.values(), folder / "predictions.parquet")
        training = {name: artifact.info for name, artifact in trained.items()}
        facts = {
            "data": data,
            "parameters": trained_parameters(training),
            "training": training,
            "test": facts_of(tests),
            "translations": {name: a.info for name, a in made.items() if a.kind == "translation"},
            "seconds": measured["seconds"],
            "code": {"fusion": code_of("fusion")},
            "artefacts": {
                name: {"kind": a.kind, "digest": a.digest, "reused": a.reused, "code": a.code}
                for name, a in made.items()
            },
        }
        if alike := made.get("similarity of validation"):
            facts["similarity"] = alike.info  # the weights of new texts follow from it
        facts = {**provenance(), **facts}
        write_json(folder / "provenance.json", facts)
        draw_curves(folder / "curves", folder / "curves.png", metric, joined(measured["lang"]))
        (folder / "metrics.json").unlink(missing_ok=True)
        part = folder / ".metrics.json"
        write_json(part, measured)
        # complete before metrics.json is there, which says that the run is
        write_json(folder / CHECKSUMS, {**seal(folder), "metrics.json": seal_of(part)})
        write_text(folder / "README.md", run_page(measured, facts, folder))
        part.replace(folder / "metrics.json")


def place_of(name: str, saved: Path) -> str:
    """Return the folder of a run that keeps trained weights.

    Args:
        name: name of the artifact: `finetune`, `transfer`, or `transfer <member of an ensemble>`.
        saved: folder of the artifact, whose name is `adapter` or `model`.
    """
    stage, _, member = name.partition(" ")
    place = "english" if stage == "finetune" else saved.name
    return f"{place}_{member}" if member else place


def trained_parameters(training: Mapping[str, Any]) -> dict[str, int]:
    """Count the parameters that the method trains, and all that it needs to answer.

    Args:
        training: name -> facts of each training. Those of an ensemble's members add up, and a
            distillation's teachers do not count; English fine-tuning counts if nothing else is
            trained.
    """
    answers = {n: f for n, f in training.items() if n == "transfer"} or training
    counts = [f["parameters"] for name, f in answers.items() if name != "finetune"]
    counts = counts or [training["finetune"]["parameters"]]
    total = counts[0]["total"] + sum(c["trainable"] for c in counts[1:])
    return {"trainable": sum(c["trainable"] for c in counts), "total": total}


@contextmanager
def _taken_back(folder: Path) -> Iterator[None]:
    """Remove half-written results when the disk is full; the configuration and the log stay."""
    try:
        yield
    except OSError:
        for place in folders(folder):
            shutil.rmtree(place, ignore_errors=True)
        for name in (
            "predictions.parquet",
            "provenance.json",
            "curves.png",
            ".metrics.json",
            CHECKSUMS,
            "README.md",
        ):
            (folder / name).unlink(missing_ok=True)
        raise


def link_weights(source: str, target: str) -> None:
    """Copy a file, or link it where it is large.

    Every run with full English tuning has the same model. A hard link takes no room, and stays
    whole when the cache is emptied. Between file systems it is a symbolic link.
    """
    path = Path(target)
    path.unlink(missing_ok=True)
    if os.stat(source).st_size < LINKED_FROM:
        shutil.copyfile(source, path)
        return
    try:
        path.hardlink_to(source)
    except OSError:
        path.symlink_to(Path(source).absolute())


def one_line(metrics: Mapping[str, Any]) -> str:
    """Return a run's result in a line."""
    scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics["test"].items())
    return (
        f"{label_of(metrics)}, {joined(metrics['lang'])}, seed {metrics['seed']}: {scores} "
        f"({metrics['seconds']['total']:.0f} s)"
    )


def print_table(metrics: Mapping[str, Any], notes: Sequence[str], folder: Path) -> None:
    """English, zero-shot and this method, with the seconds spent."""
    from rich.console import Console
    from rich.table import Table

    label, seconds = label_of(metrics), metrics["seconds"]
    places = places_of(metrics)
    rows = [("English fine-tuning", "English test", metrics["english"], seconds["finetune"])]
    rows += [("zero-shot", f"{p.name} test", p.scores["zero_shot"], None) for p in places]
    if metrics["method"] != "zero_shot":
        spent = [seconds["transfer"], *[None] * (len(places) - 1)]
        rows += [
            (label, f"{p.name} test", p.scores["test"], own)
            for p, own in zip(places, spent, strict=True)
        ]
    names = list(metrics["test"])
    what = [metrics["task"], joined(metrics["lang"]), metrics["model"], f"mt={metrics['mt']}"]
    table = Table(title=" · ".join([*what, f"seed {metrics['seed']}"]))
    table.add_column("method", no_wrap=True)
    table.add_column("scored on")
    for name in [*names, "training seconds"]:
        table.add_column(name.replace("_", " "), justify="right")  # spaces let a long head wrap
    for row, scored, values, spent in rows:
        table.add_row(
            row,
            scored,
            *(f"{100 * values[n]:.1f}" for n in names),
            "" if spent is None else f"{spent:.0f}",
        )
    console = Console(width=max(100, Console().width) if not sys.stdout.isatty() else None)
    console.print(table)
    for note in [*notes, f"{seconds['total']:.0f} s in all; everything is in {folder}"]:
        console.print(note, highlight=False, markup=False)
