"""Train the tokenizers of the tiny models."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase, XLMRobertaTokenizer


MAX_LENGTH = 128  # tokens of a pre-training document, and number of XLM-R's learned positions
SENTINELS = 100  # as in T5

log = logging.getLogger(__name__)


def unigram_pieces(documents: list[str], vocab_size: int) -> list[tuple[str, float]]:
    """Learn pieces from `documents` and return them with their scores.

    The pieces come from byte-pair merges, scored by their rank: the unigram learner prunes frequent
    words of a corpus as small as this one.
    """
    return [
        (token, -math.log(rank + 10))
        for rank, token in enumerate(byte_pairs(documents, vocab_size)["vocab"])
    ]


def byte_pairs(
    documents: Iterable[str], vocab_size: int, splits: Sequence[PreTokenizer] = ()
) -> dict[str, Any]:
    """Learn byte-pair merges within words, which begin with ▁.

    Args:
        documents: the texts.
        vocab_size: size of the vocabulary.
        splits: further boundaries that no merge crosses.

    Returns:
        `vocab`, in order, and `merges`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(), *splits]
    )
    learner.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
    )
    return json.loads(learner.to_str())["model"]


def train_tokenizer(
    documents: list[str], vocab_size: int, max_length: int = MAX_LENGTH
) -> XLMRobertaTokenizer:
    """Train a tokenizer of XLM-R."""
    from transformers import XLMRobertaTokenizer

    vocab = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab += [*unigram_pieces(documents, vocab_size), ("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocab, model_max_length=max_length)


def t5_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a tokenizer of T5, with its sentinels."""
    from transformers import T5Tokenizer

    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + unigram_pieces(
        documents, vocab_size
    )
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    return T5Tokenizer(vocab=vocab, extra_ids=SENTINELS)


def bpe_tokenizer(
    name: str, special: tuple[str, ...], prefix: str
) -> Callable[[list[str], int], PreTrainedTokenizerBase]:
    """Return a function that trains a decoder's tokenizer.

    Merges are within words and lines; all other text is encoded as bytes.

    Args:
        name: class of the tokenizer in transformers.
        special: special tokens, first in the vocabulary.
        prefix: text that the tokenizer itself puts before every input.
    """

    def build(documents: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
        import transformers
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

        learner = Tokenizer(models.BPE())
        learner.normalizer = normalizers.Replace(" ", "▁")
        splits = [("\n", "isolated"), (":", "isolated"), ("▁", "merged_with_next")]
        learner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(*split) for split in splits]
        )
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
        learner.train_from_iterator((prefix + text for text in documents), trainer)
        learned = json.loads(learner.to_str())["model"]
        tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
        vocab = {token: i for i, token in enumerate(tokens)}
        return getattr(transformers, name)(
            vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]], add_bos_token=True
        )

    return build
