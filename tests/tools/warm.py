"""What every run does in the same way, done once: here, or in the server of `processes`.

The server's forked processes find parsed grammars, hashed code, the toy world and fonts in memory,
and their garbage collections pass over the imported libraries. Nothing here leaves a thread.
"""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

from transformers import conversion_mapping

from flare_exp import code
from flare_exp.config import validation
from flare_exp.experiment import curves
from flare_exp.tasks import ToySentiment
from flare_exp.tasks.examples import Example
from flare_exp.tasks.toy import ToyTask


def read_toy_tasks_once() -> None:
    """Let toy tasks remember the examples of a split.

    They follow from the world's seed alone, and nobody changes them in place.
    """
    read, known = ToyTask.read, dict[tuple, list[Example]]()

    def remembered(self: ToyTask, lang: str, split: str) -> list[Example]:
        key = (type(self), self.world.seed, lang, split)
        if key not in known:
            known[key] = read(self, lang, split)
        return [*known[key]]

    ToyTask.read = remembered  # type: ignore[method-assign]


def sync_nothing() -> None:
    """Do not wait until files are on the disk, which matters after a power failure only."""
    os.fsync = lambda _: None


def freeze() -> None:
    """Keep later garbage collections from passing over what is here now.

    A run collects garbage where it measures memory and where it gives up a model.
    """
    gc.collect()
    gc.freeze()


def warm_up() -> None:
    """Do what a run does before it trains."""
    read_toy_tasks_once()
    sync_nothing()
    validation.validate(["task=toy_sentiment", "seed=0"], multirun=False)
    code.code_of(*code.CODE)
    for lang, split in (("en", "train"), ("en", "validation"), ("far", "train"), ("far", "test")):
        ToySentiment().read(lang, split)
    conversion_mapping.get_checkpoint_conversion_mapping("xlm-roberta")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stage in curves.TITLES:
            (folder / f"{stage}.csv").write_text("step,validation/a\n1,0.1\n2,0.2\n")
        curves.draw_curves(folder, folder / "curves.png", "a", "far")
    freeze()
