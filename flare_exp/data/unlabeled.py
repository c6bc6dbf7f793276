"""Read texts without a label, which a distillation trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flare_exp.data.pairing import Translate
from flare_exp.data.rows import Reader
from flare_exp.tasks import Example, Task

UNLABELED = "unlabeled"  # in the place of a split, in ids and keys of the texts


def unlabeled_examples(
    path: Path, task: Task, lang: str, translate: Translate, english: bool
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the texts of a file in English and in the target language, without labels.

    Args:
        path: a file with a column per field of the task, and perhaps the English texts
            (`flare_exp.data.rows`).
        task: names the fields.
        lang: language of the texts.
        translate: translates the texts without an English text.
        english: whether English texts are needed; otherwise the target's are returned twice.

    Raises:
        UserError: the file cannot be read, or has wrong rows.
    """
    reader = Reader(path, task.fields, "distil.texts", ids=False)
    reader.check()
    rows = [*reader]
    target = [
        Example(f"{task.name}/{lang}/{UNLABELED}/{i}", f"{UNLABELED}/{i}", row.texts)
        for i, row in enumerate(rows)
    ]
    if not english:
        return target, target
    lacking = [e for e, row in zip(target, rows, strict=True) if row.source is None]
    made = iter(translate(lacking, task.english) if lacking else ())
    found = [
        next(made) if row.source is None else replace(e, texts=row.source)
        for e, row in zip(target, rows, strict=True)
    ]
    return found, target
