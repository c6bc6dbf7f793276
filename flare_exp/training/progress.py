"""Show the progress of a stage as one line that fits a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class StageProgress(ProgressBar):
    """Show a training with its epoch and loss, or a prediction.

    Lightning's own bars count epochs from 0, begin a line per epoch and stack every metric.

    Args:
        stage: what the line begins with.
    """

    def __init__(self, stage: str):
        super().__init__()
        self.stage = stage
        self.bar: Progress | None = None

    def disable(self) -> None:
        """Show nothing: Lightning calls this on all processes but the first."""
        self.stage = ""

    def _begin(self, total: float) -> None:
        if self.stage and self.bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            # a console of its own: rich's common one remembers whether it is on a terminal
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
        self._begin(trainer.num_training_batches * (trainer.max_epochs or 1))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        loss = trainer.progress_bar_metrics.get("train/loss_step")
        said = "" if loss is None else f", loss {float(loss):.3f}"
        done = trainer.current_epoch * int(trainer.num_training_batches) + index + 1
        self._show(
            done, f"{self.stage}: epoch {trainer.current_epoch + 1} of {trainer.max_epochs}{said}"
        )

    def on_predict_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
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
        self._show(index + 1, self.stage)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._end()

    def on_predict_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._end()

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._end()
