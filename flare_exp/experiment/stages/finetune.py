"""Stage 1: fine-tune the backbone and its head on English."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from flare_exp.artifacts import Artifact
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.experiment import fitting
from flare_exp.experiment.context import RunContext, pairs_digest


def finetune(run: RunContext) -> Artifact:
    """Fine-tune on English, with LoRA or in full (`finetune.tuning`)."""
    cfg, data = run.cfg, run.data(PairingMode.ENGLISH)
    stage, lora = run.capped(cfg.finetune), cfg.finetune.tuning == "lora"
    key = {
        "stage": "finetune",
        "backbone": run.backbone.digest,
        "data": pairs_digest(data, *run.task.training_roles),
        "adapter": asdict(cfg.adapter) if lora else None,
        "hyper": asdict(stage),
        **run.recipe,
    }

    def build(folder: Path) -> dict[str, Any]:
        # texts that the tokenizer does not know are refused before the training, not after it
        data.dataset("train")
        for lang in cfg.task.tested:
            run.data(PairingMode.TARGET, lang=lang).dataset("test")
        saved = folder / ("adapter" if lora else "model")
        return fitting.fit(run, "finetune", untrained_english(run), None, data, stage, saved)

    return run.store.get("finetune", key, build, collective=True, resumable=True)


def untrained_english(run: RunContext) -> nn.Module:
    """Build the model that is fine-tuned on English."""
    backbone, lora = run.models.fresh_backbone(), run.cfg.finetune.tuning == "lora"
    return run.models.add_adapter(backbone) if lora else backbone.model
