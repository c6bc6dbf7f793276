"""Estimate what the stages of a run cost.

They are timed in a short probe where the weights are here, and counted from shapes elsewhere.
Either way the models, batches and passes are those of flare_exp.experiment.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from flare_exp.artifacts import Artifact
from flare_exp.config.schema import Config
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.experiment import provenance
from flare_exp.experiment.fitting import make_module, make_optimizer, make_trainer
from flare_exp.flare.source_encoders import SourceEncoder
from flare_exp.models import backbones
from flare_exp.planning.counting import work_of
from flare_exp.planning.lengths import CHARACTERS, CountingPreprocessor
from flare_exp.planning.preview import DryRun, pretraining, preview
from flare_exp.planning.shapes import config_of
from flare_exp.planning.walk import (
    batches_of,
    build_adapted,
    build_english,
    iter_stage_models,
    stage_options,
    steps_per_epoch,
    width_of,
)
from flare_exp.toy.translation_model import train_mt

GPU = (
    "an A100 (bf16)",
    312e12,
)  # the device of plans for a GPU that is not here: name, peak FLOP/s
ASSUMED_MFU = 0.35  # of the peak that training reaches
DECODE_TO_TRAIN_MFU = 0.1  # of that, when tokens are written one by one


@dataclass
class Estimate:
    """Estimated cost of the part of a run that is not built.

    The name of an artifact is that of `pipeline.run_stages`, or the digest of a translation that is
    not there.

    Attributes:
        notes: what the estimate rests on.
        parameters: training stage -> how many are `trainable`, and how many there are in `total`.
        memory: most bytes of the process (CPU) or of the device (GPU).
        states: bytes of cached source states.
        seconds: name of an artifact -> time to build it.
        disk: name of an artifact -> its bytes.
    """

    notes: list[str]
    parameters: dict[str, dict[str, int]] = field(default_factory=dict)
    memory: int = 0
    states: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Parameters of the model that is trained last."""
        return list(self.parameters.values())[-1]["total"]


def estimate(cfg: Config, scratch: Path, todo: set[str]) -> Estimate:
    """Estimate the cost of those artifacts of a settled configuration that are in `todo`.

    It is best called in a process of its own, whose peak memory is then that of a run.
    """
    torch.manual_seed(0)
    dry = preview(cfg, scratch)
    found = _arithmetic(dry, todo) if dry.shapes else _probe(dry, todo)
    for digest, (examples, times) in dry.untranslated.items():
        found.seconds[digest] = times * _translating(
            dry, [text for e in examples for text in e.texts]
        )
        found.disk[digest] = round(
            times * 2 * sum(len(text.encode()) for e in examples for text in e.texts)
        )
    if "backbone" in todo:
        found.disk["backbone"] = 4 * found.total
    if dry.run.cfg.source.cache == "disk" and "transfer" in todo:
        found.disk["transfer"] += found.states
    found.notes += _notes(dry)
    return found


def _saved(dry: DryRun, name: str, counts: Mapping[str, int]) -> int:
    """Return the bytes of what a training stage leaves, with its two checkpoints on the way."""
    full = name == "finetune" and dry.run.cfg.finetune.tuning == "full"
    copies = 3 if dry.run.cfg.task.select == "best" else 1
    return 4 * (copies - 1) * counts["trainable"] + 4 * (
        counts["total"] if full else counts["trainable"]
    )


def _notes(dry: DryRun) -> list[str]:
    """Say what an estimate rests on."""
    cfg, task = dry.run.cfg, dry.run.task
    if dry.shapes:
        device, peak = throughput(cfg.trainer.accelerator)
        found = [
            f"arithmetic: {cfg.model.name} or its data is not here. Its passes are counted on "
            "tensors without content: every "
            "matrix product (the source's pass too, and no gradient of frozen weights), and "
            "every tensor that is alive at once, "
            "weights as they are kept, optimizer states and source states; in batches as long "
            "as the longest text."
            + (
                ""
                if cfg.trainer.accelerator == "gpu"
                else " A process on a CPU may hold twice that."
            ),
            f"time: {device}, {peak / 1e12:.3g} TFLOP/s, {ASSUMED_MFU:.0%} of it used in training, "
            f"{ASSUMED_MFU * DECODE_TO_TRAIN_MFU:.1%} where tokens "
            f"are written one by one"
            + (
                f"; {CHARACTERS} characters to a token."
                if isinstance(dry.run.preprocessor, CountingPreprocessor)
                else "."
            ),
        ]
    else:
        whose = (
            "the device"
            if cfg.trainer.accelerator == "gpu"
            else "the whole process, its libraries included"
        )
        found = [
            f"probe: a few real batches of every stage on this machine; memory is that of {whose}."
        ]
    if task.assumed:  # type: ignore[attr-defined]
        found.append(
            f"data: {task.name} is not here, so its sizes are the published ones and every text "
            "is as long as "
            f"data.max_length={cfg.data.max_length}: time and memory are upper bounds; what was "
            "built from it is not recognized."
        )
    if dry.untranslated:
        found.append(
            f"translations by mt={cfg.mt.name} are not there yet: the texts themselves stand in "
            "for them, and what is trained "
            "on them counts as to do; the time of translating is arithmetic."
        )
    return found


def downloads(dry: DryRun, reads_mt: bool) -> int:
    """Return the bytes of the checkpoints that are not here."""
    found, m, task_type = 0, dry.run.cfg.model, dry.run.task_type
    if dry.run.backbone.kind == "hub" and not dry.run.backbone.reused:
        found += _published(
            str(m.path),
            m.revision,
            backbones.auto_class(task_type, config_of(str(m.path)).is_encoder_decoder),
        )
    if reads_mt and dry.mt.absent:
        found += _published(
            str(dry.run.cfg.mt.path), dry.run.cfg.mt.revision, AutoModelForSeq2SeqLM
        )
    return found


def _published(path: str, revision: str | None, auto: Any) -> int:
    """Return the bytes of a checkpoint's weights, as they are on the hub."""
    return _parameters(path, revision, auto) * (
        2 if "16" in str(config_of(path, revision).dtype) else 4
    )


@functools.cache
def _parameters(path: str, revision: str | None, auto: Any) -> int:
    """Count the parameters of a checkpoint by its configuration."""
    with torch.device("meta"):
        return auto.from_config(config_of(path, revision)).num_parameters()


def _note_sizes(
    found: Estimate, dry: DryRun, name: str, model: nn.Module, data: PairedDataModule
) -> None:
    """Parameters, and bytes of source states and of what the stage leaves."""
    counts = found.parameters[name] = backbones.parameter_counts(model)
    found.states = _states(dry, model, data)
    found.disk[name] = _saved(dry, name, counts)


def _states(dry: DryRun, model: Any, data: PairedDataModule) -> int:
    """Return the bytes of the cached source states of training."""
    o = dry.run.cfg.source
    if o.cache == "off" or not data.mode.fuses:
        return 0
    config = model.peft_config["default"]
    parts, roles = dry.parts(data.mode), dry.run.task.training_roles
    tokens = sum(
        parts[role] * sum(len(i["inputs"]["input_ids"]) for i in data.dataset(role).source or ())
        for role in roles
    )
    width = config.source_width or len(dry.run.source(model).states.blocks) * width_of(model)
    return round(tokens * width * getattr(torch, o.dtype or _read_dtype(dry, data.mode)).itemsize)


def _read_dtype(dry: DryRun, mode: PairingMode) -> str:
    """Return the precision in which a source pass gives its states."""
    mixed = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}.get(
        str(dry.run.cfg.trainer.precision)
    )
    if mode is PairingMode.LATENT:
        return mixed or ("bfloat16" if dry.mt.device == "cuda" else "float32")
    return mixed or (
        "float64" if dry.run.cfg.trainer.precision == "64-true" else dry.run.cfg.model.dtype
    )


# --- the probe ----------------------------------------------------------------------------------


def _probe(dry: DryRun, todo: set[str]) -> Estimate:
    """Measure a few real batches of every stage.

    The costliest batch gives the memory, some typical ones give the time.
    """
    found = Estimate([])
    if "backbone" in todo:
        from flare_exp.toy.pretrain import pretrain

        found.seconds["backbone"] = _building(
            dry, pretrain, pretraining(dry.run.cfg), {"documents": 2000}
        )
    if "mt" in todo:
        found.seconds["mt"] = _building(dry, train_mt, dry.mt.options, {"pairs": 2000})
    started = time.perf_counter()
    for name, model, source, data, tests in iter_stage_models(dry, todo):
        _note_sizes(found, dry, name, model, data)
        stage, dataset, parts = (
            stage_options(dry, name),
            data.dataset("train"),
            dry.parts(data.mode),
        )
        clock = _Clock(data.passes)
        module = make_module(
            dry.run,
            model,
            source,
            score=lambda _: {dry.run.task.metric: 0.0},
            optimizer=make_optimizer(dry.run, stage.lr),
            warmup=stage.warmup,
        )
        loaders = {role: _loader(dry, data, role) for role in dry.run.task.training_roles}
        ready = time.perf_counter() - started  # loading and tokenising
        if name in todo:
            make_trainer(
                dry.run,
                max_epochs=1,
                callbacks=[clock],
                logger=False,
                enable_checkpointing=False,
                accumulate_grad_batches=data.passes,
                gradient_clip_val=dry.run.cfg.trainer.gradient_clip_val,
            ).fit(module, loaders["train"], loaders.get("validation"))
            epoch = steps_per_epoch(dry, round(parts["train"] * len(dataset))) * clock.mean("train")
            if "validation" in loaders:
                batches = parts["validation"] * len(
                    batches_of(dry, data.dataset("validation"), "validation")
                )
                epoch += batches * clock.mean("validation")
            found.seconds[name] = ready + stage.epochs * epoch
        for test, mode in tests.items():
            clock = _Clock(data.passes)
            trainer = make_trainer(
                dry.run, callbacks=[clock], logger=False, enable_checkpointing=False
            )
            trainer.predict(module.eval(), _loader(dry, dry.run.data(mode), "test"))
            batches = dry.parts(mode)["test"] * len(
                batches_of(dry, dry.run.data(mode).dataset("test"), "test")
            )
            found.seconds[test] = batches * clock.mean("test")
        del module, model, source
        started = time.perf_counter()
    gpu = dry.run.cfg.trainer.accelerator == "gpu"
    found.memory = torch.cuda.max_memory_allocated() if gpu else provenance.peak_memory()
    return replace(
        found,
        memory=found.memory
        + (found.states if dry.run.cfg.source.cache == "memory" and not gpu else 0),
    )


def _loader(dry: DryRun, data: PairedDataModule, role: str) -> Any:
    """Return the costliest batch first, as a warm-up, then two rounds of three typical ones."""
    dataset = data.dataset(role)
    batches = batches_of(dry, dataset, role)
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


# --- arithmetic ---------------------------------------------------------------------------------


def _arithmetic(dry: DryRun, todo: set[str]) -> Estimate:
    """Count every allocation and product of the stages' own passes.

    The passes are over tensors that have shapes and no content.
    """
    found = Estimate([])
    speed = throughput(dry.run.cfg.trainer.accelerator)[1] * ASSUMED_MFU
    for name, model, source, data, tests in iter_stage_models(dry, todo):
        _note_sizes(found, dry, name, model, data)
        stage, parts = stage_options(dry, name), dry.parts(data.mode)
        work = work_of(dry.run, model, source, data, functools.partial(_of_depth, dry, name))
        if name in todo:
            tokens = {
                role: parts[role] * sum(data.dataset(role).costs)
                for role in dry.run.task.training_roles
            }
            rows = round(parts["train"] * len(data.dataset("train")))
            taken = steps_per_epoch(dry, rows) / max(1, -(-rows // dry.run.cfg.data.batch_size))
            epoch = taken * work.train * tokens["train"] + work.evaluate * tokens.get(
                "validation", 0.0
            )
            found.seconds[name] = stage.epochs * epoch / speed
            found.memory = max(found.memory, work.training)
        for test, mode in tests.items():
            found.memory = max(found.memory, work.testing)
            tested, part = dry.run.data(mode).dataset("test"), dry.parts(mode)["test"]
            found.seconds[test] = (
                part
                * (
                    work.evaluate * sum(tested.costs)
                    + work.written * len(tested) / DECODE_TO_TRAIN_MFU
                )
                / speed
            )
    base = provenance.peak_memory() if dry.run.cfg.trainer.accelerator == "cpu" else 0
    return replace(found, memory=found.memory + base)


def _of_depth(dry: DryRun, name: str, depth: int) -> tuple[nn.Module, SourceEncoder | None]:
    """Build the model of a training, and its source, with `depth` blocks in each stack."""
    assert dry.shapes
    shallow = replace(dry, run=replace(dry.run, models=dry.shapes.with_depth(depth)))
    if name == "finetune":
        return build_english(shallow), None
    return build_adapted(shallow, Artifact(Path(), "", "", {}, 0.0, False))


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


def _translating(dry: DryRun, texts: Sequence[str]) -> float:
    """Estimate the seconds of a translation model for texts.

    It takes two FLOPs per parameter and token, in the encoder at once, in the decoder one token
    after the other. Texts that are not known are as long as data.max_length.
    """
    o, unknown = dry.run.cfg.mt, dry.run.cfg.data.max_length
    tokens = sum(len(text) / CHARACTERS if text else unknown for text in texts)
    half = mt_parameters(dry.run.cfg) / 2
    speed = throughput(dry.run.cfg.trainer.accelerator)[1] * ASSUMED_MFU
    return 2 * half * tokens * (1 + o.beams / DECODE_TO_TRAIN_MFU) / speed


def mt_parameters(cfg: Config) -> int:
    """Count the parameters of the translation model."""
    if cfg.mt.path is None:
        p = cfg.mt.pretrain
        assert p is not None
        return p.vocab_size * p.hidden_size + p.layers * 28 * p.hidden_size**2
    return _parameters(cfg.mt.path, cfg.mt.revision, AutoModelForSeq2SeqLM)
