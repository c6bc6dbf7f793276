"""Stage 2: translate training data into each target language, and test data into English."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flare_exp.artifacts import Artifact
from flare_exp.code import code_of
from flare_exp.errors import UserError
from flare_exp.experiment.context import RunContext
from flare_exp.languages import is_spaced
from flare_exp.tasks import Example, Task, fingerprint, metrics
from flare_exp.tasks.examples import read_answers
from flare_exp.translation.base import Flagged, has_span
from flare_exp.translation.lookup import ParallelTranslator
from flare_exp.translation.noise import corrupt_examples
from flare_exp.utils import files


def translate(run: RunContext, examples: Sequence[Example], lang: str) -> list[Example]:
    """Translate examples into `lang`, once: the translation is kept as an artifact.

    With `mt.noise`, wrong words are put into the translation, which is an artifact of its own.
    `mt.noise_in` limits them to the training data (translated into the target language, and the
    unlabeled texts of a distillation) or to the test data (translated into English).
    """
    identity, o = run.translator.identity(examples, lang), run.cfg.mt
    data = {"task": run.task.name, "data": fingerprint(examples), "lang": lang}
    key = {**data, **identity, "code": code_of("translation")}
    keep = functools.partial(_kept, run, examples, lang)
    artifact = keep(key, lambda: run.translator.flagged(examples, lang), identity)
    made = read_translation(artifact, examples)
    split, _, first = examples[0].id.rpartition("/")
    if errors := noise_of(run, examples, lang):
        errors = {"of": artifact.digest, **errors}
        noisy = corrupt_examples(made, lang, o.noise, o.errors, o.seed, run.task.context)
        key = {**errors, "code": code_of("noise", "translation")}
        artifact = keep(key, lambda: [(e, {}) for e in noisy], {**identity, **errors})
        made = noisy
    target = f"into {lang}" + (f" by {run.system}" if run.system else "")
    name = f"translation of {split} {target}"
    if run.translations.setdefault(name, artifact).digest != artifact.digest:
        # another part of this split, as with task.validation_split='train[:400]'
        run.translations[f"translation of {split} from {first} {target}"] = artifact
    return made


def noise_of(run: RunContext, examples: Sequence[Example], lang: str) -> dict[str, Any]:
    """Return what the wrong words in a translation into `lang` depend on; empty: it has none."""
    o, split = run.cfg.mt, examples[0].id.rpartition("/")[0]
    trains = examples[0].lang == run.task.english or split.endswith("/unlabeled")
    if not o.noise or o.noise_in not in ("all", "train" if trains else "test"):
        return {}
    errors = {"noise": o.noise, "errors": o.errors, "noise_seed": o.seed}
    return {**errors, "spaced": is_spaced(lang)}


def _kept(
    run: RunContext,
    examples: Sequence[Example],
    lang: str,
    key: Mapping[str, Any],
    make: Callable[[], Flagged],
    facts: Mapping[str, Any],
) -> Artifact:
    """Find a translation, or make it and keep it as a table. `facts`: go into its manifest."""

    def build(folder: Path) -> dict[str, Any]:
        made = make()
        rows = [_row(e, m, flags) for e, (m, flags) in zip(examples, made, strict=True)]
        files.write_parquet(folder / "translations.parquet", rows)
        return {"examples": len(rows), **facts, **quality(run.task, examples, made, lang)}

    return run.store.get("translation", key, build)


def _row(original: Example, made: Example, flags: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": made.id,
        "original": list(original.texts),
        "translation": list(made.texts),
        "answers": {
            "text": [a.text for a in made.answers],
            "answer_start": [a.start for a in made.answers],
        },
        **flags,
    }


def read_translation(artifact: Artifact, examples: Sequence[Example]) -> list[Example]:
    """Read the translations of `examples` from their artifact."""
    columns = ["translation", "answers"]
    rows = pq.read_table(artifact.path / "translations.parquet", columns=columns).to_pylist()
    return [
        replace(e, texts=tuple(row["translation"]), answers=read_answers(row["answers"]))
        for e, row in zip(examples, rows, strict=True)
    ]


def quality(task: Task, examples: Sequence[Example], made: Flagged, lang: str) -> dict[str, Any]:
    """Measure translations for their manifest.

    Returns:
        the number of each flag; `answers`: how many answers were carried over (`kept`), and to the
        very words of the human translation (`exact`); likeness to human translations (chrF++ and
        others), where the benchmark has them.
    """
    flags = made[0][1] or ()
    facts: dict[str, Any] = {flag: sum(given[flag] for _, given in made) for flag in flags}
    found = [m for m, _ in made]
    human = _human(task, examples, lang)
    if not task.labels and examples[0].lang == task.english:
        asked = [i for i, e in enumerate(examples) if has_span(e)]
        facts["answers"] = {"of": len(asked), "kept": sum(bool(found[i].answers) for i in asked)}
        if human:
            same = [
                {a.text for a in found[i].answers} & {a.text for a in human[i].answers}
                for i in asked
            ]
            facts["answers"]["exact"] = sum(map(bool, same))
    if human and texts_of(found) != texts_of(human):
        facts |= metrics.translation(texts_of(found), texts_of(human))
    return facts


def _human(task: Task, examples: Sequence[Example], lang: str) -> list[Example] | None:
    """Return human translations; None: the benchmark has none, or not of this split."""
    try:
        if task.parallel and task.translated_by(examples[0], lang) == "human":
            return ParallelTranslator(task).translate(examples, lang)
    except UserError:
        pass
    return None


def texts_of(examples: Sequence[Example]) -> list[str]:
    """Return all fields of some examples as one list."""
    return [text for e in examples for text in e.texts]
