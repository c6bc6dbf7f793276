"""Collect the commit, versions, command and peak memory of a run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "flare-exp",
    "torch",
    "transformers",
    "peft",
    "lightning",
    "torchmetrics",
    "datasets",
    "tokenizers",
    "hydra-core",
)


def provenance() -> dict[str, Any]:
    """Return commit, versions, command and peak memory of this process.

    `peak_memory_bytes` is null where it would include earlier runs of the process.
    """
    import torch

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "commit": _commit(),
        "python": sys.version.split()[0],
        "packages": versions,
        "command": sys.argv,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": PEAK.of_this_run(),
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else None,
    }


class PeakMemory:
    """Peak memory of one run after another in a process, each without the earlier ones."""

    def __init__(self) -> None:
        self.runs, self.own = 0, True

    def begin(self) -> None:
        """Measure from now on, where the kernel allows it.

        What earlier runs have left is freed, and the peak is reset.
        """
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
        try:
            CLEAR_REFS.write_text("5")  # proc_pid_clear_refs(5): the peak becomes what is held now
            self.own = True
        except OSError:
            self.own = self.runs == 0
        self.runs += 1

    def of_this_run(self) -> int | None:
        """Return the most bytes that the process has held since `begin`; None: unknown."""
        return peak_memory() if self.own else None


PEAK = PeakMemory()
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes.

    On Linux VmHWM is read, because ru_maxrss starts with the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _commit() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this package runs from; None when it is installed."""
    folder = Path(__file__).parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=folder,
            capture_output=True,
            timeout=10,
        )
        if tracked.returncode:
            return None
        ask = [
            ["git", "rev-parse", "HEAD"],
            ["git", "status", "--porcelain", "--untracked-files=no"],
        ]
        head, status = (
            subprocess.run(a, cwd=folder, capture_output=True, text=True, timeout=10).stdout.strip()
            for a in ask
        )
        return {"hash": head, "dirty": bool(status)}
    except (OSError, subprocess.SubprocessError):
        return None
