"""Run folders as a run leaves them, as far as a report reads them, without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tables import write_rows

from flare_exp.cli.commandline import normalized
from flare_exp.config import method_schema, validation
from flare_exp.tasks import TASKS


def finished(
    folder: Path, *overrides: str, score: float = 0.5, metrics: dict[str, Any] | None = None
) -> Path:
    """Write config.yaml and metrics.json."""
    (job,), problems = validation.validate(normalized(overrides), multirun=False)
    assert not problems
    folder.mkdir(parents=True)
    metric = TASKS[job.task.name].metric
    measured = {
        "task": job.task.name,
        "lang": job.task.lang,
        "model": job.model.name,
        "mt": job.mt.name,
        "method": job.method.name,
        "seed": job.seed,
        "test": {"accuracy": 0.1, metric: score},
        "fusion": job.fusion.name if job.method.name in method_schema.FUSING_METHODS else None,
        "english": {"accuracy": 0.9, metric: 0.9},
        "zero_shot": {"accuracy": 0.2, metric: 0.2},
        "seconds": {"transfer": 1.0, "test": 2.0},
        **(metrics or {}),
    }
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(job, resolve=True))
    (folder / "metrics.json").write_text(json.dumps(measured))
    return folder


def predicted(folder: Path, gold: Sequence[Any], predictions: Sequence[str]) -> Path:
    """Write predictions.parquet, with the ids 0, 1, ... as text."""
    rows = [
        {"id": f"{i:03}", "gold": g, "prediction": p, "target": "", "source": None}
        for i, (g, p) in enumerate(zip(gold, predictions, strict=True))
    ]
    write_rows(folder / "predictions.parquet", rows)
    return folder


def traced(folder: Path, **facts: Any) -> Path:
    """Write provenance.json; `facts` take the place of single entries."""
    artifact = {"kind": "test", "digest": "t", "reused": False, "code": "code1"}
    whole = {
        "commit": {"hash": "a" * 40, "dirty": False},
        "peak_memory_bytes": 2_000_000_000,
        "peak_gpu_memory_bytes": None,
        "data": {"en/train": {"examples": 9, "fingerprint": "f1"}},
        "training": {"transfer": {"parameters": {"trainable": 1234, "total": 9999}}},
        "artefacts": {"backbone": {**artifact, "digest": "b1"}, "zero_shot": artifact},
        "code": {"fusion": "fusion1"},
        **facts,
    }
    (folder / "provenance.json").write_text(json.dumps(whole))
    return folder
