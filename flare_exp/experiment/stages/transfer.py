"""Stage 3: train a new adapter on English-paired translations, on the frozen English model.

Method `full` trains all weights of the English model instead.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import nn

from flare_exp.artifacts import Artifact, digest_of
from flare_exp.code import code_of
from flare_exp.config.methods import Method
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.source_cache import cached_states
from flare_exp.experiment import fitting
from flare_exp.experiment.context import RunContext, device_of, pairs_digest
from flare_exp.flare import mixup
from flare_exp.flare.source_encoders import MTSourceEncoder, SourceEncoder
from flare_exp.training.distillation import Distillation

SOFT_LABELS = "soft_labels.parquet"


def trained_by(
    run: RunContext, english: Artifact, method: Method
) -> tuple[Artifact, Artifact | None]:
    """Return what a method tests, and the English model below it if that is an adapter."""
    if not method.trains:
        return english, None
    return transfer(run, english, method), None if method.full else english


def transfer(
    run: RunContext, english: Artifact, method: Method, teacher: Artifact | None = None
) -> Artifact:
    """Train a new adapter (and the head), or all weights, for the target languages.

    Args:
        english: the fine-tuned English model.
        method: says what is read, fused and trained.
        teacher: the soft labels that a distillation trains on; None: there is no teacher.
    """
    cfg, mode = run.cfg, method.mode
    data = run.data(mode, distils=teacher is not None)
    stage = run.capped(cfg.transfer)
    fusion = fusion_options(run, method) if mode.fuses else None
    key: dict[str, Any] = {
        "stage": "transfer",
        "english": english.digest,
        "data": pairs_digest(data, *run.task.training_roles),
        **run.mixture,
        "fusion": fusion and {**fusion, "code": code_of("fusion")},
        "adapter": None if method.full else asdict(cfg.adapter),
        "hyper": asdict(stage),
        **run.recipe,
        **run.reading_of(mode),
    }
    if fusion and not method.mixes and cfg.source.cache != "off" and cfg.source.dtype:
        key["states"] = cfg.source.dtype  # cached states are rounded to it
    if fusion and data.augmentation:
        key["augmentation"] = {
            **asdict(data.augmentation),
            "spaced": data.spaced_sources,
            "code": code_of("noise"),
        }
    if method.mixes:
        key["consistency"] = [cfg.mixup.kl, cfg.mixup.mse]
    if teacher:
        distil = {"weight": cfg.distil.weight, "temperature": cfg.distil.temperature}
        key["teacher"] = {"labels": teacher.digest, **distil, "code": code_of("distil")}
    if mode is PairingMode.LATENT:
        assert data.source_preprocessor
        key["encoder"] = {
            **run.mt.encoder_identity,
            "max_length": data.source_preprocessor.max_length,
            "codes": data.source_codes,
        }

    def build(folder: Path) -> dict[str, Any]:
        run.release_models()  # their translations are made
        model, source = untrained(run, english, method)
        if source and source.cacheable and cfg.source.cache != "off":
            reader = run.mt.encoder_identity if mode is PairingMode.LATENT else english.digest
            cache_states(run, source, data, reader)
        added = distillation(run, teacher) if teacher else None
        saved = folder / ("model" if method.full else "adapter")
        facts = fitting.fit(run, "transfer", model, source, data, stage, saved, added)
        data.drop_states()
        return facts

    return run.store.get("transfer", key, build, collective=True, resumable=True)


def untrained(
    run: RunContext, english: Artifact, method: Method
) -> tuple[nn.Module, SourceEncoder | None]:
    """Build the model that is trained for the target languages, and its source if it fuses."""
    below = run.models.english_model(english)
    if method.full:
        return below.model.requires_grad_(True), None
    fusion = fusion_options(run, method) if method.mode.fuses else {}
    model = run.models.add_adapter(below, **fusion)
    return model, run.source(model) if fusion else None


def distillation(run: RunContext, teacher: Artifact) -> Distillation:
    """Return the loss against the teacher's soft labels."""
    rows = pq.read_table(teacher.path / SOFT_LABELS, columns=["probabilities"]).to_pydict()
    labels = torch.tensor(rows["probabilities"])
    return Distillation(labels, run.cfg.distil.weight, run.cfg.distil.temperature)


def fusion_options(run: RunContext, method: Method) -> dict[str, Any]:
    """Return the fusion, or X-Mixup's blocks, as arguments of `adapter.adapter_config`."""
    f, m = run.cfg.fusion, run.cfg.mixup
    if method.mixes:
        depths = m.depths or [mixup.DEPTHS[run.task_type]]
        return {
            "fusion": mixup.NAME,
            "fusion_options": {"depths": depths, "rank": m.rank, "most": m.most},
            "source_layer": "ahead",
            "source_state": "block_output",
        }
    common = {"fusion": f.name, "fusion_options": f.options, "answer_source": f.answer_source}
    if method.mode is PairingMode.LATENT:
        return {**common, "source_width": run.mt.encoder_config.d_model}
    return {
        **common,
        "source_layer": f.source_layer,
        "source_state": f.source_state,
        "source_combine": run.cfg.source.combine,
    }


def cache_states(
    run: RunContext, source: SourceEncoder, data: PairedDataModule, reader: Any
) -> None:
    """Compute the states of the training sources once, instead of in every epoch.

    They have the precision in which training would read them.

    Args:
        reader: identity of the weights that read the sources.
    """
    options, device = run.cfg.source, device_of(run.cfg)
    trainer = fitting.make_trainer(run, logger=False, enable_checkpointing=False)
    precision = trainer.precision_plugin
    precision.convert_module(source.model)
    if next(source.reader.parameters()).device.type != device.type:
        source.reader.to(device)  # Lightning moves models only when it trains
    with precision.forward_context():
        for role in run.task.training_roles:
            dataset = data.dataset(role)
            if dataset.source is None:
                continue
            preprocessor = data.source_preprocessor or data.preprocessor
            place = {
                "reader": reader,
                **source.reads,
                "code": code_of("states"),
                **{name: run.reading[name] for name in ("attention", "precision", "weights")},
                "texts": digest_of([item["inputs"]["input_ids"] for item in dataset.source]),
            }
            store = run.store if options.cache == "disk" else None
            kept = getattr(torch, options.dtype) if options.dtype else None
            dataset.cache = cached_states(
                source, dataset.source, preprocessor, device, kept, store, place
            )
    if isinstance(source, MTSourceEncoder):
        source.drop_encoder()
        run.release_models()
