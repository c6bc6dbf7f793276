"""Decide which rows are in which batch, on which process, and where a resumed training goes on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Sampler


class BucketSampler(Sampler[list[int]]):
    """Batches of similar length in a random order that follows from (seed, epoch).

    Shuffles, sorts by length within windows of `window` batches, shuffles the batches. Every index once per epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, window: int = 20):
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self.epoch = self.start = 0

    @property
    def sampler(self) -> BucketSampler:
        """Where Lightning looks for `set_epoch`: on a batch sampler's sampler, not on itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume(self, epoch: int, start: int) -> None:
        """Begin the next pass within an epoch, at batch `start`."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        span = self.window * self.batch_size
        order = [
            i
            for w in range(0, len(order), span)
            for i in sorted(order[w : w + span], key=self.lengths.__getitem__)
        ]
        batches = [order[b : b + self.batch_size] for b in range(0, len(order), self.batch_size)]
        rng.shuffle(batches)
        start, self.start = self.start, 0
        yield from batches[start:]


class Whole(NamedTuple):
    """What a row's loss is divided by: facts of the global batch that the row belongs to.

    terms: loss terms in the global batch (`Form.terms`); parts: passes that read it, on all processes; rows: its examples.
    """

    terms: int
    parts: int
    rows: int


class Shares(Sampler[list[tuple[int, Whole]]]):
    """Split every global batch of `batches` into `passes` micro-batches, and take this process's rows of each.

    Neighbours stay in one micro-batch, so that texts of similar length do. Each one is shared out row by row. Every global
    batch has as many parts, since each process takes part in every pass: a part without rows is a copy of the batch's first
    row (index ~row), which counts for nothing.

    Args:
        batches: of rows of a dataset, by number.
        terms: loss terms of each row.
        rank, size: this process, and how many there are.
        passes: micro-batches per global batch.
    """

    def __init__(
        self,
        batches: Sampler[list[int]],
        terms: Sequence[int],
        rank: int = 0,
        size: int = 1,
        passes: int = 1,
    ):
        self.batches, self.terms, self.rank, self.size, self.passes = (
            batches,
            terms,
            rank,
            size,
            passes,
        )

    @property
    def sampler(self) -> Any:
        """Return what Lightning calls `set_epoch` of: the order of the batches."""
        return getattr(self.batches, "sampler", None)

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.batches) * self.passes  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[tuple[int, Whole]]]:
        for batch in self.batches:
            whole = Whole(
                sum(self.terms[row] for row in batch), self.size * self.passes, len(batch)
            )
            ends = [len(batch) * n // self.passes for n in range(self.passes + 1)]
            for start, end in itertools.pairwise(ends):
                rows = batch[start:end][self.rank :: self.size] or [~batch[0]]
                yield [(row, whole) for row in rows]


def passes_of(batch_size: int, micro_batch_size: int | None, processes: int = 1) -> int:
    """Count the micro-batches of a global batch: no process reads more than `micro_batch_size` rows at once (None: no limit)."""
    return -(-batch_size // (micro_batch_size * processes)) if micro_batch_size else 1


class ResumableLoader(DataLoader):
    """A DataLoader over `Shares` of a BucketSampler's batches, which is saved and resumed between global batches.

    `taken`: micro-batches of this epoch that were read.
    """

    taken = 0
    batch_sampler: Shares

    @property
    def order(self) -> BucketSampler:
        return self.batch_sampler.sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.taken = self.order.start * self.batch_sampler.passes
        for batch in super().__iter__():
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position in the order: `taken` counts global batches, a begun one does not count."""
        return {"epoch": self.order.epoch, "taken": self.taken // self.batch_sampler.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.resume(state["epoch"], state["taken"])
