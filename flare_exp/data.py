"""English-paired data: pairs, tokenised batches, length-bucketed order, one DataModule per benchmark on one base."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from flare_exp.errors import UserError
from flare_exp.tasks import Example, NusaX, Task, ToySentiment

log = logging.getLogger(__name__)

# What the model reads and what it fuses, per method:
#   english     English text (fine-tuning on English)
#   target      target-language text alone (zero_shot, lora)
#   translated  English translation of the target text (translate_test)
#   paired      target-language text with its English counterpart as source (flare)
VIEWS = ("english", "target", "translated", "paired")

Translate = Callable[[Sequence[Example], str], list[Example]]


@dataclass(frozen=True)
class Pair:
    """What the model reads (`target`) and what it fuses (`source`, None for nothing)."""

    id: str
    target: tuple[str, ...]
    source: tuple[str, ...] | None
    label: int


def make_pairs(english: Sequence[Example], target: Sequence[Example], view: str) -> list[Pair]:
    """Pairs of the same examples in English and in the target language, seen as `view` asks."""
    if [(e.key, e.label) for e in english] != [(t.key, t.label) for t in target]:
        raise ValueError("English and target examples are not the same examples in the same order")
    pairs = []
    for e, t in zip(english, target, strict=True):
        read = e.texts if view in ("english", "translated") else t.texts
        pairs.append(Pair(t.id, read, e.texts if view == "paired" else None, t.label))
    return pairs


def shuffled_sources(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Every pair with another pair's source: a seeded permutation without fixed points. The ablation that keeps the
    sources' distribution and breaks their meaning."""
    if len(pairs) < 2:
        raise UserError("source.shuffle=true needs at least two examples in every split")
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    # along one random cycle, everybody gets the next one's
    taken = dict(zip(order, order[1:] + order[:1], strict=True))
    return [Pair(p.id, p.target, pairs[taken[i]].source, p.label) for i, p in enumerate(pairs)]


class PairedDataset(Dataset):
    """Tokenised pairs. Texts longer than `max_length` tokens are cut, counted in `truncated`."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.pairs = list(pairs)
        self.truncated = 0
        self.target = self._encode([p.target for p in pairs], tokenizer, max_length)
        sources = [p.source for p in pairs if p.source is not None]
        if sources and len(sources) != len(self.pairs):
            raise ValueError("either every pair has a source or none has")
        self.source = self._encode(sources, tokenizer, max_length) if sources else None

    def _encode(self, texts: Sequence[tuple[str, ...]], tokenizer, max_length: int) -> list[dict[str, list[int]]]:
        columns = list(zip(*texts, strict=True))
        encoded = tokenizer(*map(list, columns), truncation=False, verbose=False)
        self.truncated += sum(len(ids) > max_length for ids in encoded["input_ids"])
        encoded = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
        return [{name: encoded[name][i] for name in encoded} for i in range(len(texts))]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"index": index, "label": self.pairs[index].label, "target": self.target[index]}
        return {**item, "source": self.source[index]} if self.source else item

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pair, source included: what a batch costs."""
        sources = self.source or [{"input_ids": []}] * len(self)
        return [len(t["input_ids"]) + len(s["input_ids"]) for t, s in zip(self.target, sources, strict=True)]


class PairedCollator:
    """Pads each side of a batch to its own longest text. Batch: target and source (tokenizer output, [B, T] and
    [B, S]), labels [B], index [B] (row of the dataset)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "labels": torch.tensor([item["label"] for item in items]),
            "index": torch.tensor([item["index"] for item in items]),
        }
        for side in ("target", "source"):
            if side in items[0]:
                batch[side] = dict(self.tokenizer.pad([item[side] for item in items], return_tensors="pt"))
        return batch


class BucketSampler(Sampler[list[int]]):
    """Batches of similar length in a random order that follows from (seed, epoch).

    Shuffles, sorts by length within windows of `window` batches, shuffles the batches. Every index once per epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, window: int = 20):
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        span = self.window * self.batch_size
        order = [i for w in range(0, len(order), span) for i in sorted(order[w : w + span], key=self.lengths.__getitem__)]
        batches = [order[b : b + self.batch_size] for b in range(0, len(order), self.batch_size)]
        rng.shuffle(batches)
        yield from batches


class PairedDataModule(LightningDataModule):
    """Loads a benchmark's English data, pairs it with translations and serves batches.

    Train and validation: the English original and its translation into `lang`. Test: the original text of `lang` and
    its translation into English (PAPER: translate-train). With view="english" all three roles are English originals.

    Args:
        task: the benchmark; must be of the class `benchmark` of a subclass.
        lang: the target language.
        tokenizer: of the backbone.
        translate: (examples, language) -> the same examples in that language.
        view: one of VIEWS.
        batch_size, max_length (tokens), workers: of the loaders.
        seed: of the batch order.
        shuffle_source: pair every text with another one's source (ablation).
        empty_source: pair it with none (ablation).
    """

    benchmark: ClassVar[type[Task]]

    def __init__(
        self,
        task: Task,
        lang: str,
        tokenizer: PreTrainedTokenizerBase,
        translate: Translate,
        *,
        view: str = "paired",
        batch_size: int = 32,
        max_length: int = 128,
        workers: int = 0,
        seed: int = 0,
        shuffle_source: bool = False,
        empty_source: bool = False,
    ):
        super().__init__()
        if not isinstance(task, self.benchmark):
            raise TypeError(f"{type(self).__name__} serves {self.benchmark.__name__}, not {type(task).__name__}")
        if view not in VIEWS:
            raise ValueError(f"view={view!r} is none of {', '.join(VIEWS)}")
        self.task, self.lang, self.tokenizer, self.translate, self.view = task, lang, tokenizer, translate, view
        self.batch_size, self.max_length, self.workers, self.seed = batch_size, max_length, workers, seed
        self.shuffle_source, self.empty_source = shuffle_source, empty_source
        self._datasets: dict[str, PairedDataset] = {}

    def pairs(self, role: str) -> list[Pair]:
        """The pairs of a role, in the benchmark's order."""
        english_view = self.view == "english"
        if english_view:
            english = target = self.task.load(self.task.english, role)
        elif role == "test":
            target = self.task.load(self.lang, role)
            # zero_shot and lora never look at a translation of the test text, so none is made
            english = target if self.view == "target" else self.translate(target, self.task.english)
        else:
            english = self.task.load(self.task.english, role)
            target = self.translate(english, self.lang)
        pairs = make_pairs(english, target, self.view)
        if self.empty_source:
            return [Pair(p.id, p.target, None, p.label) for p in pairs]
        return shuffled_sources(pairs, self.seed) if self.shuffle_source else pairs

    def dataset(self, role: str) -> PairedDataset:
        """The tokenised pairs of a role (made once)."""
        if role not in self._datasets:
            made = self._datasets[role] = PairedDataset(self.pairs(role), self.tokenizer, self.max_length)
            if made.truncated:
                log.warning(
                    "%s %s: %d texts are longer than data.max_length=%d tokens and were cut",
                    *(self.lang, role, made.truncated, self.max_length),
                )
        return self._datasets[role]

    def train_dataloader(self) -> DataLoader:
        dataset = self.dataset("train")
        return self._loader(dataset, batch_sampler=BucketSampler(dataset.lengths, self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.dataset("validation"), batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.dataset("test"), batch_size=self.batch_size)

    predict_dataloader = test_dataloader

    def _loader(self, dataset: PairedDataset, **order) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=PairedCollator(self.tokenizer),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            **order,
        )


class ToySentimentDataModule(PairedDataModule):
    benchmark = ToySentiment


class NusaXDataModule(PairedDataModule):
    benchmark = NusaX


DATAMODULES: dict[type[Task], type[PairedDataModule]] = {cls.benchmark: cls for cls in (ToySentimentDataModule, NusaXDataModule)}
