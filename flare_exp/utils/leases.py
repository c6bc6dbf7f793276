"""Hold leases: files that say that a process is at work in a place, also on shared disks.

filelock renews a lease while its holder lives, and takes over that of a dead one. It does so by
exchanging two names, which NFS and other network file systems refuse; there this module removes
the dead holder's file.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

# seconds without a renewal after which a holder on another machine counts as dead
LEASE = 120.0
MARGIN = 1.25  # filelock has the first try


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
        self._sign: tuple[int, int] | None = None  # the other holder's, as it was seen last
        self._since, self._changes = 0.0, 0

    def acquire(self, seconds: float) -> bool:
        """Try for some seconds to take the lease, and return whether this process holds it.

        A dead holder's lease is taken over by a later call, if not by this one.
        """
        with suppress(Timeout):
            self._lease.acquire(timeout=seconds, poll_interval=0.25)
            return True
        if (sign := self._seen()) != self._sign:
            self._sign, self._since = sign, time.monotonic()
            self._changes = self._changes + 1 if sign else 0
        elif sign and self._is_dead() and self._seen() == sign:
            self._lease.force_break()
        return False

    def release(self) -> None:
        """Give the lease back."""
        self._lease.release()

    @property
    def is_held(self) -> bool:
        """Return whether this process still holds the lease, and was not taken for dead."""
        return self._lease.is_lock_held_by_us

    @property
    def other_is_alive(self) -> bool:
        """Return whether the holder that `acquire` met is known to live; it may live if not."""
        pid = self._local_holder()
        return self._changes > 1 if pid is None else process_exists(pid)

    def _is_dead(self) -> bool:
        pid = self._local_holder()
        if pid is not None and not process_exists(pid):
            return True
        return time.monotonic() - self._since > self.duration * MARGIN

    def _local_holder(self) -> int | None:
        """Return the process on this machine that holds the lease; None: there is none."""
        owner = self._lease.owner
        return owner.pid if owner and owner.hostname == socket.gethostname() else None

    def _seen(self) -> tuple[int, int] | None:
        """Return what every renewal and every new holder changes; None: there is no holder."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns


def process_exists(pid: int) -> bool:
    """Return whether a process of this machine runs. One that nobody has waited for is gone."""
    import psutil

    with suppress(psutil.AccessDenied):
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
    return True
