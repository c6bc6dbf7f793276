"""Finished runs of tiny models, made in this process in a second or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from runs import last_of_each
from small_checkpoints import tiny_checkpoint

import flare_exp
from flare_exp.config import validation
from flare_exp.experiment.runs import run_job

BRIEF = [
    "model=custom",
    "task.limit=10",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=1",
    "trainer.enable_progress_bar=false",
    "data.batch_size=4",
    "finetune.lr=1e-2",
]
SMALL_MT = [
    "mt=toy_nllb",
    "mt.pretrain.steps=2",
    "mt.pretrain.pairs=50",
    "mt.pretrain.hidden_size=16",
    "mt.max_length=16",
]


def finish(folder: Path, checkpoint: Path, cache: Path, *overrides: str) -> Path:
    """Run to the end: a checkpoint of `small_checkpoints`, trained for one step."""
    given = [*BRIEF, f"model.path={checkpoint}", f"cache_dir={cache}", f"output_dir={folder}"]
    (composed,), problems = validation.validate(last_of_each([*given, *overrides]), False)
    assert problems == []
    run_job(composed, folder, brief=True)
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Callable[..., Path]:
    """(overrides, architecture) -> the folder of a finished run, which is made once."""
    root, made = tmp_path_factory.mktemp("finished"), {}

    def make(*overrides: str, architecture: str = "xlm-roberta") -> Path:
        key, checkpoint = (architecture, *overrides), root / architecture
        if key not in made:
            if not checkpoint.exists():
                checkpoint.mkdir()
                tiny_checkpoint(checkpoint, architecture)
            made[key] = finish(root / f"run{len(made)}", checkpoint, root / "cache", *overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def flare_folder(finished_run) -> Path:
    return finished_run()


@pytest.fixture(scope="session")
def loaded_run(flare_folder):
    """A run of `flare`, whose translations are those of the generated world."""
    return flare_exp.load(flare_folder)


@pytest.fixture(scope="session")
def toy_texts(loaded_run) -> list[str]:
    """Texts that mt=toy can translate."""
    return [example.texts[0] for example in loaded_run.task.read("far", "test")[:30]]
