"""Content-addressed artefacts: what one stage hands to the next.

An artefact is a folder `<root>/<kind>/<hash of its key>` with a manifest.json that lists every file's SHA-256. It is
built once, under a lock, in a temporary folder beside its place, fsynced and renamed; so it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import SoftFileLock, Timeout

from flare_exp import __version__
from flare_exp.errors import UserError

log = logging.getLogger(__name__)

SCHEMA = 2  # raise when the code changes what any kind of artefact contains
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A finished, verified artefact.

    `info` is what its builder returned, `seconds` what building took, `reused` whether it was there before this call.
    """

    path: Path
    kind: str
    digest: str
    info: dict[str, Any]
    seconds: float
    reused: bool


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class ArtifactStore:
    """Builds, verifies and returns artefacts below `root` (shared by runs and, on a cluster, by nodes)."""

    def __init__(self, root: Path | str):
        self.root = Path(root).expanduser()

    def get(self, kind: str, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any] | None]) -> Artifact:
        """Return the artefact of `kind` and `key`, building it if it is missing or damaged.

        `build(folder)` writes files into an empty folder and returns JSON-able facts for the manifest. A damaged
        artefact is named in a warning and rebuilt; nothing of it is used.

        Raises:
            UserError: the cache folder cannot be written.
        """
        key, digest, place = self._identified(kind, key)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(place):
                manifest = self._verified(place, kind, key)
                reused = manifest is not None
                if manifest is None:
                    manifest = self._build(place, kind, key, build)
        except OSError as error:
            raise UserError(f"cache_dir={self.root}: cannot write the artefact {kind}/{place.name}: {error}") from error
        return Artifact(place, kind, digest, manifest["info"], manifest["seconds"], reused)

    def find(self, kind: str, key: Mapping[str, Any]) -> Artifact:
        """What `get` would return, without building it: `reused` says whether it is there, and whole."""
        key, digest, place = self._identified(kind, key)
        manifest = self._verified(place, kind, key) or {"info": {}, "seconds": 0.0}
        return Artifact(place, kind, digest, manifest["info"], manifest["seconds"], "key" in manifest)

    def _identified(self, kind: str, key: Mapping[str, Any]) -> tuple[dict[str, Any], str, Path]:
        """The key as a manifest holds it, its digest, and where the artefact belongs."""
        plain = json.loads(json.dumps(dict(key)))
        digest = digest_of({"kind": kind, "schema": SCHEMA, "key": plain})[:20]
        return plain, digest, self.root / kind / digest

    def _locked(self, place: Path):
        lock = SoftFileLock(place.parent / f"{place.name}.lock")
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            log.info("waiting for %s/%s: another process is building it", place.parent.name, place.name)
            lock.acquire(poll_interval=0.5)
        return lock

    def _verified(self, place: Path, kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest when every byte is as it was written; otherwise None, with the damage named."""
        if not place.is_dir():
            return None
        problem = None
        try:
            manifest = json.loads((place / MANIFEST).read_text())
            if manifest["kind"] != kind or manifest["key"] != key:
                problem = f"{MANIFEST} belongs to something else"
            for name, expected in manifest["files"].items():
                if not (place / name).is_file():
                    problem = f"{name} is missing"
                elif (place / name).stat().st_size != expected["bytes"] or file_sha256(place / name) != expected["sha256"]:
                    problem = f"{name} is not what was written"
        except (OSError, ValueError, KeyError, TypeError):
            problem = f"{MANIFEST} is missing or unreadable"
        if problem is None:
            return manifest
        log.warning("damaged artefact %s: %s; building it again", place, problem)
        return None

    def _build(self, place: Path, kind: str, key: Mapping[str, Any], build: Callable) -> dict[str, Any]:
        # We hold the lock: what a killed builder left behind is nobody's.
        for stale in place.parent.glob(f".{place.name}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        folder = place.parent / f".{place.name}.{os.getpid()}"
        folder.mkdir()
        try:
            start = time.perf_counter()
            info = dict(build(folder) or {})
            manifest = {
                "kind": kind,
                "schema": SCHEMA,
                "key": key,
                "info": info,
                "seconds": round(time.perf_counter() - start, 3),
                "flare_exp": __version__,
                "files": {
                    str(path.relative_to(folder)): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
                    for path in sorted(folder.rglob("*"))
                    if path.is_file()
                },
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
            _fsync(folder)
            if place.exists():
                shutil.rmtree(place)
            folder.rename(place)
            _fsync_path(place.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return json.loads(json.dumps(manifest))


def _fsync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync_path(path)


def _fsync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
