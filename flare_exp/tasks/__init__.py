"""Benchmarks. A task's class is found by its name; adding one is an entry here and a file beside it."""

from __future__ import annotations

from flare_exp.tasks.base import ROLES, Example, Slice, Task, fingerprint
from flare_exp.tasks.nusax import NusaX
from flare_exp.tasks.toy import ToySentiment

TASKS: dict[str, type[Task]] = {cls.name: cls for cls in (ToySentiment, NusaX)}

__all__ = ["ROLES", "TASKS", "Example", "NusaX", "Slice", "Task", "ToySentiment", "fingerprint"]
