"""Analyze a finished run: activations in the bottleneck, and similarity of English and target.

The first examples of the test set are read three times: by the adapted model, and in both
languages by the English model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flare_exp.config.methods import ENSEMBLE, METHODS, Method
from flare_exp.config.schema import Config
from flare_exp.data.dataset import PairedCollator, PairedDataset
from flare_exp.data.pairing import Pair, make_pairs
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Preprocessor
from flare_exp.errors import UserError
from flare_exp.experiment import fitting
from flare_exp.experiment.context import RunContext
from flare_exp.experiment.loading import load, saved, stored_config
from flare_exp.flare.measuring import (
    Activation,
    BottleneckRecorder,
    Cosine,
    cosine,
    fusions_of,
    hidden_states,
    means,
)
from flare_exp.flare.source_encoders import SourceEncoder
from flare_exp.utils.suggestions import allowed

States = Mapping[str, Tensor]  # stack -> mean states [N, layers, d]


@dataclass(frozen=True)
class Similarity:
    """Similarity of English and target states in one layer.

    The English states are always those of the English model, which reads the English text.

    Args:
        stack: "encoder" or "decoder".
        layer: 0 for the embeddings, n for the output of block n.
        before: with the English model's states of the target text.
        after: with the adapted model's states of the target text; None: nothing was adapted.
    """

    stack: str
    layer: int
    before: Cosine
    after: Cosine | None


@dataclass(frozen=True)
class Analysis:
    """Hold what `analyze` measures.

    Args:
        run: task, lang, model, method, fusion, mt and seed of the run.
        examples: number of test examples that were read.
        relu: whether the fusion applies ReLU to S and T.
        activations: of each fused projection; none for methods without a fusion function.
        similarities: of each layer.
    """

    run: Mapping[str, Any]
    examples: int
    relu: bool
    activations: Sequence[Activation]
    similarities: Sequence[Similarity]


def analyze(
    folder: str | Path, rows: int = 100, progress: bool = True, lang: str | None = None
) -> Analysis:
    """Analyze a finished run.

    Args:
        folder: the run folder.
        rows: number of test examples that are read, from the first on.
        progress: whether to show progress bars on a terminal.
        lang: the language whose test examples are read; None: that of a run with one.

    Raises:
        UserError: the run cannot be loaded, read no source though its method fuses one, or reads
            text and source as one input, or the language is missing or not one of the run's.
    """
    folder = Path(folder).expanduser()
    if (folder / "metrics.json").is_file():
        check(folder, stored_config(folder), lang)
    # tests are of one language and with the source, whatever the run has besides
    loaded = load(folder, "predict.sources=[given]", *([f"task.lang={lang}"] if lang else []))
    cfg = loaded.run.cfg
    method, lang = METHODS[cfg.method.name], cfg.task.langs[0]
    trainer = replace(cfg.trainer, enable_progress_bar=progress)
    run = replace(loaded.run, cfg=replace(cfg, trainer=trainer))
    examples = english_pairs(run, method, rows)
    activations: list[Activation] = []
    relu, after = False, None
    if method.trains:
        data = run.data(method.mode)
        own = PairedDataset(data.pairs("test")[:rows], run.preprocessor, data.source_preprocessor)
        relu = any(getattr(phi, "f", None) is not None for *_, phi in fusions_of(loaded.model))
        reader = _Reader(run, loaded.model, "target", loaded.source)
        after = reader.read(own, "adapted model", data.source_preprocessor)
        activations = reader.recorder.activations()
        del reader
    del loaded  # one model at a time
    run.release_models()
    both = PairedDataset(examples, run.preprocessor)
    with isolate_rng():  # loading seeds the generators
        english = run.models.english_model(saved(folder, "english")).model.eval()
    before = _Reader(run, english, "target").read(both, "English model, target")
    source = _Reader(run, english, "source").read(both, "English model, English")
    facts = {key: getattr(run.cfg, key).name for key in ("model", "method", "mt")}
    fusion = run.cfg.fusion.name if method.fuses else None
    facts = {"task": run.task.name, "lang": lang, **facts, "fusion": fusion}
    similarities = similarities_of(source, before, after)
    return Analysis({**facts, "seed": run.cfg.seed}, len(examples), relu, activations, similarities)


def check(folder: Path, cfg: Config, lang: str | None) -> None:
    """Check that a run has texts of a language, and sources that can be compared.

    Raises:
        UserError: it has not.
    """
    tested = cfg.task.tested
    if lang is None and len(tested) > 1:
        raise UserError(f"{folder}: the run has several languages; choose one: --lang {tested[0]}")
    if lang is not None and lang not in tested:
        raise UserError(f"{folder}: --lang {lang}: {allowed(lang, tested)}")
    if cfg.method.name == ENSEMBLE:
        raise UserError(
            f"{folder} is an ensemble of {', '.join(cfg.method.of)}: its members have models of "
            "their own; give the run of a member"
        )
    method = METHODS[cfg.method.name]
    if method.mode is PairingMode.JOINT:
        raise UserError(
            f"{folder}: method={cfg.method.name} reads a text and its source as one input, so that "
            "neither has states of its own; give the run of another method"
        )
    if method.mode.fuses and cfg.source.empty:
        raise UserError(
            f"{folder}: with source.empty=true the run read no source, so there is nothing to "
            "analyze; give a run with source.empty=false"
        )


def english_pairs(run: RunContext, method: Method, rows: int) -> list[Pair]:
    """Return the first test examples, each with its English text.

    The English text is the run's translation, whose key is of the whole test set. Where a method
    reads none, only these examples are translated.
    """
    (lang,) = run.cfg.task.langs
    target = run.task.load(lang, "test")
    read = target if method.reads_translated_tests else target[:rows]
    english = run.translate(run, read, run.task.english)[:rows]
    return make_pairs(english, target[:rows], PairingMode.PAIRED)


def similarities_of(english: States, before: States, after: States | None) -> list[Similarity]:
    """Return the similarities of every layer of every stack, from mean states [N, layers, d]."""
    return [
        Similarity(
            stack,
            layer,
            cosine(before[stack][:, layer], states[:, layer]),
            None if after is None else cosine(after[stack][:, layer], states[:, layer]),
        )
        for stack, states in english.items()
        for layer in range(states.shape[1])
    ]


class _Reader(pl.LightningModule):
    """Read one side of a dataset's batches, and return the mean states of each row.

    Args:
        run: settings of the run.
        model: the model that reads.
        side: "target" or "source", the texts that are read.
        source: reads the batch's source before; None where nothing is fused.
    """

    def __init__(
        self, run: RunContext, model: nn.Module, side: str, source: SourceEncoder | None = None
    ):
        super().__init__()
        self.run, self.model, self.side, self.source = run, model, side, source
        self.writes = run.task_type == "prompt"
        self.recorder = BottleneckRecorder(model)

    def read(
        self, dataset: PairedDataset, stage: str, source: Preprocessor | None = None
    ) -> dict[str, Tensor]:
        """Return stack -> mean states [rows, layers, d] of a dataset.

        Args:
            dataset: the dataset.
            stage: name of the line of progress.
            source: encodes the sources, if they need another preprocessor.
        """
        cfg = self.run.cfg
        collate = PairedCollator(self.run.preprocessor, source)
        loader = DataLoader(dataset, batch_size=cfg.data.batch_size, collate_fn=collate)
        options: dict[str, Any] = {"enable_checkpointing": False, "logger": False}
        trainer = fitting.make_trainer(self.run, stage, **options)
        with self.recorder:
            parts: Sequence[Any] = trainer.predict(self, loader) or ()
        if self.source is not None:
            self.source.states.clear()
        return {stack: torch.cat([part[stack] for part in parts]) for stack in parts[0]}

    def predict_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        """Return stack -> mean states [B, layers, d] of a batch."""
        inputs = batch[self.side]
        mask = inputs["attention_mask"].bool()
        self.recorder.mask = mask
        if self.source is not None:
            self.source.encode(batch.get("source"), mask.shape[1])
        layers = hidden_states(self.model, inputs, self.writes)
        return {stack: means(states, mask).cpu() for stack, states in layers.items()}
