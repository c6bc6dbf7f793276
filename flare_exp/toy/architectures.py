"""Build the untrained tiny model of every family, with its tokenizer and objective.

The models are real transformers classes with their own objectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flare_exp.toy.objectives import causal, masked, span_corruption
from flare_exp.toy.tokenizers import MAX_LENGTH, bpe_tokenizer, t5_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def blank_xlmr(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, heads: int
) -> PreTrainedModel:
    """Build an untrained XLM-R."""
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=MAX_LENGTH + 2,
        type_vocab_size=1,
        initializer_range=0.05,  # the default, 0.02, is for a width of 768
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return XLMRobertaForMaskedLM(config)


def decoder_options(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, heads: int
) -> dict[str, Any]:
    """Return the options that Llama and Gemma 2 share.

    These are gated feed-forward layers, grouped queries, and one matrix for input and output
    embeddings.
    """
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": hidden_size // heads,
        "intermediate_size": 3 * hidden_size,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def blank_llama(*size) -> PreTrainedModel:
    """Build an untrained Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**decoder_options(*size)))


def blank_gemma2(*size) -> PreTrainedModel:
    """Build an untrained Gemma 2."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    options = decoder_options(*size)
    config = Gemma2Config(**options, query_pre_attn_scalar=options["head_dim"], sliding_window=32)
    config._attn_implementation = "eager"  # the only one with soft-capped attention
    return Gemma2ForCausalLM(config)


def blank_mt5(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, heads: int
) -> PreTrainedModel:
    """Build an untrained mT5."""
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=hidden_size // heads,
        d_ff=3 * hidden_size,
        num_layers=layers,  # the decoder has as many
        num_heads=heads,
        dropout_rate=0.0,
        tie_word_embeddings=False,  # as in mT5
    )
    model = MT5ForConditionalGeneration(config)
    # the head is drawn with a standard deviation of 1, which would give a first loss of 60
    model.lm_head.weight.data.mul_(hidden_size**-0.5)
    return model


@dataclass(frozen=True)
class Architecture:
    """The parts of pre-training that differ between model families.

    Args:
        tokenizer: texts and vocabulary size -> tokenizer.
        blank: tokenizer, width, layers, heads -> untrained model.
        collate: tokenizer -> collator of the objective.
        objective: name of the objective.
        dropout: names of the dropout rates in the model's config.
    """

    tokenizer: Callable[[list[str], int], PreTrainedTokenizerBase]
    blank: Callable[..., PreTrainedModel]
    collate: Callable[[PreTrainedTokenizerBase], Callable[[list[list[int]]], dict[str, Tensor]]]
    objective: str
    dropout: tuple[str, ...] = ()


ARCHITECTURES = {
    "xlm-roberta": Architecture(
        train_tokenizer,
        blank_xlmr,
        masked,
        "masked_token",
        ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "llama": Architecture(
        bpe_tokenizer("LlamaTokenizer", ("<unk>", "<s>", "</s>"), " "),
        blank_llama,
        causal,
        "next_token",
    ),
    "gemma2": Architecture(
        bpe_tokenizer("GemmaTokenizer", ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), ""),
        blank_gemma2,
        causal,
        "next_token",
    ),
    "mt5": Architecture(t5_tokenizer, blank_mt5, span_corruption, "lost_span", ("dropout_rate",)),
}
