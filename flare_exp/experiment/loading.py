"""Load the models of a finished run from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flare_exp.artifacts import Artifact
from flare_exp.config.composition import register_schema
from flare_exp.config.methods import ENSEMBLE, METHODS, answering
from flare_exp.config.schema import RETIRED, Config
from flare_exp.errors import UserError, first_line
from flare_exp.experiment import pipeline
from flare_exp.experiment.checksums import damage
from flare_exp.experiment.context import RunContext
from flare_exp.experiment.mixing import SameWeights, Weights, WeightsBySimilarity
from flare_exp.experiment.overriding import overridden
from flare_exp.experiment.predicting import LoadedRun
from flare_exp.experiment.predictor import Predictor
from flare_exp.experiment.results import place_of
from flare_exp.experiment.runs import quiet
from flare_exp.experiment.stages.testing import trained_model
from flare_exp.hub import is_commit, looks_local


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
    stored = finished_config(folder)
    given = _as_read(overridden(stored, options), stored, folder)
    if given.model.path == stored.model.path:
        check_folder_is_here("model", given.model, _backbone(_noted(folder)).get("digest", ""))
    _check_alone(folder, given)
    _check_weights(folder, given)
    quiet(given)
    run = pipeline.context_of(given, folder)
    _check_backbone(folder, run)
    with isolate_rng():  # loading seeds the generators, and the caller's stay as they are
        predictors = _predictors(folder, run)
    return LoadedRun(folder, run, predictors, _weights(folder, run, predictors))


def _as_read(given: Config, stored: Config, folder: Path) -> Config:
    """Replace the revisions of hub checkpoints by the commits that a run has read.

    The configuration of a run keeps a branch, or null, whose commit may have changed since.

    Args:
        given: the run's configuration with other options.
        stored: its own one.
        folder: the run folder.
    """
    noted = _noted(folder)
    translated = [one.get("checkpoint") for one in noted.get("translations", {}).values()]
    backbone = _backbone(noted).get("digest")
    found: dict[str, Any] = {}
    for name, identities in (("model", [backbone]), ("mt", translated)):
        part, own = getattr(given, name), getattr(stored, name)
        for identity in map(str, identities):
            hub_id, _, commit = identity.rpartition("@")
            if hub_id == part.path and part.revision == own.revision and is_commit(commit):
                found[name] = replace(part, revision=commit)
    return replace(given, **found)


def _noted(folder: Path) -> dict[str, Any]:
    """Return the provenance of a run; empty: the folder has none."""
    facts = folder / "provenance.json"
    return json.loads(facts.read_text()) if facts.is_file() else {}


def _backbone(noted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a provenance says about the pre-trained model."""
    return noted.get("artefacts", {}).get("backbone", {})


def check_folder_is_here(name: str, part: Any, identity: str) -> None:
    """Check that the folder of a checkpoint does not pass for a hub id where it is not.

    The relative path owner/name is a folder only in the directory where the run was started.

    Args:
        name: name of the section, `model` or `mt`.
        part: that section of the run's configuration.
        identity: identity of the checkpoint as the run has recorded it; that of a folder has no @.
            Exported runs have it, too, beside the commit of the hub id.

    Raises:
        UserError: it is not here.
    """
    if part.path is None or looks_local(part.path) or is_commit(part.revision):
        return
    if identity and "@" not in identity:
        raise UserError(
            f"{name}.path={part.path}: the run read this folder, and it is not in {Path.cwd()}; "
            "start the command in the directory where the run was started"
        )


def _check_backbone(folder: Path, run: RunContext) -> None:
    """Check that a checkpoint folder has the files that the run was trained with.

    Other weights of the same shape would load, and give wrong answers.

    Raises:
        UserError: it has other files.
    """
    read, here = _backbone(_noted(folder)), run.backbone
    if read.get("kind") == here.kind == "checkpoint" and read["digest"] != here.digest:
        raise UserError(
            f"model.path={run.cfg.model.path}: its files are not those of the checkpoint that "
            f"{folder} was trained on (digest {here.digest}, not {read['digest']}), and what the "
            "run has learned fits that one alone; give its folder"
        )


def _predictors(folder: Path, run: RunContext) -> dict[str, Predictor]:
    """Load the model of the run, or of each member of an ensemble.

    Returns:
        name of the method, or of the pass -> predictor.
    """
    loaded: dict[str, tuple[Any, Any]] = {}
    found: dict[str, Predictor] = {}
    for name, method in answering(run.cfg.method).items():
        place = _place_of(run.cfg, name)
        if place not in loaded:
            below = saved(folder, "english") if method.trains and not method.full else None
            loaded[place] = trained_model(run, saved(folder, place), below)
        found[name] = Predictor(run, method.mode, *loaded[place])
    if len(passes := run.cfg.predict.sources) > 1:
        (one,) = found.values()
        return {
            name: Predictor(run, one.mode, one.model, one.source, name == "given")
            for name in passes
        }
    return found


def _place_of(cfg: Config, name: str) -> str:
    """Return where a run folder keeps the weights of one of its methods."""
    method = METHODS[name]
    if not method.trains:
        return "english"
    training = f"transfer {name}" if cfg.method.name == ENSEMBLE else "transfer"
    return place_of(training, Path("model" if method.full else "adapter"))


def _weights(folder: Path, run: RunContext, predictors: Mapping[str, Predictor]) -> Weights:
    """Return how much each predictor counts.

    Raises:
        UserError: the run folder does not say it.
    """
    equal = SameWeights([1 / len(predictors)] * len(predictors))
    method = run.cfg.method
    if method.name != ENSEMBLE or method.weights == "equal":
        return equal
    facts = json.loads((folder / "provenance.json").read_text())
    if method.weights == "validation":
        # the same in every language
        tests = [*facts["test"].get("languages", {"": facts["test"]}).values()]
        return SameWeights([tests[0]["weights"][name] for name in predictors])
    if "similarity" not in facts:
        raise UserError(
            f"{folder}: method.weights=similarity: an earlier version left the folder without the "
            "similarity of validation pairs, which the weights of new texts follow from; give the "
            "run's command another output_dir (what it trained is in the cache)"
        )
    return WeightsBySimilarity(run, predictors.values(), facts["similarity"])


def _check_alone(folder: Path, cfg: Config) -> None:
    """Check that texts are in one language.

    Raises:
        UserError: the run has several, and none was chosen.
    """
    if len(cfg.task.langs) > 1:
        raise UserError(
            f"{folder}: the run has several languages; give the one of the texts: "
            f"task.lang={cfg.task.langs[0]} (or {', '.join(cfg.task.tested[1:])})"
        )


def _check_weights(folder: Path, cfg: Config) -> None:
    """Check early that the folder has all models that the run answers with.

    Raises:
        UserError: one is missing.
    """
    places = ["english", *(_place_of(cfg, name) for name in answering(cfg.method))]
    if lacking := [name for name in dict.fromkeys(places) if not (folder / name).is_dir()]:
        raise UserError(
            f"{folder}: {' and '.join(lacking)} is missing in it; give the run's command another "
            "output_dir (what it trained is taken from the cache)"
        )


def finished_config(folder: Path) -> Config:
    """Return the configuration of a finished run, for one process.

    Raises:
        UserError: the folder holds no finished run, or is damaged.
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
    trainer = replace(given.trainer, enable_progress_bar=False, devices=1, nodes=1, strategy=None)
    return replace(given, trainer=trainer, data=replace(given.data, workers=0))


def saved(folder: Path, name: str) -> Artifact:
    """Return the weights that a run folder keeps: `english`, `adapter`, `model`, or a member's."""
    return Artifact(folder / name, name, "", {}, 0.0, True)


def stored_config(folder: Path) -> Config:
    """Return the configuration of a run folder, also if an earlier version wrote it.

    Raises:
        UserError: it cannot be read, or has options that this version does not have.
    """
    register_schema()  # the resolvers: an export names the default cache by one
    try:
        stored: Any = OmegaConf.load(folder / "config.yaml")
        for key in RETIRED:  # options of earlier versions
            section, _, name = key.rpartition(".")
            (OmegaConf.select(stored, section) or {}).pop(name, None)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), stored))  # type: ignore[return-value]
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{folder / 'config.yaml'} cannot be used: {first_line(error)}") from error
