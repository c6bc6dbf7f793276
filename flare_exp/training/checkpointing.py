"""Training that goes on where it was stopped, as if it had never been (I12)."""

from __future__ import annotations

import csv
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from flare_exp.errors import first_line
from flare_exp.training.distributed import Team
from flare_exp.utils import signals

log = logging.getLogger(__name__)


class StepCheckpoint(pl.Callback):
    """Keeps the state of a training at the boundary of a step: every `minutes`, after each epoch, and when a signal asks the run
    to stop; the first two less often where that is slow (`signals.Pace`).

    The state is Lightning's (trained weights, optimizer, schedule, progress, best epoch), the position in the epoch's
    order (`flare_exp.data.sampling.ResumableLoader`), and the random states of all processes.

    Not after the last batch of an epoch: validation comes next, and belongs to the same epoch. What it gave is kept with the
    first step of the next epoch.

    Raises:
        Stopped: once the state is kept.
    """

    def __init__(self, path: Path, team: Team, minutes: float):
        self.path, self.team, self.pace, self.epoch_ended = path, team, signals.Pace(minutes), False
        self.order: dict[str, int] | None = None
        self.random: dict[str, Any] | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        loop = trainer.fit_loop.epoch_loop
        if (
            loop.batch_progress.is_last_batch or loop._should_accumulate()
        ):  # the gradients of a begun step are not kept
            return
        due = self.pace.due or (self.epoch_ended and self.pace.affordable)
        self.epoch_ended = False
        by, due = self.team.agree((signals.asked(), due))
        if by or due:
            with self.pace.keeping():
                self.save(trainer)
        if by:
            log.info("kept the state after %d steps", trainer.global_step)
            raise signals.Stopped(by, f"after {trainer.global_step} steps")

    def on_train_epoch_end(self, *_) -> None:
        self.epoch_ended = True

    def save(self, trainer: pl.Trainer) -> None:
        """Replace the state on disk, all or nothing."""
        partial = self.path.with_suffix(".partial")
        try:
            trainer.save_checkpoint(partial)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        for logger in trainer.loggers:
            logger.save()
        if self.team.leads:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self.path)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["order"] = trainer.train_dataloader.state_dict()  # type: ignore[union-attr]
        checkpoint["random"] = self.team.gather(random_state())
        checkpoint["passes"] = trainer.accumulate_grad_batches
        checkpoint["sharded"] = isinstance(trainer.strategy, ModelParallelStrategy)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.order, self.random = checkpoint["order"], checkpoint["random"][self.team.rank]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        _recount(progress, checkpoint.get("passes", 1), trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if (
            self.order is not None
        ):  # Lightning 2.6 forgets it when the schedule asks for the number of steps
            trainer.train_dataloader.load_state_dict(self.order)  # type: ignore[union-attr]
            self.order = None

    def on_train_batch_start(self, *_) -> None:
        if self.random is not None:  # not earlier: what prepares the training draws, too
            set_random_state(self.random)
            self.random = None


def _recount(progress: dict[str, Any], before: int, now: int) -> None:
    """Count the micro-batches that were read, `before` to a step, as if they had been `now` to a step (data.micro_batch_size).

    Lightning counts the last one as completed once its callbacks have ended, in one of which the state is kept.
    """
    for counts in (progress["current"], progress["total"]):
        for name, count in counts.items():
            late = name == "completed"
            counts[name] = (count + late) // before * now - late


class Interruptible(pl.Callback):
    """Lets a signal stop predictions, which are made anew.

    Raises:
        Stopped: a signal asked for it.
    """

    def __init__(self, team: Team):
        self.team = team

    def on_predict_batch_end(self, *_) -> None:
        if by := self.team.agree(signals.asked()):
            raise signals.Stopped(by, "while predicting")


def random_state() -> dict[str, Any]:
    """The states of all generators, of types that torch.load reads with weights_only."""
    state = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": random.getstate(),
        "numpy": {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})


def steps_kept(path: Path, processes: int = 1, sharded: bool = False) -> int:
    """Steps after which a state was kept; 0: there is none. One that is damaged, or that these processes cannot take up, is named
    and removed.

    Args:
        processes: of this run; each needs a random state.
        sharded: whether these have a part of the weights each, and number the optimizer's states by all weights.
    """
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if len(state["random"]) >= processes and state["sharded"] == sharded:
            return state["global_step"]
        log.warning(
            "the state %s is of fewer processes, or of another trainer.strategy; training starts "
            "anew",
            path,
        )
        path.unlink()
        return 0
    except Exception as error:  # torch, zip and pickle raise many kinds
        log.warning("damaged state %s (%s); training starts anew", path, first_line(error))
        path.unlink()
        return 0


@contextmanager
def continued_curves(curves: Path, steps: int) -> Iterator[None]:
    """Keep the rows of `curves` (CSV) up to `steps`, where Lightning's logger begins a new file."""
    before = curves.with_suffix(".before.csv")
    rows = [row for row in [*_rows(before), *_rows(curves)] if int(row["step"]) < steps]
    _write(before, rows)
    curves.unlink(missing_ok=True)
    yield
    _write(curves, [*rows, *_rows(curves)])
    before.unlink()


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
