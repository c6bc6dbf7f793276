"""Train one model of a run with Lightning, and save the weights that are kept."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from flare_exp.config.schema import StageConfig
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.generation import GenerationPreprocessor
from flare_exp.data.preprocessing import Prediction
from flare_exp.experiment.building import save_model
from flare_exp.experiment.context import RunContext
from flare_exp.flare.source_encoders import MixupSourceEncoder, SourceEncoder
from flare_exp.models import backbones
from flare_exp.tasks.metrics import mean_of
from flare_exp.training.checkpointing import (
    BestCheckpoint,
    StepCheckpoint,
    continued_curves,
    steps_kept,
)
from flare_exp.training.consistency import Consistency
from flare_exp.training.distillation import Distillation
from flare_exp.training.divergence import NotFinite, StopIfNotFinite
from flare_exp.training.generation import GenerationModule
from flare_exp.training.heads import ClassificationModule, SpanModule
from flare_exp.training.modules import AddedLoss, FusionModule, Score
from flare_exp.training.progress import StageProgress
from flare_exp.utils import signals

log = logging.getLogger(__name__)


def fit(
    run: RunContext,
    name: str,
    model: nn.Module,
    source: SourceEncoder | None,
    data: PairedDataModule,
    stage: StageConfig,
    saved: Path,
    added: AddedLoss | None = None,
) -> dict[str, Any]:
    """Train a model, and save the weights of the best validation epoch or of the last one.

    An earlier attempt that was stopped goes on from its last kept step.

    Args:
        name: of the stage (`finetune`, `transfer`).
        source: reads the batch's source before the target pass; None: nothing is fused.
        saved: where the weights go; the folder above keeps what an attempt leaves.
        added: a loss beside that of the task; None: that of the method, if it has one.

    Returns:
        facts for the artifact's manifest; empty on all ranks but the first.

    Raises:
        NotFinite: a loss or a gradient is NaN or infinite; nothing is kept.
    """
    pl.seed_everything(_dropout_seed(run), workers=True, verbose=False)
    counts = backbones.parameter_counts(model)
    of = f"{counts['trainable']:,}", f"{counts['total']:,}"
    log.info("%s: %s of %s parameters train", name, *of)
    folder, best = saved.parent, _best_epoch(run, saved.parent)
    module = make_module(
        run,
        model,
        source,
        added=added,
        score=_validation_score(run, data) if "validation" in run.task.training_roles else None,
        optimizer=make_optimizer(run, stage.lr),
        warmup=stage.warmup,
    )
    kept = StepCheckpoint(
        folder / "state.ckpt", run.distributed, run.cfg.trainer.checkpoint_minutes, best
    )
    finite = StopIfNotFinite(name, _causes_of_divergence(run, _rate(run, name, added), stage))
    callbacks = [finite, kept, *([best] if best else [])]
    trainer = _fitting_trainer(run, name, data, stage, folder, callbacks)
    _train(run, name, trainer, module, data, kept.path)
    # with fsdp every rank has a part of the weights
    weights = {} if best else module.trained(trainer.strategy.lightning_module_state_dict())
    if not run.distributed.is_main:
        return {}
    chosen: dict[str, Any] = {"epoch": stage.epochs - 1}
    score = trainer.callback_metrics.get(_monitor(run))
    if best:
        score, chosen["epoch"], weights = _read_best(best)
    if score is not None:
        chosen = {_monitor(run): round(float(score), 6), **chosen}
    save_model(model, {name.removeprefix("model."): w for name, w in weights.items()}, saved)
    kept.path.unlink(missing_ok=True)  # before the file that it names
    if best:
        shutil.rmtree(str(best.dirpath))
    roles = run.task.training_roles
    return {
        "parameters": counts,
        "best" if best else "last": chosen,
        "truncated": {role: data.dataset(role).truncated for role in roles},
        "cut_off": {role: data.dataset(role).cut_off for role in roles},
    }


def _fitting_trainer(
    run: RunContext,
    name: str,
    data: PairedDataModule,
    stage: StageConfig,
    folder: Path,
    callbacks: Sequence[pl.Callback],
) -> pl.Trainer:
    """Return the Trainer of a training stage."""
    assert run.tracker
    limit = run.cfg.trainer.limit_train_batches
    return make_trainer(
        run,
        name,
        callbacks,
        max_epochs=stage.epochs,
        enable_checkpointing=any(isinstance(one, BestCheckpoint) for one in callbacks),
        logger=run.tracker.loggers(name, folder),
        gradient_clip_val=run.cfg.trainer.gradient_clip_val,
        accumulate_grad_batches=data.passes,
        limit_train_batches=limit and limit * data.passes,
        limit_val_batches=None if "validation" in run.task.training_roles else 0,
    )


def _train(
    run: RunContext,
    name: str,
    trainer: pl.Trainer,
    module: FusionModule,
    data: PairedDataModule,
    state: Path,
) -> None:
    """Train, from the step that an earlier attempt kept in the file `state`, if there is one."""
    distributed, folder = run.distributed, state.parent
    sharded = distributed.size > 1 and run.cfg.trainer.strategy == "fsdp"
    steps = distributed.broadcast(
        steps_kept(state, distributed.size, sharded) if distributed.is_main else None
    )
    if steps:
        log.info("%s: goes on after %d steps", name, steps)
    elif distributed.is_main:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    curves = (
        continued_curves(folder / "metrics.csv", steps) if distributed.is_main else nullcontext()
    )
    with signals.deferred(), curves:
        try:
            begun = str(state) if steps else None
            trainer.fit(module, data, ckpt_path=begun, weights_only=True)
        except NotFinite:
            if distributed.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            data.trainer = None  # the run keeps the data, and the trainer holds the weights


def _monitor(run: RunContext) -> str:
    """Return the name under which the selecting metric is logged."""
    return f"validation/{run.task.metric}"


def _best_epoch(run: RunContext, folder: Path) -> BestCheckpoint | None:
    """Return what keeps the best validation epoch; None: the last epoch is kept."""
    if run.cfg.task.select != "best":
        return None
    folder, monitor = folder / "checkpoints", _monitor(run)
    return BestCheckpoint(dirpath=folder, monitor=monitor, mode="max", save_weights_only=True)


def _read_best(best: BestCheckpoint) -> tuple[Tensor | None, int, dict[str, Tensor]]:
    """Read score, epoch and weights of the best validation epoch."""
    checkpoint = torch.load(best.best_model_path, weights_only=True, map_location="cpu")
    return best.best_model_score, checkpoint["epoch"], checkpoint["state_dict"]


def _validation_score(run: RunContext, data: PairedDataModule) -> Score:
    """Return the function that scores predictions of the validation set.

    Of several languages it is the mean of their scores, so that each counts the same.
    """
    dataset = data.dataset("validation")
    parts: dict[str, list[int]] = {}
    for number, pair in enumerate(dataset.pairs):
        parts.setdefault(pair.target.lang, []).append(number)

    def score(found: Mapping[int, Prediction]) -> dict[str, float]:
        texts = dataset.texts(found)
        scored = [
            run.task.score([texts[i] for i in own], [dataset.pairs[i].scored for i in own])
            for own in parts.values()
        ]
        return mean_of(scored)

    return score


def _rate(run: RunContext, name: str, added: AddedLoss | None) -> str:
    """Return the option with the learning rate of a training; a student may have its own."""
    own = isinstance(added, Distillation) and run.cfg.distil.lr is not None
    return "distil.lr" if own else f"{name}.lr"


def _causes_of_divergence(run: RunContext, rate: str, stage: StageConfig) -> str:
    """Name what makes losses infinite or NaN, as far as the configuration tells."""
    t, dtype = run.cfg.trainer, run.models.precision.dtype
    causes = [f"{rate}={stage.lr:g} is too high"]
    if t.precision in ("16-mixed", "bf16-true") or dtype != "float32":
        causes.append(f"trainer.precision={t.precision} with model.dtype={dtype} is too coarse")
    if t.gradient_clip_val is None:
        causes.append("trainer.gradient_clip_val=null does not limit the gradient")
    return "; ".join([*causes, "at the first step: the checkpoint itself"])


def _dropout_seed(run: RunContext) -> int:
    """Return the seed of dropout: another one on every rank, so that no two rows share a mask."""
    seed, rank = run.cfg.seed, run.distributed.rank
    return seed if run.distributed.is_main else random.Random(f"{seed}-{rank}").getrandbits(32)


def make_module(
    run: RunContext, model: nn.Module, source: SourceEncoder | None, **training: Any
) -> FusionModule:
    """Make the LightningModule of the run's task type. `training`: options of FusionModule."""
    training["source"] = source
    training["added"] = training.get("added") or consistency_of(run, source)
    if run.task_type == "label":
        return ClassificationModule(model, run.task.labels, **training)
    if run.task_type == "span":
        return SpanModule(model, run.cfg.task.max_answer_length, **training)
    assert isinstance(run.preprocessor, GenerationPreprocessor)
    rows = run.cfg.data.micro_batch_size
    prompts = run.preprocessor.tokenizer, run.preprocessor.answer, run.decoding
    return GenerationModule(model, *prompts, rows=rows, **training)


def consistency_of(run: RunContext, source: SourceEncoder | None) -> Consistency | None:
    """Return X-Mixup's consistency losses; None for other methods.

    The first token of a decoder stands for no text, so that the mean is compared there.
    """
    if not isinstance(source, MixupSourceEncoder):
        return None
    first = run.task_type == "label" and not source.encoder_decoder
    m = run.cfg.mixup
    return Consistency(source.states, m.kl, m.mse, "first" if first else "mean")


def make_trainer(
    run: RunContext, stage: str = "", callbacks: Sequence[pl.Callback] = (), **options: Any
) -> pl.Trainer:
    """Make a Trainer for the run's devices. `stage`: name of its line of progress."""
    t = run.cfg.trainer
    machine = {k: getattr(t, k) for k in ("accelerator", "devices", "enable_progress_bar")}
    machine |= run.distributed.trainer_options(t.strategy, str(t.precision))
    bar = [StageProgress(stage)] if t.enable_progress_bar else []
    return pl.Trainer(
        **machine,
        callbacks=[*callbacks, *bar],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        **options,
    )


def make_optimizer(run: RunContext, lr: float) -> Callable[..., torch.optim.Optimizer]:
    """Return the function that makes the optimizer (`optim._target_`) of some parameters."""
    return hydra.utils.instantiate({**asdict(run.cfg.optim), "_partial_": True}, lr=lr)
