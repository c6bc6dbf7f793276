"""Hold the cost of a run, and count what it keeps and downloads."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from flare_exp.config.methods import METHODS
from flare_exp.config.schema import Config
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.dataset import PairedDataset
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.models import backbones
from flare_exp.planning.preview import DryRun
from flare_exp.planning.shapes import config_of
from flare_exp.planning.walk import width_of


@dataclass
class Estimate:
    """Estimated cost of the part of a run that is not built.

    The name of an artifact is that of `pipeline.run_stages`, or the digest of a translation that is
    not there.

    Attributes:
        notes: what the estimate rests on.
        parameters: training stage -> how many are `trainable`, and how many there are in `total`.
        memory: most bytes of the process (CPU) or of the device (GPU); infinite: more than it has.
        states: bytes of cached source states.
        seconds: name of an artifact -> time to build it.
        disk: name of an artifact -> its bytes.
        passing: name of a training -> most bytes that it keeps on the way, beside its artifact.
    """

    notes: list[str]
    parameters: dict[str, dict[str, int]] = field(default_factory=dict)
    memory: float = 0
    states: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    passing: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Parameters of the model that is trained last."""
        return list(self.parameters.values())[-1]["total"]


def _saved(dry: DryRun, name: str, counts: Mapping[str, int]) -> tuple[int, int]:
    """Return the bytes of what a training stage leaves, and of what it keeps on the way.

    On the way are its state (weights and both moments, 32 bits each) and, if that is selected, the
    best epoch. Either is there twice while it is replaced.
    """
    full = (
        dry.run.cfg.finetune.tuning == "full"
        if name == "finetune"
        else METHODS[dry.run.cfg.method.name].full
    )
    copies = 4 if dry.run.cfg.task.select == "best" else 3
    trained = 4 * counts["trainable"]
    return 4 * counts["total"] if full else trained, 2 * copies * trained


def downloads(dry: DryRun) -> dict[tuple[str, str | None], int]:
    """Return path and revision -> bytes, of the checkpoints that are not here."""
    found, m, task_type = {}, dry.run.cfg.model, dry.run.task_type
    if dry.run.backbone.kind == "hub" and not dry.run.backbone.reused:
        auto = backbones.auto_class(task_type, config_of(str(m.path)).is_encoder_decoder)
        found[str(m.path), m.revision] = _published(str(m.path), m.revision, auto)
    absent = {(str(mt.cfg.path), mt.cfg.revision) for mt in dry.models_read.values() if mt.absent}
    return found | {place: _published(*place, AutoModelForSeq2SeqLM) for place in absent}


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


def note_sizes(
    found: Estimate, dry: DryRun, name: str, model: nn.Module, data: PairedDataModule
) -> None:
    """Parameters, and bytes of source states and of what the stage leaves."""
    counts = found.parameters[name] = backbones.parameter_counts(model)
    found.states = _states(dry, model, data)
    found.disk[name], found.passing[name] = _saved(dry, name, counts)


def _states(dry: DryRun, model: Any, data: PairedDataModule) -> int:
    """Return the bytes of the cached source states of training."""
    o = dry.run.cfg.source
    if o.cache == "off" or not data.mode.fuses or not dry.run.source(model).cacheable:
        return 0
    config = model.peft_config["default"]
    tokens = sum(_source_tokens(dry, data, role) for role in dry.run.task.training_roles)
    width = config.source_width or len(dry.run.source(model).states.blocks) * width_of(model)
    return round(tokens * width * getattr(torch, o.dtype or _read_dtype(dry, data.mode)).itemsize)


def _source_tokens(dry: DryRun, data: PairedDataModule, role: str) -> float:
    """Return the tokens of a role's sources, each distinct text once."""
    dataset, weights = data.dataset(role), dry.weights(data, role)
    found: dict[Any, float] = {}
    for i, item in enumerate(dataset.source or ()):
        which, row = divmod(i, len(weights))
        ids = item["inputs"]["input_ids"]
        key = _text_of(dataset, which, row) if isinstance(ids, range) else tuple(ids)
        found[key] = weights[row] * len(ids)
    return sum(found.values())


def _text_of(dataset: PairedDataset, which: int, row: int) -> Any:
    """Return what a source has in common with the same text in other rows, without its tokens."""
    pair = dataset.pairs[dataset.examples[row]]
    sources = (pair.source, *pair.more)
    if which >= len(sources):  # with wrong words of its own
        return which, row
    source = sources[which]
    assert source is not None
    text = source.texts if any(source.texts) else source.id
    return text, dataset.target[row].get("window")


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


def mt_parameters(cfg: Config) -> int:
    """Count the parameters of the translation model."""
    if cfg.mt.path is None:
        p = cfg.mt.pretrain
        assert p is not None
        return p.vocab_size * p.hidden_size + p.layers * 28 * p.hidden_size**2
    return _parameters(cfg.mt.path, cfg.mt.revision, AutoModelForSeq2SeqLM)
