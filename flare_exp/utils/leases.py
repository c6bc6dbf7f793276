"""Hold leases: files that say that a process is at work in a place, also on shared disks.

filelock renews a lease while its holder lives, and takes over that of a dead one. It does so by
exchanging two names, which NFS and other network file systems refuse; there this module removes
the dead holder's file.
"""

from __future__ import annotations

import functools
import os
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

# seconds without a renewal after which a holder on another machine counts as dead
LEASE = 120.0
MARGIN = 1.25  # filelock has the first try
# seconds between two looks after which a waiter counts anew: it, or its disk, stood still itself
BLIND = 15.0

Sign = tuple[int, int]  # inode and time of a lease's file: a renewal or a new holder changes it


class Lease:
    """Hold the right to work in a place.

    A holder on this machine is dead when its process is gone. One on another machine is dead when
    it has not renewed its lease for LEASE seconds, by the clock of the process that waits.

    Args:
        path: the file of the lease, in a folder that exists.
    """

    def __init__(self, path: Path):
        self.path, self.duration = path, LEASE
        self._lease = SoftFileLease(path, lease_duration=self.duration)
        self._sign: Sign | None = None  # the other holder's, as it was seen last
        self._changes = 0
        self._since = self._looked = time.monotonic()

    def acquire(self, seconds: float) -> bool:
        """Try for some seconds to take the lease, and return whether this process holds it.

        A dead holder's lease is taken over by a later call, if not by this one.
        """
        with suppress(Timeout):
            self._lease.acquire(timeout=seconds, poll_interval=0.25)
            return True
        sign, now = sign_of(self.path), time.monotonic()
        blind, self._looked = now - self._looked > max(BLIND, 3 * seconds), now
        if sign != self._sign or blind:
            changed = sign != self._sign
            self._changes = (self._changes + changed) if sign else 0
            self._sign, self._since = sign, now
        elif sign and (holder_is_gone(self.path) or now - self._since > self.duration * MARGIN):
            self._remove(sign)
        return False

    def release(self) -> None:
        """Give the lease back."""
        self._lease.release()

    @property
    def is_held(self) -> bool:
        """Return whether this process still holds the lease, and was not taken for dead."""
        owner = self._lease.owner
        return owner is not None and owner.token == self._lease.token

    @property
    def is_lost(self) -> bool:
        """Return whether another process is known to hold the lease now.

        Both this and `is_held` are false where the file is gone, or cannot be read.
        """
        owner = self._lease.owner
        return owner is not None and owner.token != self._lease.token

    @property
    def other_is_alive(self) -> bool:
        """Return whether the holder that `acquire` met is known to live; it may live if not."""
        if self._changes > 1 or not self._sign:
            return self._changes > 1
        # after a restart of the machine, its process may be another one
        recent = time.time() - self._sign[1] / 1e9 < self.duration
        return recent and local_holder(self.path) is not None and not holder_is_gone(self.path)

    def _remove(self, dead: Sign) -> None:
        """Remove a dead holder's file, and none that another process has put there meanwhile."""
        aside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            self.path.rename(aside)
            if sign_of(aside) == dead:
                aside.unlink()
            elif not self.path.exists():
                aside.rename(self.path)


def sign_of(path: Path) -> Sign | None:
    """Return the sign of a lease's file; None: nobody holds it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def held_by_another(path: Path) -> bool:
    """Return whether another process than this one holds a lease."""
    lease = SoftFileLease(path)
    return lease.owner is not None and not lease.is_lock_held_by_us


def local_holder(path: Path) -> int | None:
    """Return the process on this machine that holds a lease; None: there is none."""
    owner = SoftFileLease(path).owner
    return owner.pid if owner and owner.hostname == own_name() else None


def holder_is_gone(path: Path) -> bool:
    """Return whether a process on this machine held a lease, and has ended."""
    pid = local_holder(path)
    return pid is not None and not process_exists(pid)


@functools.cache
def own_name() -> str:
    """Return this machine's name as filelock writes it: containers have their own."""
    with tempfile.TemporaryDirectory() as folder:
        lease = SoftFileLease(Path(folder) / "own")
        with lease:
            assert lease.owner
            return lease.owner.hostname


def process_exists(pid: int) -> bool:
    """Return whether a process of this machine runs. One that nobody has waited for is gone."""
    import psutil

    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return True
