"""Load a benchmark, pair it with its translations and serve batches of it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import BatchSampler, DataLoader

from flare_exp.data.dataset import PairedCollator, PairedDataset, check_known
from flare_exp.data.pairing import Pair, Translate, make_pairs, shuffled_sources
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Preprocessor
from flare_exp.data.sampling import (
    LengthBucketedBatchSampler,
    RankShardBatchSampler,
    ResumableDataLoader,
    micro_batches_per_batch,
)
from flare_exp.data.source_augmentation import SourceAugmentation
from flare_exp.data.temperature import TemperatureBatchSampler
from flare_exp.errors import UserError
from flare_exp.languages import is_spaced
from flare_exp.tasks import Example, Task

log = logging.getLogger(__name__)

Unlabeled = Callable[[bool], tuple[Sequence[Example], Sequence[Example]]]


class PairedDataModule(LightningDataModule):
    """Loads a benchmark's English data, pairs it with translations and serves batches.

    Train and validation: the English original and its translation into each of `langs`. Test: the
    original text of `langs` and its translation into English. The paper calls this translate-train.
    With mode="english" all three roles are English originals.

    Args:
        task: the benchmark.
        langs: the target language, or several, whose rows follow one another.
        preprocessor: encodes the examples (flare_exp.data.question_answering, for example).
        translate: (examples, language) -> the same examples in that language.
        source_preprocessor: encodes the sources, if they need another preprocessor.
        mode: what the model reads and fuses.
        batch_size: rows of a global batch, over all processes.
        workers: worker processes of each loader.
        micro_batch_size: maximum number of rows of a pass on one process; None for all rows of the
            batch that the process has.
        seed: seed of the batch order.
        shuffle_source: pair every text with another one's source (ablation).
        empty_source: pair every text with no source (ablation).
        ablate_in: the data that these two ablations change: "all", "train" (training and
            validation) or "test".
        augmentation: draws the sources of training examples; None: always their own.
        scores_originals: compare predictions on translations (mode="translated") with the original
            examples.
        share: rank and number of the processes that split the batches.
        sources: a translator and a language for each source that is fused; empty: English, by
            `translate`. Texts that are in that language already are one source, whoever would
            translate them.
        unlabeled: returns further training texts without a label, as examples in English and in
            the target language; its argument says whether the English ones are needed, which are
            the same as the others otherwise. None: there are none.
        temperature: draws the training rows of several languages
            (`flare_exp.data.temperature`); None reads every row once per epoch.
    """

    def __init__(
        self,
        task: Task,
        langs: str | Sequence[str],
        preprocessor: Preprocessor,
        translate: Translate,
        *,
        source_preprocessor: Preprocessor | None = None,
        mode: PairingMode | str = PairingMode.PAIRED,
        batch_size: int = 32,
        micro_batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        shuffle_source: bool = False,
        empty_source: bool = False,
        ablate_in: str = "all",
        augmentation: SourceAugmentation | None = None,
        scores_originals: bool = False,
        share: tuple[int, int] = (0, 1),
        sources: Sequence[tuple[Translate, str]] = (),
        unlabeled: Unlabeled | None = None,
        temperature: float | None = None,
    ):
        super().__init__()
        self.task, self.mode, self.temperature = task, PairingMode(mode), temperature
        self.langs = [langs] if isinstance(langs, str) else [*langs]
        self.preprocessor, self.translate = preprocessor, translate
        self.source_preprocessor = source_preprocessor
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.shuffle_source, self.empty_source, self.share = shuffle_source, empty_source, share
        self.ablate_in, self.augmentation = ablate_in, augmentation
        self.scores_originals, self.unlabeled = scores_originals, unlabeled
        self.sources = [*sources]
        self.passes = micro_batches_per_batch(batch_size, micro_batch_size, share[1])
        self._datasets: dict[str, PairedDataset] = {}

    def pairs(self, role: str) -> list[Pair]:
        """Return the pairs of a role, language by language in the benchmark's order.

        Raises:
            UserError: no training example of a language keeps its answer.
        """
        langs = [self.task.english] if self.mode is PairingMode.ENGLISH else self.langs
        return [pair for lang in langs for pair in self._pairs_of(role, lang)]

    def _pairs_of(self, role: str, lang: str) -> list[Pair]:
        """Return the pairs of a role in one language."""
        english, target = self._both(role, lang)
        pairs = make_pairs(english, target, self.mode)
        if self.sources:
            pairs = self._with_sources(role, lang, pairs)
        if self.scores_originals:
            pairs = [
                replace(p, original=original) for p, original in zip(pairs, target, strict=True)
            ]
        if role == "train":
            pairs = self._answerable(pairs, lang)
            if self.unlabeled is not None:
                needed = self.mode.translates_tests
                pairs += make_pairs(*self.unlabeled(needed), self.mode)
        if self.ablate_in not in ("all", "test" if role == "test" else "train"):
            return pairs
        if self.empty_source:
            return [replace(p, source=None, more=()) for p in pairs]
        return shuffled_sources(pairs, self.seed) if self.shuffle_source else pairs

    def _with_sources(self, role: str, lang: str, pairs: Sequence[Pair]) -> list[Pair]:
        """Return the pairs of one role and language with each of `sources`."""
        own = lang if role == "test" else self.task.english
        examples = self.task.load(own, role)
        sources: list[Sequence[Example]] = []
        for translate, other in self.sources:
            if other != own:
                sources.append(translate(examples, other))
            elif not any(given is examples for given in sources):
                sources.append(examples)
        return [
            replace(pair, source=first, more=tuple(more))
            for pair, first, *more in zip(pairs, *sources, strict=True)
        ]

    def _both(self, role: str, lang: str) -> tuple[Sequence[Example], Sequence[Example]]:
        """Return the same examples of a role in English and in a language."""
        if self.mode is PairingMode.ENGLISH:
            english = self.task.load(self.task.english, role)
            return english, english
        if role == "test":
            target = self.task.load(lang, role)
            # zero_shot, lora and flare_mt read no translation of the test text, so none is made
            translates = self.mode.translates_tests and not self.sources
            return (self.translate(target, self.task.english) if translates else target), target
        english = self.task.load(self.task.english, role)
        target = self.translate(english, lang)
        if len(self.langs) == 1:
            return english, target
        # a translation has the id of its original, which several languages share
        if self.mode is PairingMode.TRANSLATED:
            english = [e.into(lang) for e in english]
        return english, [e.into(lang) for e in target]

    def _answerable(self, pairs: list[Pair], lang: str) -> list[Pair]:
        """Return the training pairs whose answer survived translation.

        Test examples are never left out.
        """
        kept = [p for p in pairs if p.target.label is not None or p.target.answers]
        if lost := len(pairs) - len(kept):
            log.warning(
                "%s: %d of %d training examples lost their answer in translation: left out",
                lang,
                lost,
                len(pairs),
            )
        if not kept:
            raise UserError(
                f"{lang}: no training example kept its answer in translation; try another mt "
                "or mt.marker"
            )
        return kept

    def dataset(self, role: str) -> PairedDataset:
        """Return the encoded pairs of a role, which are built once.

        Raises:
            UserError: no training example keeps its answer, or too many tokens are unknown
                (`check_known`).
        """
        if role not in self._datasets:
            training, pairs = role == "train", self.pairs(role)
            drawn = self.augmentation if training else None
            made = self._datasets[role] = PairedDataset(
                pairs,
                self.preprocessor,
                self.source_preprocessor,
                training,
                joint=self.mode is PairingMode.JOINT,
                augmentation=drawn,
                versions=self._versions(drawn, pairs) if drawn else (),
            )
            self._check(made)
            if made.truncated or made.cut_off:
                log.warning(
                    "%s (%s): %d texts are longer than %d tokens and were cut; %d examples lost "
                    "their answer by that%s",
                    *(
                        ", ".join(_places(made)),
                        self.mode,
                        made.truncated,
                        self.preprocessor.max_length,
                    ),
                    *(made.cut_off, ": left out" if training and made.cut_off else ""),
                )
        return self._datasets[role]

    @property
    def source_codes(self) -> dict[str, str]:
        """Return language -> its code, where a translation model's encoder is told it."""
        return dict(getattr(self.source_preprocessor, "codes", {}))

    @property
    def spaced_sources(self) -> list[bool]:
        """Return whether each language of the sources is written with spaces."""
        return [is_spaced(lang) for lang in self._source_langs]

    @property
    def _source_langs(self) -> list[str]:
        """Return the languages of the sources that wrong words are put into."""
        if self.mode is PairingMode.LATENT:
            return self.langs
        return [self.sources[0][1] if self.sources else self.task.english]

    def _versions(self, drawn: SourceAugmentation, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """Return the training pairs with wrong words in their sources, in each version."""
        if len(self._source_langs) == 1:
            return drawn.versions(pairs, self._source_langs[0])
        # the sources are texts of the target languages, one language after the other
        own = [[p for p in pairs if p.target.lang == lang] for lang in self.langs]
        made = [drawn.versions(part, lang) for part, lang in zip(own, self.langs, strict=True)]
        return [[*itertools.chain(*parts)] for parts in zip(*made, strict=True)]

    def _check(self, made: PairedDataset) -> None:
        """Check that the rows of each language can be learned from.

        Raises:
            UserError: they cannot.
        """
        there = {pair.target.lang for pair in made.pairs}
        # with one language, the ids of its training data name English
        lost = [lang for lang in self.langs if lang not in there] if len(self.langs) > 1 else []
        if (self.mode is not PairingMode.ENGLISH and lost) or not there:
            raise UserError(
                f"data.max_length={self.preprocessor.max_length}: every training example's "
                f"answer is cut off{f' in {lost[0]}' if lost else ''}; choose more"
            )
        source = (self.source_preprocessor or self.preprocessor).tokenizer
        for place, rows in _places(made).items():
            place = f"{place} ({self.mode})"
            check_known([made.target[row] for row in rows], self.preprocessor.tokenizer, place)
            check_known(
                [made.source[row] for row in rows] if made.source else (),
                source,
                f"{place}, sources",
            )

    def drop_states(self) -> None:
        """Drop the computed states of the sources."""
        for dataset in self._datasets.values():
            dataset.cache = None

    def train_dataloader(self) -> DataLoader:
        """Build the loader of training batches, which a resumed run can continue."""
        dataset = self.dataset("train")
        return self.loader(dataset, self.training_batches(dataset), ResumableDataLoader)

    def training_batches(self, dataset: PairedDataset) -> LengthBucketedBatchSampler:
        """Return the sampler of training batches."""
        how = dataset.lengths, self.batch_size, self.seed
        if self.temperature is None or len(self.langs) < 2 or self.mode is PairingMode.ENGLISH:
            return LengthBucketedBatchSampler(*how)
        langs = [dataset.pairs[number].target.lang for number in dataset.examples]
        return TemperatureBatchSampler(*how, langs, self.temperature)

    def val_dataloader(self) -> DataLoader:
        """Build the loader of validation batches, in the benchmark's order."""
        return self.in_order("validation")

    def test_dataloader(self) -> DataLoader:
        """Build the loader of test batches, in the benchmark's order."""
        return self.in_order("test")

    predict_dataloader = test_dataloader

    def in_order(self, role: str) -> DataLoader:
        """Build the loader of a role's batches, in the benchmark's order."""
        dataset = self.dataset(role)
        return self.loader(
            dataset, BatchSampler(range(len(dataset)), self.batch_size, drop_last=False)
        )

    def loader(
        self, dataset: PairedDataset, batches: Any, kind: type[DataLoader] = DataLoader
    ) -> DataLoader:
        """Build a loader that reads this process's part of global batches (lists of rows)."""
        return kind(
            dataset,
            batch_sampler=RankShardBatchSampler(batches, dataset.terms, *self.share, self.passes),
            collate_fn=PairedCollator(self.preprocessor, self.source_preprocessor),
            # otherwise a loader draws from the generator of dropout, as often as it has workers
            generator=torch.Generator().manual_seed(self.seed),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _places(dataset: PairedDataset) -> dict[str, list[int]]:
    """Return `<task>/<lang>/<split>` -> its rows of a dataset."""
    found: dict[str, list[int]] = {}
    for row, number in enumerate(dataset.examples):
        place = dataset.pairs[number].target.id.rpartition("/")[0]
        found.setdefault(place, []).append(row)
    return found
