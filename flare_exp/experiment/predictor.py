"""Predict with one model of a finished run, in the batches that the run reads."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import BatchSampler

from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.dataset import PairedDataset
from flare_exp.data.pairing import make_pairs
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Prediction
from flare_exp.experiment import fitting
from flare_exp.experiment.context import RunContext, device_of
from flare_exp.experiment.source_texts import leaves_sources_out
from flare_exp.tasks import Example
from flare_exp.training.global_batch import real_row_mask


class Predictor:
    """A model in eval mode, and what it reads of each text.

    A run of one method has one predictor, an ensemble one for each member, and a run with several
    passes (`predict.sources`) one for each pass, all with the same model.

    Args:
        run: settings of the run.
        mode: what the model reads and fuses.
        model: the transformers model; with the adapter a PeftModel.
        source: fills the source states before a forward; None where the method does not fuse.
        sources: False leaves all sources out.
    """

    def __init__(
        self, run: RunContext, mode: PairingMode, model: Any, source: Any, sources: bool = True
    ):
        self.run, self.mode, self.sources = run, mode, sources
        self.model, self.source = model, source

    @property
    def data(self) -> PairedDataModule:
        """Return the run's DataModule for what the model reads."""
        return self.run.data(self.mode, self.sources)

    def test_set(self) -> PairedDataset:
        """Return the run's own test set, translated and encoded as the run did."""
        return self.data.dataset("test")

    def dataset(
        self, texts: Sequence[Example], sources: Mapping[str, Sequence[Example]]
    ) -> PairedDataset:
        """Return texts outside of the run's data, encoded as the run encodes its test set.

        Args:
            texts: in the target language.
            sources: language -> their translations, as far as the run reads them.
        """
        data, cfg = self.data, self.run.cfg
        pairs = make_pairs(sources.get(self.run.task.english, texts), texts, self.mode)
        if not self.sources or (self.mode.pairs and leaves_sources_out(cfg)):
            pairs = [replace(pair, source=None) for pair in pairs]
        elif data.sources:
            further = [sources[lang] for _, lang in data.sources]
            pairs = [
                replace(pair, source=first, more=tuple(more))
                for pair, first, *more in zip(pairs, *further, strict=True)
            ]
        joint = self.mode is PairingMode.JOINT
        return PairedDataset(pairs, data.preprocessor, data.source_preprocessor, joint=joint)

    def predictions(self, dataset: PairedDataset, first: int = 0) -> Iterator[Prediction]:
        """Yield the best prediction of each example of a dataset, from example `first` on.

        The batches are those that a run reads, whatever `first` is.
        """
        size, rows = self.run.cfg.data.batch_size, range(len(dataset))
        start = bisect.bisect_left(dataset.examples, first)
        sampler = BatchSampler(rows[start - start % size :], size, drop_last=False)
        batches = iter(self.data.loader(dataset, sampler))
        found: dict[int, Prediction] = {}
        try:
            for _, group in itertools.groupby(rows[start:], dataset.examples.__getitem__):
                own = list(group)
                while own[-1] not in found:
                    found |= self._forward(next(batches))
                yield max((found.pop(row) for row in own), key=lambda one: one.score)
        finally:
            self._module.on_predict_end()

    def likelihoods(self, dataset: PairedDataset) -> Iterator[list[float]]:
        """Yield the log-likelihood of each label of each example: its tokens and EOS.

        This is what a generative run with decode=score compares, in the batches of the run.
        """
        rows = BatchSampler(range(len(dataset)), self.run.cfg.data.batch_size, drop_last=False)
        try:
            for batch in self.data.loader(dataset, rows):
                yield from self._compute(self._label_likelihoods, batch).tolist()
        finally:
            self._module.on_predict_end()

    def _label_likelihoods(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the log-likelihoods [rows, labels] of a batch's real rows."""
        count, labels = len(batch["index"]), self._module.candidates
        repeated = {
            name: x.to(batch["index"].device).repeat(count, 1) for name, x in labels.items()
        }
        chosen, _ = self._module(batch, repeated)
        return chosen.sum(1).view(count, -1)[real_row_mask(batch)]

    @functools.cached_property
    def _module(self) -> Any:
        """Return the LightningModule, on its device and in the run's precision."""
        module = fitting.make_module(self.run, self.model, self.source).eval()
        return self._precision.convert_module(module).to(device_of(self.run.cfg))

    @functools.cached_property
    def _precision(self) -> Any:
        options: dict[str, Any] = {"enable_checkpointing": False, "logger": False}
        return fitting.make_trainer(self.run, **options).precision_plugin

    def _forward(self, batch: dict[str, Any]) -> dict[int, Prediction]:
        """Return row -> prediction, as Lightning's Trainer.predict computes it.

        A Trainer belongs to the main thread and takes longer to start than a small batch takes.
        """
        return self._compute(lambda given: self._module.predict_step(given, 0), batch)

    def _compute(self, function: Callable[[dict[str, Any]], Any], batch: dict[str, Any]) -> Any:
        """Apply a function of the module to a batch, on its device and in the run's precision."""
        device = device_of(self.run.cfg)
        with torch.inference_mode(), self._precision.predict_step_context():
            batch = move_data_to_device(self._precision.convert_input(batch), device)
            return function(batch)
