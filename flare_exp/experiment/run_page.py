"""Write the README.md of a run folder: what was run, with what result, and how to load it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flare_exp.config.languages import as_list, joined
from flare_exp.config.methods import ENSEMBLE, METHODS

FILES = {
    "metrics.json": "scores (fractions) and seconds per stage",
    "predictions.parquet": "id, gold, prediction, probabilities of the labels, target and source "
    "text of every test example",
    "provenance.json": "commit, versions, data fingerprints, parameters, memory, artifacts",
    "config.yaml": "the resolved configuration",
    "english/": "the English model or its adapter",
    "adapter/": "the target language's adapter, in PEFT format",
    "model/": "the target language's model, in transformers format (method=full)",
    "curves.png": "loss and validation metric of both trainings; curves/ has the numbers",
    "checksums.json": "SHA-256 of the results: a damaged one is noticed, and made again by the "
    "same command",
    "flare_exp.log": "the log",
}


def label_of(measured: Mapping[str, Any]) -> str:
    """Return the method with its members or teachers and its fusion, as tables name it."""
    details = [" + ".join(measured.get("of") or ()), measured["fusion"]]
    said = ", ".join(filter(None, details))
    return f"{measured['method']} ({said})" if said else measured["method"]


class Place(NamedTuple):
    """Hold what scores are on.

    Attributes:
        name: as tables show it.
        scores: has the blocks `test` and `zero_shot`.
        lang: the language; None for a mean over several.
    """

    name: str
    scores: Mapping[str, Any]
    lang: str | None


def places_of(measured: Mapping[str, Any]) -> list[Place]:
    """Return what a run's scores are on: its language, or each of several and their mean.

    Unseen languages come last.
    """
    languages = measured.get("languages")
    if not languages:
        return [Place(measured["lang"], measured, measured["lang"])]
    seen = [lang for lang in languages if not languages[lang]["unseen"]]
    mean = [Place(f"mean of {joined(seen)}", measured, None)] if len(seen) > 1 else []
    unseen = [lang for lang in languages if lang not in seen]
    return [
        *(Place(lang, languages[lang], lang) for lang in seen),
        *mean,
        *(Place(f"{lang} (unseen)", languages[lang], lang) for lang in unseen),
    ]


def run_page(measured: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> str:
    """Return the page in Markdown.

    Args:
        measured: what metrics.json holds.
        facts: what provenance.json holds.
        folder: the run folder. Files that it does not hold are not listed, metrics.json aside.
    """
    method = label_of(measured)
    listed = [name for name in FILES if name == "metrics.json" or (folder / name).exists()]
    counts, commit = facts["parameters"], facts["commit"]
    code = (
        "an installed package"
        if commit is None
        else commit["hash"][:12] + (" with local changes" if commit["dirty"] else "")
    )
    lines = [
        f"# {method} on {measured['task']}, {joined(measured['lang'])}",
        "",
        f"Model {measured['model']}, translation {measured['mt']}, seed {measured['seed']}; "
        f"{counts['trainable']:,} of {counts['total']:,} parameters trained.",
        f"Made by flare_exp {facts['packages']['flare-exp']} ({code}) on {facts['device']}, "
        f"{measured['seconds']['total']:.0f} s.",
        "",
        *_table(measured, method, facts["data"]),
        "",
        "It was a job of this grid:"
        if {"-m", "--multirun"} & {*facts["command"]}
        else "The command:",
        "",
        f"    python -m flare_exp {shlex.join(facts['command'][1:])}".rstrip(),
        "",
        *_usage(measured, folder),
        "| file | content |",
        "|---|---|",
        *(f"| `{name}` | {FILES[name]} |" for name in listed),
        *(f"| `{name}/` | {content} |" for name, content in _members(folder)),
    ]
    return "\n".join(lines) + "\n"


def _table(measured: Mapping[str, Any], method: str, data: Mapping[str, Any]) -> list[str]:
    """Return the scores in percent. `data`: facts of each split."""
    names, places = list(measured["test"]), places_of(measured)
    rows = {"English, on the English test set": measured["english"]}
    rows |= {f"zero-shot, on {place.name}": place.scores["zero_shot"] for place in places}
    for place in places:
        count = f" ({data[f'{place.lang}/test']['examples']:,} examples)" if place.lang else ""
        rows[f"**{method}**, on {place.name}{count}"] = place.scores["test"]
    cells = [["scores in %", *names], ["---", *("---:" for _ in names)]]
    cells += [[row, *(f"{100 * values[n]:.1f}" for n in names)] for row, values in rows.items()]
    return [f"| {' | '.join(row)} |" for row in cells]


def _members(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield folder and content of the weights of each member of an ensemble, or teacher."""
    for kind, format in (("adapter", "PEFT"), ("model", "transformers")):
        for place in sorted(folder.glob(f"{kind}_*/")):
            member = place.name.removeprefix(f"{kind}_")
            yield place.name, f"the {kind} of {member}, in {format} format"


def _usage(measured: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the lines that say how to load the run and use it.

    Paths are those of the command above, so that its other paths, which the run keeps, are right,
    too.

    Args:
        measured: what metrics.json holds.
        folder: the run folder.
    """
    method, langs = measured["method"], as_list(measured["lang"])
    modes = [METHODS[name].mode for name in (measured["of"] if method == ENSEMBLE else [method])]
    chosen = [f"task.lang={langs[0]}"] if len(langs) > 1 else []
    options = "".join(f', "{option}"' for option in chosen)
    place = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    run = " ".join(shlex.quote(word) for word in (f"run={place}", *chosen))
    call = "run.predict(texts)"
    if any(mode.translates_tests for mode in modes):
        call = "run.predict(texts, sources=english_texts)"
        if measured.get("source", {}).get("langs"):
            call = "run.predict(texts, sources=sources)  # each has what run.sources.parts names"
    return [
        "To load it and use it, in the folder where the command was run:",
        "",
        "    import flare_exp",
        "",
        f"    run = flare_exp.load({json.dumps(place, ensure_ascii=False)}{options})",
        f"    {call}",
        "",
        "Or, for one text, a file, or over HTTP:",
        "",
        f'    python -m flare_exp predict {run} text="..."',
        f"    python -m flare_exp predict {run} file=in.csv out=out.csv",
        f"    python -m flare_exp serve {run}",
        "",
    ]
