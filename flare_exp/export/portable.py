"""Name checkpoints as others can get them, and leave out what belongs to one machine."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flare_exp import hub
from flare_exp.config.methods import answering
from flare_exp.config.schema import Config, LoggerConfig
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.errors import UserError
from flare_exp.experiment.loading import check_folder_is_here
from flare_exp.utils.programs import program_of

CACHE = "${default_cache:}"  # as in conf/config.yaml: resolved where the folder is loaded
# a folder as the hub's libraries lay out their cache
SNAPSHOT = re.compile(r"models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
TEXTS = (".json", ".md", ".yaml")
VOCABULARIES = ("tokenizer.json", "vocab.json")  # a word may look like a path, as "/tmp"


@dataclass(frozen=True)
class Origin:
    """A checkpoint as others can get it.

    Args:
        name: name of the model or of the translation system in the configuration.
        hub_id: its hub id; None: flare_exp builds it (embedded), or nobody else has it.
        commit: the commit of `hub_id`.
        given: whether the exporter named `hub_id`, because the run used a folder.
    """

    name: str
    hub_id: str | None = None
    commit: str | None = None
    given: bool = False

    def __str__(self) -> str:
        return self.name if self.hub_id is None else f"{self.hub_id} at {self.commit}"


def origins(
    cfg: Config, facts: Mapping[str, Any], base: str | None, mt_base: str | None
) -> tuple[Origin, Origin]:
    """Return the origins of the backbone and of the translation system.

    Args:
        cfg: the run's configuration.
        facts: what provenance.json holds.
        base: `<hub id>` or `<hub id>@<commit>` of the backbone, where the run used a folder.
        mt_base: the same for the translation model.

    Raises:
        UserError: one of the two has to be given, or its commit is not known; all problems in one
            message.
    """
    read = str(facts.get("artefacts", {}).get("backbone", {}).get("digest", ""))
    # the translation model's name is enough, unless the model reads its encoder
    needed = any(m.mode is PairingMode.LATENT for m in answering(cfg.method).values())
    found, problems = [], []
    for option, part, identity, given, required in (
        ("base", cfg.model, read, base, True),
        ("mt_base", cfg.mt, _translated_by(facts), mt_base, needed),
    ):
        try:
            found.append(_origin(option, part, identity, given))
        except UserError as error:
            found.append(Origin(part.name))
            problems += [str(error)] if required or given else []
    if problems:
        raise UserError("; ".join(problems))
    return found[0], found[1]


def _origin(option: str, part: Any, identity: str, given: str | None) -> Origin:
    """Return the origin of the checkpoint at `part.path`.

    Args:
        option: name of the option that gives the hub id.
        part: the section `model` or `mt` of the configuration.
        identity: `<hub id>@<commit>` as the run has recorded it, or anything else.
        given: value of the option, or None.

    Raises:
        UserError: the option has to be given, or is not wanted, or its commit is not known, or the
            folder is not here.
    """
    if getattr(part, "kind", "model") == "model":
        check_folder_is_here("mt" if option == "mt_base" else "model", part, identity)
    folder = part.path is not None and hub.looks_local(part.path)
    if given is not None and (not folder or getattr(part, "kind", "model") != "model"):
        read = part.name if part.path is None else part.path
        raise UserError(f"{option}={given}: the run read {read}, and no folder; leave it out")
    if part.path is None or getattr(part, "kind", "model") != "model":
        return Origin(part.name)
    if given is not None:
        hub_id, _, revision = given.partition("@")
        return Origin(part.name, hub_id, _commit(option, hub_id, revision or None), True)
    if not folder:
        hub_id, _, commit = identity.rpartition("@")
        if hub_id != part.path or not hub.is_commit(commit):
            commit = _commit(option, part.path, part.revision)
        return Origin(part.name, part.path, commit)
    place = Path(part.path).expanduser().resolve().as_posix()
    if match := SNAPSHOT.search(place):
        return Origin(part.name, match["id"].replace("--", "/"), match["commit"])
    raise UserError(
        f"{option}: the run read its checkpoint from the folder {part.path}, which others do not "
        f"have; give {option}=<hub id> or {option}=<hub id>@<commit>"
    )


def _commit(option: str, hub_id: str, revision: str | None) -> str:
    """Return the commit of a revision.

    Raises:
        UserError: the hub id is none, or its commit is not known.
    """
    if hub.looks_local(hub_id):
        raise UserError(f"{option}={hub_id}: give a hub id (owner/name), not a folder")
    try:
        return hub.commit_of(hub_id, revision)
    except Exception as error:  # the hub's libraries raise many kinds
        raise UserError(
            f"{option}={hub_id}: the commit of {revision or 'main'} is not known "
            f"({hub.reason(error)}); give {option}={hub_id}@<commit>"
        ) from error


def _translated_by(facts: Mapping[str, Any]) -> str:
    """Return the identity of the translation model that made a run's translations."""
    made = facts.get("translations", {}).values()
    return next((str(one["checkpoint"]) for one in made if "checkpoint" in one), "")


def other_weights(folder: Path, origin: Origin) -> list[str] | None:
    """Compare a checkpoint's weights with those that the hub has under a name.

    Returns:
        files of the folder whose content the hub does not have at that commit; None: the hub
        cannot be asked, or the folder is gone.
    """
    from huggingface_hub import HfApi

    from flare_exp.artifacts import file_sha256

    names = [p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin")]
    read = [name for name in hub.wanted(names) if name in names]
    try:
        info = HfApi().model_info(
            str(origin.hub_id), revision=origin.commit, files_metadata=True, timeout=10
        )
    except Exception:  # the hub's libraries raise many kinds; without an answer nothing is compared
        return None
    there = {file.lfs.sha256 for file in info.siblings or () if file.lfs}
    return [name for name in read if file_sha256(folder / name) not in there] if read else None


def portable(cfg: Config, base: Origin, translation: Origin) -> Config:
    """Return a configuration that means the same on another machine.

    Folders are replaced by hub ids or left out, and the device is chosen anew.
    """
    mt = replace(
        cfg.mt,
        path=translation.hub_id,
        revision=translation.commit or cfg.mt.revision,
        command=program_of(cfg.mt.command) if cfg.mt.command else None,
    )
    if mt.kind == "file":
        mt.path = "translations"  # never read: whoever loads the model brings the sources
    return replace(
        cfg,
        output_dir=".",
        cache_dir=CACHE,
        offline=False,
        model=replace(cfg.model, path=base.hub_id, revision=base.commit),
        mt=mt,
        task=replace(cfg.task, data_dir=None, train_data_dir=None),
        trainer=replace(cfg.trainer, accelerator="auto", devices=1, nodes=1, strategy=None),
        distil=replace(cfg.distil, texts=None),
        logger=LoggerConfig(name="csv"),
    )


def places(cfg: Config, *folders: Path) -> set[str]:
    """Return the paths of this machine that no exported file may have."""
    given = [cfg.output_dir, cfg.cache_dir, cfg.task.data_dir, cfg.task.train_data_dir]
    given += [cfg.model.path, cfg.mt.path]
    found = {path for path in given if path and hub.looks_local(path)}
    found |= {*map(str, folders), str(Path.cwd()), str(Path.home()), tempfile.gettempdir()}
    known = {form for path in found for form in (path, str(Path(path).expanduser().resolve()))}
    return {path for path in known if path.startswith(("/", "~"))}


def leaks(folder: Path, paths: set[str]) -> Iterator[str]:
    """Yield a message for each text file of a folder that has one of some paths in it.

    The root is none: every text with a slash has it.
    """
    searched = sorted({path.rstrip("/") for path in paths} - {""})
    if not searched:
        return
    path = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, searched))})(?![\w-])")
    for file in sorted(folder.rglob("*")):
        if file.suffix in TEXTS and file.name not in VOCABULARIES and file.is_file():
            if found := path.search(file.read_text(errors="replace")):
                yield f"{file.relative_to(folder)} has the path {found[0]} of this machine in it"
