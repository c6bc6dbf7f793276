"""Check the languages that a run trains on, and those that it tests alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flare_exp.config.languages import as_list
from flare_exp.config.schema import Config
from flare_exp.utils.files import folder_problem
from flare_exp.utils.suggestions import allowed


def language_problems(cfg: Config, task: Any) -> Iterator[str]:
    """Check the languages that a run trains on, and those that it tests alone."""
    langs, unseen = cfg.task.langs, cfg.task.unseen
    if not langs:
        yield f"task.lang=[]: name one language or more; {allowed('', task.languages)}"
    for key, given in (("lang", cfg.task.lang), ("unseen", unseen)):
        yield from _codes_problems(f"task.{key}={_shown(given)}", given, task.languages)
    for lang in dict.fromkeys(lang for lang in unseen if lang in langs):
        yield (
            f"task.unseen={_shown(unseen)} with task.lang={_shown(cfg.task.lang)}: {lang} is "
            "trained on, so it is not unseen; leave it out of one of them"
        )
    yield from _missing_tests(cfg, task)


def _codes_problems(given: str, value: Any, known: Sequence[str]) -> Iterator[str]:
    """Check that each language is known, and named once. `given`: the option and its value."""
    codes = as_list(value)
    if value == "":
        yield f"{given}<target language> is missing: {allowed('', known)}"
        return
    for code in dict.fromkeys(codes):
        if code not in known:
            which = "" if isinstance(value, str) else f" {code}:"
            yield f"{given}:{which} {allowed(str(code), known)}"
        elif (times := codes.count(code)) > 1:
            yield f"{given}: {code} is named {times} times; name each language once"


def _missing_tests(cfg: Config, task: Any) -> Iterator[str]:
    """Check that the files of `task.data_dir` have a test split for each unseen language."""
    if not cfg.task.data_dir or folder_problem(cfg.task.data_dir):
        return
    folder = Path(cfg.task.data_dir).expanduser()
    split = cfg.task.test_split.partition("[")[0]
    for lang in dict.fromkeys(lang for lang in cfg.task.unseen if lang in task.languages):
        if not os.path.isfile(folder / lang / f"{split}.parquet"):
            yield (
                f"task.unseen={_shown(cfg.task.unseen)}: there is no "
                f"{folder / lang / split}.parquet to test {lang} on; choose languages that have a "
                "test split"
            )


def _shown(value: Any) -> str:
    """Return languages as they are typed."""
    return value if isinstance(value, str) else f"[{','.join(map(str, value))}]"
