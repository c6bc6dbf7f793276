"""A task: a loader of typed examples, its labels, its languages and its metric."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flare_exp.artifacts import digest_of
from flare_exp.errors import UserError

ROLES = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One labelled example.

    `id` is `<task>/<lang>/<split>/<row>`, unique; `key` is the same for translations of one another in a parallel
    benchmark; `texts` has one entry for a sentence task, two for a sentence-pair task; `label` indexes `Task.labels`.
    """

    id: str
    key: str
    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Slice:
    """`split`, `split[:n]`, `split[n:]` or `split[n:m]`, in rows."""

    split: str
    start: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Read a slice; ValueError when it is none, or empty."""
        match = re.fullmatch(r"([A-Za-z_]\w*)(?:\[(\d*):(\d*)\])?", text)
        if not match:
            raise ValueError(f"{text!r} is not a split; write e.g. train, validation[:2000] or validation[2000:]")
        split, start, stop = match.groups()
        parsed = cls(split, int(start or 0), int(stop) if stop else None)
        if parsed.stop is not None and parsed.stop <= parsed.start:
            raise ValueError(f"{text!r} is empty")
        return parsed

    def overlaps(self, other: Slice) -> bool:
        ends = [float("inf") if s.stop is None else s.stop for s in (self, other)]
        return self.split == other.split and self.start < ends[1] and other.start < ends[0]


class Task(ABC):
    """Loads a benchmark's examples by language and role (train, validation, test).

    Args:
        splits: the slice of the benchmark that plays each role.
        limit: only the first `limit` examples of every role.
    """

    name: ClassVar[str]
    english: ClassVar[str]  # the benchmark's own code for English
    languages: ClassVar[tuple[str, ...]]
    labels: ClassVar[tuple[str, ...]]
    metric: ClassVar[str]  # what model selection and the tables look at
    parallel: ClassVar[bool] = False  # rows with one key are human translations of one another

    def __init__(self, splits: dict[str, str] | None = None, limit: int | None = None):
        self.splits = {role: Slice.parse((splits or {}).get(role, role)) for role in ROLES}
        self.limit = limit

    @abstractmethod
    def read(self, lang: str, split: str) -> list[Example]:
        """Every example of one split, in file order."""

    def load(self, lang: str, role: str) -> list[Example]:
        """The examples that play `role` in `lang`.

        Raises:
            UserError: the slice is outside the split.
        """
        part = self.splits[role]
        rows = self.read(lang, part.split)[part.start : part.stop][: self.limit]
        if not rows:
            raise UserError(f"task.{role}_split={part.split}[{part.start}:{part.stop or ''}] of {lang} holds no example")
        return rows


def fingerprint(examples: Sequence[Example]) -> str:
    """Identity of a data set: ids, keys, texts and labels, in order."""
    return digest_of([[e.id, e.key, *e.texts, e.label] for e in examples])[:16]


def read_parquet(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a local parquet file.

    Raises:
        UserError: missing or damaged file, or a column is missing; names the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"task.data_dir: there is no {path}; expected <data_dir>/<language>/<split>.parquet")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"task.data_dir: {path} is not a readable parquet file ({error})") from error
    if missing := [c for c in columns if c not in table.column_names]:
        raise UserError(f"task.data_dir: {path} lacks the column(s) {', '.join(missing)}; it has {', '.join(table.column_names)}")
    return table.select(list(columns)).to_pylist()


def read_hub(hub_id: str, config: str, split: str, revision: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a hub data set at a pinned revision.

    Raises:
        UserError: it cannot be reached, or has no such config, split or column.
    """
    import datasets

    try:
        table = datasets.load_dataset(hub_id, config, split=split, revision=revision)
        return table.select_columns(list(columns)).to_list()
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise UserError(
            f"the data set {hub_id} ({config}, {split}) could not be loaded: {str(error).splitlines()[0]}\n"
            "  without network, point task.data_dir at a folder of <language>/<split>.parquet files"
        ) from error
