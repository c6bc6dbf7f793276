"""Count every allocation and product of the stages' passes, where the weights are not here."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from flare_exp.artifacts import Artifact
from flare_exp.config.schema import Config
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.experiment import provenance
from flare_exp.experiment.tested import stage_of
from flare_exp.flare.source_encoders import SourceEncoder
from flare_exp.planning.costs import Estimate, mt_parameters, note_sizes
from flare_exp.planning.counting import Work, work_of
from flare_exp.planning.lengths import CHARACTERS
from flare_exp.planning.preview import DryRun
from flare_exp.planning.walk import (
    LABELS,
    build,
    iter_stage_models,
    role_of,
    stage_options,
    steps_per_epoch,
)

# the device of plans for a GPU that is not here: name, peak FLOP/s
GPU = ("an A100 (bf16)", 312e12)
ASSUMED_MFU = 0.35  # of the peak that training reaches
DECODE_TO_TRAIN_MFU = 0.1  # of that, when tokens are written one by one


def arithmetic(dry: DryRun, todo: set[str]) -> Estimate:
    """Count every allocation and product of the stages' own passes.

    The passes are over tensors that have shapes and no content.
    """
    found = Estimate([])
    speed = throughput(dry.run.cfg.trainer.accelerator)[1] * ASSUMED_MFU
    for name, model, source, data, tests in iter_stage_models(dry, todo):
        trains = stage_of(name) != LABELS
        if trains:
            note_sizes(found, dry, name, model, data)
        stage = stage_options(dry, name)
        work = work_of(dry.run, model, source, data, functools.partial(_of_depth, dry, name))
        if trains and name in todo:
            rows = round(sum(dry.weights(data, "train")))
            taken = steps_per_epoch(dry, rows) / max(1, -(-rows // dry.run.cfg.data.batch_size))
            epoch = taken * work.train * _tokens(dry, data, "train")
            if "validation" in dry.run.task.training_roles:
                epoch += _predicting(dry, work, data, "validation")
            found.seconds[name] = stage.epochs * epoch / speed
            found.memory = max(found.memory, work.training)
        for test, read in tests.items():
            found.memory = max(found.memory, work.testing)
            found.seconds[test] = _predicting(dry, work, read, role_of(test)) / speed
    base = provenance.peak_memory() if dry.run.cfg.trainer.accelerator == "cpu" else 0
    return replace(found, memory=found.memory + base)


def _tokens(dry: DryRun, data: PairedDataModule, role: str) -> float:
    """Return the tokens of all of the benchmark's rows that a role's data stand for."""
    costs = data.dataset(role).costs
    return sum(w * cost for w, cost in zip(dry.weights(data, role), costs, strict=True))


def _predicting(dry: DryRun, work: Work, data: PairedDataModule, role: str) -> float:
    """Return the FLOPs of predicting a role, at the speed of a training."""
    written = work.written * sum(dry.weights(data, role)) / DECODE_TO_TRAIN_MFU
    return work.evaluate * _tokens(dry, data, role) + written


def _of_depth(dry: DryRun, name: str, depth: int) -> tuple[nn.Module, SourceEncoder | None]:
    """Build the model of a training, and its source, with `depth` blocks in each stack."""
    assert dry.shapes
    shallow = replace(dry, run=replace(dry.run, models=dry.shapes.with_depth(depth)))
    return build(shallow, name, Artifact(Path(), "", "", {}, 0.0, False))


@functools.cache
def throughput(accelerator: str) -> tuple[str, float]:
    """Return the device of an estimate and its peak FLOP/s.

    The peak is measured with a matrix product where the device is here.
    """
    gpu = accelerator == "gpu"
    if gpu and not torch.cuda.is_available():
        return GPU
    size, kind = (8192, {"device": "cuda", "dtype": torch.bfloat16}) if gpu else (1024, {})
    a = torch.randn(size, size, **kind)  # type: ignore[call-overload]
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return (torch.cuda.get_device_name() if gpu else "this CPU"), 2 * size**3 / best


def translation_seconds(cfg: Config, texts: Sequence[str]) -> float:
    """Estimate the seconds of a configuration's translation model for texts.

    It takes two FLOPs per parameter and token, in the encoder at once, in the decoder one token
    after the other. Texts that are not known are as long as data.max_length. How fast a program
    is (mt=command) is not known: 0.
    """
    if cfg.mt.kind == "command":
        return 0.0
    o, unknown = cfg.mt, cfg.data.max_length
    tokens = sum(len(text) / CHARACTERS if text else unknown for text in texts)
    half = mt_parameters(cfg) / 2
    speed = throughput(cfg.trainer.accelerator)[1] * ASSUMED_MFU
    return 2 * half * tokens * (1 + o.beams / DECODE_TO_TRAIN_MFU) / speed
