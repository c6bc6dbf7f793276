"""Build the models of a run, and save what was trained of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import PeftModel
from torch import nn

from flare_exp.artifacts import Artifact
from flare_exp.config.schema import Config
from flare_exp.flare import adapter
from flare_exp.models import backbones
from flare_exp.models.backbones import Backbone
from flare_exp.tasks import Task
from flare_exp.utils.finite import check_finite


class ModelBuilder:
    """Build a run's models, for the task and in the run's precision.

    Args:
        backbone: the pre-trained checkpoint.
        task_type: how the backbone takes the task (`label`, `span` or `prompt`).
    """

    def __init__(self, cfg: Config, task: Task, backbone: Artifact, task_type: str):
        self.cfg, self.task, self.backbone, self.task_type = cfg, task, backbone, task_type

    @property
    def precision(self) -> backbones.Precision:
        """Return how weights are kept and multiplied."""
        m = self.cfg.model
        return backbones.Precision(m.dtype, m.quantize, m.double_quant, m.compute_dtype)

    def fresh_backbone(self) -> Backbone:
        """Load the pre-trained checkpoint; the seed decides the weights of its new head."""
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
        return self.load(str(self.backbone.path), self.cfg.model.revision)

    def load(self, path: str, revision: str | None = None) -> Backbone:
        """Load a checkpoint for this task, in this run's precision."""
        backbone = backbones.load(
            path,
            self.task_type,
            num_labels=len(self.task.labels),
            revision=revision,
            precision=self.precision,
            attention=self.cfg.model.attention,
            device="cuda" if self.cfg.trainer.accelerator == "gpu" else "cpu",
        )
        if self.cfg.model.gradient_checkpointing:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        return backbone

    def add_adapter(self, backbone: Backbone, **fusion: Any) -> PeftModel:
        """Put a new adapter on a backbone. `fusion`: options of `adapter.adapter_config`."""
        return adapter.add_adapter(backbone, **asdict(self.cfg.adapter), **fusion)

    def english_model(self, english: Artifact) -> Backbone:
        """Load the English model.

        Its LoRA is merged where the weights can hold the update. Elsewhere it stays beside them as
        a frozen adapter.
        """
        folder = saved_weights(english.path)
        if (folder / "adapter_config.json").is_file():
            merge = self.precision.holds_updates
            return adapter.english_model(self.fresh_backbone(), str(folder), merge=merge)
        # the next adapter is the same whether English was trained in this process or found
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
        return self.load(str(folder))


def saved_weights(folder: Path) -> Path:
    """Return where weights are: an artifact's `adapter` or `model`, or a run folder itself."""
    return next(
        (folder / name for name in ("adapter", "model") if (folder / name).is_dir()), folder
    )


def save_model(model: nn.Module, trained: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Save an adapter in PEFT's format, or a full model in transformers' format, as safetensors.

    Args:
        trained: the weights that were trained; the model may no longer hold them, or only a part.

    Raises:
        UserError: a trained weight is NaN or infinite.
    """
    check_finite(trained.items(), f"the trained weights for {folder}")
    options: dict[str, Any] = {"save_embedding_layers": False, "selected_adapters": ["default"]}
    options = options if isinstance(model, PeftModel) else {}
    model.save_pretrained(str(folder), state_dict=dict(trained), **options)  # type: ignore[operator]
