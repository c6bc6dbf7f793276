"""Average the label probabilities of several predictors, as an ensemble's stage does."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Prediction
from flare_exp.experiment.context import RunContext
from flare_exp.experiment.predictor import Predictor
from flare_exp.experiment.stages.ensemble import mix, shares
from flare_exp.experiment.stages.similarity import (
    cosines,
    embedded,
    encoder_of,
    reliability,
    similarities,
    trust,
)
from flare_exp.tasks import Example

Sources = Mapping[str, Sequence[Example]]  # language -> the translations of some texts


class Weights(Protocol):
    """Decide how much each predictor counts: arrays [predictors, texts or 1]."""

    def of_tests(self, ids: Sequence[str]) -> np.ndarray:
        """Return the weights for the run's own test set. `ids`: its examples."""

    def of_texts(self, texts: Sequence[Example], sources: Sources) -> np.ndarray:
        """Return the weights for other texts and their sources."""


class SameWeights:
    """The same weights for every text.

    Args:
        weights: one for each predictor.
    """

    def __init__(self, weights: Sequence[float]):
        self.weights = np.array(weights)[:, None]

    def of_tests(self, ids: Sequence[str]) -> np.ndarray:
        """Return the weights, for all texts."""
        return self.weights

    def of_texts(self, texts: Sequence[Example], sources: Sources) -> np.ndarray:
        """Return the weights, for all texts."""
        return self.weights


class WeightsBySimilarity:
    """Weights by the similarity of each text and its source (`method.weights=similarity`).

    Args:
        run: settings of the run; its pre-trained model compares.
        predictors: those that are weighed.
        validation: similarities of the validation pairs, as the run measured them.
    """

    def __init__(
        self, run: RunContext, predictors: Iterable[Predictor], validation: Mapping[str, float]
    ):
        self.run, self.validation = run, validation
        self.reads = [one.mode.translates_tests for one in predictors]
        # compares each text with its English source, whatever the predictors read
        self.pairs = Predictor(run, PairingMode.PAIRED, None, None)

    @functools.cached_property
    def _encoder(self) -> Any:
        return encoder_of(self.run)

    def of_tests(self, ids: Sequence[str]) -> np.ndarray:
        """Return the weights of each test example, from similarities in the run's cache."""
        tested = similarities(self.run, "test")
        return shares(reliability(self.validation, tested, ids), self.reads)

    def of_texts(self, texts: Sequence[Example], sources: Sources) -> np.ndarray:
        """Return the weights of each text."""
        dataset = self.pairs.dataset(texts, sources)
        own = np.full(len(texts), np.nan)  # no source: nothing is like it
        if dataset.source:
            own = cosines(*embedded(self.run, self._encoder, dataset))
        return shares(trust(own, self.validation), self.reads)


def mixed(
    found: Iterable[Sequence[Prediction]], weights: np.ndarray, labels: Sequence[str], first: int
) -> Iterator[Prediction]:
    """Yield the weighted mean of the predictions of each text.

    Args:
        found: the predictors' predictions of each text, from number `first` on.
        weights: [predictors, texts or 1].
        labels: names of the labels.
        first: number of the first text.
    """
    for number, each in enumerate(found, first):
        own = weights if weights.shape[1] == 1 else weights[:, number : number + 1]
        (mean,) = mix(np.array([[one.probabilities] for one in each]), own)
        yield Prediction(labels[mean.argmax()], probabilities=tuple(mean.tolist()))
