"""Store content-addressed artifacts: the output of one stage that another stage reads.

An artifact is a folder `<root>/<kind>/<hash of its key>` with a manifest.json that lists every
file's SHA-256. It is built once, under a lock, in a temporary folder next to its place, fsynced and
renamed. It therefore exists completely or not at all.

Locks are leases: if a builder dies on any machine, its lock expires and another process takes over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from flare_exp.errors import UserError, out_of_room
from flare_exp.utils import signals
from flare_exp.utils.leases import Lease

log = logging.getLogger(__name__)

# Increase this number when artifacts of an unchanged key get another content. The hashes of
# flare_exp.code detect most changes of the code.
SCHEMA = 3
MANIFEST = "manifest.json"
SPENT = ".seconds"  # file with the time that earlier builders of an unfinished artifact took


@dataclass(frozen=True)
class Artifact:
    """A finished, verified artifact.

    Args:
        path: folder of the artifact.
        kind: its kind.
        digest: hash of its key.
        info: facts that its builder returned.
        seconds: time that building took.
        reused: whether it existed before this call.
        code: hash of the code that decides its content (flare_exp.code); None if its key has none.
    """

    path: Path
    kind: str
    digest: str
    info: dict[str, Any]
    seconds: float
    reused: bool
    code: str | None = None


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value in canonical form."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256(file)
        )


def _sha256(file) -> str:  # Python 3.10
    """Return the SHA-256 of an open file, for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class ProcessGroup(Protocol):
    """Protocol of the processes of a run, as far as the store needs them.

    It is implemented in flare_exp.training.distributed.
    """

    @property
    def is_main(self) -> bool:
        """Return whether this is the process that builds."""

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's value on every process."""


class ArtifactStore:
    """Builds, verifies and returns artifacts below `root`.

    The folder may be shared by several runs and by the nodes of a cluster.

    Args:
        root: folder of all artifacts.
        distributed: the processes of this run: rank 0 builds, and the others wait for the artifact;
            None for one process.
    """

    def __init__(self, root: Path | str, distributed: ProcessGroup | None = None):
        self.root, self.distributed = Path(root).expanduser(), distributed

    def get(
        self,
        kind: str,
        key: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any] | None],
        collective: bool = False,
        resumable: bool = False,
    ) -> Artifact:
        """Return the artifact of `kind` and `key`; build it if it is missing or damaged.

        A damaged artifact is named in a warning and rebuilt; nothing of it is used.

        Args:
            kind: kind of the artifact.
            key: everything that decides its content, JSON-able.
            build: writes files into an empty folder and returns JSON-able facts for the manifest.
            collective: whether every process calls `build`, with rank 0's folder, into which only
                rank 0 writes.
            resumable: whether a builder that was stopped leaves its folder to the next one, which
                continues from its files.

        Raises:
            UserError: the cache folder cannot be written.
            StopRequested: a signal asked the run to stop; nothing was begun.
        """
        key, digest, place = self._identified(kind, key)
        if self.distributed and not self.distributed.is_main:
            if collective and (folder := self.distributed.broadcast()) is not None:
                build(Path(folder))
            left = self._awaited(place, kind, key)
            return Artifact(
                place, kind, digest, left["info"], left["seconds"], True, key.get("code")
            )
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(place) as lock:
                manifest = self._verified(place, kind, key)
                reused = manifest is not None
                if manifest is None:
                    signals.raise_if_signalled(f"before {kind}")
                    manifest = self._build(place, lock, kind, key, build, collective, resumable)
                elif collective and self.distributed:
                    self.distributed.broadcast(None)
        except (UserError, signals.StopRequested):
            raise
        except Exception as error:
            full = out_of_room(error)
            if full is None and not isinstance(error, OSError):
                raise
            reason = f"{full}; when there is room, the same command goes on" if full else error
            raise UserError(
                f"cache_dir={self.root}: cannot write the artifact {kind}/{place.name}: {reason}"
            ) from error
        return Artifact(
            place, kind, digest, manifest["info"], manifest["seconds"], reused, key.get("code")
        )

    def find(self, kind: str, key: Mapping[str, Any]) -> Artifact:
        """Return the artifact that `get` would return, without building it.

        `reused` says whether it exists and is undamaged.
        """
        key, digest, place = self._identified(kind, key)
        manifest = self._verified(place, kind, key) or {"info": {}, "seconds": 0.0}
        return Artifact(
            place,
            kind,
            digest,
            manifest["info"],
            manifest["seconds"],
            "key" in manifest,
            key.get("code"),
        )

    def _identified(self, kind: str, key: Mapping[str, Any]) -> tuple[dict[str, Any], str, Path]:
        """Return the key as a manifest holds it, its digest, and the artifact's folder."""
        plain = json.loads(json.dumps(dict(key)))
        digest = digest_of({"kind": kind, "schema": SCHEMA, "key": plain})[:20]
        return plain, digest, self.root / kind / digest

    @contextmanager
    def _locked(self, place: Path) -> Iterator[Lease]:
        """Hold the lock of an artifact, and wait before that while another process builds it."""
        lock = Lease(place.parent / f"{place.name}.lock")
        if not lock.acquire(0.5):
            log.info(
                "waiting for %s/%s: another process is building it", place.parent.name, place.name
            )
            while not lock.acquire(2):
                signals.raise_if_signalled(
                    f"while another process was building {place.parent.name}"
                )
        try:
            yield lock
        finally:
            lock.release()

    def _awaited(self, place: Path, kind: str, key: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until rank 0 has written the artifact, and return its manifest.

        The lock is not taken, because that would block rank 0.
        """
        while (manifest := self._verified(place, kind, key, warn=False)) is None:
            time.sleep(0.2)
        return manifest

    def _verified(
        self, place: Path, kind: str, key: Mapping[str, Any], warn: bool = True
    ) -> dict[str, Any] | None:
        """Return the manifest if every file is as it was written.

        Otherwise the damage is logged (`warn`) and None is returned.
        """
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
                elif (place / name).stat().st_size != expected["bytes"] or file_sha256(
                    place / name
                ) != expected["sha256"]:
                    problem = f"{name} is not what was written"
        except (OSError, ValueError, KeyError, TypeError):
            problem = f"{MANIFEST} is missing or unreadable"
        if problem is None:
            return manifest
        if warn:
            log.warning("damaged artifact %s: %s; building it again", place, problem)
        return None

    def _build(
        self,
        place: Path,
        lock: Lease,
        kind: str,
        key: Mapping[str, Any],
        build: Callable,
        collective: bool,
        resumable: bool,
    ) -> dict[str, Any]:
        """Build an artifact in a temporary folder, move it into place and return its manifest."""
        folder = _begun(place, resumable)
        spent = folder / SPENT
        start = time.perf_counter() - (float(spent.read_text()) if spent.exists() else 0.0)
        try:
            if collective and self.distributed:
                self.distributed.broadcast(str(folder))
            info = dict(build(folder) or {})
            self._check_held(lock, place)
            spent.unlink(missing_ok=True)
            manifest = {
                "kind": kind,
                "schema": SCHEMA,
                "key": key,
                "info": info,
                "seconds": round(time.perf_counter() - start, 3),
                "flare_exp": version("flare-exp"),
                "files": _sums(folder),
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
            _fsync(folder)
            self._check_held(lock, place)
            if place.exists():
                shutil.rmtree(place)
            folder.rename(place)
            _fsync_path(place.parent)
        except signals.StopRequested:
            with suppress(OSError):  # another process has taken over
                spent.write_text(str(time.perf_counter() - start))
            raise
        except Exception as error:
            if not isinstance(error, UserError):
                self._check_held(lock, place, f" ({error})")
            raise
        finally:
            if not resumable or lock.is_lost:
                shutil.rmtree(folder, ignore_errors=True)
        return json.loads(json.dumps(manifest))

    def _check_held(self, lock: Lease, place: Path, reason: str = "") -> None:
        """Refuse to go on if this process was suspended, and another one has taken the lock."""
        if not lock.is_held:
            raise UserError(
                f"{place.parent.name}/{place.name}: this process gave no sign of life for "
                f"{lock.duration:.0f} s, and another one has taken over; start it again{reason}"
            )


def _begun(place: Path, resumable: bool) -> Path:
    """Return the temporary folder of an artifact: empty, or what a stopped builder has left.

    The lock's holder calls it. The folder gets a name of its own, so that a builder that was
    suspended, and lost its lock, cannot write into its successor's.
    """
    left = sorted(place.parent.glob(f".{place.name}*.part"), key=lambda path: path.stat().st_mtime)
    folder = place.parent / f".{place.name}.{secrets.token_hex(4)}.part"
    if resumable and left:
        left.pop().rename(folder)
    else:
        folder.mkdir()
    for other in left:
        shutil.rmtree(other, ignore_errors=True)
    return folder


def _sums(folder: Path) -> dict[str, dict[str, Any]]:
    """Return checksum and size of each file below a folder, by its path there."""
    return {
        str(path.relative_to(folder)): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _fsync(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for path in [*folder.rglob("*"), folder]:
        _fsync_path(path)


def _fsync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
