"""Predict with a finished run: texts in, results out, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flare_exp.config.methods import answering
from flare_exp.data.dataset import PairedDataset
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Prediction
from flare_exp.errors import UserError
from flare_exp.experiment.context import RunContext
from flare_exp.experiment.mixing import Weights, mixed
from flare_exp.experiment.predictor import Predictor
from flare_exp.experiment.source_texts import SourceTexts, source_texts
from flare_exp.experiment.translating import TextTranslator
from flare_exp.tasks import Example

CHUNK = 512  # texts that are translated and encoded together, rounded to whole batches

# a sequence where a task has several fields, in the order of Task.fields
Text = str | Sequence[str]
# a text, and language -> its fields for the sources that are given; None: they are to be made
Row = tuple[Example, Mapping[str, tuple[str, ...]] | None]


@dataclass(frozen=True)
class Result:
    """Hold what a model says about a text.

    Attributes:
        prediction: the label or the answer.
        probabilities: label -> probability; empty for answers.
        source: the source texts that were read, in the order of `LoadedRun.sources.parts`: the
            English text by field; None where none was read.
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
    """Hold the models of a run, in eval mode, with what they need to read texts.

    Attributes:
        predictors: name -> model and what it reads. One for a run of one method; one for each
            member of an ensemble, or for each pass of `predict.sources`, whose probabilities are
            averaged.
        weights: how much each of several predictors counts.
        tokenizer: the models' tokenizer.
        task: labels, fields and prompt.
        sources: names the source texts that are read beside a text.
        translator: translates the texts that are given without a source.
        folder: the run folder.
    """

    def __init__(
        self, folder: Path, run: RunContext, predictors: Mapping[str, Predictor], weights: Weights
    ):
        self.folder, self.run, self.predictors, self.weights = folder, run, predictors, weights
        self.task, self.tokenizer = run.task, run.preprocessor.tokenizer
        self.translator = TextTranslator(run)

    @property
    def first(self) -> Predictor:
        """Return the predictor of a run that has one; of several, the first."""
        return next(iter(self.predictors.values()))

    @property
    def model(self) -> Any:
        """Return the transformers model; with the adapter a PeftModel. See `first`."""
        return self.first.model

    @property
    def source(self) -> Any:
        """Return what fills the source states before a forward of `model`.

        None where the method does not fuse (`flare_exp.flare.source_states`).
        """
        return self.first.source

    @property
    def sources(self) -> SourceTexts:
        """Return the names of the source texts that are read beside a text."""
        return source_texts(self.run.cfg, self.task)

    @property
    def reads_sources(self) -> bool:
        """Return whether translations of a text are read."""
        return bool(self.sources.langs)

    @property
    def translates_back(self) -> bool:
        """Return whether answers are translated into the target language."""
        return self.run.answers_back(self.first.mode) is not None

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
                is to make. Other methods take none. With `source.langs`, a sequence of texts
                each, in the order of `sources.parts`.

        Raises:
            UserError: sources are not wanted or cannot be made, or their number or a text's fields
                do not fit.
        """
        self._check(texts, sources)
        size = self.run.cfg.data.batch_size
        rows, chunk = self._examples(texts, sources), max(size, CHUNK - CHUNK % size)
        chunks = iter(lambda: list(itertools.islice(rows, chunk)), [])
        return (result for part in chunks for result in self._results(part))

    def test_set(self) -> list[PairedDataset]:
        """Return the run's own test set as each predictor reads it, as in the run."""
        return [one.test_set() for one in self.predictors.values()]

    def written(self, tests: Sequence[PairedDataset]) -> list[tuple[str, str | None]]:
        """Return text and source of each test example, as the run's predictions.parquet has them.

        A mean over several predictors has none of their sources.
        """
        if len(tests) > 1:
            examples = self.task.load(self.run.cfg.task.lang, "test")
            return [("\n".join(example.texts), None) for example in examples]
        return [
            ("\n".join(pair.target.texts), "\n".join(pair.source.texts) if pair.source else None)
            for pair in tests[0].pairs
        ]

    def test_predictions(
        self, tests: Sequence[PairedDataset], first: int = 0
    ) -> Iterator[Prediction]:
        """Yield the prediction of each example of `test_set`, from number `first` on."""
        return self._predicted(
            tests, lambda: self.weights.of_tests([pair.target.id for pair in tests[0].pairs]), first
        )

    def _predicted(
        self, datasets: Sequence[PairedDataset], weights: Callable[[], np.ndarray], first: int = 0
    ) -> Iterator[Prediction]:
        """Yield the predictions of some examples, which each predictor reads in its own way."""
        pairs = zip(self.predictors.values(), datasets, strict=True)
        found = [one.predictions(dataset, first) for one, dataset in pairs]
        if len(found) == 1:
            return found[0]
        return mixed(zip(*found, strict=True), weights(), self.task.labels, first)

    def answers(self, tests: Sequence[PairedDataset]) -> Iterator[str]:
        """Yield the answer to each test example, translated back where the run does so."""
        return (text for text, _ in self._answered(self.test_predictions(tests)))

    def check_new_texts(self) -> None:
        """Check that the run can read texts outside of its data.

        Raises:
            UserError: it paired each text with a source that new texts do not have.
        """
        source = self.run.cfg.source
        modes = [method.mode for method in answering(self.run.cfg.method).values()]
        if any(mode.pairs for mode in modes) and source.shuffle and source.ablate_in != "train":
            raise UserError(
                "source.shuffle=true: the run paired each text with another one's source, which "
                "single texts do not have; give a run with source.shuffle=false"
            )
        if PairingMode.PAIRED in modes and source.systems:
            raise UserError(
                f"source.systems=[{','.join(source.systems)}]: new texts are translated by mt "
                "alone; give a run with source.systems=[], which has the same adapter"
            )

    def _check(self, texts: Any, sources: Any) -> None:
        """Check what can be checked before a text is read."""
        method = self.run.cfg.method.name
        if sources is not None and not self.reads_sources:
            raise UserError(f"sources: method {method} reads no source: leave them out")
        self.check_new_texts()
        if self.reads_sources and sources is None:
            self.translator.check(self.sources.langs)
        both = [x for x in (texts, sources) if isinstance(x, Sized) and not isinstance(x, str)]
        if len(both) == 2 and len(both[0]) != len(both[1]):
            raise UserError(f"sources: {len(both[1])} for {len(both[0])} texts; give one for each")

    def _examples(self, texts: Any, sources: Any) -> Iterator[Row]:
        """Yield each text as an example, with its sources if they are given."""
        texts, sources = ([x] if isinstance(x, str) else x for x in (texts, sources))
        place = f"{self.task.name}/{self.run.cfg.task.lang}/given"
        beside = itertools.repeat(None) if sources is None else iter(sources)
        names = self.sources
        for i, text in enumerate(texts):
            # the label is not looked at
            fields = _fields(text, self.task.fields, f"texts[{i}]")
            example = Example(f"{place}/{i}", str(i), fields, 0 if self.task.labels else None)
            if (source := next(beside, self)) is self:
                raise UserError(f"sources: there are only {i}; give one for each text")
            given = None if source is None else _fields(source, names.parts, f"sources[{i}]")
            yield example, None if given is None else names.by_language(given)
        if sources is not None and next(beside, self) is not self:
            raise UserError("sources: there are more than texts; give one for each text")

    def _results(self, rows: Sequence[Row]) -> Iterator[Result]:
        """Yield the results of some rows, as they are computed."""
        targets, names = [target for target, _ in rows], self.sources
        sources = {lang: self._translations(rows, lang) for lang in names.langs}
        datasets = [one.dataset(targets, sources) for one in self.predictors.values()]
        cut = {number for dataset in datasets for number in _cut(dataset)}
        found = self._predicted(datasets, lambda: self.weights.of_texts(targets, sources))
        back = self.translates_back
        for i, (text, best) in enumerate(self._answered(found)):
            read = itertools.chain(*(sources[lang][i].texts for lang in names.langs))
            yield Result(
                prediction=text,
                probabilities=dict(zip(self.task.labels, best.probabilities, strict=False)),
                source=tuple(read) if names.langs else None,
                english_prediction=best.text if back else None,
                cut=i in cut,
            )

    def _answered(self, found: Iterable[Prediction]) -> Iterator[tuple[str, Prediction]]:
        """Yield the text of each prediction, which is translated where the run does so, with it."""
        if not self.translates_back:
            yield from ((best.text, best) for best in found)
            return
        every = list(found)
        yield from zip(self.translator.into_target([p.text for p in every]), every, strict=True)

    def _translations(self, rows: Sequence[Row], lang: str) -> list[Example]:
        """Return the sources of some rows in a language; those that are not given are made."""
        asked = [target.texts for target, given in rows if given is None]
        made = iter(self.translator.into(lang, asked) if asked else ())
        return [
            replace(target, texts=next(made) if given is None else given[lang])
            for target, given in rows
        ]


def _fields(text: Any, names: Sequence[str], place: str) -> tuple[str, ...]:
    """Return the parts of a text or of its sources, which `names` names.

    Raises:
        UserError: it is no text, or has other parts.
    """
    fields = (text,) if isinstance(text, str) else text
    if (
        not isinstance(fields, Sequence)
        or len(fields) != len(names)
        or not all(isinstance(one, str) for one in fields)
    ):
        raise UserError(f"{place}: give {' and '.join(names)} as text, not {text!r}")
    return tuple(fields)


def _cut(dataset: PairedDataset) -> Iterator[int]:
    """Yield the number of each example of which a text or a source was cut."""
    own = len(dataset.target)
    items = [*enumerate(dataset.target), *enumerate(dataset.source or ())]
    return (dataset.examples[row % own] for row, item in items if item["cut"])
