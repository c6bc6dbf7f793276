"""Keep checksums of what a run leaves, so that a damaged result is noticed.

This module imports no torch: stored results are shown at once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from flare_exp.artifacts import file_sha256

CHECKSUMS = "checksums.json"
FILES = ("config.yaml", "metrics.json", "provenance.json", "predictions.parquet")
# an ensemble has an adapter or a model for each member
FOLDERS = ("adapter*", "english", "model*", "curves")
LARGE = 2**28  # bytes; larger files are read again only when their size or time has changed


def seal(folder: Path) -> dict[str, dict[str, Any]]:
    """Return checksum, size and time of each result in a run folder, by its path there.

    The page and the picture for people are left out: both may be edited.
    """
    return {path.relative_to(folder).as_posix(): seal_of(path) for path in _results(folder)}


def seal_of(path: Path) -> dict[str, Any]:
    """Return checksum, size and time of one file."""
    found = path.stat()
    return {"sha256": file_sha256(path), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def damage(folder: Path, only: Collection[str] | None = None, trusted: int = LARGE) -> list[str]:
    """Return what is wrong with the results in the folder of a finished run, one message per file.

    A folder of a version without checksums is only looked at for files that cannot be read.

    Args:
        only: look at these files alone.
        trusted: smallest size in bytes at which an unchanged size and time are enough. 0 reads
            no file that has not been touched.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return [name for name in _unreadable(folder) if only is None or name.split(" ")[0] in only]
    try:
        stored = json.loads(path.read_text())
        return [
            f"{name} {problem}"
            for name, facts in stored.items()
            if (only is None or name in only)
            and (problem := _problem(folder / name, facts, trusted))
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return [f"{CHECKSUMS} is unreadable"]


def _results(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in FILES if (folder / name).is_file())
    for place in folders(folder):
        yield from (
            path for path in sorted(place.rglob("*")) if path.is_file() and path.name != "README.md"
        )


def folders(folder: Path) -> Iterator[Path]:
    """Yield the folders of a run folder that hold results."""
    for name in FOLDERS:
        yield from (path for path in sorted(folder.glob(name)) if path.is_dir())


def _problem(path: Path, facts: Mapping[str, Any], trusted: int) -> str | None:
    if not path.is_file():
        return "is missing"
    found = path.stat()
    if found.st_size != facts["bytes"]:
        return f"has {found.st_size} bytes instead of {facts['bytes']}"
    if found.st_size >= trusted and found.st_mtime_ns == facts["mtime_ns"]:
        return None
    return None if file_sha256(path) == facts["sha256"] else "is not what was written"


def _unreadable(folder: Path) -> Iterator[str]:
    for name in ("metrics.json", "provenance.json"):
        try:
            json.loads((folder / name).read_text())
        except (OSError, ValueError):
            yield f"{name} is missing or unreadable"
