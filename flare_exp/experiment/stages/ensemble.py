"""Combine predictions: a weighted mean of the probabilities that each member gives to the labels.

An ensemble of a method that reads the target text and one that reads its English translation uses
the same two texts as a fusion does. A fusion that does not beat it is not worth its training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from flare_exp.utils import files

PARTS = 10  # weights are multiples of 1 / PARTS

Score = Callable[[Sequence[str]], float]


@dataclass(frozen=True)
class Member:
    """A method of the ensemble: what it trained, and its predictions.

    Attributes:
        trained: the adapter or the model; the English model for methods that train nothing.
        validation: predictions of the validation split; None where the weights are equal.
        test: predictions of the test split.
        reads_source: whether the method reads the translations of the test texts.
    """

    trained: Artifact
    validation: Artifact | None
    test: Artifact
    reads_source: bool


def ensemble(
    run: RunContext, english: Artifact, methods: Mapping[str, Method]
) -> dict[str, Artifact]:
    """Train and test every member as in a run of its own, and combine their predictions.

    Args:
        english: the fine-tuned English model.
        methods: name -> method of each member.

    Returns:
        name in the provenance -> artifact; `test` is the ensemble's.
    """
    members = {name: _member(run, english, method) for name, method in methods.items()}
    made: dict[str, Artifact] = {}
    alike: dict[str, Artifact] = {}
    if run.cfg.method.weights == "similarity":
        alike = {role: similarities(run, role) for role in ("validation", "test")}
        made |= {f"similarity of {role}": artifact for role, artifact in alike.items()}
    for name, member in members.items():
        if methods[name].trains:
            made[f"transfer {name}"] = member.trained
        if member.validation:
            made[f"validation {name}"] = member.validation
        made[f"test {name}"] = member.test
    return {**made, "test": _combined(run, members, run.cfg.task.lang, alike)}


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
    members = {name: Member(trained, None, test, name == "given") for name, test in tested.items()}
    return {f"test {name}": test for name, test in tested.items()} | {
        "test": _combined(run, members, lang, {})
    }


def _member(run: RunContext, english: Artifact, method: Method) -> Member:
    trained, below = trained_by(run, english, method)
    validation = None
    if run.cfg.method.weights == "validation":
        validation = evaluate(run, trained, method.mode, below, role="validation")
    test = evaluate(run, trained, method.mode, below)
    return Member(trained, validation, test, method.mode.translates_tests)


def _combined(
    run: RunContext, members: Mapping[str, Member], lang: str, alike: Mapping[str, Artifact]
) -> Artifact:
    """Combine the members' predictions of a language's test set.

    Args:
        members: name -> member.
        lang: the language.
        alike: role -> similarities of texts and sources; empty: they do not count.
    """
    validated = [m.validation for m in members.values() if m.validation]
    tested = [m.test for m in members.values()]
    key = {
        "stage": "ensemble",
        "test": [artifact.digest for artifact in tested],
        "validation": [artifact.digest for artifact in validated],
        "metric": run.task.metric,
        "code": code_of("ensemble"),
    }
    if alike:
        key["similarity"] = [artifact.digest for artifact in alike.values()]

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
            "members": {name: m.test.info["metrics"] for name, m in members.items()},
            "examples": len(predicted),
            "unparsable": 0,
            **({"separation": alike["validation"].info["separation"]} if alike else {}),
            **counts,
        }

    return run.store.get("test", key, build)


def _weights(
    run: RunContext,
    members: Mapping[str, Member],
    alike: Mapping[str, Artifact],
    ids: Sequence[str],
) -> np.ndarray:
    """Return the weight of each member, for each test example or for all: [members, examples or 1].

    By `alike`, it follows from the reliability of the source.
    """
    if alike:
        trusted = reliability(alike["validation"].info, alike["test"], ids)
        return shares(trusted, [m.reads_source for m in members.values()])
    validated = [m.validation for m in members.values() if m.validation]
    if not validated:
        return np.full((len(members), 1), 1 / len(members))
    task, (given, _) = run.task, _probabilities(validated)
    examples = task.load(task.english, "validation")

    def score(said: Sequence[str]) -> float:
        return task.score(said, examples)[task.metric]

    return np.array(choose_weights(given, task.labels, score))[:, None]


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


def choose_weights(
    probabilities: np.ndarray, labels: Sequence[str], score: Score
) -> Sequence[float]:
    """Return the weights whose mixture has the highest validation score.

    All weights that are multiples of 1 / PARTS and sum to 1 are tried. Of equal scores, the weights
    that are closest to equal ones win, since a small validation set has many ties.

    Args:
        probabilities: [members, examples, labels].
        labels: names of the labels.
        score: predicted labels -> the metric.
    """
    count = len(probabilities)

    def worth(tried: Iterable[float]) -> tuple[float, float]:
        weights = [*tried]
        mixed = mix(probabilities, np.array(weights)[:, None])
        predicted = [labels[i] for i in mixed.argmax(-1)]
        distance = sum((w - 1 / count) ** 2 for w in weights)
        return score(predicted), -round(distance, 9)

    return list(max([*_grid(count)], key=worth))


def _grid(count: int) -> Iterator[tuple[float, ...]]:
    """Yield all weights of `count` members that are multiples of 1 / PARTS and sum to 1."""
    for parts in itertools.product(range(PARTS + 1), repeat=count - 1):
        if (left := PARTS - sum(parts)) >= 0:
            yield tuple(part / PARTS for part in (*parts, left))
