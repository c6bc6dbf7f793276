"""Write files atomically."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISSING = "there is no such folder"


def folder_problem(text: str) -> str | None:
    """Return why the name of a folder names none that can be looked at; None: it does.

    A `~` stands for a home folder, as in a shell.
    """
    try:
        found = Path(text).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:  # no permission, or a name that is too long
        return f"it cannot be looked at ({error.strerror})"
    except RuntimeError:
        return f"there is no home folder for {text.split('/')[0]}"
    return None if stat.S_ISDIR(found.st_mode) else MISSING


def new_folder_problem(path: Path) -> str:
    """Return why a folder cannot be written into; empty: it is there, or the one above it is."""
    if path.exists() and not path.is_dir():
        return "is a file; name a folder"
    return "" if path.parent.is_dir() else f"there is no folder {path.parent}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file that then replaces `path`; after a failure the old one stays."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as part:
        part.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path)
