"""Keep the state of a training, and resume from it as if the training had never stopped."""

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
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from flare_exp.errors import first_line
from flare_exp.training.distributed import DistributedContext
from flare_exp.utils import signals
from flare_exp.utils.files import replacing

log = logging.getLogger(__name__)


class StepCheckpoint(pl.Callback):
    """Callback that keeps the state of a training at the boundary of an optimizer step.

    The state is kept every `minutes`, after each epoch, and when a signal asks the run to stop. The
    first two happen less often where writing is slow (`signals.Pace`).

    The state is Lightning's (trained weights, optimizer, schedule, progress, best epoch), the
    position in the epoch's order (`flare_exp.data.sampling.ResumableDataLoader`), and the random
    states of all processes.

    No state is kept after the last batch of an epoch: the validation that follows belongs to the
    same epoch. Its results are kept with the first step of the next epoch. So a training whose
    epochs are one step each keeps no state.

    Args:
        path: file of the state.
        distributed: the processes of the run; all must call this callback at the same steps.
        minutes: time between two states within an epoch.
        best: keeps the best epoch, whose file a state names; None: nothing does.

    Raises:
        StopRequested: a signal asked the run to stop; the state is already kept.
    """

    def __init__(
        self,
        path: Path,
        distributed: DistributedContext,
        minutes: float,
        best: BestCheckpoint | None = None,
    ):
        self.path, self.distributed, self.best = path, distributed, best
        self.pace, self.epoch_ended = signals.Pace(minutes), False
        self.order: dict[str, int] | None = None
        self.random: dict[str, Any] | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, *_) -> None:
        """Stop the run for a signal where an epoch is one step, so that no state is kept.

        Raises:
            StopRequested: a signal asked the run to stop.
        """
        if trainer.num_training_batches > trainer.accumulate_grad_batches:
            return
        if by := self.distributed.broadcast(signals.pending_signal()):
            whole = "before this training, which keeps no state: an epoch is one step"
            raise signals.StopRequested(by, whole)

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        """Save the state if it is due or a signal asks for it, and stop the run for a signal.

        Raises:
            StopRequested: a signal asked the run to stop.
        """
        loop = trainer.fit_loop.epoch_loop
        # the gradients of a step that has begun are not kept
        if loop.batch_progress.is_last_batch or loop._should_accumulate():
            return
        due = self.pace.due or (self.epoch_ended and self.pace.affordable)
        self.epoch_ended = False
        by, due = self.distributed.broadcast((signals.pending_signal(), due))
        if by or due:
            with self.pace.keeping():
                self.save(trainer)
        if by:
            log.info("kept the state after %d steps", trainer.global_step)
            raise signals.StopRequested(by, f"after {trainer.global_step} steps")

    def on_train_epoch_end(self, *_) -> None:
        """Mark the epoch as ended, so that the next step is kept."""
        self.epoch_ended = True

    def save(self, trainer: pl.Trainer) -> None:
        """Replace the state on disk atomically."""
        partial = self.path.with_suffix(".partial")
        try:
            trainer.save_checkpoint(partial)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        for logger in trainer.loggers:
            logger.save()
        if self.distributed.is_main:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self.path)
        if self.best:
            self.best.state_kept(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the data order, all random states and the layout of the processes to a checkpoint."""
        checkpoint["order"] = trainer.train_dataloader.state_dict()  # type: ignore[union-attr]
        checkpoint["random"] = self.distributed.gather(random_state())
        checkpoint["passes"] = trainer.accumulate_grad_batches
        checkpoint["sharded"] = isinstance(trainer.strategy, ModelParallelStrategy)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the data order and this process's random state, and rescale batch counts."""
        self.order, self.random = checkpoint["order"], checkpoint["random"][self.distributed.rank]
        for state in checkpoint["callbacks"].values():
            if before := state.get("dirpath"):  # the best epoch's file is where this state is
                # Lightning keeps the real path
                now = os.path.realpath(self.path.parent)
                state.update(_moved(state, str(Path(before).parent), now))
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        _recount(progress, checkpoint.get("passes", 1), trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Restore the position in the epoch's order."""
        # not earlier: Lightning 2.6 loses the position when the schedule asks for the steps
        if self.order is not None:
            trainer.train_dataloader.load_state_dict(self.order)  # type: ignore[union-attr]
            self.order = None

    def on_train_batch_start(self, *_) -> None:
        """Restore the random state before the first batch."""
        # not earlier: preparing the training draws random numbers, too
        if self.random is not None:
            set_random_state(self.random)
            self.random = None


class BestCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that keeps a superseded file until a state that knows the better one is kept.

    A training that is killed before that goes on from a state that names the superseded file.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.named = ""  # the file that the last kept state names
        self.superseded = False  # whether that file is superseded

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if filepath == self.named:
            self.superseded = True
        else:
            super()._remove_checkpoint(trainer, filepath)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the state, which names the best epoch's file."""
        super().load_state_dict(state_dict)
        self.named = self.best_model_path

    def state_kept(self, trainer: pl.Trainer) -> None:
        """Remove the file that the last state named, if the present one names another."""
        if self.superseded:
            super()._remove_checkpoint(trainer, self.named)
        self.named, self.superseded = self.best_model_path, False


def _moved(value: Any, before: str, now: str) -> Any:
    """Return a ModelCheckpoint's state with all paths in another folder."""
    if isinstance(value, dict):
        return {_moved(k, before, now): _moved(v, before, now) for k, v in value.items()}
    return now + value.removeprefix(before) if str(value).startswith(before) else value


def _recount(progress: dict[str, Any], before: int, now: int) -> None:
    """Rescale counts of micro-batches from `before` to `now` micro-batches per step.

    The two differ if `data.micro_batch_size` changed between the runs. Lightning counts a batch as
    completed only after its callbacks, and the state is kept in a callback: the count of completed
    batches is therefore one behind.
    """
    for counts in (progress["current"], progress["total"]):
        for name, count in counts.items():
            late = name == "completed"
            counts[name] = (count + late) // before * now - late


class Interruptible(pl.Callback):
    """Callback that lets a signal stop a prediction, which the next run makes anew.

    Raises:
        StopRequested: a signal asked the run to stop.
    """

    def __init__(self, distributed: DistributedContext):
        self.distributed = distributed

    def on_predict_batch_end(self, *_) -> None:
        """Stop the prediction if a signal asks for it.

        Raises:
            StopRequested: a signal asked the run to stop.
        """
        if by := self.distributed.broadcast(signals.pending_signal()):
            raise signals.StopRequested(by, "while predicting")


def random_state() -> dict[str, Any]:
    """Return the states of all random generators, in types that weights_only loading permits."""
    state = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": random.getstate(),
        "numpy": {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})


def steps_kept(path: Path, processes: int = 1, sharded: bool = False) -> int:
    """Return the number of steps after which a state was kept, or 0 without a usable state.

    A state that is damaged, or that these processes cannot resume from, is logged and removed.

    Args:
        path: file of the state.
        processes: number of processes of this run; each needs a random state.
        sharded: whether each process holds a part of every weight. The optimizer's states are then
            numbered by all weights.
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
    """Keep the rows of `curves` (CSV) before `steps` while Lightning's logger begins a new file."""
    before = curves.with_suffix(".before.csv")
    rows = [row for row in [*_rows(before), *_rows(curves)] if int(row["step"]) < steps]
    _write(before, rows)
    curves.unlink(missing_ok=True)
    yield
    _write(curves, [*rows, *_rows(curves)])
    before.unlink()


def _rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, or none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows to a CSV file atomically; the columns are those of any row."""
    with replacing(path) as part, part.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
