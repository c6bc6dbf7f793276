"""Write the folder of an export from the folder of a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from peft import LoraConfig

from flare_exp.config.methods import ENSEMBLE, METHODS
from flare_exp.config.schema import Config
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.errors import UserError
from flare_exp.experiment import pipeline
from flare_exp.experiment.checksums import CHECKSUMS, damage, seal
from flare_exp.experiment.context import RunContext, family_of_model
from flare_exp.experiment.loading import stored_config
from flare_exp.experiment.runs import missing_folders, quiet, remove_empty
from flare_exp.experiment.source_texts import source_texts
from flare_exp.export import lora
from flare_exp.export.card import Card, model_card
from flare_exp.export.portable import Origin, leaks, origins, other_weights, places, portable
from flare_exp.flare.peft_method import FlareConfig
from flare_exp.hub import files_read
from flare_exp.report.cells import Cell, cells_of
from flare_exp.report.comparability import differences
from flare_exp.report.runs import READING, Run
from flare_exp.report.runs import read as read_run
from flare_exp.utils.files import write_json, write_text

BASE = "base"  # the model below a plain LoRA, where no hub id names it
WEIGHTS = ("english", "adapter", "model")
# of provenance.json; the command and what made the translations may name paths and keys
FACTS = (
    *("commit", "python", "packages", "device", "threads", "data", "parameters", "training"),
    *("test", "seconds", "code", "artefacts"),
)
PRIVATE = ("command", "files")


@dataclass(frozen=True)
class Request:
    """Hold what is to be exported, and as what.

    Args:
        runs: run folders of one cell; the model of the first one is exported.
        to: the folder to write.
        format: "flare", which `flare_exp.load` reads, or "lora", which PEFT alone reads.
        base: hub id of the backbone, with `@<commit>` or without; for runs that read a folder.
        mt_base: the same for the translation model.
        license: identifier of the license.
        repository: hub repository that the folder is meant for, or None.
    """

    runs: Sequence[Path]
    to: Path
    format: str = "flare"
    base: str | None = None
    mt_base: str | None = None
    license: str = "unknown"
    repository: str | None = None


def export(request: Request) -> list[str]:
    """Write the exported folder, and return notes for the user.

    The folder is written beside its place and then renamed, so a failure leaves none.

    Raises:
        UserError: a run cannot be exported so; nothing is left.
    """
    cell, run = same_cell(request.runs)
    given = stored_config(run.folder)
    quiet(replace(given, offline=False))  # what the run was allowed to ask is no matter here
    check_has_model(run, request.format)
    base, translation = origins(given, run.provenance, request.base, request.mt_base)
    notes = [*compared("base", given.model, base), *compared("mt_base", given.mt, translation)]
    shared = portable(given, base, translation)
    context = pipeline.context_of(replace(given, trainer=shared.trainer), run.folder)
    write = write_lora if request.format == "lora" else write_run
    with new_folder(request.to) as part:
        reading = reading_of(context, base, translation)
        write_json(part / READING, reading)
        card = Card(
            name=request.to.name,
            repository=request.repository,
            license=request.license,
            cell=cell,
            run=run,
            cfg=shared,
            task=context.task,
            reading=reading,
            base=base,
            translation=translation,
            lora=write(part, run, shared, base, context),
        )
        write_text(part / "README.md", model_card(card))
        if problems := list(leaks(part, places(given, run.folder, request.to))):
            raise UserError("; ".join(problems))
    return notes


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets its name when it is complete; a failure leaves nothing.

    Raises:
        UserError: there is something already, or nothing can be written there.
    """
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"to={place}: there is something already; choose a new folder")
    new, part = missing_folders([place.parent]), place.with_name(f".{place.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if place.exists():
            place.rmdir()
        part.rename(place)
    except OSError as error:
        raise UserError(f"to={place}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not place.exists():
            remove_empty(new)


def same_cell(folders: Sequence[Path]) -> tuple[Cell, Run]:
    """Read runs that differ in nothing but the seed; return their cell and the first of them.

    Raises:
        UserError: a run has no result, or they differ in more than the seed.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
            problems += unexported(runs[-1])
        except ValueError as error:
            problems.append(f"run={folder}: {error}")
    if not problems:
        tasks, problems = cells_of(runs)
        cells = [cell for own in tasks.values() for cell in own]
        problems += [line for own in tasks.values() for line in differences(own)]
        if len(cells) > 1:
            labels = ", ".join(" ".join((c.task, *c.name)) for c in cells[:3])
            problems.append(f"run: these runs differ in more than the seed ({labels})")
    if problems:
        raise UserError("; ".join(problems))
    return cells[0], runs[0]


def unexported(run: Run) -> Iterator[str]:
    """Name what a run has that an exported folder does not: several languages or systems."""
    if systems := run.options.get("source.systems"):
        yield (
            f"run={run.folder}: its tests fuse translations by {', '.join(systems)}, too "
            "(source.systems), and new texts are translated by mt alone; give a run with "
            "source.systems=[], which has the same adapter"
        )
    if several := run.metrics.get("languages"):
        yield (
            f"run={run.folder}: it has several languages ({', '.join(several)}), and a model "
            "card is of one; give a run with one task.lang and no task.unseen"
        )


def check_has_model(run: Run, format: str) -> None:
    """Check that a run has a model of its own, and adapters that are plain LoRA if asked for.

    Raises:
        UserError: it has not.
    """
    if problems := damage(run.folder):
        raise UserError(f"run={run.folder} is damaged: {', '.join(problems[:5])}")
    if run.method == ENSEMBLE:
        raise UserError(
            f"run={run.folder} is an ensemble of {', '.join(run.members)}: it has no model of its "
            "own; export the run of a member"
        )
    if format != "lora":
        if spec := run.options.get("task.spec"):
            raise UserError(
                f"run={run.folder}: its data are described by task.spec={spec}, a file that others "
                "do not have; only format=lora can be exported of task=custom (a method without "
                "a source; method=distil learns from one with a source)"
            )
        return
    method = METHODS[run.method]
    if method.mode is PairingMode.JOINT:
        raise UserError(
            f"format=lora: method={run.method} reads a text and its translation as one input, "
            "which flare_exp puts together; leave format=lora out"
        )
    if method.full or not adapters_of(run.folder):
        raise UserError(
            f"format=lora: method={run.method} has trained all weights, so there is no adapter; "
            "leave format=lora out"
        )
    for place in adapters_of(run.folder):
        lora.check_plain(FlareConfig.from_pretrained(str(place)))


def adapters_of(folder: Path) -> list[Path]:
    """Return the adapters of a run folder, the lowest first."""
    places = (folder / name for name in ("english", "adapter"))
    return [place for place in places if (place / "adapter_config.json").is_file()]


def compared(option: str, part: Any, origin: Origin) -> list[str]:
    """Compare the weights that a run read with those under a hub id that the user gave.

    Args:
        option: name of the option that gave the hub id.
        part: the section `model` or `mt` of the configuration.
        origin: what was given, or found without.

    Returns:
        a note if they could not be compared.

    Raises:
        UserError: they differ.
    """
    if not origin.given:
        return []
    folder, named = Path(str(part.path)).expanduser(), f"{option}={origin.hub_id}"
    other = other_weights(folder, origin)
    if other is None:
        return [f"{named}: not compared with {folder}, because the hub does not answer"]
    if other:
        raise UserError(
            f"{named}: {other[0]} of {folder} is not in it at commit {origin.commit}; "
            "name the repository that the folder was fetched from"
        )
    return []


def reading_of(context: RunContext, base: Origin, translation: Origin) -> dict[str, Any]:
    """Return what is needed to read texts as the run did."""
    cfg, task, mode = context.cfg, context.task, METHODS[context.cfg.method.name].mode
    own = context.joint_preprocessor if mode is PairingMode.JOINT else context.preprocessor
    facts, weights = context.reading, asdict(context.models.precision)
    if cfg.model.quantize:
        weights["unquantized"] = family_of_model(cfg).unquantized(context.task_type)
    return {
        "task": task.name,
        "fields": list(task.fields),
        "order": [task.fields[i] for i in own.order],
        "labels": list(task.labels),
        "prompt": facts["prompt"],
        "answers": facts["answers"],
        "source_language": task.english,
        "target_language": cfg.task.lang,
        "method": cfg.method.name,
        "reads": mode.value,
        "source_texts": list(source_texts(cfg, task).parts),
        "passes": list(cfg.predict.sources),
        "task_type": context.task_type,
        "max_length": own.max_length,
        "truncation_side": cfg.data.truncation_side,
        "padding_side": own.tokenizer.padding_side,
        "doc_stride": facts["doc_stride"],
        "attention": facts["attention"],
        "weights": weights,
        "base_model": {"name": base.name, "hub_id": base.hub_id, "commit": base.commit},
        "translation": {
            "name": translation.name,
            "hub_id": translation.hub_id,
            "revision": translation.commit or cfg.mt.revision,
            "noise": cfg.mt.noise,
        },
    }


def write_run(part: Path, run: Run, cfg: Config, base: Origin, context: RunContext) -> None:
    """Write what `flare_exp.load` reads: a run folder without data and without paths."""
    for name in WEIGHTS:
        if (run.folder / name).is_dir():
            copy_weights(run.folder / name, part / name, base)
    write_text(part / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    write_json(part / "metrics.json", run.metrics)
    made = run.provenance.get("translations", {})
    made = {name: _without(facts, PRIVATE) for name, facts in made.items()}
    kept = {name: run.provenance[name] for name in FACTS if name in run.provenance}
    write_json(part / "provenance.json", {**kept, "translations": made})
    write_json(part / CHECKSUMS, seal(part))


def _without(facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in names}


def copy_weights(source: Path, target: Path, base: Origin) -> None:
    """Copy an adapter or a model, with the backbone's hub id in place of its path."""
    target.mkdir()
    for file in source.iterdir():
        if file.name == "adapter_config.json":
            named = {"base_model_name_or_path": base.hub_id, "revision": base.commit}
            write_json(target / file.name, {**json.loads(file.read_text()), **named})
        elif file.name != "README.md":  # PEFT's, which has nothing but that path
            shutil.copyfile(file, target / file.name)


def write_lora(part: Path, run: Run, cfg: Config, base: Origin, context: RunContext) -> LoraConfig:
    """Write one plain LoRA, and the model below it where no hub id names it."""
    below: Path | None = None
    if not (run.folder / "english" / "adapter_config.json").is_file():
        below = run.folder / "english"
    elif base.hub_id is None:
        below = context.backbone.path
    if below is not None:
        (part / BASE).mkdir()
        for name in files_read([file.name for file in below.iterdir()]):
            shutil.copyfile(below / name, part / BASE / name)
        context.preprocessor.tokenizer.save_pretrained(str(part / BASE))
    adapters = [lora.read(place) for place in adapters_of(run.folder)]
    named = (None, None) if below is not None else (base.hub_id, base.commit)
    return lora.write(adapters, part, *named)
