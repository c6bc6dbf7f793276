"""Go through the models of a run that are yet to be trained or tested, without training them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from flare_exp.artifacts import Artifact
from flare_exp.config.methods import METHODS
from flare_exp.config.schema import StageConfig
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.dataset import PairedDataset
from flare_exp.data.sampling import BucketSampler
from flare_exp.experiment.stages import save_model
from flare_exp.flare.source_encoders import Source
from flare_exp.planning.preview import Preview, Sketch


def iter_stage_models(
    stages: Preview, todo: set[str]
) -> Iterator[tuple[str, nn.Module, Source | None, PairedDataModule, dict[str, str]]]:
    """The models of the stages in `todo`: name, model, source, data to train on, and artefact -> view that it is tested on."""
    method = METHODS[stages.cfg.method.name]
    tests = {"english_test": "english", "zero_shot": "target"}
    adapted = {"test": method.view} if method.trains else {}
    tests |= {} if method.trains else {"test": method.view}
    trains, transfers = bool(todo & {"finetune", *tests}), bool(todo & {"transfer", *adapted})
    saves = transfers and not isinstance(stages, Sketch)
    model = build_english(stages) if trains or saves else None
    if trains:
        yield (
            "finetune",
            model,
            None,
            stages.data("english"),
            {k: v for k, v in tests.items() if k in todo},
        )  # type: ignore[misc]
    if transfers:
        english = Artifact(
            stages.store.scratch / "english" / stages.backbone.digest.replace("/", "--"),
            "",
            "",
            {},
            0.0,
            False,
        )
        if saves:
            assert model is not None
            english.path.mkdir(parents=True, exist_ok=True)
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            lora = stages.cfg.finetune.tuning == "lora"
            save_model(model, trained, english.path / ("adapter" if lora else "model"))
        del model
        adapted_model, source = build_adapted(stages, english)
        yield (
            "transfer",
            adapted_model,
            source,
            stages.data(method.view),
            {k: v for k, v in adapted.items() if k in todo},
        )


def build_english(stages: Preview) -> nn.Module:
    """Build the model that is fine-tuned on English."""
    backbone = stages.fresh_backbone()
    return stages.add_adapter(backbone) if stages.cfg.finetune.tuning == "lora" else backbone.model


def build_adapted(stages: Preview, english: Artifact) -> tuple[nn.Module, Source | None]:
    """Build the model that is trained in the transfer, and its source if it fuses."""
    method = METHODS[stages.cfg.method.name]
    fusion = stages.fusion_options(method.view) if method.fuses else None
    model = stages.add_adapter(stages.english_model(english), **(fusion or {}))
    return model, stages.source(model) if fusion else None


def width_of(model: Any) -> int:
    config = model.config
    return getattr(config, "hidden_size", None) or config.d_model


def batches_of(stages: Preview, dataset: PairedDataset, role: str) -> list[list[int]]:
    size = stages.cfg.data.batch_size
    if role == "train":
        return list(BucketSampler(dataset.lengths, size, stages.cfg.seed))
    return [list(range(i, min(i + size, len(dataset)))) for i in range(0, len(dataset), size)]


def steps_per_epoch(stages: Preview, rows: int) -> int:
    """Optimiser steps of an epoch."""
    steps = -(-rows // stages.cfg.data.batch_size)
    return min(steps, stages.cfg.trainer.limit_train_batches or steps)


def stage_options(stages: Preview, name: str) -> StageConfig:
    return stages.capped(stages.cfg.finetune if name == "finetune" else stages.cfg.transfer)
