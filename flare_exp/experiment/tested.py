"""Gather the tests of a run's languages: artifacts, scores and predictions.

A run with one language has artifacts `zero_shot` and `test`; one with several has `test jav` and so
on. Its score is the mean over the languages that it trained on. Nothing heavy is imported here, so
that a stored result is shown at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flare_exp.artifacts import Artifact
from flare_exp.config.task_schema import TaskConfig
from flare_exp.utils import files

STAGES = ("zero_shot", "test")
COUNTS = ("examples", "truncated", "cut_off", "unparsable")


def name_of_test(stage: str, lang: str, tested: Sequence[str]) -> str:
    """Return the name of the artifact of a test in one of the tested languages."""
    return stage if len(tested) == 1 else f"{stage} {lang}"


def stage_of(name: str) -> str:
    """Return the stage of an artifact's name.

    It is "test" of "test jav", a language's, and "transfer" of "transfer lora", a member's.
    """
    return name.partition(" ")[0]


def tests_of(
    made: Mapping[str, Artifact], stage: str, tested: Sequence[str]
) -> dict[str, Artifact]:
    """Return language -> its test. `stage`: one of STAGES."""
    return {lang: made[name_of_test(stage, lang, tested)] for lang in tested}


def scores_of(task: TaskConfig, made: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return the blocks of metrics.json that are scores on target languages.

    Returns:
        `test` and `zero_shot`: means over the languages that were trained on. With several
            languages also `languages`: language -> `unseen`, and its own `test` and `zero_shot`.
    """
    from flare_exp.tasks.metrics import mean_of

    tests = {stage: tests_of(made, stage, task.tested) for stage in STAGES}
    found = {stage: [a.info["metrics"] for a in own.values()] for stage, own in tests.items()}
    blocks: dict[str, Any] = {
        stage: mean_of(scores[: len(task.langs)]) for stage, scores in found.items()
    }
    if len(task.tested) > 1:
        blocks["languages"] = {
            lang: {"unseen": lang in task.unseen, "test": test, "zero_shot": zero_shot}
            for lang, test, zero_shot in zip(
                task.tested, found["test"], found["zero_shot"], strict=True
            )
        }
    return blocks


def facts_of(tests: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return the facts of a run's tests. `tests`: language -> its test.

    Of several languages these are the sums of the counts, and `languages`: language -> the other
    facts of its test, such as the weights of an ensemble.
    """
    facts = [test.info for test in tests.values()]
    if len(facts) == 1:
        return facts[0]
    own = {
        lang: {name: value for name, value in test.info.items() if name not in COUNTS}
        for lang, test in tests.items()
    }
    return {**{name: sum(one[name] for one in facts) for name in COUNTS}, "languages": own}


def write_predictions(tests: Iterable[Artifact], target: Path) -> None:
    """Write the predictions of all tests to one file; the ids of its rows name the language."""
    import pyarrow.parquet as pq

    sources = [a.path / "predictions.parquet" for a in tests]
    if len(sources) == 1:
        shutil.copyfile(sources[0], target)
        return
    files.write_parquet(target, [row for s in sources for row in pq.read_table(s).to_pylist()])
