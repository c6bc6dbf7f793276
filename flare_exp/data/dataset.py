"""Encode pairs, and collate them to batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from flare_exp.data.pairing import Pair
from flare_exp.data.preprocessing import Item, Prediction, Preprocessor, same_part
from flare_exp.data.sampling import GlobalBatch
from flare_exp.data.source_augmentation import SourceAugmentation
from flare_exp.data.source_cache import SourceStateCache, padded_states
from flare_exp.errors import UserError
from flare_exp.tasks import Example

# Share of unknown tokens above which data are refused. Measured on NusaX, XNLI and TyDiQA in Latin
# script: an English WordPiece tokenizer has 0.04 % at most; the embedded models' tokenizers,
# trained on generated text, up to 11 %. On scripts without training text, either has 50 to 100 %.
UNKNOWN = 0.25


class PairedDataset(Dataset):
    """Encoded pairs, one row each, or several rows where a long pair is split into windows.

    `truncated` counts the texts that a preprocessor cut. `cut_off` counts the examples whose
    answers were cut off with them.

    A row is read by its number, alone or with the batch that it belongs to
    (`RankShardBatchSampler`). Number ~i is row i as a padding row, which does not count in the loss
    or the predictions.

    The source of a window is the question of the source with the part of its context at the same
    relative place (`same_part`). It is cut as any source is.

    `examples`: number of the pair that each row belongs to.
    `source`: encoded sources, one for each row, then the further ones of pairs with several
    (`Pair.more`), then those of `versions`, all in the same order.
    `count`: number of sources that a row fuses.
    `cache`: the sources' states once they have been computed; None if sources are encoded anew
    every time.

    Args:
        pairs: pairs to encode.
        preprocessor: encodes the targets.
        source_preprocessor: encodes the sources; None for `preprocessor`.
        training: leave out the examples whose answers were cut off, since they have no right answer
            to learn.
        joint: the model reads each target and its source as one input (`Preprocessor.joint`),
            instead of fusing the source.
        augmentation: draws the sources that rows of a global batch fuse; None: their own.
        versions: the same pairs with other sources (`SourceAugmentation.versions`).

    Raises:
        ValueError: some pairs have a source and others have none, or more of them.
        UserError: `augmentation` needs another example's source, and there is one example.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        preprocessor: Preprocessor,
        source_preprocessor: Preprocessor | None = None,
        training: bool = False,
        joint: bool = False,
        augmentation: SourceAugmentation | None = None,
        versions: Sequence[Sequence[Pair]] = (),
    ):
        self.preprocessor, self.cache, self.augmentation = preprocessor, None, augmentation
        rows: list[list[Item]] = [[] for _ in pairs]
        for number, item in enumerate(preprocessor.encode([p.target for p in pairs])):
            rows[item.get("example", number)].append(item)
        lost = {i for i, items in enumerate(rows) if all(item.get("cut_off") for item in items)}
        self.cut_off = len(lost)
        kept = [i for i in range(len(pairs)) if not (training and i in lost)]
        self.pairs, self.target = [pairs[i] for i in kept], [item for i in kept for item in rows[i]]
        self.examples = [number for number, i in enumerate(kept) for _ in rows[i]]
        encode = (source_preprocessor or preprocessor).encode_sources
        own = self._sources(pairs, kept, rows)
        self.source = encode(own) if own else None
        for further in zip(*(p.more for p in pairs), strict=True):
            if self.source is None:  # no example is kept
                break
            other = [replace(p, source=s) for p, s in zip(pairs, further, strict=True)]
            self.source += encode(self._sources(other, kept, rows))
        self.truncated = sum(item["cut"] for item in [*self.target, *(self.source or ())])
        if joint and self.source is not None:
            both = zip(self.target, self.source, strict=True)
            self.target, self.source = [preprocessor.joint(*pair) for pair in both], None
        self.count = len(self.source) // len(self.target) if self.source else 0
        if self.source is not None and augmentation:
            if augmentation.mixes_examples and len(self.pairs) < 2:
                raise UserError(f"source.noise={augmentation.noise}: needs at least two examples")
            for version in versions:
                self.source += encode(self._sources(version, kept, rows))

    def _sources(
        self, pairs: Sequence[Pair], kept: Sequence[int], rows: Sequence[Sequence[Item]]
    ) -> list[Example]:
        """Return the source of every row; none if the pairs have no sources.

        Args:
            pairs: all pairs.
            kept: numbers of the pairs that have rows.
            rows: items of each pair.
        """
        sources = [
            pairs[i].source if len(rows[i]) == 1 else self._source_of_window(pairs[i], item)
            for i in kept
            for item in rows[i]
        ]
        known = [source for source in sources if source is not None]
        if known and len(known) != len(sources):
            raise ValueError("either every pair has a source or none has")
        return known

    def _source_of_window(self, pair: Pair, item: Item) -> Example | None:
        context = self.preprocessor.task.context
        if pair.source is None or context is None:
            return pair.source
        return same_part(pair.source, pair.target, context, item["window"])

    def texts(self, found: Mapping[int, Prediction]) -> list[str]:
        """Return the text of each pair's best prediction; `found` maps row -> prediction."""
        return [prediction.text for prediction in self.best(found)]

    def best(self, found: Mapping[int, Prediction]) -> list[Prediction]:
        """Return the best prediction of each pair among all of its rows.

        `found` maps row -> prediction.
        """
        best: dict[int, Prediction] = {}
        for row, number in enumerate(self.examples):
            if number not in best or found[row].score > best[number].score:
                best[number] = found[row]
        return [best[number] for number in range(len(self.pairs))]

    cache: SourceStateCache | None

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, asked: int | tuple[int, GlobalBatch]) -> dict[str, Any]:
        index, whole = asked if isinstance(asked, tuple) else (asked, None)
        row = index if index >= 0 else ~index
        item = {"index": index, "whole": whole, "target": self.target[row]}
        if not self.source:
            return item
        fused: int | None = row
        if self.augmentation and whole is not None:
            fused = self.augmentation.source_of(row, whole.epoch, self.examples)
        # a row without a source has its own as padding: the collator masks it
        kept = row if fused is None else fused
        item["fuses"] = fused is not None
        numbers = [kept + i * len(self) for i in range(self.count)]
        if self.cache is not None:
            return {**item, "states": [self.cache[number] for number in numbers]}
        return {**item, "source": [self.source[number] for number in numbers]}

    @property
    def lengths(self) -> list[int]:
        """Count the tokens of each target.

        The batch order depends on these lengths alone, so it is the same with and without sources.
        """
        return [len(item["inputs"]["input_ids"]) for item in self.target]

    @property
    def terms(self) -> list[int]:
        """Count the loss terms of each row."""
        return [self.preprocessor.terms(item) for item in self.target]

    @property
    def costs(self) -> list[int]:
        """Count the tokens that a model reads for each pair, source included."""
        found, own = self.lengths, (self.source or ())[: self.count * len(self)]
        for number, item in enumerate(own):
            found[number % len(self)] += len(item["inputs"]["input_ids"])
        return found


def check_known(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase | None, place: str
) -> None:
    """Check that a tokenizer covers the texts that it has encoded.

    Tokenizers of characters or with byte fallback cover every text.

    Args:
        items: items from a preprocessor's `encode`.
        tokenizer: the tokenizer, or None where a plan only counts lengths.
        place: name of the texts, for the message.

    Raises:
        UserError: more than UNKNOWN of the tokens are unknown tokens.
    """
    if tokenizer is None:
        return
    unknown = unknown_share((item["inputs"]["input_ids"] for item in items), tokenizer)
    if unknown > UNKNOWN:
        share = f"{100 * unknown:.1f} % of the tokens are {tokenizer.unk_token}"
        raise UserError(
            f"{place}: {share}, unknown to the tokenizer of {tokenizer.name_or_path} (at most "
            f"{100 * UNKNOWN:.0f} %): it is not "
            "made for this language or script, or is not this model's"
        )


def unknown_share(rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the share of unknown tokens, special ones left out; 0 if there is no such token."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
    ):
        return 0.0
    special = set(tokenizer.all_special_ids) - {unknown}
    counts = Counter(token for row in rows for token in row if token not in special)
    return counts[unknown] / max(1, counts.total())


def _by_number(items: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """Return the first source of every item, then the second of every item, and so on."""
    return [one for number in zip(*(item[name] for item in items), strict=True) for one in number]


class PairedCollator:
    """Collates items to a batch, padding targets and sources to their own longest text.

    The batch has what the preprocessor builds of the targets, and
    `source`: tokenizer output [B, S], or attention_mask [B, S] and states [B, S, n, d]; the mask
        of a row without a source is zero; with K sources for each text, all have K as a first
        dimension;
    `index` [B]: rows of the dataset, below 0 for padding rows;
    `whole`: facts of the global batch that the rows belong to, if any.
    """

    def __init__(self, preprocessor: Preprocessor, source_preprocessor: Preprocessor | None = None):
        self.preprocessor, self.source_preprocessor = (
            preprocessor,
            source_preprocessor or preprocessor,
        )

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate items of a `PairedDataset` to one batch."""
        batch = self.preprocessor.collate([item["target"] for item in items])
        if "source" in items[0]:
            batch["source"] = self.source_preprocessor.pad(_by_number(items, "source"))
        elif "states" in items[0]:
            batch["source"] = padded_states(
                _by_number(items, "states"), self.source_preprocessor.tokenizer.padding_side
            )
        if "source" in batch:
            if (count := len(batch["source"]["attention_mask"]) // len(items)) > 1:
                given = batch["source"].items()
                batch["source"] = {name: x.unflatten(0, (count, -1)) for name, x in given}
            fuses = torch.tensor([item["fuses"] for item in items])
            batch["source"]["attention_mask"] *= fuses[:, None]
        if items[0]["whole"] is not None:
            batch["whole"] = items[0]["whole"]
        return {**batch, "index": torch.tensor([item["index"] for item in items])}
