"""Load the model of a finished run from its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flare_exp.artifacts import Artifact, ArtifactStore
from flare_exp.config.methods import ENSEMBLE, METHODS
from flare_exp.config.schema import RETIRED, Config
from flare_exp.errors import UserError, first_line
from flare_exp.experiment import pipeline
from flare_exp.experiment.checkpoints import prepare_backbone
from flare_exp.experiment.checksums import damage
from flare_exp.experiment.overriding import overridden
from flare_exp.experiment.predicting import LoadedRun
from flare_exp.experiment.runs import quiet
from flare_exp.experiment.stages.testing import trained_model
from flare_exp.training.tracking import Tracker


def load(folder: str | Path, *options: str) -> LoadedRun:
    """Load a finished run.

    The pre-trained model comes from where the run had it: the hub or its folder. An embedded one
    (model=tiny...) comes from the run's cache, and is built again where the cache lost it.

    Args:
        folder: the run folder.
        *options: changes of options that the model does not depend on
            (`flare_exp.experiment.overriding`), for example "mt=nllb_600m", another translator, or
            "trainer.accelerator=cpu".

    Raises:
        UserError: there is no finished run, it was made by a version with other options, or an
            option is wrong.
    """
    folder = Path(folder).expanduser()
    given = overridden(finished_config(folder), options)
    _check_alone(folder, given)
    quiet(given)
    cfg = pipeline.resolve_hardware(given)
    store = ArtifactStore(cfg.cache_dir)
    task, backbone = pipeline.load_task(cfg), prepare_backbone(cfg, store)
    run = pipeline.make_context(cfg, store, task, backbone, Tracker(folder, {}))
    english, method = saved(folder, "english"), METHODS[cfg.method.name]
    with isolate_rng():  # loading seeds the generators, and the caller's stay as they are
        if method.trains and not method.full:
            return LoadedRun(folder, run, *trained_model(run, saved(folder, "adapter"), english))
        model = saved(folder, "model") if method.full else english
        return LoadedRun(folder, run, *trained_model(run, model, None))


def _check_alone(folder: Path, cfg: Config) -> None:
    """Check that texts are in one language, and answered in one pass.

    Raises:
        UserError: the run has several languages or passes, and none was chosen.
    """
    if len(cfg.task.langs) > 1:
        raise UserError(
            f"{folder}: the run has several languages; give the one of the texts: "
            f"task.lang={cfg.task.langs[0]} (or {', '.join(cfg.task.tested[1:])})"
        )
    if len(cfg.predict.sources) > 1:
        raise UserError(
            f"{folder}: the run averages two passes (predict.sources=[given,none]), and here one "
            "is made; give predict.sources=[given] for the pass with the source"
        )


def finished_config(folder: Path) -> Config:
    """Return the configuration of a finished run that has a model, for one process.

    Raises:
        UserError: the folder holds no finished run, is damaged, or its run has no model.
    """
    if not (folder / "metrics.json").is_file():
        inside = sorted(p.parent for p in folder.glob("*/metrics.json"))
        hint = f"; it holds runs, e.g. {inside[0]}" if inside else ""
        raise UserError(f"{folder}: there is no finished run (metrics.json) in this folder{hint}")
    if problems := damage(folder):
        raise UserError(
            f"{folder} is damaged: {', '.join(problems[:5])}; the run's own command makes it again"
        )
    given = stored_config(folder)
    if given.method.name == ENSEMBLE:
        raise UserError(
            f"{folder} is an ensemble of {', '.join(given.method.of)}: it has no model of its own; "
            "load the run of a member"
        )
    trainer = replace(given.trainer, enable_progress_bar=False, devices=1, nodes=1, strategy=None)
    return replace(given, trainer=trainer, data=replace(given.data, workers=0))


def saved(folder: Path, name: str) -> Artifact:
    """Return the weights that a run folder keeps: `english`, `adapter` or `model`."""
    return Artifact(folder / name, name, "", {}, 0.0, True)


def stored_config(folder: Path) -> Config:
    """Return the configuration of a run folder, also if an earlier version wrote it.

    Raises:
        UserError: it cannot be read, or has options that this version does not have.
    """
    try:
        stored: Any = OmegaConf.load(folder / "config.yaml")
        for key in RETIRED:  # options of earlier versions
            section, _, name = key.rpartition(".")
            stored.get(section, {}).pop(name, None)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), stored))  # type: ignore[return-value]
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{folder / 'config.yaml'} cannot be used: {first_line(error)}") from error
