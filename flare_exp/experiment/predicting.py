"""Predict with the model of a finished run: texts in, results out, in bounded memory."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import BatchSampler

from flare_exp.config.methods import METHODS
from flare_exp.data.dataset import PairedDataset
from flare_exp.data.pairing import make_pairs
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Prediction
from flare_exp.errors import UserError
from flare_exp.experiment import fitting
from flare_exp.experiment.context import RunContext, device_of
from flare_exp.experiment.translating import TextTranslator
from flare_exp.tasks import Example

CHUNK = 512  # texts that are translated and encoded together, rounded to whole batches

# a sequence where a task has several fields, in the order of Task.fields
Text = str | Sequence[str]


@dataclass(frozen=True)
class Result:
    """Hold what a model says about a text.

    Attributes:
        prediction: the label or the answer.
        probabilities: label -> probability; empty for answers.
        source: the English text that the model read, by field; None where it read none.
        english_prediction: the answer in English, where it was translated back.
        cut: whether the text or its source was too long and was cut.
    """

    prediction: str
    probabilities: Mapping[str, float]
    source: tuple[str, ...] | None
    english_prediction: str | None
    cut: bool

    @property
    def probability(self) -> float | None:
        """Return the probability of the predicted label; None for answers."""
        return self.probabilities.get(self.prediction)


class LoadedRun:
    """Hold the model of a run, in eval mode, with what it needs to read texts.

    Attributes:
        model: the transformers model; with the adapter a PeftModel.
        tokenizer: the model's tokenizer.
        source: fills the source states before a forward (`flare_exp.flare.source_states`); None
            where the method does not fuse.
        task: labels, fields and prompt.
        translator: translates the texts that are given without a source.
        folder: the run folder.
    """

    def __init__(self, folder: Path, run: RunContext, model: Any, source: Any):
        self.folder, self.run, self.model, self.source = folder, run, model, source
        self.task, self.tokenizer = run.task, run.preprocessor.tokenizer
        self.mode = METHODS[run.cfg.method.name].mode
        self.translator = TextTranslator(run)

    @property
    def reads_sources(self) -> bool:
        """Return whether the method reads the English translation of a text."""
        return reads_sources(self.run.cfg)

    def predict(
        self, texts: str | Iterable[Text], sources: str | Iterable[Text | None] | None = None
    ) -> list[str]:
        """Return one label or answer per text; see `stream`."""
        return [result.prediction for result in self.stream(texts, sources)]

    def stream(
        self, texts: str | Iterable[Text], sources: str | Iterable[Text | None] | None = None
    ) -> Iterator[Result]:
        """Yield one result per text, in the order of the texts.

        The texts are read as they are needed, CHUNK at a time, so that there may be any number.

        Args:
            texts: in the target language. A task with several fields takes a sequence of texts
                each, for example (context, question). A single string is one text.
            sources: the texts' English translations, which methods `flare`, `x_mixup`,
                `input_fusion` and `translate_test` read; None for those that the run's translator
                is to make. Other methods take none.

        Raises:
            UserError: sources are not wanted or cannot be made, or their number or a text's fields
                do not fit.
        """
        self._check(texts, sources)
        size = self.run.cfg.data.batch_size
        rows, chunk = self._examples(texts, sources), max(size, CHUNK - CHUNK % size)
        chunks = iter(lambda: list(itertools.islice(rows, chunk)), [])
        return (result for part in chunks for result in self._results(part))

    def test_set(self) -> PairedDataset:
        """Return the run's own test set, translated and encoded as the run did."""
        return self.run.data(self.mode).dataset("test")

    def predictions(self, dataset: PairedDataset, first: int = 0) -> Iterator[Prediction]:
        """Yield the best prediction of each example of a dataset, from example `first` on.

        The batches are those that a run reads, whatever `first` is.
        """
        size, rows = self.run.cfg.data.batch_size, range(len(dataset))
        start = bisect.bisect_left(dataset.examples, first)
        sampler = BatchSampler(rows[start - start % size :], size, drop_last=False)
        batches = iter(self.run.data(self.mode).loader(dataset, sampler))
        found: dict[int, Prediction] = {}
        try:
            for _, group in itertools.groupby(rows[start:], dataset.examples.__getitem__):
                own = list(group)
                while own[-1] not in found:
                    found |= self._forward(next(batches))
                yield max((found.pop(row) for row in own), key=lambda one: one.score)
        finally:
            self._module.on_predict_end()

    def answers(self, dataset: PairedDataset) -> Iterator[str]:
        """Yield the answer of each example of a dataset, translated back where the run does so."""
        return (text for text, _ in self._answered(self.predictions(dataset)))

    def likelihoods(self, dataset: PairedDataset) -> Iterator[list[float]]:
        """Yield the log-likelihood of each label of each example: its tokens and EOS.

        This is what a generative run with decode=score compares, in the batches of the run.
        """
        rows = BatchSampler(range(len(dataset)), self.run.cfg.data.batch_size, drop_last=False)
        try:
            for batch in self.run.data(self.mode).loader(dataset, rows):
                yield from self._compute(self._label_likelihoods, batch).tolist()
        finally:
            self._module.on_predict_end()

    def _label_likelihoods(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the log-likelihoods [B, labels] of a batch."""
        count, labels = len(batch["index"]), self._module.candidates
        repeated = {
            name: x.to(batch["index"].device).repeat(count, 1) for name, x in labels.items()
        }
        chosen, _ = self._module(batch, repeated)
        return chosen.sum(1).view(count, -1)

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

    def check_new_texts(self) -> None:
        """Check that the run can read texts outside of its data.

        Raises:
            UserError: it paired each text with a source that new texts do not have.
        """
        source = self.run.cfg.source
        if self.mode.pairs and source.shuffle:
            raise UserError(
                "source.shuffle=true: the run paired each text with another one's source, which "
                "single texts do not have; give a run with source.shuffle=false"
            )
        if self.mode.pairs and source.langs:
            raise UserError(
                f"source.langs=[{','.join(source.langs)}]: new texts are translated into English "
                "alone; give a run with source.langs=[]"
            )
        if self.mode is PairingMode.PAIRED and source.systems:
            raise UserError(
                f"source.systems=[{','.join(source.systems)}]: new texts are translated by mt "
                "alone; give a run with source.systems=[], which has the same adapter"
            )

    def _check(self, texts: Any, sources: Any) -> None:
        """Check what can be checked before a text is read."""
        method = self.run.cfg.method.name
        if sources is not None and not self.reads_sources:
            raise UserError(f"sources: method {method} reads no English text: leave them out")
        self.check_new_texts()
        if self.reads_sources and sources is None:
            self.translator.check()
        both = [x for x in (texts, sources) if isinstance(x, Sized) and not isinstance(x, str)]
        if len(both) == 2 and len(both[0]) != len(both[1]):
            raise UserError(f"sources: {len(both[1])} for {len(both[0])} texts; give one for each")

    def _examples(self, texts: Any, sources: Any) -> Iterator[tuple[Example, Example | None]]:
        """Yield each text with its source, if one is given, as examples."""
        texts, sources = ([x] if isinstance(x, str) else x for x in (texts, sources))
        place = f"{self.task.name}/{self.run.cfg.task.lang}/given"
        beside = itertools.repeat(None) if sources is None else iter(sources)
        for i, text in enumerate(texts):
            # the label is not looked at
            fields, label = self._fields(text, f"texts[{i}]"), 0 if self.task.labels else None
            example = Example(f"{place}/{i}", str(i), fields, label)
            if (source := next(beside, self)) is self:
                raise UserError(f"sources: there are only {i}; give one for each text")
            given = None if source is None else self._fields(source, f"sources[{i}]")
            yield example, None if given is None else replace(example, texts=given)
        if sources is not None and next(beside, self) is not self:
            raise UserError("sources: there are more than texts; give one for each text")

    def _fields(self, text: Any, place: str) -> tuple[str, ...]:
        fields = (text,) if isinstance(text, str) else text
        if (
            not isinstance(fields, Sequence)
            or len(fields) != len(self.task.fields)
            or not all(isinstance(one, str) for one in fields)
        ):
            raise UserError(f"{place}: give {' and '.join(self.task.fields)} as text, not {text!r}")
        return tuple(fields)

    def _results(self, rows: Sequence[tuple[Example, Example | None]]) -> Iterator[Result]:
        """Yield the results of some rows, as they are computed."""
        targets = [target for target, _ in rows]
        english = self._english(rows) if self.reads_sources else targets
        pairs = make_pairs(english, targets, self.mode)
        if self.mode.pairs and self.run.cfg.source.empty:
            pairs = [replace(pair, source=None) for pair in pairs]
        data = self.run.data(self.mode)
        joint = self.mode is PairingMode.JOINT
        dataset = PairedDataset(pairs, data.preprocessor, data.source_preprocessor, joint=joint)
        cut = {
            number
            for side in (dataset.target, dataset.source or ())
            for number, item in zip(dataset.examples, side, strict=False)
            if item["cut"]
        }
        for i, said in enumerate(self._answered(self.predictions(dataset))):
            text, best = said
            yield Result(
                prediction=text,
                probabilities=dict(zip(self.task.labels, best.probabilities, strict=False)),
                source=english[i].texts if self.reads_sources else None,
                english_prediction=None if text is best.text else best.text,
                cut=i in cut,
            )

    def _answered(self, found: Iterable[Prediction]) -> Iterator[tuple[str, Prediction]]:
        """Yield the text of each prediction, which is translated where the run does so, with it."""
        if self.run.answers_back(self.mode) is None:
            yield from ((best.text, best) for best in found)
            return
        every = list(found)
        yield from zip(self.translator.into_target([p.text for p in every]), every, strict=True)

    def _english(self, rows: Sequence[tuple[Example, Example | None]]) -> list[Example]:
        """Return the sources of some rows; those that are not given are translated."""
        asked = [target.texts for target, source in rows if source is None]
        made = iter(self.translator.into_english(asked) if asked else ())
        return [source or replace(target, texts=next(made)) for target, source in rows]


def reads_sources(cfg: Any) -> bool:
    """Return whether a run's method reads the English translation of a test text."""
    mode = METHODS[cfg.method.name].mode
    return mode.translates_tests and not (mode.pairs and cfg.source.empty)
