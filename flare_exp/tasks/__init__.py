"""Benchmarks, found by the name of the task.

To add one, write a file in this folder and an entry in TASKS.
"""

from __future__ import annotations

from flare_exp.tasks.base import ROLES, Benchmark, Slice, Task
from flare_exp.tasks.examples import Answer, Example, fingerprint
from flare_exp.tasks.nusax import NusaX
from flare_exp.tasks.sib200 import SIB200
from flare_exp.tasks.toy import ToyNLI, ToyQA, ToySentiment
from flare_exp.tasks.tydiqa import TyDiQA
from flare_exp.tasks.xnli import XNLI
from flare_exp.tasks.xquad import XQuAD

TASKS: dict[str, type[Task]] = {
    cls.name: cls for cls in (ToySentiment, ToyNLI, ToyQA, NusaX, SIB200, XNLI, TyDiQA, XQuAD)
}

__all__ = [
    "ROLES",
    "SIB200",
    "TASKS",
    "XNLI",
    "Answer",
    "Benchmark",
    "Example",
    "NusaX",
    "Slice",
    "Task",
    "ToyNLI",
    "ToyQA",
    "ToySentiment",
    "TyDiQA",
    "XQuAD",
    "fingerprint",
]
