"""Load NLLB checkpoints: M2M100 models with FLORES-200 language codes (arXiv 2207.04672)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, M2M100ForConditionalGeneration, NllbTokenizer

from flare_exp.errors import UNREADABLE, UserError, first_line, why_unreadable
from flare_exp.hub import local
from flare_exp.models.backbones import check_vocabulary
from flare_exp.models.families import config_of
from flare_exp.utils.finite import check_finite

DROPOUT_FIELDS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
)


@dataclass(frozen=True)
class MTDecoding:
    """Options of decoding that change the translations.

    Args:
        beams: hypotheses of beam search (length penalty 1); 1 means greedy decoding.
        max_length: longest segment of a source text and longest translation of one, in tokens, with
            language code and end included.
        no_repeat_ngram: length in tokens of the runs that may not occur twice in a translation,
            against loops; 0 turns this off.
    """

    beams: int = 1
    max_length: int = 256
    no_repeat_ngram: int = 0

    def limit(self, source_tokens: int) -> int:
        """Return the largest number of tokens for the translation of a segment.

        The limit is three tokens per source token plus 32, so that a row that loops does not delay
        its batch up to max_length. It is rounded up to a multiple of 32: rows with the same limit
        are batched together, so no engine needs a limit per row.
        """
        return min(self.max_length, 32 * -(-(3 * source_tokens + 32) // 32))


def check(path: str, revision: str | None = None, decoding: MTDecoding | None = None) -> Any:
    """Read the configuration and the tokenizer of a checkpoint (hub id or folder), without weights.

    Returns:
        the tokenizer, for `language_id`.

    Raises:
        UserError: they cannot be read, are not those of an NLLB checkpoint or do not fit one
            another, or max_length is beyond its positions.
    """
    config = read_config(path, revision)
    positions = config.max_position_embeddings
    # a translation starts with two tokens that do not count: the decoder's start and the language
    if decoding and decoding.max_length + 2 > positions:
        raise UserError(
            f"mt.max_length={decoding.max_length}: the translation model knows {positions} "
            "positions; choose less"
        )
    tokenizer = load_tokenizer(path, revision)
    check_vocabulary(tokenizer, config.vocab_size, f"mt.path={path}")
    return tokenizer


def load_model(path: str, revision: str | None, device: str, dtype: str | None = None) -> Any:
    """Load the whole model, frozen and without dropout.

    `dtype` None means 32-bit floats on CPUs and 16-bit floats on GPUs. The weights stay on the CPU.

    Raises:
        UserError: the weights are missing, truncated, incomplete or contain NaN, or there is no GPU
            for `device`.
    """
    from safetensors import SafetensorError

    read_config(path, revision)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device: a GPU is asked for, but torch finds none")
    # M2M100 checkpoints drop one layer in twenty in training; frozen models must not
    options: dict[str, Any] = dict.fromkeys(DROPOUT_FIELDS, 0.0)
    options |= {
        "revision": revision,
        "dtype": getattr(torch, dtype or _dtype(device)),
        "output_loading_info": True,
    }
    try:
        loaded: Any = M2M100ForConditionalGeneration.from_pretrained(local(path), **options)
    except (*UNREADABLE, SafetensorError) as error:
        raise UserError(
            f"mt.path={path}: its weights could not be read: {why_unreadable(error)}"
        ) from error
    model, report = loaded
    if lost := sorted(report["missing_keys"]):
        raise UserError(
            f"mt.path={path}: the checkpoint lacks {len(lost)} weights ({', '.join(lost[:3])}, ...)"
        )
    check_finite(model.named_parameters(), f"mt.path={path}")
    return model.requires_grad_(False).eval()


def load_encoder(
    path: str, revision: str | None = None, device: str = "cpu"
) -> tuple[nn.Module, Any]:
    """Load the frozen encoder of a checkpoint, without its decoder, and the tokenizer.

    encoder(input_ids, attention_mask).last_hidden_state, [B, S, d_mt], is taken after the final
    layer norm.

    Raises:
        UserError: see `check` and `load_model`.
    """
    tokenizer = check(path, revision)
    # only the encoder is moved, and nothing references the decoder after the return
    return load_model(path, revision, device).get_encoder().to(device), tokenizer


def read_config(path: str, revision: str | None) -> Any:
    """Read the configuration of a checkpoint.

    Raises:
        UserError: it cannot be read, or is not that of an NLLB checkpoint.
    """
    instead = "\n  without network, fetch it with prefetch, or choose mt=gold or mt=file"
    config = config_of(path, revision, "mt.path", instead)
    if config.model_type != "m2m_100":
        raise UserError(
            f"mt.path={path}: the architecture {config.model_type!r} is not NLLB's; "
            "give a dense NLLB checkpoint, e.g. facebook/nllb-200-distilled-600M"
        )
    return config


def load_tokenizer(path: str, revision: str | None) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        UserError: it cannot be read, or is not an NLLB tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(local(path), revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"mt.path={path}: its tokenizer could not be read: {first_line(error)}"
        ) from error
    if not isinstance(tokenizer, NllbTokenizer):
        raise UserError(
            f"mt.path={path}: its tokenizer is {type(tokenizer).__name__}; NLLB's is needed, with "
            "FLORES-200 codes"
        )
    return tokenizer


def language_id(tokenizer: Any, code: str) -> int:
    """Return the token number of a language code.

    Raises:
        UserError: the tokenizer has no such code; the message names similar ones.
    """
    # Ordinary tokens of the vocabulary are not languages, and an unknown code would silently become
    # <unk>.
    usual = {
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
        tokenizer.unk_token,
        tokenizer.mask_token,
    }
    codes = {
        token: number for token, number in tokenizer.get_added_vocab().items() if token not in usual
    }
    if code not in codes:
        near = difflib.get_close_matches(code, codes, 5, 0.5) or sorted(codes)[:5]
        raise UserError(
            f"the translation model does not know the language {code!r}; it knows codes such as "
            f"{', '.join(near)}"
        )
    return codes[code]


def _dtype(device: str) -> str:
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
