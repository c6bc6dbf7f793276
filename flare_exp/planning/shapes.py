"""Build models that have shapes and no weights, of checkpoints that are not here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from flare_exp.artifacts import Artifact
from flare_exp.config.methods import members_of
from flare_exp.config.schema import Config
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.errors import UserError
from flare_exp.experiment.building import ModelBuilder
from flare_exp.experiment.checkpoints import existing_checkpoint
from flare_exp.flare import adapter
from flare_exp.hub import Checkpoint, local, looks_local
from flare_exp.models import backbones, families
from flare_exp.models.backbones import Backbone
from flare_exp.planning.architectures import ARCHITECTURES
from flare_exp.tasks import Task


def weights_here(path: str, revision: str | None = None) -> bool:
    """Return True if a checkpoint is a folder, or in the hub's cache."""
    return looks_local(path) or Checkpoint("model", path, revision).find().lacks is None


def config_of(path: str, revision: str | None = None) -> PreTrainedConfig:
    """Return a checkpoint's configuration: its own where it is here, else the published numbers.

    Raises:
        UserError: neither is known.
    """
    with suppress(OSError, ValueError):
        return AutoConfig.from_pretrained(local(path), revision=revision, local_files_only=True)
    if path not in ARCHITECTURES:
        raise UserError(
            f"{path}: its config.json is not here and its numbers are not known to plan; "
            "download it, or give a folder"
        )
    return AutoConfig.for_model(**ARCHITECTURES[path])


class ShapeBuilder(ModelBuilder):
    """Build models that have shapes and no weights.

    Args:
        depth: number of blocks of each stack; None: as many as the checkpoint has.
    """

    def __init__(
        self, cfg: Config, task: Task, backbone: Artifact, task_type: str, depth: int | None = None
    ):
        super().__init__(cfg, task, backbone, task_type)
        self.depth = depth

    def with_depth(self, depth: int) -> ShapeBuilder:
        """Return a builder of the same models with `depth` blocks in each stack."""
        return ShapeBuilder(self.cfg, self.task, self.backbone, self.task_type, depth)

    def fresh_backbone(self) -> Backbone:
        """Build the pre-trained checkpoint."""
        return self.load(str(self.backbone.path))

    def load(self, path: str, revision: str | None = None) -> Backbone:
        """Build a checkpoint from its configuration."""
        config, m = AutoConfig.from_pretrained(path), self.cfg.model
        if self.depth is not None:
            shorten(config, self.depth)
        family = families.FAMILIES[config.model_type]
        if self.task_type == "label":
            config.num_labels = max(1, len(self.task.labels))
        auto = backbones.auto_class(self.task_type, config.is_encoder_decoder)
        dtype = {"64-true": "float64"}.get(str(self.cfg.trainer.precision), m.dtype)
        attention = m.attention or family.attention[0]
        with torch.device("meta"):
            model = auto.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation=attention
            )
        if m.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return backbones.wrap(model, family, self.task_type)

    def add_adapter(self, backbone: Backbone, **fusion: Any) -> Any:
        """Put a new adapter on a backbone."""
        with torch.device("meta"):
            return super().add_adapter(backbone, **fusion)

    def english_model(self, english: Artifact) -> Backbone:
        """Build the English model, with a frozen adapter where its LoRA cannot be merged."""
        backbone = self.fresh_backbone()
        if self.precision.holds_updates:
            return backbone
        with torch.device("meta"):
            config = adapter.adapter_config(backbone, **asdict(self.cfg.adapter))
            return adapter.frozen(backbone, config)


def shorten(config: PreTrainedConfig, depth: int) -> None:
    """Give every stack of a model's configuration `depth` blocks."""
    config.num_hidden_layers = depth
    if hasattr(config, "num_decoder_layers"):
        config.num_decoder_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]


def is_sketch(cfg: Config) -> bool:
    """Return True if a model that is trained, or read for its states, is not here."""
    needed = [(cfg.model.path, cfg.model.revision)]
    if any(method.mode is PairingMode.LATENT for method in members_of(cfg.method).values()):
        needed.append((cfg.mt.path, cfg.mt.revision))
    return any(path is not None and not weights_here(path, revision) for path, revision in needed)


def sketched(cfg: Config, scratch: Path) -> Artifact:
    """Make a folder with the configuration of a hub checkpoint alone; returns its identity."""
    if cfg.model.path is None:
        raise UserError(
            "method=flare_mt with a translation model that is not here: plan it with a model "
            "that is not embedded"
        )
    folder = scratch / "sketch" / str(cfg.model.path).replace("/", "--")
    config_of(cfg.model.path, cfg.model.revision).save_pretrained(folder)
    families.family_of(str(folder))
    here = weights_here(cfg.model.path, cfg.model.revision)
    return replace(
        existing_checkpoint(cfg.model.path, cfg.model.revision), path=folder, reused=here
    )
