"""Find the artifacts of a run and build none; what is missing is replaced or raises."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flare_exp.artifacts import Artifact, ArtifactStore
from flare_exp.experiment.checkpoints import MT
from flare_exp.planning import shapes
from flare_exp.toy.translation_model import train_mt


class ArtifactMissing(Exception):
    """Something that later stages read is not there."""

    def __init__(self, artifact: Artifact):
        super().__init__(f"{artifact.kind}/{artifact.digest}")
        self.artifact = artifact


class ReadOnlyStore(ArtifactStore):
    """Find artifacts and build none, except translations that need no model.

    These are built into `scratch`.
    """

    def __init__(self, root: Path | str, scratch: Path, machine: bool):
        super().__init__(root)
        self.scratch, self.machine = scratch, machine

    def get(
        self, kind: str, key: Mapping[str, Any], build: Callable[[Path], Any], *_, **__
    ) -> Artifact:
        """Find an artifact; only a translation that needs no model is built.

        Raises:
            ArtifactMissing: a later stage reads the artifact, and it is not there.
        """
        found = self.find(kind, key)
        if found.reused or kind in (
            "backbone",
            "finetune",
            "labels",
            "transfer",
            "similarity",
            "test",
        ):  # nothing here reads an unbuilt one
            return found
        if kind != "translation" or self.machine:
            raise ArtifactMissing(found)
        place = self.scratch / kind / found.digest
        if not place.is_dir():
            place.mkdir(parents=True)
            build(place)
        return replace(found, path=place)


class PreviewMT(MT):
    """A translation model that need not be here."""

    store: ReadOnlyStore

    @property
    def absent(self) -> bool:
        """Return True if the checkpoint is not here."""
        return self.cfg.path is not None and not shapes.weights_here(
            self.cfg.path, self.cfg.revision
        )

    def check(self, *codes: str) -> None:
        """Check the languages, as far as the checkpoint is here."""
        if not self.absent:
            super().check(*codes)

    @functools.cached_property
    def missing(self) -> Artifact | None:
        """Return the embedded model, where it has yet to be trained."""
        try:
            if self.cfg.kind == "model":
                _ = super().checkpoint
        except ArtifactMissing as missing:
            return missing.artifact
        return None

    @functools.cached_property
    def checkpoint(self) -> str:
        """Return the path of the checkpoint; the embedded model is trained for one step."""
        if self.missing is None:
            return super().checkpoint
        return str(
            first_step(self.store.scratch / "mt" / self.missing.digest, train_mt, self.options)
        )

    @functools.cached_property
    def encoder_config(self) -> Any:
        """Read the configuration of the encoder, or its published numbers."""
        return (
            shapes.config_of(str(self.cfg.path), self.cfg.revision)
            if self.absent
            else super().encoder_config
        )

    @functools.cached_property
    def encoder(self) -> Any:
        """Load the encoder; None: it is not here."""
        return None if self.absent else super().encoder


def first_step(folder: Path, build: Callable[..., Any], options: Mapping[str, Any]) -> Path:
    """Train a tiny model for one step: it has the shapes and the tokenizer of the finished one."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        build(folder, **{**options, "steps": 1})
    return folder
