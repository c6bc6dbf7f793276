"""Load the tokenizer of a run's model, if it is on this machine."""

from __future__ import annotations

from typing import Any

from flare_exp import hub
from flare_exp.artifacts import ArtifactStore
from flare_exp.config.schema import Config
from flare_exp.experiment.checkpoints import pretraining_key
from flare_exp.models.backbones import load_tokenizer


def local_tokenizer(cfg: Config) -> tuple[Any, str]:
    """Load a tokenizer; nothing is downloaded or built.

    Returns:
        the tokenizer, or None, and the reason why it is not here.

    Raises:
        UserError: it is here and cannot be read.
    """
    path, name = cfg.model.path, cfg.model.name
    if path is None:
        found = ArtifactStore(cfg.cache_dir).find("backbone", pretraining_key(cfg))
        if not found.reused:
            return None, f"model={name} is built by its first run; there was none yet"
        return load_tokenizer(str(found.path)), ""
    if not hub.looks_local(path):
        if lacks := hub.Checkpoint("backbone", path, cfg.model.revision).find().lacks:
            fetch = f"python -m flare_exp prefetch model={name}"
            return None, f"model.path={path}: missing {lacks}; fetch it: {fetch}"
        hub.offline(True)
    return load_tokenizer(path, cfg.model.revision), ""
