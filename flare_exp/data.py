"""English-paired data: pairs, tokenised batches, length-bucketed order, one DataModule per benchmark on one base."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from flare_exp.errors import UserError
from flare_exp.forms import Form, Item, Prediction, same_part
from flare_exp.states import StateCache, padded_states
from flare_exp.tasks import Example, Task

log = logging.getLogger(__name__)

# What the model reads and what it fuses, per method:
#   english     English text (fine-tuning on English)
#   target      target-language text alone (zero_shot, lora)
#   translated  English translation of the target text (translate_test)
#   paired      target-language text with its English counterpart as source (flare)
#   latent      target-language text with itself as source, for a translation model's encoder (flare_mt)
VIEWS = ("english", "target", "translated", "paired", "latent")

# Share of unknown tokens above which data are refused. Measured: an English WordPiece tokenizer on NusaX, XNLI and TyDiQA (Latin
# script) 0.04 % at most; the embedded models' pieces, learned from generated text, up to 11 % there; either one on scripts that
# it has never seen 50 to 100 %.
UNKNOWN = 0.25

Translate = Callable[[Sequence[Example], str], list[Example]]


@dataclass(frozen=True)
class Pair:
    """What the model reads (`target`), what it fuses (`source`, None for nothing), and whose answers or label count as right
    (`original`, None: those of `target`)."""

    target: Example
    source: Example | None
    original: Example | None = None

    @property
    def scored(self) -> Example:
        """The example that the prediction is compared with."""
        return self.original or self.target


def make_pairs(english: Sequence[Example], target: Sequence[Example], view: str) -> list[Pair]:
    """Pairs of the same examples in English and in the target language, seen as `view` asks."""
    if [(e.key, e.label) for e in english] != [(t.key, t.label) for t in target]:
        raise ValueError("English and target examples are not the same examples in the same order")
    read = english if view in ("english", "translated") else target
    sources: Sequence[Example | None] = {"paired": english, "latent": target}.get(view, [None] * len(read))
    return [Pair(r, s) for r, s in zip(read, sources, strict=True)]


def shuffled_sources(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Every pair with another pair's source: a seeded permutation without fixed points. The ablation that keeps the
    sources' distribution and breaks their meaning."""
    if len(pairs) < 2:
        raise UserError("source.shuffle=true needs at least two examples in every split")
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    # along one random cycle, everybody gets the next one's
    taken = dict(zip(order, order[1:] + order[:1], strict=True))
    return [replace(p, source=pairs[taken[i]].source) for i, p in enumerate(pairs)]


class PairedDataset(Dataset):
    """Encoded pairs, one row each, or several where the form reads long ones in windows. `truncated` counts the texts that a form
    cut, `cut_off` the examples whose answers were cut off with them.

    A row is asked for by its number, alone or with the batch that it belongs to (`Shares`). Number ~i is row i as a stand-in,
    which counts for nothing.

    The source of a window is the source's question with that part of its context which stands at the same relative place
    (`forms.same_part`), and is cut as any source is.

    `examples`: number of the pair that each row belongs to.
    `cache`: the sources' states, once they have been computed; None: sources are read anew every time.

    Args:
        training: leave out the examples whose answers were cut off, from which nothing right can be learned.
    """

    def __init__(self, pairs: Sequence[Pair], form: Form, source_form: Form | None = None, training: bool = False):
        self.form, self.cache = form, None
        rows: list[list[Item]] = [[] for _ in pairs]
        for number, item in enumerate(form.encode([p.target for p in pairs])):
            rows[item.get("example", number)].append(item)
        lost = {i for i, items in enumerate(rows) if all(item.get("cut_off") for item in items)}
        self.cut_off = len(lost)
        kept = [i for i in range(len(pairs)) if not (training and i in lost)]
        self.pairs, self.target = [pairs[i] for i in kept], [item for i in kept for item in rows[i]]
        self.examples = [number for number, i in enumerate(kept) for _ in rows[i]]
        sources = [
            pairs[i].source if len(rows[i]) == 1 else self._source_of_window(pairs[i], item) for i in kept for item in rows[i]
        ]
        known = [source for source in sources if source is not None]
        if known and len(known) != len(sources):
            raise ValueError("either every pair has a source or none has")
        self.source = (source_form or form).encode_sources(known) if known else None
        self.truncated = sum(item["cut"] for item in [*self.target, *(self.source or ())])

    def _source_of_window(self, pair: Pair, item: Item) -> Example | None:
        context = self.form.task.context
        if pair.source is None or context is None:
            return pair.source
        return same_part(pair.source, pair.target, context, item["window"])

    def texts(self, found: Mapping[int, Prediction]) -> list[str]:
        """Return the text of each pair's best prediction, of all rows' (row -> prediction)."""
        best: dict[int, Prediction] = {}
        for row, number in enumerate(self.examples):
            if number not in best or found[row].score > best[number].score:
                best[number] = found[row]
        return [best[number].text for number in range(len(self.pairs))]

    cache: StateCache | None

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, asked: int | tuple[int, Whole]) -> dict[str, Any]:
        index, whole = asked if isinstance(asked, tuple) else (asked, None)
        row = index if index >= 0 else ~index
        item = {"index": index, "whole": whole, "target": self.target[row]}
        if self.cache is not None:
            return {**item, "states": self.cache[row]}
        return {**item, "source": self.source[row]} if self.source else item

    @property
    def lengths(self) -> list[int]:
        """Count the tokens of each target: the order of batches follows from them, with a source or without."""
        return [len(item["inputs"]["input_ids"]) for item in self.target]

    @property
    def terms(self) -> list[int]:
        """Count the loss terms of each row."""
        return [self.form.terms(item) for item in self.target]

    @property
    def costs(self) -> list[int]:
        """Count the tokens of each pair, source included: what a model reads."""
        sources = [len(item["inputs"]["input_ids"]) for item in self.source or ()] or [0] * len(self)
        return [target + source for target, source in zip(self.lengths, sources, strict=True)]


def check_known(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase | None, place: str) -> None:
    """Check that a tokenizer knows the texts that it has encoded.

    Tokenizers of characters or with byte fallback know everything.

    Args:
        items: of a form, from `encode`.
        tokenizer: None where a plan only counts lengths.
        place: the texts, for the message.

    Raises:
        UserError: more than UNKNOWN of the tokens stand for text that it does not know.
    """
    if tokenizer is None:
        return
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return
    special = set(tokenizer.all_special_ids) - {unknown}
    counts = Counter(token for item in items for token in item["inputs"]["input_ids"])
    total = sum(count for token, count in counts.items() if token not in special)
    if total and counts[unknown] > UNKNOWN * total:
        share = f"{100 * counts[unknown] / total:.1f} % of the tokens are {tokenizer.unk_token}"
        raise UserError(
            f"{place}: {share}, unknown to the tokenizer of {tokenizer.name_or_path} (at most {100 * UNKNOWN:.0f} %): it is not "
            "made for this language or script, or is not this model's"
        )


class PairedCollator:
    """Pads each side of a batch to its own longest text. Batch: what the form makes of the targets, `source` (tokenizer
    output [B, S], or attention_mask [B, S] and states [B, S, n, d]), `index` [B] (row of the dataset; below
    0 a stand-in), `whole` (of the global batch that they belong to, if any)."""

    def __init__(self, form: Form, source_form: Form | None = None):
        self.form, self.source_form = form, source_form or form

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.form.collate([item["target"] for item in items])
        if "source" in items[0]:
            batch["source"] = self.source_form.pad([item["source"] for item in items])
        elif "states" in items[0]:
            batch["source"] = padded_states([item["states"] for item in items], self.source_form.tokenizer.padding_side)
        if items[0]["whole"] is not None:
            batch["whole"] = items[0]["whole"]
        return {**batch, "index": torch.tensor([item["index"] for item in items])}


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
        order = [i for w in range(0, len(order), span) for i in sorted(order[w : w + span], key=self.lengths.__getitem__)]
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

    def __init__(self, batches: Sampler[list[int]], terms: Sequence[int], rank: int = 0, size: int = 1, passes: int = 1):
        self.batches, self.terms, self.rank, self.size, self.passes = batches, terms, rank, size, passes

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
            whole = Whole(sum(self.terms[row] for row in batch), self.size * self.passes, len(batch))
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


class PairedDataModule(LightningDataModule):
    """Loads a benchmark's English data, pairs it with translations and serves batches.

    Train and validation: the English original and its translation into `lang`. Test: the original text of `lang` and
    its translation into English (PAPER: translate-train). With view="english" all three roles are English originals.

    Args:
        task: the benchmark.
        lang: the target language.
        form: how examples are read (flare_exp.forms).
        translate: (examples, language) -> the same examples in that language.
        source_form: how sources are read, if not in the same form.
        view: one of VIEWS.
        batch_size, workers: of the loaders; a batch is global, over all processes.
        micro_batch_size: most rows of a pass on one process; None: all rows of the batch that are the process's.
        seed: of the batch order.
        shuffle_source: pair every text with another one's source (ablation).
        empty_source: pair it with none (ablation).
        scores_originals: compare predictions on translations (view="translated") with the original examples.
        share: rank and number of the processes that share the batches out.
    """

    def __init__(
        self,
        task: Task,
        lang: str,
        form: Form,
        translate: Translate,
        *,
        source_form: Form | None = None,
        view: str = "paired",
        batch_size: int = 32,
        micro_batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        shuffle_source: bool = False,
        empty_source: bool = False,
        scores_originals: bool = False,
        share: tuple[int, int] = (0, 1),
    ):
        super().__init__()
        if view not in VIEWS:
            raise ValueError(f"view={view!r} is none of {', '.join(VIEWS)}")
        self.task, self.lang, self.form, self.translate, self.view = task, lang, form, translate, view
        self.source_form = source_form
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.shuffle_source, self.empty_source, self.share = shuffle_source, empty_source, share
        self.scores_originals = scores_originals
        self.passes = passes_of(batch_size, micro_batch_size, share[1])
        self._datasets: dict[str, PairedDataset] = {}

    def pairs(self, role: str) -> list[Pair]:
        """The pairs of a role, in the benchmark's order."""
        english_view = self.view == "english"
        if english_view:
            english = target = self.task.load(self.task.english, role)
        elif role == "test":
            target = self.task.load(self.lang, role)
            # zero_shot, lora and flare_mt never look at a translation of the test text, so none is made
            english = target if self.view in ("target", "latent") else self.translate(target, self.task.english)
        else:
            english = self.task.load(self.task.english, role)
            target = self.translate(english, self.lang)
        pairs = make_pairs(english, target, self.view)
        if self.scores_originals:
            pairs = [replace(p, original=original) for p, original in zip(pairs, target, strict=True)]
        if role == "train":
            pairs = self._answerable(pairs)
        if self.empty_source:
            return [replace(p, source=None) for p in pairs]
        return shuffled_sources(pairs, self.seed) if self.shuffle_source else pairs

    def _answerable(self, pairs: list[Pair]) -> list[Pair]:
        """Training pairs whose answer survived translation; test examples are never left out."""
        kept = [p for p in pairs if p.target.label is not None or p.target.answers]
        if lost := len(pairs) - len(kept):
            log.warning("%s: %d of %d training examples lost their answer in translation: left out", self.lang, lost, len(pairs))
        if not kept:
            raise UserError(f"{self.lang}: no training example kept its answer in translation; try another mt or mt.marker")
        return kept

    def dataset(self, role: str) -> PairedDataset:
        """The encoded pairs of a role (made once).

        Raises:
            UserError: no training example keeps its answer, or the tokenizer does not know most texts.
        """
        if role not in self._datasets:
            training = role == "train"
            made = self._datasets[role] = PairedDataset(self.pairs(role), self.form, self.source_form, training)
            if not made.pairs:
                raise UserError(
                    f"data.max_length={self.form.max_length}: every training example's answer is cut off; choose more"
                )
            place = f"{made.pairs[0].target.id.rpartition('/')[0]} ({self.view})"
            check_known(made.target, self.form.tokenizer, place)
            check_known(made.source or (), (self.source_form or self.form).tokenizer, f"{place}, sources")
            if made.truncated or made.cut_off:
                log.warning(
                    "%s (%s): %d texts are longer than %d tokens and were cut; %d examples lost their answer by that%s",
                    *(made.pairs[0].target.id.rpartition("/")[0], self.view, made.truncated, self.form.max_length),
                    *(made.cut_off, ": left out" if training and made.cut_off else ""),
                )
        return self._datasets[role]

    def drop_states(self) -> None:
        """Give up the sources' computed states."""
        for dataset in self._datasets.values():
            dataset.cache = None

    def train_dataloader(self) -> DataLoader:
        dataset = self.dataset("train")
        return self.loader(dataset, BucketSampler(dataset.lengths, self.batch_size, self.seed), ResumableLoader)

    def val_dataloader(self) -> DataLoader:
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader:
        return self._in_order("test")

    predict_dataloader = test_dataloader

    def _in_order(self, role: str) -> DataLoader:
        dataset = self.dataset(role)
        return self.loader(dataset, BatchSampler(range(len(dataset)), self.batch_size, drop_last=False))

    def loader(self, dataset: PairedDataset, batches: Any, kind: type[DataLoader] = DataLoader) -> DataLoader:
        """Read this process's parts of global batches (lists of rows)."""
        return kind(
            dataset,
            batch_sampler=Shares(batches, dataset.terms, *self.share, self.passes),
            collate_fn=PairedCollator(self.form, self.source_form),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
