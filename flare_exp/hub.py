"""Checkpoints and data sets of the Hugging Face hub: whether the local caches hold them, and how they get there.

The hub's libraries are imported inside functions only: they read HF_HUB_OFFLINE once, when they are imported.
"""

from __future__ import annotations

import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from flare_exp.errors import UserError, first_line

# in the order in which transformers looks for them
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX = ".index.json"
# configuration and tokenizer; subfolders hold other formats (onnx/, original/)
SMALL = [
    "config.json",
    "generation_config.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
]
ELSEWHERE = ["*/*"]
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = {
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
}


def offline(wanted: bool) -> bool:
    """Whether the hub must not be asked: offline=true, or HF_HUB_OFFLINE in the environment.

    Tells the hub's libraries, so it comes before their import.
    """
    os.environ.setdefault(
        "DATASETS_VERBOSITY", "error"
    )  # without network it tells every time that it reads its cache
    if wanted:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return asked.upper() in ("1", "ON", "YES", "TRUE")


def unreachable(seconds: float = 5.0) -> str | None:
    """Why the hub does not answer, None: it does. The libraries try again and again, for minutes; this asks once.

    Args:
        seconds: at most; a name that nobody resolves can take longer than any timeout of a connection.
    """
    import threading
    import urllib.error
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    answers: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(
                urllib.request.Request(endpoint, method="HEAD"), timeout=seconds
            ).close()
            answers.append(None)
        except urllib.error.HTTPError:  # an answer, too
            answers.append(None)
        except (OSError, ValueError) as error:
            answers.append(str(getattr(error, "reason", error)))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    reason = answers[0] if answers else f"no answer within {seconds:.0f} s"
    return reason and f"{endpoint} cannot be reached ({reason})"


def looks_local(path: str) -> bool:
    """Whether `path` means a folder rather than a hub id (`name` or `owner/name`)."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path)


def local(path: str) -> str:
    """`path` as transformers understands it, hub id or folder."""
    return str(Path(path).expanduser()) if looks_local(path) else path


def is_commit(revision: str | None) -> bool:
    """Tell a commit, whose content never changes, from a branch, a tag or None (the newest)."""
    return bool(re.fullmatch("[0-9a-f]{40}", revision or ""))


def commit_of(hub_id: str, revision: str | None) -> str:
    """Resolve a checkpoint's revision to a commit: by the hub, or without network by the local cache.

    Raises whatever goes wrong (see `reason`).
    """
    from huggingface_hub import hf_hub_download

    if is_commit(revision):
        return str(revision)
    return Path(hf_hub_download(hub_id, "config.json", revision=revision)).parent.name


@dataclass(frozen=True)
class Found:
    """What the local caches hold of something: its commit, its bytes, and what `lacks` (None: nothing)."""

    commit: str | None = None
    size: int = 0
    lacks: str | None = None


@dataclass(frozen=True)
class Need(ABC):
    """Something on the hub, at a revision (None: the newest)."""

    what: str
    hub_id: str
    revision: str | None

    @property
    def origin(self) -> str:
        return self.hub_id

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, so that the hub cannot hold anything newer."""
        return is_commit(self.revision)

    def __str__(self) -> str:
        return f"{self.what} {self.origin} at {self.revision or 'main'}"

    @property
    @abstractmethod
    def cache(self) -> str:
        """The folder of the local cache."""

    @abstractmethod
    def find(self) -> Found:
        """Look into the local caches; the network is not asked."""

    @abstractmethod
    def download(self) -> int:
        """Bytes that `fetch` would take from the hub, if the caches have nothing; raises whatever goes wrong."""

    @abstractmethod
    def fetch(self) -> None:
        """Fetch what the local caches lack, showing progress; raises whatever goes wrong."""


@dataclass(frozen=True)
class Checkpoint(Need):
    """A model with its tokenizer, in the one format that transformers will load."""

    @property
    def cache(self) -> str:
        from huggingface_hub import constants

        return constants.HF_HUB_CACHE

    def find(self) -> Found:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        lacks = None
        try:
            folder = Path(
                snapshot_download(
                    self.hub_id,
                    revision=self.revision,
                    local_files_only=True,
                    allow_patterns=SMALL,
                    ignore_patterns=ELSEWHERE,
                )
            )
        except (LocalEntryNotFoundError, HFValidationError) as error:
            part = getattr(error, "snapshot_path", None)  # what an interrupted download has left
            if part is None:
                return Found(lacks="all of it")
            folder, lacks = Path(part), "part of its configuration or tokenizer"
        names = [p.name for p in folder.iterdir() if p.is_file()]
        size = sum((folder / name).stat().st_size for name in wanted(names))
        return Found(folder.name, size, lacks or missing_files(folder, names))

    def download(self) -> int:
        from huggingface_hub import HfApi

        files = (
            HfApi().model_info(self.hub_id, revision=self.revision, files_metadata=True).siblings
            or ()
        )
        sizes = {file.rfilename: file.size or 0 for file in files}
        return sum(sizes[name] for name in wanted(list(sizes)))

    def fetch(self) -> None:
        from huggingface_hub import HfApi, snapshot_download

        names = wanted(HfApi().list_repo_files(self.hub_id, revision=self.revision))
        if not set(WEIGHTS).intersection(names):
            raise UserError(f"the hub has none of {', '.join(WEIGHTS)} there")
        snapshot_download(self.hub_id, revision=self.revision, allow_patterns=names)


@dataclass(frozen=True)
class DataSet(Need):
    """One configuration of a data set: `datasets` prepares all splits of it at once."""

    config: str

    @property
    def origin(self) -> str:
        return f"{self.hub_id} ({self.config})"

    @property
    def cache(self) -> str:
        from datasets import config

        return str(config.HF_DATASETS_CACHE)

    def find(self) -> Found:
        from datasets.naming import camelcase_to_snakecase

        owner, _, name = self.hub_id.rpartition("/")
        place = Path(self.cache) / "___".join((owner, camelcase_to_snakecase(name))) / self.config
        # <version>/<commit>; without network `datasets` would take any commit, the one prepared last
        ready = [p.parent for p in place.glob(f"*/{self.revision}/dataset_info.json")]
        if not ready:
            return Found(lacks="all of it")
        return Found(self.revision, sum(p.stat().st_size for p in ready[0].iterdir()))

    def download(self) -> int:
        from huggingface_hub import HfApi

        files = (
            HfApi().dataset_info(self.hub_id, revision=self.revision, files_metadata=True).siblings
            or ()
        )
        data = {
            file.rfilename: file.size or 0
            for file in files
            if not file.rfilename.startswith((".", "README"))
        }
        own = [
            size for name, size in data.items() if f"/{self.config}/" in f"/{name}"
        ]  # a folder of each configuration
        return sum(own or data.values())

    def fetch(self) -> None:
        load_hub(self.hub_id, self.config, str(self.revision))


def wanted(names: Sequence[str]) -> list[str]:
    """Of a repository's files those that a run reads: small ones, and the weights in one format."""
    from huggingface_hub.utils import filter_repo_objects

    weights = next((name for name in WEIGHTS if name in names), "")
    shards = weights.removesuffix(INDEX).replace(".", "-*-of-*.") if weights.endswith(INDEX) else ""
    small = filter_repo_objects(names, allow_patterns=SMALL, ignore_patterns=ELSEWHERE)
    return [*small, *(name for name in names if name == weights or fnmatch(name, shards))]


def files_read(names: Sequence[str]) -> list[str]:
    """Select, of the files of a checkpoint's folder, those that transformers reads: a PEFT adapter there is loaded as well."""
    return [*wanted(names), *sorted({*ADAPTER}.intersection(names))]


def missing_files(folder: Path, names: Sequence[str]) -> str | None:
    """What a checkpoint's folder lacks, in words; None: nothing."""
    weights = next((name for name in WEIGHTS if name in names), None)
    if weights is None:
        return "its weights"
    if weights.endswith(INDEX):
        shards = set(json.loads((folder / weights).read_text())["weight_map"].values())
        if lost := sorted(shards.difference(names)):
            return f"{len(lost)} of its {len(shards)} files of weights, e.g. {lost[0]}"
    if "config.json" not in names:
        return "its config.json"
    return None if TOKENIZERS.intersection(names) else "its tokenizer"


def reason(error: Exception) -> str:
    """Why the hub did not give something, in a line that says what to do where that is known."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return (
            "it is gated: ask for access on its page of the hub, then log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private: log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    return first_line(error)


log = logging.getLogger(__name__)


def load_hub(hub_id: str, config: str, revision: str, split: str | None = None) -> Any:
    """A split of a hub data set at a pinned revision, or (None) all; either way all are prepared in the local cache.

    Raises:
        UserError: it cannot be reached, or has no such config or split.
    """
    import datasets

    try:
        return datasets.load_dataset(hub_id, config, split=split, revision=revision)
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise UserError(
            f"the data set {hub_id} ({config}{f', {split}' if split else ''}) could not be loaded: {first_line(error)}\n"
            "  without network, fetch it beforehand (python -m flare_exp prefetch), or point task.data_dir at a folder of "
            "<language>/<split>.parquet files"
        ) from error
