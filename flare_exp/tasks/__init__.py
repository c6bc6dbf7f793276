"""Benchmarks, found by the name of the task.

To add one, write a file in this folder and an entry in TASKS.
"""

from __future__ import annotations

from flare_exp.tasks.base import ROLES, Benchmark, Slice, Task
from flare_exp.tasks.custom import CustomTask
from flare_exp.tasks.examples import Answer, Example, fingerprint
from flare_exp.tasks.nusax import NusaX
from flare_exp.tasks.sib200 import SIB200
from flare_exp.tasks.spec import SpecError
from flare_exp.tasks.toy import ToyNLI, ToyQA, ToySentiment
from flare_exp.tasks.tydiqa import TyDiQA
from flare_exp.tasks.xnli import XNLI
from flare_exp.tasks.xquad import XQuAD

TASKS: dict[str, type[Task]] = {
    cls.name: cls for cls in (ToySentiment, ToyNLI, ToyQA, NusaX, SIB200, XNLI, TyDiQA, XQuAD)
}
CUSTOM = "custom"  # a data set of one's own, which a file describes


def task_class(name: str, spec: str | None = None) -> type[Task]:
    """Return the class of a task.

    Args:
        name: a name of TASKS, or CUSTOM.
        spec: the file that describes the data set; CUSTOM needs it.

    Raises:
        SpecError: there is no description, or it is wrong.
    """
    if name != CUSTOM:
        return TASKS[name]
    if spec is None:
        raise SpecError(
            [f"task={CUSTOM}: task.spec=<file.yaml> is missing; it describes your data"]
        )
    found = CustomTask.described_by(spec)
    if found.name in TASKS or found.name.startswith("toy_"):
        raise SpecError([f"task.spec={spec}: name: {found.name} is a benchmark; choose another"])
    return found


__all__ = [
    "CUSTOM",
    "ROLES",
    "SIB200",
    "TASKS",
    "XNLI",
    "Answer",
    "Benchmark",
    "CustomTask",
    "Example",
    "NusaX",
    "Slice",
    "SpecError",
    "Task",
    "ToyNLI",
    "ToyQA",
    "ToySentiment",
    "TyDiQA",
    "XQuAD",
    "fingerprint",
    "task_class",
]
