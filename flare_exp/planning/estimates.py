"""Estimate what the stages of a run cost.

They are timed in a short probe where the weights are here, and counted from shapes elsewhere.
Either way the models, batches and passes are those of flare_exp.experiment.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flare_exp.config.schema import Config
from flare_exp.models import backbones
from flare_exp.planning.arithmetic import (
    ASSUMED_MFU,
    DECODE_TO_TRAIN_MFU,
    arithmetic,
    throughput,
    translation_seconds,
)
from flare_exp.planning.costs import Estimate
from flare_exp.planning.lengths import CHARACTERS, CountingPreprocessor
from flare_exp.planning.preview import DryRun, preview
from flare_exp.planning.probe import probe


def estimate(cfg: Config, scratch: Path, todo: set[str]) -> Estimate:
    """Estimate the cost of those artifacts of a settled configuration that are in `todo`.

    It is best called in a process of its own, whose peak memory is then that of a run.
    """
    torch.manual_seed(0)
    dry = preview(cfg, scratch)
    found = arithmetic(dry, todo) if dry.shapes else probe(dry, todo)
    for digest, (run, examples, times) in dry.untranslated.items():
        texts = [text for e in examples for text in e.texts]
        found.seconds[digest] = times * translation_seconds(run.cfg, texts)
        found.disk[digest] = round(times * 2 * sum(len(text.encode()) for text in texts))
    if "backbone" in todo:
        found.disk["backbone"] = 4 * (found.total if found.parameters else _size_of(dry))
    if dry.run.cfg.source.cache == "disk" and "transfer" in todo:
        found.disk["transfer"] += found.states
    found.notes += _notes(dry)
    return found


def _size_of(dry: DryRun) -> int:
    """Count the parameters of the backbone."""
    return backbones.parameter_counts(dry.run.models.fresh_backbone().model)["total"]


def _notes(dry: DryRun) -> list[str]:
    """Say what an estimate rests on."""
    cfg, task = dry.run.cfg, dry.run.task
    if dry.shapes:
        device, peak = throughput(cfg.trainer.accelerator)
        found = [
            f"arithmetic: {cfg.model.name} or its data is not here. Its passes are counted on "
            "tensors without content: every "
            "matrix product (the source's pass too, and no gradient of frozen weights), and "
            "every tensor that is alive at once, "
            "weights as they are kept, optimizer states and source states; in batches as long "
            "as the longest text."
            + (
                ""
                if cfg.trainer.accelerator == "gpu"
                else " A process on a CPU may hold twice that."
            ),
            f"time: {device}, {peak / 1e12:.3g} TFLOP/s, {ASSUMED_MFU:.0%} of it used in training, "
            f"{ASSUMED_MFU * DECODE_TO_TRAIN_MFU:.1%} where tokens "
            f"are written one by one"
            + (
                f"; {CHARACTERS} characters to a token."
                if isinstance(dry.run.preprocessor, CountingPreprocessor)
                else "."
            ),
        ]
    else:
        whose = (
            "the device"
            if cfg.trainer.accelerator == "gpu"
            else "the whole process, its libraries included"
        )
        found = [
            f"probe: a few real batches of every stage on this machine; memory is that of {whose}."
        ]
    if task.assumed:  # type: ignore[attr-defined]
        found.append(
            f"data: {task.name} is not here, so its sizes are the published ones and every text "
            "is as long as "
            f"data.max_length={cfg.data.max_length}: time and memory are upper bounds; what was "
            "built from it is not recognized."
        )
    if dry.untranslated:
        systems = dict.fromkeys(run.cfg.mt.name for run, *_ in dry.untranslated.values())
        found.append(
            f"translations by mt={' and mt='.join(systems)} are not there yet: the texts "
            "themselves stand in for them, and what is trained on them counts as to do; the time "
            "of translating is "
            + ("not known and not counted." if cfg.mt.kind == "command" else "arithmetic.")
        )
    return found
