"""Find runs that one table must not compare: other data, translations, checkpoints or code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from flare_exp.experiment.tested import stage_of
from flare_exp.report.cells import Cell
from flare_exp.report.runs import Run

SPLITS = (
    "task.train_split",
    "task.validation_split",
    "task.test_split",
    "task.english_test_split",
    "task.limit",
)


def splits(run: Run) -> dict[str, Any]:
    """Return the options that say which examples a run reads."""
    return {key: run.options.get(key) for key in SPLITS}


def score(run: Run) -> dict[str, Any]:
    """Return what the score of a run is; the description of a user's own data may change."""
    return {"metric": run.metric, "labels": run.labels}


def fingerprints(run: Run) -> dict[str, Any]:
    """Return the fingerprint of each split that a run has read."""
    found = run.provenance.get("data", {})
    return {f"data fingerprint of {name}": facts["fingerprint"] for name, facts in found.items()}


def checkpoint(run: Run) -> dict[str, Any]:
    """Return the digest of the backbone, and its commit on the hub."""
    made = run.provenance.get("artefacts", {}).get("backbone")
    digest = {"digest of the checkpoint": made["digest"]} if made else {}
    return {**digest, "model.revision": run.options.get("model.revision")}


def translations(run: Run) -> dict[str, Any]:
    """Return the digest of each translation that a run has made or taken.

    Texts without labels belong to a method (`distil.texts`). Where training and validation are
    parts of one split, which part has which name depends on the order in which a run reads them.
    """
    found = run.provenance.get("artefacts", {})
    asked = [str(run.options.get(f"task.{role}_split")) for role in ("train", "validation")]
    train, validation = (text.partition("[")[0] for text in asked)
    left_out = ["/unlabeled ", *([f"/{train} "] if train == validation else [])]
    names = [name for name in found if stage_of(name) == "translation"]
    return {
        f"digest of the {name}": found[name]["digest"]
        for name in names
        if not any(part in name for part in left_out)
    }


def code(run: Run) -> dict[str, Any]:
    """Return the hashes of the code behind the result.

    A commit that changes nothing behind it does not count, so the hashes are taken, and the commit
    only where a run has none. Every run has the zero-shot test, whose code is that of all trainings
    and tests; the code of fusion counts for methods that have a source.
    """
    found = run.provenance.get("artefacts", {})
    made = next((found[name] for name in found if stage_of(name) == "zero_shot"), None)
    if not made or not made.get("code"):
        commit = run.provenance.get("commit")
        return {"commit": commit["hash"]} if commit else {}
    fusion = run.provenance.get("code", {}).get("fusion")
    reads = any(method.mode.fuses for method in run.members.values())
    return {
        "code version": made["code"],
        **({"code version of fusion": fusion} if fusion and reads else {}),
    }


def differences(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield a message for each thing in which runs of one task differ and must not.

    Runs of one language are compared; metric and labels among all; checkpoints within one model and
    its options, translations within one system and its options. A run without provenance.json
    agrees with every other.
    """
    yield from _within(cells, lambda cell: cell.task, score)
    yield from _within(cells, lambda cell: cell.lang, splits, fingerprints, code)
    yield from _within(cells, lambda cell: (cell.model, *_own(cell, "model.")), checkpoint)
    yield from _within(cells, lambda cell: (cell.mt, *_own(cell, "mt.")), translations)


def _own(cell: Cell, section: str) -> list[tuple[str, str]]:
    """Return the options of a section that differ from the shipped ones."""
    return sorted(option for option in cell.changed if option[0].startswith(section))


def _within(
    cells: Sequence[Cell],
    group: Callable[[Cell], Hashable],
    *facts: Callable[[Run], Mapping[str, Any]],
) -> Iterator[str]:
    """Yield the first difference in each of some facts, among runs of each group of cells."""
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for cell in cells:
        groups[group(cell)] += cell.runs.values()
    for runs in groups.values():
        # in the order of folders, so that a message does not depend on the table
        ordered = sorted(runs, key=lambda run: run.folder)
        for fact in facts:
            yield from _first_difference([(run, fact(run)) for run in ordered])


def _first_difference(runs: Sequence[tuple[Run, Mapping[str, Any]]]) -> Iterator[str]:
    """Yield the first pair of runs that differ in a fact that both have."""
    seen: dict[str, tuple[Run, Any]] = {}
    for run, facts in runs:
        for name, value in facts.items():
            first, other = seen.setdefault(name, (run, value))
            if other != value:
                yield f"{first.folder} and {run.folder} differ in {name}: {other} and {value}"
                return


def code_notes(cells: Sequence[Cell]) -> list[str]:
    """Return what has to be said about commits, which `differences` does not compare."""
    commits = [run.provenance.get("commit") for cell in cells for run in cell.runs.values()]
    hashes = sorted({commit["hash"][:12] for commit in commits if commit})
    notes = []
    if len(hashes) > 1:
        notes.append(
            f"The runs are of {len(hashes)} commits ({', '.join(hashes)}). The code of models, "
            "data, fusion and scores is the same in all."
        )
    if any(commit["dirty"] for commit in commits if commit):
        notes.append("Some runs were made with changes that were not committed.")
    return notes
