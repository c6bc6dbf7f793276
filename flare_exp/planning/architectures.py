"""Know the shapes of the named checkpoints, to plan with them before they are downloaded."""

from __future__ import annotations

from typing import Any

# The published numbers of the named checkpoints: transformers' names, defaults left out; `dtype`:
# of the files on the hub.
_LLAMA = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_XLMR = {
    "model_type": "xlm-roberta",
    "vocab_size": 250002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
_NLLB = {
    "model_type": "m2m_100",
    "vocab_size": 256206,
    "d_model": 1024,
    "encoder_layers": 24,
    "decoder_layers": 24,
    "encoder_ffn_dim": 8192,
    "decoder_ffn_dim": 8192,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "FacebookAI/xlm-roberta-base": _XLMR,
    "FacebookAI/xlm-roberta-large": {
        **_XLMR,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "google/mt5-xl": {
        "model_type": "mt5",
        "vocab_size": 250112,
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 32,
        "tie_word_embeddings": False,
    },
    "meta-llama/Meta-Llama-3-8B": {**_LLAMA, "max_position_embeddings": 8192},
    "meta-llama/Llama-3.1-8B": {**_LLAMA, "max_position_embeddings": 131072},
    "google/gemma-2-9b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
    },
    "facebook/nllb-200-distilled-600M": {
        **_NLLB,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
    },
    "facebook/nllb-200-distilled-1.3B": _NLLB,
    "facebook/nllb-200-1.3B": _NLLB,
    "facebook/nllb-200-3.3B": {**_NLLB, "d_model": 2048},
}
