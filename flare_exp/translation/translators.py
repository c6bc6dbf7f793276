"""Choose who translates: English training data to the target language, test data to English.

There are three sources of translations: a parallel benchmark's own (mt=gold and mt=toy), files
(mt=file), both in `flare_exp.translation.lookup`, and a translation model or a program (every other
mt; `flare_exp.translation.machine`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flare_exp.errors import UserError
from flare_exp.tasks import Task
from flare_exp.translation.base import Translator
from flare_exp.translation.lookup import FileTranslator, ParallelTranslator
from flare_exp.translation.machine import MachineTranslator

BENCHMARK = ("toy", "gold")


def translator(
    task: Task,
    name: str,
    *,
    path: str | None = None,
    fallback: str | None = None,
    machine: Callable[[], MachineTranslator] | None = None,
) -> Translator:
    """Build the translator of an mt group.

    Args:
        task: the benchmark to translate.
        name: name of the mt option.
        path: mt.path, the folder of translations (mt=file).
        fallback: mt.fallback; "gold" falls back to the benchmark's own translations (mt=file).
        machine: builds the translator of a translation model.

    Raises:
        UserError: the translator does not suit the task, or mt.path is missing.
        ValueError: `name` is a translation model, and `machine` is None.
    """
    if name == "file":
        if path is None:
            raise UserError(
                "mt=file: set mt.path=<folder> of mt_<from>-<to>/<split>.parquet, translations of "
                f"{task.name}"
            )
        return FileTranslator(
            task, Path(path).expanduser(), ParallelTranslator(task) if fallback == "gold" else None
        )
    if name in BENCHMARK:
        return ParallelTranslator(task)
    if machine is None:
        raise ValueError(f"mt={name} is a model, and none is given")
    return machine()
