"""Pair each example of the target language with its source."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flare_exp.data.pairing_mode import PairingMode
from flare_exp.errors import UserError
from flare_exp.tasks import Example

Translate = Callable[[Sequence[Example], str], list[Example]]


@dataclass(frozen=True)
class Pair:
    """The input of the model, the source that it fuses, and the example that counts as right.

    Args:
        target: the example that the model reads.
        source: the example that it fuses; None for nothing.
        original: the example whose answers or label count as right; None for `target`.
        more: further sources, in other languages or by other translators, that are fused with
            `source`.
    """

    target: Example
    source: Example | None
    original: Example | None = None
    more: tuple[Example, ...] = ()

    @property
    def scored(self) -> Example:
        """Return the example that the prediction is compared with."""
        return self.original or self.target


def make_pairs(
    english: Sequence[Example], target: Sequence[Example], mode: PairingMode
) -> list[Pair]:
    """Pair the same examples in English and in the target language as `mode` asks.

    Raises:
        ValueError: the two lists are not the same examples in the same order.
    """
    if [(e.key, e.label) for e in english] != [(t.key, t.label) for t in target]:
        raise ValueError("English and target examples are not the same examples in the same order")
    if not mode.pairs:
        return [Pair(example, None) for example in (english if mode.reads_english else target)]
    sources = target if mode is PairingMode.LATENT else english
    return [Pair(t, s) for t, s in zip(target, sources, strict=True)]


def shuffled_sources(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Give every pair another pair's source, by a seeded permutation without fixed points.

    This ablation keeps the sources' distribution and breaks their meaning.

    Raises:
        UserError: there are fewer than two pairs.
    """
    if len(pairs) < 2:
        raise UserError("source.shuffle=true needs at least two examples in every split")
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    # along one random cycle, every pair gets the source of the next one
    taken = dict(zip(order, order[1:] + order[:1], strict=True))
    return [
        replace(p, source=pairs[taken[i]].source, more=pairs[taken[i]].more)
        for i, p in enumerate(pairs)
    ]
