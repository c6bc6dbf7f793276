"""Write curves: always as CSV in the run folder, and to Weights & Biases on request.

A failure of W&B never fails the run.
"""

from __future__ import annotations

import logging
import os
import secrets
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger

from flare_exp.errors import first_line
from flare_exp.utils.files import write_text

log = logging.getLogger(__name__)

STAGES = ("finetune", "transfer")  # the stages with curves


class Tracker:
    """One W&B run for all stages of a run, or none.

    Every call to W&B is guarded: the first failure is logged, tracking ends, and the run goes on.

    Args:
        folder: the run folder. The W&B run's id is kept there, so that a resumed run continues the
            same W&B run.
        config: dotted key -> value; these are the names that a sweep sets.
        wandb_options: arguments of `wandb.init`; None for CSV only.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        wandb_options: Mapping[str, Any] | None = None,
    ):
        self.folder, self.drawn = folder, dict.fromkeys(STAGES, -1)
        self.begun: set[str] = set()
        self.run: Any = None
        if wandb_options is not None:
            self._guarded(lambda: self._start(dict(config), wandb_options))

    def _start(self, config: dict[str, Any], options: Mapping[str, Any]) -> None:
        import wandb

        place = self.folder / "wandb_id"
        given = os.environ.get("WANDB_RUN_ID")  # a sweep agent's
        kept = place.read_text().strip() if place.is_file() else secrets.token_hex(4)
        write_text(place, given or kept)
        # W&B reads WANDB_RUN_ID itself, and rejects any other id in a sweep
        run = wandb.init(
            dir=str(self.folder),
            config=config,
            id=None if given else kept,
            resume="allow",
            **options,
        )
        self.run = run
        for stage in STAGES:
            run.define_metric(f"{stage}/step", hidden=True)
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            # a stage that was killed trains again and repeats points that are already drawn
            if run.resumed:
                self.drawn[stage] = run.summary.get(f"{stage}/step", -1)

    def loggers(self, stage: str, folder: Path) -> list[Logger]:
        """Return the Lightning loggers of one stage.

        One writes `folder/metrics.csv`; the other one, with W&B, writes keys `<stage>/...`.
        """
        if stage in self.begun:  # another training of the stage: its points are not drawn yet
            self.drawn[stage] = -1
        self.begun.add(stage)
        found: list[Logger] = [CSVLogger(folder, name="", version="")]
        return found if self.run is None else [*found, _Curves(self, stage)]

    def point(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """Add a point to a stage's curves; `step` counts the stage's own steps."""
        if self.run is not None and step >= self.drawn[stage]:
            point = {f"{stage}/{name}": value for name, value in {**values, "step": step}.items()}
            self._guarded(lambda: self.run.log(point))

    def summary(self, values: Mapping[str, float]) -> None:
        """Record the final results."""
        if self.run is not None:
            self._guarded(lambda: self.run.summary.update(values))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind, *_) -> None:
        if self.run is not None:
            run, self.run = self.run, None
            self._guarded(lambda: run.finish(exit_code=int(kind is not None)))
            if run.offline:
                parts = map(str, sorted(self.folder.glob(f"wandb/offline-run-*-{run.id}")))
                log.info(
                    "W&B is offline; from a machine with network: wandb sync %s", shlex.join(parts)
                )

    def _guarded(self, call: Callable[[], Any]) -> None:
        """Call `call`; if it fails, log the failure and end tracking."""
        try:
            call()
        # W&B raises network errors and many of its own; none may stop a run
        except Exception as error:
            log.warning(
                "W&B failed and is off for the rest of this run: %s",
                first_line(error),
            )
            self.run = None


class _Curves(Logger):
    """Lightning logger that passes metrics on to the tracker."""

    name = version = None

    def __init__(self, tracker: Tracker, stage: str):
        super().__init__()
        self.tracker, self.stage = tracker, stage

    def log_metrics(self, metrics, step=None):
        self.tracker.point(self.stage, metrics, step or 0)

    def log_hyperparams(self, params, *args, **kwargs):
        pass  # the run holds the whole configuration from its start
