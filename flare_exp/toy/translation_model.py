"""Train a tiny NLLB (arXiv 2207.04672) on parallel text of the generated world.

The classes are transformers' own. Real translation code (language codes, forced first token, beams,
marked answers) thus runs without a download.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flare_exp.languages import language
from flare_exp.toy.meaning import Inquiry, Review
from flare_exp.toy.objectives import padded
from flare_exp.toy.tokenizers import byte_pairs
from flare_exp.toy.training import STATE, reproducible, save, train
from flare_exp.toy.world import SPLITS, Sampler, T, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import NllbTokenizer, PreTrainedModel


LANGS = ("en", "near", "far")
MARKS = ('"{}"', "[{}]", "<a>{}</a>")
MARKED = 0.85  # share of the stories with a mark; they are a quarter of all pairs
Pair = tuple[tuple[str, str], tuple[str, str]]  # (language, sentence), twice
Row = tuple[list[int], list[int]]


def train_mt(folder: Path, *, world_seed: int, pairs: int, **recipe) -> dict[str, Any]:
    """Train one model on en <-> near and en <-> far of a generated world.

    Args:
        folder: folder of the checkpoint.
        world_seed: seed of the world.
        pairs: number of sentence pairs.
        **recipe: arguments of `learn`.
    """
    return learn(folder, list(parallel(World(world_seed), pairs)), LANGS, **recipe)


def learn(
    folder: Path,
    texts: list[Pair],
    langs: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a model on parallel text and save it, with its tokenizer, in `folder`.

    Returns:
        facts for the manifest: parameter count, vocabulary size, loss over the last 100 steps.
    """
    import torch

    with reproducible():
        codes = [language(lang).flores for lang in langs]
        tokenizer = nllb_tokenizer([text for pair in texts for _, text in pair], vocab_size, codes)
        torch.manual_seed(seed)
        model = blank_nllb(tokenizer, hidden_size, layers, heads)
        rows = encoded(tokenizer, texts)
        losses = train(
            model,
            rows,
            translation(tokenizer),
            steps,
            batch_size,
            lr,
            length=lambda row: len(row[0]),
            state=folder / STATE,
        )
    return save(folder, model, tokenizer, "translation", losses)


# --- parallel text --------------------------------------------------------------------------------


class Reader(Sampler):
    """Sampler that draws rare words more often than Zipf's law, which the tasks follow.

    The short training could not learn them otherwise.
    """

    def word(self, words: list[str]) -> str:
        """Return a random word; its probability falls with the square root of its rank."""
        return self.rng.choices(words, [(rank + 3) ** -0.5 for rank in range(len(words))])[0]


def parallel(world: World, size: int) -> Iterator[Pair]:
    """Yield pairs of sentences, one of the two English.

    No tree of a task is among them. The tasks' questions are, because only about 150 different ones
    exist.
    """
    rng = random.Random(f"{world.seed}-mt")
    sampler = Reader(rng, contrast=0.6, setting=0.3)
    held = held_out(world)

    def unseen(draw: Callable[[], T]) -> T:
        while not held.isdisjoint(parts(tree := draw())):
            pass
        return tree

    for _ in range(size):
        langs = ["en", rng.choice(["near", "far"])]
        rng.shuffle(langs)
        kind = rng.choices(["review", "opinion", "story", "question"], [10, 3, 6, 2])[0]
        if kind in ("review", "opinion"):
            review = unseen(
                sampler.any_review if kind == "review" else lambda: sampler.any_inference().premise
            )
            texts = [world.render(review, lang) for lang in langs]
        else:
            inquiry = unseen(sampler.inquiry)
            asked = [world.ask(inquiry, lang) for lang in langs]
            mark = rng.choice(MARKS) if rng.random() < MARKED else "{}"
            texts = [question for _, question, *_ in asked]
            if kind == "story":
                texts = [
                    story[:start] + mark.format(word) + story[start + len(word) :]
                    for story, _, word, start in asked
                ]
        source, target = zip(langs, texts, strict=True)
        yield source, target


def parts(tree: Any) -> set[Any]:
    """Return the parts of a tree that are translated, whatever its question asks for."""
    if isinstance(tree, Review):
        return {tree}
    if isinstance(tree, Inquiry):
        return {replace(tree, asked="time", given="place"), tree.opinion}
    return {tree.premise, tree.hypothesis}


def held_out(world: World) -> set[Any]:
    """Return the parts of every tree of every task and split."""
    tasks = (world.reviews, world.inferences, world.inquiries)
    return {
        part for trees in tasks for split in SPLITS for tree in trees(split) for part in parts(tree)
    }


# --- tokenizer and model --------------------------------------------------------------------------


def nllb_tokenizer(documents: list[str], vocab_size: int, codes: list[str]) -> NllbTokenizer:
    """Train a tokenizer of NLLB.

    `vocab_size` pieces are learned, within words and without marks. The first piece of a word is
    then merged with the ▁ at its beginning. A word with a mark before it therefore has the same
    pieces, except for that ▁.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split
    from transformers import NllbTokenizer

    learned = byte_pairs(documents, vocab_size, [Split(Regex('▁|"|\\[|\\]|</?a>'), "isolated")])
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *learned["vocab"]]
    merges: Any = [tuple(merge) for merge in learned["merges"]]

    def build() -> NllbTokenizer:
        return NllbTokenizer(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            extra_special_tokens=codes,
            src_lang=codes[0],
            model_max_length=1024,
        )

    bare, words = build(), sorted({word for text in documents for word in text.split()})
    first = {bare.tokenize(word)[1]: None for word in words}
    tokens += [f"▁{piece}" for piece in first]
    merges += [("▁", piece) for piece in first]
    return build()


def blank_nllb(
    tokenizer: NllbTokenizer, hidden_size: int, layers: int, heads: int
) -> PreTrainedModel:
    """Build an untrained NLLB."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    both: dict[str, Any] = {
        "layers": layers,
        "attention_heads": heads,
        "ffn_dim": 2 * hidden_size,
        "layerdrop": 0.0,
    }
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        **{
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in both.items()
        },
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.05,  # the default, 0.02, is for a width of 1024
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    return M2M100ForConditionalGeneration(config)


def encoded(tokenizer: NllbTokenizer, texts: list[Pair]) -> list[Row]:
    """Return the token ids of both sides, `[code] tokens </s>`.

    Words are tokenized independently, each only once, which saves seconds.
    """
    vocab = tokenizer.get_vocab()
    words = {word for pair in texts for _, text in pair for word in text.split()}
    ids = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in words}

    def encode(lang: str, text: str) -> list[int]:
        return [
            vocab[language(lang).flores],
            *(i for word in text.split() for i in ids[word]),
            tokenizer.eos_token_id,
        ]

    return [(encode(*source), encode(*target)) for source, target in texts]


def translation(tokenizer: NllbTokenizer) -> Callable[[list[Row]], dict[str, Tensor]]:
    """Return a collator for translation."""
    pad = tokenizer.pad_token_id

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        source, target = zip(*rows, strict=True)
        ids = padded(source, pad)
        return {
            "input_ids": ids,
            "attention_mask": (ids != pad).long(),
            "labels": padded(target, -100),
        }

    return collate
