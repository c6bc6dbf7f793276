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
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.experiment.building import save_model
from flare_exp.experiment.stages.transfer import fusion_options
from flare_exp.experiment.tested import name_of_test
from flare_exp.flare.source_encoders import SourceEncoder
from flare_exp.planning.preview import DryRun


def iter_stage_models(
    dry: DryRun, todo: set[str]
) -> Iterator[
    tuple[str, nn.Module, SourceEncoder | None, PairedDataModule, dict[str, PairedDataModule]]
]:
    """Yield the models of the stages in `todo`.

    Yields:
        name, model, source, data to train on, and artifact -> data that it is tested on.
    """
    method, task = METHODS[dry.run.cfg.method.name], dry.run.cfg.task
    passes = {"test": True}
    if len(dry.run.cfg.predict.sources) > 1:
        passes = {"test given": True, "test none": False}
    tests, tested = {"english_test": dry.run.data(PairingMode.ENGLISH)}, {}
    for lang in task.tested:
        zero_shot = name_of_test("zero_shot", lang, task.tested)
        tests[zero_shot] = dry.run.data(PairingMode.TARGET, lang=lang)
        for name, sources in passes.items():
            own = name_of_test(name, lang, task.tested)
            tested[own] = dry.run.data(method.mode, sources, lang)
    adapted = tested if method.trains else {}
    tests |= {} if method.trains else tested
    trains, transfers = bool(todo & {"finetune", *tests}), bool(todo & {"transfer", *adapted})
    saves = transfers and dry.shapes is None
    model = build_english(dry) if trains or saves else None
    if trains:
        yield (
            "finetune",
            model,
            None,
            dry.run.data(PairingMode.ENGLISH),
            {k: v for k, v in tests.items() if k in todo},
        )  # type: ignore[misc]
    if transfers:
        english = Artifact(
            dry.store.scratch / "english" / dry.run.backbone.digest.replace("/", "--"),
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
            lora = dry.run.cfg.finetune.tuning == "lora"
            save_model(model, trained, english.path / ("adapter" if lora else "model"))
        del model
        adapted_model, source = build_adapted(dry, english)
        yield (
            "transfer",
            adapted_model,
            source,
            dry.run.data(method.mode),
            {k: v for k, v in adapted.items() if k in todo},
        )


def build_english(dry: DryRun) -> nn.Module:
    """Build the model that is fine-tuned on English."""
    backbone = dry.run.models.fresh_backbone()
    return (
        dry.run.models.add_adapter(backbone)
        if dry.run.cfg.finetune.tuning == "lora"
        else backbone.model
    )


def build_adapted(dry: DryRun, english: Artifact) -> tuple[nn.Module, SourceEncoder | None]:
    """Build the model that is trained in the transfer, and its source if it fuses."""
    method = METHODS[dry.run.cfg.method.name]
    if method.full:
        return dry.run.models.english_model(english).model.requires_grad_(True), None
    fusion = fusion_options(dry.run, method) if method.mode.fuses else None
    model = dry.run.models.add_adapter(dry.run.models.english_model(english), **(fusion or {}))
    return model, dry.run.source(model) if fusion else None


def width_of(model: Any) -> int:
    """Return the width of a model's hidden states."""
    config = model.config
    return getattr(config, "hidden_size", None) or config.d_model


def batches_of(data: PairedDataModule, dataset: PairedDataset, role: str) -> list[list[int]]:
    """Return the batches of a data set, as rows, in the order of the first epoch."""
    size = data.batch_size
    if role == "train":
        return list(data.training_batches(dataset))
    return [list(range(i, min(i + size, len(dataset)))) for i in range(0, len(dataset), size)]


def steps_per_epoch(dry: DryRun, rows: int) -> int:
    """Optimizer steps of an epoch."""
    steps = -(-rows // dry.run.cfg.data.batch_size)
    return min(steps, dry.run.cfg.trainer.limit_train_batches or steps)


def stage_options(dry: DryRun, name: str) -> StageConfig:
    """Return the options of a training stage."""
    return dry.run.capped(dry.run.cfg.finetune if name == "finetune" else dry.run.cfg.transfer)
