"""Measure a few real batches of every stage, on this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from flare_exp.data.datamodule import PairedDataModule
from flare_exp.experiment import provenance
from flare_exp.experiment.checkpoints import pretraining
from flare_exp.experiment.fitting import make_module, make_optimizer, make_trainer
from flare_exp.experiment.tested import stage_of
from flare_exp.planning.costs import Estimate, note_sizes
from flare_exp.planning.preview import DryRun
from flare_exp.planning.walk import (
    LABELS,
    batches_of,
    iter_stage_models,
    role_of,
    stage_options,
    steps_per_epoch,
)
from flare_exp.toy.translation_model import train_mt
from flare_exp.training.modules import FusionModule


def probe(dry: DryRun, todo: set[str]) -> Estimate:
    """Measure a few real batches of every stage.

    The costliest batch gives the memory, some typical ones give the time.
    """
    found = Estimate([])
    if "backbone" in todo:
        from flare_exp.toy.pretrain import pretrain

        found.seconds["backbone"] = _building(
            dry, pretrain, pretraining(dry.run.cfg), {"documents": 2000}
        )
    for name, mt in dry.models.items():
        if name in todo:
            found.seconds[name] = _building(dry, train_mt, mt.options, {"pairs": 2000})
    started, roles = time.perf_counter(), dry.run.task.training_roles
    for name, model, source, data, tests in iter_stage_models(dry, todo):
        trains = stage_of(name) != LABELS
        if trains:
            note_sizes(found, dry, name, model, data)
        stage = stage_options(dry, name)
        module = make_module(
            dry.run,
            model,
            source,
            score=lambda _: {dry.run.task.metric: 0.0},
            optimizer=make_optimizer(dry.run, stage.lr),
            warmup=stage.warmup,
        )
        loaders = {role: _loader(data, role, role == "train") for role in roles} if trains else {}
        ready = time.perf_counter() - started  # loading and tokenising
        if trains and name in todo:
            found.seconds[name] = ready + stage.epochs * _epoch(dry, module, data, loaders)
        for test, read in tests.items():
            found.seconds[test] = _test(dry, module, read, role_of(test))
        del module, model, source
        started = time.perf_counter()
    gpu = dry.run.cfg.trainer.accelerator == "gpu"
    found.memory = torch.cuda.max_memory_allocated() if gpu else provenance.peak_memory()
    return replace(
        found,
        memory=found.memory
        + (found.states if dry.run.cfg.source.cache == "memory" and not gpu else 0),
    )


def _epoch(
    dry: DryRun, module: FusionModule, data: PairedDataModule, loaders: Mapping[str, Any]
) -> float:
    """Measure the seconds of an epoch of training, with its validation."""
    clock = _Clock(data.passes)
    make_trainer(
        dry.run,
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        accumulate_grad_batches=data.passes,
        gradient_clip_val=dry.run.cfg.trainer.gradient_clip_val,
    ).fit(module, loaders["train"], loaders.get("validation"))
    epoch = steps_per_epoch(dry, len(data.dataset("train"))) * clock.mean("train")
    if "validation" in loaders:
        batches = len(batches_of(data, data.dataset("validation")))
        epoch += batches * clock.mean("validation")
    return epoch


def _test(dry: DryRun, module: FusionModule, data: PairedDataModule, role: str) -> float:
    """Measure the seconds in which a model predicts a role of its data."""
    clock = _Clock(data.passes)
    trainer = make_trainer(dry.run, callbacks=[clock], logger=False, enable_checkpointing=False)
    trainer.predict(module.eval(), _loader(data, role))
    return len(batches_of(data, data.dataset(role))) * clock.mean("test")


def _loader(data: PairedDataModule, role: str, trains: bool = False) -> Any:
    """Return the costliest batch first, as a warm-up, then two rounds of three typical ones."""
    dataset = data.dataset(role)
    batches = batches_of(data, dataset, trains)
    full = [rows for rows in batches if len(rows) == max(map(len, batches))]
    full.sort(key=lambda rows: max(dataset.costs[i] for i in rows))
    typical = [full[len(full) * sixth // 6] for sixth in (1, 3, 5)]
    return data.loader(dataset, [full[-1], *typical, *typical])


class _Clock(Callback):
    """Time the batches between their ends, the first left out.

    Args:
        passes: forward passes that read one batch.
    """

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.at: dict[str, list[float]] = {}

    def mean(self, role: str) -> float:
        """Return the mean seconds of a batch."""
        ends = self.at[role][self.passes - 1 :: self.passes]
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def _tick(self, role: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.at.setdefault(role, []).append(time.perf_counter())

    def on_train_batch_end(self, *_, **__) -> None:
        self._tick("train")

    def on_validation_batch_end(self, *_, **__) -> None:
        self._tick("validation")

    def on_predict_batch_end(self, *_, **__) -> None:
        self._tick("test")


def _building(
    dry: DryRun,
    build: Callable[..., Any],
    options: Mapping[str, Any],
    little: Mapping[str, Any],
) -> float:
    """Estimate the seconds to train an embedded model.

    Its text and first step are measured; the other steps are estimated from some on `little` text.
    """
    taken = []
    for changes in ({"steps": 1}, {"steps": 1, **little}, {"steps": 31, **little}):
        with tempfile.TemporaryDirectory(dir=dry.store.scratch) as folder:
            start = time.perf_counter()
            build(Path(folder), **{**options, **changes})
            taken.append(time.perf_counter() - start)
    whole, first, more = taken
    return whole + options["steps"] * max(0.0, more - first) / 30
