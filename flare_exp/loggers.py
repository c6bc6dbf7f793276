"""Where curves go: CSV in the run folder always, Weights & Biases when asked. W&B can fail; the run cannot fail for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

log = logging.getLogger(__name__)


class Tracker:
    """One W&B run for all stages of a run, or none.

    Every call to W&B is guarded: the first failure is logged, tracking ends, the run goes on.

    Args:
        folder: the run folder.
        config: plain containers.
        wandb_options: project, entity, group, tags; None for CSV only.
    """

    def __init__(self, folder: Path, config: dict[str, Any], wandb_options: dict[str, Any] | None = None):
        self.folder, self.run = folder, None
        if wandb_options is not None:
            self.run = self._guarded(lambda: self._start(config, wandb_options))

    def _start(self, config: dict[str, Any], options: dict[str, Any]):
        import wandb

        return wandb.init(dir=str(self.folder), config=config, name=self.folder.name, **options)

    def loggers(self, stage: str, folder: Path) -> list[Logger]:
        """Lightning loggers of one stage: `folder/metrics.csv`, and the W&B run with keys `<stage>/...`."""
        found: list[Logger] = [CSVLogger(folder, name="", version="")]
        if self.run is not None:
            found.append(_GuardedWandbLogger(self, experiment=self.run, prefix=stage))
        return found

    def summary(self, values: dict[str, Any]) -> None:
        """Final results."""
        if self.run is not None:
            self._guarded(lambda: self.run.log(values))  # type: ignore[union-attr]

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind, *_) -> None:
        if self.run is not None:
            run, self.run = self.run, None
            self._guarded(lambda: run.finish(exit_code=int(kind is not None)))

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # W&B raises many kinds, of the network and of its own; none may stop a run
            log.warning(
                "W&B failed and is off for the rest of this run: %s",
                str(error).splitlines()[0] if str(error) else repr(error),
            )
            self.run = None
            return None


class _GuardedWandbLogger(WandbLogger):
    LOGGER_JOIN_CHAR = "/"  # keys are <stage>/<metric>

    def __init__(self, tracker: Tracker, **kwargs):
        super().__init__(**kwargs)
        self._tracker = tracker

    def log_metrics(self, metrics, step=None):
        if self._tracker.run is not None:
            self._tracker._guarded(lambda: super(_GuardedWandbLogger, self).log_metrics(metrics, step))

    def log_hyperparams(self, params, *args, **kwargs):
        pass  # the whole configuration is in the run since its start

    def after_save_checkpoint(self, checkpoint_callback):
        pass

    def finalize(self, status):
        pass  # the tracker closes the run after the last stage
