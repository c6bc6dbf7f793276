"""Draw the rows of several languages by a temperature, so that small languages are read more often.

Sizes differ between languages where translation loses answers, or where long texts are read in
windows. The rule is that of multilingual pre-training (arXiv 1907.05019).
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from flare_exp.data.sampling import LengthBucketedBatchSampler


class TemperatureBatchSampler(LengthBucketedBatchSampler):
    """Batches whose rows are drawn by language, in an order that follows from (seed, epoch).

    An epoch has as many rows as the data. Each is of a language that is drawn by `shares`, and the
    next one of that language's rows in random order. All rows of a language are read before any of
    them is read again.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a global batch.
        seed: seed of the draws.
        langs: language of each row.
        temperature: 1 draws in proportion to the languages' rows; a high one draws all alike.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        langs: Sequence[str],
        temperature: float,
    ):
        super().__init__(lengths, batch_size, seed)
        self.rows: dict[str, list[int]] = defaultdict(list)
        for row, lang in enumerate(langs):
            self.rows[lang].append(row)
        self.shares = shares(Counter(langs), temperature)

    def drawn(self, rng: random.Random) -> list[int]:
        """Return the rows of an epoch in random order."""
        langs = rng.choices([*self.shares], [*self.shares.values()], k=len(self.lengths))
        rows = {lang: _endless(own, rng) for lang, own in self.rows.items()}
        return [next(rows[lang]) for lang in langs]


def shares(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Return the probability of each language, proportional to size^(1 / temperature).

    Args:
        sizes: language -> its rows, at least one.
        temperature: above 0.
    """
    logs = {lang: math.log(size) / temperature for lang, size in sizes.items()}
    most = max(logs.values())  # a low temperature gives powers that no float holds
    powers = {lang: math.exp(log - most) for lang, log in logs.items()}
    return {lang: power / sum(powers.values()) for lang, power in powers.items()}


def _endless(rows: Sequence[int], rng: random.Random) -> Iterator[int]:
    """Yield rows in random order, in another order each time that all have been yielded."""
    while True:
        yield from rng.sample(rows, len(rows))
