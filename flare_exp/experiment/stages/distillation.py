"""Distil methods that read a source into an adapter that reads the target text alone.

The teachers label the training texts softly. A plain LoRA, the student, learns from that and from
the labels (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flare_exp.artifacts import Artifact
from flare_exp.code import code_of
from flare_exp.config.methods import DISTIL, METHODS, Method, members_of
from flare_exp.config.schema import Config
from flare_exp.data.rows import Reader
from flare_exp.experiment.context import RunContext, pairs_digest
from flare_exp.experiment.stages.testing import evaluate, predictions
from flare_exp.experiment.stages.transfer import SOFT_LABELS, trained_by, transfer
from flare_exp.experiment.tested import name_of_test
from flare_exp.tasks import Task
from flare_exp.utils import files


def distil(
    run: RunContext, english: Artifact, methods: Mapping[str, Method]
) -> dict[str, Artifact]:
    """Train the teachers as in runs of their own, label the training texts, train the student.

    The student is tested without a source.

    Args:
        english: the fine-tuned English model.
        methods: name -> method of the teachers and the student.

    Returns:
        name in the provenance -> artifact; `transfer` and `test` are the student's.
    """
    teachers = {name: method for name, method in methods.items() if name != DISTIL}
    made: dict[str, Artifact] = {}
    labeled: list[Artifact] = []
    for name, method in teachers.items():
        trained, below = trained_by(run, english, method)
        if method.trains:
            made[f"transfer {name}"] = trained
        labeled.append(soft_labels(run, trained, below, method))
        made[f"labels {name}"] = labeled[-1]
    if len(labeled) > 1:
        labeled.append(_mean(run, labeled))
        made["labels"] = labeled[-1]
    student = transfer(with_student_options(run), english, METHODS[DISTIL], labeled[-1])
    langs = run.cfg.task.tested
    tests = {
        name_of_test("test", lang, langs): evaluate(
            run, student, METHODS[DISTIL].mode, english, lang=lang
        )
        for lang in langs
    }
    return {**made, "transfer": student, **tests}


def with_student_options(run: RunContext) -> RunContext:
    """Return the run with the student's options of the transfer."""
    stage = run.cfg.transfer
    lr = run.cfg.distil.lr or stage.lr
    return replace(run, cfg=replace(run.cfg, transfer=replace(stage, lr=lr)))


def check_texts(cfg: Config, task: Task) -> None:
    """Check early that the teachers can read the texts without labels.

    Raises:
        UserError: the file has wrong rows, or lacks English texts that nothing can translate.
    """
    if cfg.distil.texts is None:
        return
    needed = any(method.mode.translates_tests for method in members_of(cfg.method).values())
    reason = f"mt={cfg.mt.name} translates no new texts, and the teachers read their English"
    reader = Reader(Path(cfg.distil.texts), task.fields, "distil.texts", ids=False)
    reader.check(reason if needed and not cfg.mt.translates else None)


def soft_labels(
    run: RunContext, trained: Artifact, english: Artifact | None, method: Method
) -> Artifact:
    """Predict the label probabilities of all texts that the student trains on.

    Args:
        trained: the teacher.
        english: the English model below the teacher; None: the teacher is a model itself.
        method: the teacher's method.

    Returns:
        a table of id and probabilities, in the order of the student's training data.
    """
    data = run.data(method.mode, distils=True)
    key: dict[str, Any] = {
        "stage": "labels",
        "model": trained.digest,
        "data": pairs_digest(data, "train"),
        **run.reading_of(method.mode),
        "labels_code": code_of("distil"),
        "codes": data.source_codes,
    }

    def build(folder: Path) -> dict[str, Any]:
        found = predictions(run, trained, english, data, "train")
        if not run.distributed.is_main:
            return {}
        pairs = data.dataset("train").pairs
        rows = [
            {"id": pair.target.id, "probabilities": [*prediction.probabilities]}
            for pair, prediction in zip(pairs, found, strict=True)
        ]
        files.write_parquet(folder / SOFT_LABELS, rows)
        known = [(p.target.label, f) for p, f in zip(pairs, found, strict=True)]
        own = [f.text == run.task.labels[label] for label, f in known if label is not None]
        return {
            "texts": len(rows),
            "unlabeled": len(rows) - len(own),
            "agreement": round(float(np.mean(own)), 4) if own else None,
        }

    return run.store.get("labels", key, build, collective=True)


def _mean(run: RunContext, labeled: list[Artifact]) -> Artifact:
    """Average the soft labels of several teachers."""
    key = {"stage": "labels", "of": [a.digest for a in labeled], "code": code_of("distil")}

    def build(folder: Path) -> dict[str, Any]:
        tables = [pq.read_table(a.path / SOFT_LABELS).to_pydict() for a in labeled]
        if any(table["id"] != tables[0]["id"] for table in tables):
            raise ValueError("the teachers of a distillation labeled different texts")
        mean = np.mean([table["probabilities"] for table in tables], axis=0).tolist()
        rows = [
            {"id": row, "probabilities": probabilities}
            for row, probabilities in zip(tables[0]["id"], mean, strict=True)
        ]
        files.write_parquet(folder / SOFT_LABELS, rows)
        return {"texts": len(rows), "teachers": len(labeled)}

    return run.store.get("labels", key, build)
