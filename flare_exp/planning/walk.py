"""Go through the models of a run that are yet to be trained or tested, without training them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from flare_exp.artifacts import Artifact
from flare_exp.config.methods import DISTIL, METHODS, Method
from flare_exp.config.schema import StageConfig
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.dataset import PairedDataset
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.experiment.building import save_model
from flare_exp.experiment.stages.finetune import finetune, untrained_english
from flare_exp.experiment.stages.transfer import untrained
from flare_exp.experiment.tested import name_of_test, stage_of
from flare_exp.flare.source_encoders import SourceEncoder
from flare_exp.planning.preview import DryRun

VALIDATION = "validation"  # predictions of it, which choose the weights of an ensemble
LABELS = "labels"  # artifacts of the texts that the teachers of a distillation label


def iter_stage_models(
    dry: DryRun, todo: set[str]
) -> Iterator[
    tuple[str, nn.Module, SourceEncoder | None, PairedDataModule, dict[str, PairedDataModule]]
]:
    """Yield the models of the stages in `todo`.

    Yields:
        name, model, source, data to train on, and artifact -> data that it predicts. The name is
        that of a training, or of the soft labels of a teacher, whose model is trained elsewhere.
    """
    task = dry.run.cfg.task
    tests = {"english_test": dry.run.data(PairingMode.ENGLISH)}
    for lang in task.tested:
        zero_shot = name_of_test("zero_shot", lang, task.tested)
        tests[zero_shot] = dry.run.data(PairingMode.TARGET, lang=lang)
    tested, trained = _tests(dry), METHODS[dry.run.cfg.method.name].trains
    adapted = tested if trained else {}
    tests |= {} if trained else tested
    labels = [name for name in sorted(todo) if name.startswith(f"{LABELS} ")]
    later = [*labels, *(["transfer"] if todo & {"transfer", *adapted} else [])]
    saves = bool(later) and dry.shapes is None
    trains = bool(todo & {"finetune", *tests})
    model = untrained_english(dry.run) if trains or saves else None
    if trains:
        assert model is not None
        read = {k: v for k, v in tests.items() if k in todo}
        yield "finetune", model, None, dry.run.data(PairingMode.ENGLISH), read
    place = dry.store.scratch / "english" / finetune(dry.run).digest
    english = Artifact(place, "", "", {}, 0.0, False)
    if saves:
        assert model is not None
        _save_english(dry, model, place)
    del model
    for name in later:
        mode = method_of(dry, name).mode
        # the student reads the unlabeled texts, too
        distils = name != "transfer" or dry.run.cfg.method.name == DISTIL
        data = dry.run.data(mode, distils=distils)
        read = {k: v for k, v in adapted.items() if k in todo}
        yield name, *build(dry, name, english), data, read if name == "transfer" else {name: data}


def _tests(dry: DryRun) -> dict[str, PairedDataModule]:
    """Return artifact -> data, for the tests of the run's method in every language and pass.

    A member of an ensemble predicts the validation data of each language that it trains on, too.
    """
    cfg, passes = dry.run.cfg, {"test": True}
    if len(cfg.predict.sources) > 1:
        passes = {"test given": True, "test none": False}
    mode, tested = METHODS[cfg.method.name].mode, cfg.task.tested
    validations = {
        name_of_test(VALIDATION, lang, tested): dry.run.data(mode, lang=lang)
        for lang in cfg.task.langs
    }
    return validations | {
        name_of_test(name, lang, tested): dry.run.data(mode, sources, lang)
        for lang in tested
        for name, sources in passes.items()
    }


def _save_english(dry: DryRun, model: nn.Module, place: Path) -> None:
    """Save the untrained English model, which adapted models are built on."""
    place.mkdir(parents=True, exist_ok=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lora = dry.run.cfg.finetune.tuning == "lora"
    save_model(model, trained, place / ("adapter" if lora else "model"))


def role_of(artifact: str) -> str:
    """Return the role of the data that an artifact is predictions of."""
    return {LABELS: "train", VALIDATION: "validation"}.get(stage_of(artifact), "test")


def method_of(dry: DryRun, name: str) -> Method:
    """Return the method of a model: the run's, or that of a teacher (`labels <method>`)."""
    return METHODS[name.partition(" ")[2] or dry.run.cfg.method.name]


def build(dry: DryRun, name: str, english: Artifact) -> tuple[nn.Module, SourceEncoder | None]:
    """Build the model of a name of `iter_stage_models`, and its source if it fuses.

    Args:
        english: the English model, on which adapted ones are built.
    """
    method = method_of(dry, name)
    if name == "finetune" or not method.trains:
        return untrained_english(dry.run), None
    return untrained(dry.run, english, method)


def width_of(model: Any) -> int:
    """Return the width of a model's hidden states."""
    config = model.config
    return getattr(config, "hidden_size", None) or config.d_model


def batches_of(
    data: PairedDataModule, dataset: PairedDataset, trains: bool = False
) -> list[list[int]]:
    """Return the batches of a data set, as rows, in its order or in that of the first epoch."""
    size = data.batch_size
    if trains:
        return list(data.training_batches(dataset))
    return [list(range(i, min(i + size, len(dataset)))) for i in range(0, len(dataset), size)]


def steps_per_epoch(dry: DryRun, rows: int) -> int:
    """Optimizer steps of an epoch."""
    steps = -(-rows // dry.run.cfg.data.batch_size)
    return min(steps, dry.run.cfg.trainer.limit_train_batches or steps)


def stage_options(dry: DryRun, name: str) -> StageConfig:
    """Return the options of a training stage."""
    return dry.run.capped(dry.run.cfg.finetune if name == "finetune" else dry.run.cfg.transfer)
