"""Combine predictions: a weighted mean of the probabilities that each member gives to the labels.

An ensemble of a method that reads the target text and one that reads its English translation uses
the same two texts as a fusion does. A fusion that does not beat it is not worth its training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flare_exp.artifacts import Artifact
from flare_exp.code import code_of
from flare_exp.config.methods import Method
from flare_exp.experiment.context import RunContext
from flare_exp.experiment.stages.similarity import reliability, similarities
from flare_exp.experiment.stages.testing import evaluate
from flare_exp.experiment.stages.transfer import trained_by
from flare_exp.experiment.tested import name_of_test
from flare_exp.tasks.metrics import mean_of
from flare_exp.utils import files

PARTS = 10  # weights are multiples of 1 / PARTS

Score = Callable[[Sequence[float]], float]  # of the members' weights
Alike = tuple[Artifact, Artifact]  # similarities of the validation pairs, and of a test set's


@dataclass(frozen=True)
class Member:
    """A method of the ensemble: what it trained, and its predictions.

    Attributes:
        trained: the adapter or the model; the English model for methods that train nothing.
        validations: language that is trained on -> predictions of its validation split; empty
            where they do not choose the weights.
        tests: language -> predictions of its test split.
        reads_source: whether the method reads the translations of the test texts.
    """

    trained: Artifact
    validations: Mapping[str, Artifact]
    tests: Mapping[str, Artifact]
    reads_source: bool


def ensemble(
    run: RunContext, english: Artifact, methods: Mapping[str, Method]
) -> dict[str, Artifact]:
    """Train and test every member as in a run of its own, and combine their predictions.

    Of several languages, the members have the same weights in each, or, by similarity, the same
    scale of reliability: both follow from the validation data of all that are trained on.

    Args:
        english: the fine-tuned English model.
        methods: name -> method of each member.

    Returns:
        name in the provenance -> artifact; `test`, or `test <language>`, is the ensemble's.
    """
    members = {name: _member(run, english, method) for name, method in methods.items()}
    langs = run.cfg.task.tested
    made: dict[str, Artifact] = {}
    validated = None
    if run.cfg.method.weights == "similarity":
        validated = made["similarity of validation"] = similarities(run, "validation")
    for name, member in members.items():
        if methods[name].trains:
            made[f"transfer {name}"] = member.trained
        for role, artifacts in (("validation", member.validations), ("test", member.tests)):
            for lang, artifact in artifacts.items():
                made[name_of_test(f"{role} {name}", lang, langs)] = artifact
    for lang in langs:
        alike: Alike | None = None
        if validated:
            tested = similarities(run, "test", lang)
            made[name_of_test("similarity of test", lang, langs)] = tested
            alike = validated, tested
        made[name_of_test("test", lang, langs)] = _combined(run, members, lang, alike)
    return made


def test_passes(
    run: RunContext, trained: Artifact, english: Artifact | None, method: Method, lang: str
) -> dict[str, Artifact]:
    """Test what a method trained on a language, in every pass of `predict.sources`.

    Of several passes, the probabilities are averaged: p = (p_given + p_none) / 2. A text without
    a source is answered by the adapter's own path, which `source.dropout` trains.

    Returns:
        name in the provenance -> artifact; `test` holds the combined predictions.
    """
    passes = run.cfg.predict.sources
    if passes == ["given"]:
        return {"test": evaluate(run, trained, method.mode, english, lang=lang)}
    tested = {
        name: evaluate(run, trained, method.mode, english, sources=name == "given", lang=lang)
        for name in passes
    }
    members = {
        name: Member(trained, {}, {lang: test}, name == "given") for name, test in tested.items()
    }
    return {f"test {name}": test for name, test in tested.items()} | {
        "test": _combined(run, members, lang)
    }


def _member(run: RunContext, english: Artifact, method: Method) -> Member:
    trained, below = trained_by(run, english, method)

    def predicted(role: str, langs: Sequence[str]) -> dict[str, Artifact]:
        return {lang: evaluate(run, trained, method.mode, below, role, lang=lang) for lang in langs}

    validates, task = run.cfg.method.weights == "validation", run.cfg.task
    validations = predicted("validation", task.langs if validates else ())
    return Member(
        trained, validations, predicted("test", task.tested), method.mode.translates_tests
    )


def _combined(
    run: RunContext, members: Mapping[str, Member], lang: str, alike: Alike | None = None
) -> Artifact:
    """Combine the members' predictions of a language's test set.

    Args:
        members: name -> member.
        lang: the language.
        alike: similarities of texts and sources; None: they do not count.
    """
    validated = [a for m in members.values() for a in m.validations.values()]
    tested = [m.tests[lang] for m in members.values()]
    key = {
        "stage": "ensemble",
        "test": [artifact.digest for artifact in tested],
        "validation": [artifact.digest for artifact in validated],
        "metric": run.task.metric,
        "code": code_of("ensemble"),
    }
    if alike:
        key["similarity"] = [artifact.digest for artifact in alike]

    def build(folder: Path) -> dict[str, Any]:
        given, rows = _probabilities(tested)
        weights = _weights(run, members, alike, [row["id"] for row in rows])
        mean = mix(given, weights)
        predicted = [run.task.labels[i] for i in mean.argmax(-1)]
        examples = run.task.load(lang, "test")
        for row, example, text, probabilities in zip(
            rows, examples, predicted, mean.tolist(), strict=True
        ):
            row |= {"prediction": text, "probabilities": probabilities}
            row |= {"target": "\n".join(example.texts), "source": None}
        files.write_parquet(folder / "predictions.parquet", rows)
        counts = {kind: sum(a.info[kind] for a in tested) for kind in ("truncated", "cut_off")}
        return {
            "metrics": run.task.score(predicted, examples),
            "weights": dict(zip(members, weights.mean(-1).tolist(), strict=True)),
            "members": {name: m.tests[lang].info["metrics"] for name, m in members.items()},
            "examples": len(predicted),
            "unparsable": 0,
            **({"separation": alike[0].info["separation"]} if alike else {}),
            **counts,
        }

    return run.store.get("test", key, build)


def _weights(
    run: RunContext,
    members: Mapping[str, Member],
    alike: Alike | None,
    ids: Sequence[str],
) -> np.ndarray:
    """Return the weight of each member, for each test example or for all: [members, examples or 1].

    By `alike`, it follows from the reliability of the source.
    """
    if alike:
        validation, tested = alike
        trusted = reliability(validation.info, tested, ids)
        return shares(trusted, [m.reads_source for m in members.values()])
    validated = zip(*(m.validations.values() for m in members.values()), strict=True)
    languages = [_probabilities(artifacts)[0] for artifacts in validated]
    if not languages:
        return np.full((len(members), 1), 1 / len(members))
    task = run.task
    examples = task.load(task.english, "validation")

    def score(weights: Sequence[float]) -> float:
        said = (predicted_labels(given, weights, task.labels) for given in languages)
        return mean_of([task.score(own, examples) for own in said])[task.metric]

    return np.array(choose_weights(len(members), score))[:, None]


def shares(trusted: np.ndarray, reads_source: Sequence[bool]) -> np.ndarray:
    """Return the weight of each member for each text: [members, texts].

    Those that read the source share its reliability, and the others the rest.

    Args:
        trusted: reliability of each text's source, from 0 to 1: [texts].
        reads_source: whether a member reads it.
    """
    reads = np.array(reads_source)[:, None]
    return np.where(reads, trusted / reads.sum(), (1 - trusted) / (~reads).sum())


def _probabilities(artifacts: Sequence[Artifact]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Read predictions: probabilities [members, examples, labels], and the first member's rows.

    Raises:
        ValueError: the members did not predict the same examples in the same order.
    """
    tables = [pq.read_table(a.path / "predictions.parquet").to_pylist() for a in artifacts]
    ids = [[(row["id"], row["gold"]) for row in table] for table in tables]
    if any(other != ids[0] for other in ids):
        raise ValueError("the members of an ensemble predicted different examples")
    return np.array([[row["probabilities"] for row in table] for table in tables]), tables[0]


def mix(probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean over members.

    Args:
        probabilities: [members, examples, labels].
        weights: [members, examples], or [members, 1] for the same weights everywhere.

    Returns:
        [examples, labels].
    """
    return (weights[..., None] * probabilities).sum(0)


def predicted_labels(
    probabilities: np.ndarray, weights: Sequence[float], labels: Sequence[str]
) -> list[str]:
    """Return the label of each example that is most probable in the weighted mean.

    Args:
        probabilities: [members, examples, labels].
        weights: one for each member.
        labels: names of the labels.
    """
    return [labels[i] for i in mix(probabilities, np.array(weights)[:, None]).argmax(-1)]


def choose_weights(count: int, score: Score) -> Sequence[float]:
    """Return the weights whose mixture has the highest validation score.

    All weights that are multiples of 1 / PARTS and sum to 1 are tried. Of equal scores, the weights
    that are closest to equal ones win, since a small validation set has many ties.

    Args:
        count: number of members.
        score: weights -> the metric; of several languages, the mean of their metrics.
    """

    def worth(weights: Sequence[float]) -> tuple[float, float]:
        distance = sum((w - 1 / count) ** 2 for w in weights)
        return score(weights), -round(distance, 9)

    best: Sequence[float] = max(_grid(count), key=worth)
    return best


def _grid(count: int) -> Iterator[tuple[float, ...]]:
    """Yield all weights of `count` members that are multiples of 1 / PARTS and sum to 1."""
    for parts in itertools.product(range(PARTS + 1), repeat=count - 1):
        if (left := PARTS - sum(parts)) >= 0:
            yield tuple(part / PARTS for part in (*parts, left))
