"""Show the progress of a stage as one line that fits a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class StageProgress(ProgressBar):
    """Progress bar of one line: a training with its epoch and loss, or a prediction.

    Lightning's own bars count epochs from 0, begin a line per epoch and stack every metric.

    Args:
        stage: text at the beginning of the line.
    """

    def __init__(self, stage: str):
        super().__init__()
        self.stage = stage
        self.bar: Progress | None = None

    def disable(self) -> None:
        """Show nothing. Lightning calls this on all processes but the first."""
        self.stage = ""

    def _begin(self, total: float) -> None:
        if self.stage and self.bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            # not rich's common console, which remembers whether it was on a terminal at first
            self.bar = Progress(*columns, console=Console(), transient=True)
            self.bar.start()
            self.bar.add_task(self.stage, total=total)

    def _show(self, done: int, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, description=text)

    def _end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin the bar with the number of batches of all epochs."""
        self._begin(trainer.num_training_batches * (trainer.max_epochs or 1))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Show the epoch and, once it is known, the loss."""
        loss = trainer.progress_bar_metrics.get("train/loss_step")
        said = "" if loss is None else f", loss {float(loss):.3f}"
        done = trainer.current_epoch * int(trainer.num_training_batches) + index + 1
        self._show(
            done, f"{self.stage}: epoch {trainer.current_epoch + 1} of {trainer.max_epochs}{said}"
        )

    def on_predict_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin the bar with the number of batches to predict."""
        self._begin(sum(trainer.num_predict_batches))

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        index: int,
        loader: int = 0,
    ) -> None:
        """Show the number of predicted batches."""
        self._show(index + 1, self.stage)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._end()

    def on_predict_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._end()

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar, so that it does not overwrite the error message."""
        self._end()
