"""Find checkpoints and data sets of the Hugging Face hub in the local caches, or download them.

The hub's libraries are imported inside functions only: they read HF_HUB_OFFLINE once, at their
import.
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

# in the order in which transformers searches for them
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
    """Return whether the hub must not be asked: offline=true, or HF_HUB_OFFLINE in the environment.

    The environment of the hub's libraries is set accordingly. Call this before their import.
    """
    # offline, `datasets` would report every use of its cache
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if wanted:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return asked.upper() in ("1", "ON", "YES", "TRUE")


def unreachable(seconds: float = 5.0) -> str | None:
    """Return why the hub does not answer, or None if it does.

    The hub's libraries retry for minutes; this function asks once.

    Args:
        seconds: longest time to wait. A name that cannot be resolved may take longer than the
            timeout of a connection.
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
        except urllib.error.HTTPError:  # the hub has answered
            answers.append(None)
        except (OSError, ValueError) as error:
            answers.append(str(getattr(error, "reason", error)))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    reason = answers[0] if answers else f"no answer within {seconds:.0f} s"
    return reason and f"{endpoint} cannot be reached ({reason})"


def looks_local(path: str) -> bool:
    """Return whether `path` means a folder and not a hub id (`name` or `owner/name`)."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path)


def local(path: str) -> str:
    """Return `path` as transformers expects it: a hub id, or an expanded folder."""
    return str(Path(path).expanduser()) if looks_local(path) else path


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit, whose content never changes.

    Other revisions are branches, tags and None (the newest commit).
    """
    return bool(re.fullmatch("[0-9a-f]{40}", revision or ""))


def commit_of(hub_id: str, revision: str | None) -> str:
    """Return the commit of a checkpoint's revision, from the hub, or offline from the local cache.

    Any error of the hub's libraries is raised (see `reason`).
    """
    from huggingface_hub import hf_hub_download

    if is_commit(revision):
        return str(revision)
    return Path(hf_hub_download(hub_id, "config.json", revision=revision)).parent.name


@dataclass(frozen=True)
class CacheStatus:
    """Content of the local caches for a need.

    Args:
        commit: commit of the cached files; None without any.
        size: their bytes.
        lacks: description of what is missing; None: nothing.
    """

    commit: str | None = None
    size: int = 0
    lacks: str | None = None


@dataclass(frozen=True)
class HubResource(ABC):
    """A checkpoint or data set on the hub, at a revision (None: the newest)."""

    what: str
    hub_id: str
    revision: str | None

    @property
    def origin(self) -> str:
        """Return the name of the source for tables and messages."""
        return self.hub_id

    @property
    def pinned(self) -> bool:
        """Return whether the revision is a commit, so that the hub has nothing newer."""
        return is_commit(self.revision)

    def __str__(self) -> str:
        return f"{self.what} {self.origin} at {self.revision or 'main'}"

    @property
    @abstractmethod
    def cache(self) -> str:
        """Return the folder of the local cache."""

    @abstractmethod
    def find(self) -> CacheStatus:
        """Search the local caches, without network."""

    @abstractmethod
    def download(self) -> int:
        """Return the bytes that `fetch` would download with empty caches.

        Any error of the hub's libraries is raised.
        """

    @abstractmethod
    def fetch(self) -> None:
        """Download the files that the local caches lack, with a progress bar.

        Any error of the hub's libraries is raised.
        """


@dataclass(frozen=True)
class Checkpoint(HubResource):
    """A model with its tokenizer, in the one format that transformers will load."""

    @property
    def cache(self) -> str:
        """Return the folder of the hub's cache."""
        from huggingface_hub import constants

        return constants.HF_HUB_CACHE

    def find(self) -> CacheStatus:
        """Search the local cache, without network."""
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
            part = getattr(error, "snapshot_path", None)  # left by an interrupted download
            if part is None:
                return CacheStatus(lacks="all of it")
            folder, lacks = Path(part), "part of its configuration or tokenizer"
        names = [p.name for p in folder.iterdir() if p.is_file()]
        size = sum((folder / name).stat().st_size for name in wanted(names))
        return CacheStatus(folder.name, size, lacks or missing_files(folder, names))

    def download(self) -> int:
        """Return the bytes of the files that a run reads."""
        from huggingface_hub import HfApi

        files = (
            HfApi().model_info(self.hub_id, revision=self.revision, files_metadata=True).siblings
            or ()
        )
        sizes = {file.rfilename: file.size or 0 for file in files}
        return sum(sizes[name] for name in wanted(list(sizes)))

    def fetch(self) -> None:
        """Download the files that a run reads.

        Raises:
            UserError: the repository has no weights in a known format.
        """
        from huggingface_hub import HfApi, snapshot_download

        names = wanted(HfApi().list_repo_files(self.hub_id, revision=self.revision))
        if not set(WEIGHTS).intersection(names):
            raise UserError(f"the hub has none of {', '.join(WEIGHTS)} there")
        snapshot_download(self.hub_id, revision=self.revision, allow_patterns=names)


@dataclass(frozen=True)
class DataSet(HubResource):
    """One configuration of a data set; `datasets` prepares all its splits at once."""

    config: str

    @property
    def origin(self) -> str:
        """Return the id and the configuration of the data set."""
        return f"{self.hub_id} ({self.config})"

    @property
    def cache(self) -> str:
        """Return the folder of the cache of `datasets`."""
        from datasets import config

        return str(config.HF_DATASETS_CACHE)

    def find(self) -> CacheStatus:
        """Search the local cache, without network."""
        from datasets.naming import camelcase_to_snakecase

        owner, _, name = self.hub_id.rpartition("/")
        place = Path(self.cache) / "___".join((owner, camelcase_to_snakecase(name))) / self.config
        # <version>/<commit>: offline, `datasets` would take any commit, the one prepared last
        ready = [p.parent for p in place.glob(f"*/{self.revision}/dataset_info.json")]
        if not ready:
            return CacheStatus(lacks="all of it")
        return CacheStatus(self.revision, sum(p.stat().st_size for p in ready[0].iterdir()))

    def download(self) -> int:
        """Return the bytes of the configuration's files."""
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
        # a configuration may have a folder of its own
        own = [size for name, size in data.items() if f"/{self.config}/" in f"/{name}"]
        return sum(own or data.values())

    def fetch(self) -> None:
        """Download and prepare all splits."""
        load_hub(self.hub_id, self.config, str(self.revision))


def wanted(names: Sequence[str]) -> list[str]:
    """Return those of a repository's files that a run reads.

    These are the small files, and the weights in one format.
    """
    from huggingface_hub.utils import filter_repo_objects

    weights = next((name for name in WEIGHTS if name in names), "")
    shards = weights.removesuffix(INDEX).replace(".", "-*-of-*.") if weights.endswith(INDEX) else ""
    small = filter_repo_objects(names, allow_patterns=SMALL, ignore_patterns=ELSEWHERE)
    return [*small, *(name for name in names if name == weights or fnmatch(name, shards))]


def files_read(names: Sequence[str]) -> list[str]:
    """Return those of a checkpoint folder's files that transformers reads.

    A PEFT adapter in the folder is loaded as well.
    """
    return [*wanted(names), *sorted({*ADAPTER}.intersection(names))]


def missing_files(folder: Path, names: Sequence[str]) -> str | None:
    """Return a description of the files that a checkpoint's folder lacks; None: nothing."""
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
    """Return in one line why the hub refused, and the remedy where it is known."""
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
    """Load a split of a hub data set at a pinned revision.

    All splits are prepared in the local cache. Without `split` all of them are returned.

    Raises:
        UserError: the hub cannot be reached, or has no such configuration or split, or the local
            cache has another commit.
    """
    import datasets

    try:
        found = datasets.load_dataset(hub_id, config, split=split, revision=revision)
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise UserError(
            f"the data set {hub_id} ({config}{f', {split}' if split else ''}) could not be loaded: "
            f"{first_line(error)}\n"
            "  without network, fetch it beforehand (python -m flare_exp prefetch), or point "
            "task.data_dir at a folder of <language>/<split>.parquet files"
        ) from error
    # without the hub, `datasets` takes the commit prepared last, whichever revision is asked for
    for part in found.values() if isinstance(found, dict) else [found]:
        for folder in {Path(file["filename"]).parent for file in part.cache_files}:
            commits = [name for name in folder.parts if is_commit(name)]
            if commits and is_commit(revision) and revision not in commits:
                raise UserError(
                    f"the data set {hub_id} ({config}) is needed at commit {revision}, but without "
                    f"the hub `datasets` takes another commit, prepared last, from {folder}\n"
                    "  fetch the right one with network (python -m flare_exp prefetch); if it is "
                    "in the cache already, remove that folder"
                )
    return found
