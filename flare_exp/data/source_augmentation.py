"""Draw the sources of training examples: their own, none, or that of another example.

An adapter that always trains with a good source trusts every source. One that has trained without
a source, and with wrong ones, has learned to answer from the target text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SourceAugmentation:
    """Decide which row's source a training row fuses, anew in every epoch.

    A decision follows from (seed, epoch, row) alone. So it is the same in a resumed training, on
    any number of processes and in any loader process.

    Args:
        dropout: probability of having no source.
        noise: probability of having the source of another example.
        seed: seed of the decisions.
    """

    dropout: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __bool__(self) -> bool:
        """Return whether some example may get another source than its own."""
        return self.dropout + self.noise > 0

    def source_of(self, row: int, epoch: int, examples: Sequence[int]) -> int | None:
        """Return the row whose source a row fuses, or None for no source.

        Args:
            row: the row that is read.
            epoch: number of the pass over the data.
            examples: number of the example that each row belongs to; at least two examples.
        """
        rng = random.Random(f"{self.seed}-{epoch}-{row}")
        drawn = rng.random()
        if drawn < self.dropout:
            return None
        if drawn >= self.dropout + self.noise:
            return row
        other = row
        while examples[other] == examples[row]:
            other = rng.randrange(len(examples))
        return other
