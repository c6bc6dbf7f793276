"""Decide which rows are in which batch and on which process, and where training resumes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Sampler


class LengthBucketedBatchSampler(Sampler[list[int]]):
    """Batches of similar length in a random order that follows from (seed, epoch).

    The rows are shuffled, then sorted by length within windows of `window` batches; then the
    batches are shuffled. Every index occurs once per epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, window: int = 20):
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self.epoch = self.start = 0

    @property
    def sampler(self) -> LengthBucketedBatchSampler:
        """Return this sampler.

        Lightning looks for `set_epoch` on a batch sampler's `sampler`, not on the batch sampler.
        """
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the order depends on; Lightning calls this before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume(self, epoch: int, start: int) -> None:
        """Start the next pass within an epoch, at batch `start`."""
        self.epoch, self.start = epoch, start

    def drawn(self, rng: random.Random) -> list[int]:
        """Return the rows of an epoch in random order."""
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        return order

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        order = self.drawn(rng)
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


class GlobalBatch(NamedTuple):
    """Facts of the global batch that a row belongs to; the row's loss is divided by them.

    terms: loss terms in the global batch (`Preprocessor.terms`); parts: passes that read it, on all
    processes; rows: its examples; epoch: number of the pass over the data.
    """

    terms: int
    parts: int
    rows: int
    epoch: int = 0


class RankShardBatchSampler(Sampler[list[tuple[int, GlobalBatch]]]):
    """Split every global batch of `batches` into `passes` micro-batches, and take this rank's rows.

    Neighbors stay in one micro-batch, so that texts of similar length stay together. The rows of a
    micro-batch are dealt to the ranks in turn. Every global batch has the same number of parts,
    since each rank takes part in every pass. A part without rows gets a copy of the batch's first
    row (index ~row), which does not count.

    Args:
        batches: batches of row numbers of a dataset.
        terms: loss terms of each row.
        rank: rank of this process.
        size: number of processes.
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
        """Return the sampler of the batches, whose `set_epoch` Lightning calls."""
        return getattr(self.batches, "sampler", None)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the batch order."""
        self.batches.set_epoch(epoch)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.batches) * self.passes  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[tuple[int, GlobalBatch]]]:
        for batch in self.batches:
            whole = GlobalBatch(
                sum(self.terms[row] for row in batch),
                self.size * self.passes,
                len(batch),
                getattr(self.sampler, "epoch", 0),
            )
            ends = [len(batch) * n // self.passes for n in range(self.passes + 1)]
            for start, end in itertools.pairwise(ends):
                rows = batch[start:end][self.rank :: self.size] or [~batch[0]]
                yield [(row, whole) for row in rows]


def micro_batches_per_batch(
    batch_size: int, micro_batch_size: int | None, processes: int = 1
) -> int:
    """Count the micro-batches of a global batch.

    No process reads more than `micro_batch_size` rows at once; None sets no limit.
    """
    return -(-batch_size // (micro_batch_size * processes)) if micro_batch_size else 1


class ResumableDataLoader(DataLoader):
    """A DataLoader that can be saved and resumed within an epoch.

    Its batches are those of a `RankShardBatchSampler` over a `LengthBucketedBatchSampler`. It is
    saved and resumed at whole global batches. `taken` counts the micro-batches of this epoch that
    were read.
    """

    taken = 0
    batch_sampler: RankShardBatchSampler

    @property
    def order(self) -> LengthBucketedBatchSampler:
        """Return the sampler that determines the order of the batches."""
        return self.batch_sampler.sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.taken = self.order.start * self.batch_sampler.passes
        for batch in super().__iter__():
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of complete global batches that were read in it."""
        return {"epoch": self.order.epoch, "taken": self.taken // self.batch_sampler.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume at the position that `state_dict` returned."""
        self.order.resume(state["epoch"], state["taken"])
