"""Draw the sources of training examples: their own, none, another example's, or one with errors.

An adapter that always trains with a good source trusts every source. One that has trained without
a source, and with wrong ones, has learned to answer from the target text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flare_exp.data.pairing import Pair
from flare_exp.translation.noise import corrupt_examples

# wrong sources: that of another example; the example's own with wrong words
OTHER, WORDS = KINDS = ("other", "words")
VERSIONS = 3  # of each source with wrong words; each has its own share of them, from 0 to 1


@dataclass(frozen=True)
class SourceAugmentation:
    """Decide which source a training row fuses, anew in every epoch.

    A decision follows from (seed, epoch, row) alone. So it is the same in a resumed training, on
    any number of processes and in any loader process.

    Args:
        dropout: probability of having no source.
        noise: probability of having a wrong source.
        kinds: kinds of wrong sources, all equally likely.
        errors: kinds of wrong words (flare_exp.translation.noise).
        seed: seed of the decisions and of the wrong words.
    """

    dropout: float = 0.0
    noise: float = 0.0
    kinds: tuple[str, ...] = (OTHER,)
    errors: tuple[str, ...] = ()
    seed: int = 0

    def __bool__(self) -> bool:
        """Return whether some example may get another source than its own."""
        return self.dropout + self.noise > 0

    @property
    def mixes_examples(self) -> bool:
        """Return whether an example may get the source of another one."""
        return self.noise > 0 and OTHER in self.kinds

    def versions(self, pairs: Sequence[Pair], lang: str) -> list[list[Pair]]:
        """Return the pairs with wrong words in their sources, VERSIONS times; [] if none is needed.

        Args:
            pairs: the training pairs.
            lang: language of the sources.
        """
        sources = [pair.source for pair in pairs if pair.source is not None]
        if not self.noise or WORDS not in self.kinds or not sources:
            return []
        made = []
        for version in range(VERSIONS):
            seed = f"{self.seed}-{version}"
            rates = [random.Random(f"{seed}-{source.id}").random() for source in sources]
            wrong = corrupt_examples(sources, lang, rates, self.errors, seed)
            made.append([replace(p, source=w) for p, w in zip(pairs, wrong, strict=True)])
        return made

    def source_of(self, row: int, epoch: int, examples: Sequence[int]) -> int | None:
        """Return the number of the source that a row fuses, or None for no source.

        Args:
            row: the row that is read.
            epoch: number of the pass over the data.
            examples: number of the example that each row belongs to; at least two examples.

        Returns:
            a row, or v * rows + row for version v = 1, 2, ... of its source with wrong words.
        """
        rng = random.Random(f"{self.seed}-{epoch}-{row}")
        drawn = rng.random()
        if drawn < self.dropout:
            return None
        if drawn >= self.dropout + self.noise:
            return row
        if rng.choice(self.kinds) == WORDS:
            return rng.randint(1, VERSIONS) * len(examples) + row
        other = row
        while examples[other] == examples[row]:
            other = rng.randrange(len(examples))
        return other
