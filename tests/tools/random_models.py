"""Random models of every family (float64, milliseconds to build), and batches for them."""

from __future__ import annotations

import torch
import transformers as hf

from flare_exp.flare.source_states import positions
from flare_exp.models import backbones, families

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # large enough that a change anywhere shows at the output
}
DECODER = {
    **SMALL,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
# every second layer sees three tokens only, so that the sliding cache is at work
SLIDING = {
    **DECODER,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MT5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "pad_token_id": 1,
    "eos_token_id": 3,
    "decoder_start_token_id": 1,
    "initializer_factor": 0.7,
}


def causal(name: str, options: dict, **more):
    """A random language model of the family whose classes are called `name`."""
    config = getattr(hf, f"{name}Config".replace("Gemma3Config", "Gemma3TextConfig"))
    return lambda: getattr(hf, f"{name}ForCausalLM")(config(**options, **more))


# (family, form) -> a random model of it
BUILDERS = {
    ("bert", "label"): lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**SMALL, num_labels=3, pad_token_id=0)
    ),
    ("bert", "span"): lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SMALL, pad_token_id=0)),
    ("xlm-roberta", "label"): lambda: hf.XLMRobertaForSequenceClassification(
        hf.XLMRobertaConfig(**SMALL, num_labels=3, type_vocab_size=1, pad_token_id=1)
    ),
    ("xlm-roberta", "span"): lambda: hf.XLMRobertaForQuestionAnswering(
        hf.XLMRobertaConfig(**SMALL, type_vocab_size=1, pad_token_id=1)
    ),
    ("mt5", "label"): lambda: hf.MT5ForSequenceClassification(hf.MT5Config(**MT5, num_labels=3)),
    ("mt5", "span"): lambda: hf.MT5ForQuestionAnswering(hf.MT5Config(**MT5)),
    ("mt5", "prompt"): lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**MT5)),
    ("llama", "prompt"): causal("Llama", DECODER),
    ("mistral", "prompt"): causal("Mistral", DECODER, sliding_window=3),
    ("qwen2", "prompt"): causal("Qwen2", {k: v for k, v in DECODER.items() if k != "head_dim"}),
    ("qwen3", "prompt"): causal("Qwen3", DECODER),
    ("gemma2", "prompt"): causal(
        "Gemma2",
        SLIDING,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        attn_implementation="eager",
    ),
    ("gemma3_text", "prompt"): causal("Gemma3", SLIDING, query_pre_attn_scalar=8),
}


def dtype_of(kind: tuple[str, str]) -> torch.dtype:
    """float64; eager attention masks with the smallest number of that type and then computes in 32
    bits, where it is -inf.
    """
    return torch.float32 if kind[0] == "gemma2" else torch.float64


def random_backbone(kind: tuple[str, str], seed: int = 0) -> backbones.Backbone:
    torch.manual_seed(seed)
    model = BUILDERS[kind]()
    # frozen as under an adapter: what needs a gradient decides which attention kernel runs
    model = model.to(dtype_of(kind)).eval().requires_grad_(False)
    return backbones.wrap(model, families.FAMILIES[kind[0]], kind[1])


def outputs(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model says of each example, padding left out: logits [B, labels], [B, T, 2] (spans) or
    [B, T, V] (prompts; of a fixed answer for an encoder-decoder).
    """
    mask, more = batch["attention_mask"], {}
    if model.config.is_encoder_decoder and hasattr(
        model.get_base_model() if hasattr(model, "peft_config") else model, "lm_head"
    ):
        more = {"decoder_input_ids": torch.tensor([[1, 7, 8, 9]]).repeat(len(mask), 1)}
    elif not model.config.is_encoder_decoder and (model.config.model_type, "prompt") in BUILDERS:
        more = {"position_ids": positions(mask)}
    output = model(**batch, **more)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1) * mask[..., None]
    padded = output.logits.ndim == 3 and not model.config.is_encoder_decoder
    return output.logits * mask[..., None] if padded else output.logits


def token_batch(
    lengths: list[int], seed: int, width: int | None = None, side: str = "right"
) -> dict[str, torch.Tensor]:
    """Random token ids of the given lengths, each ending in EOS, padded with 1 to `width`."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), 1)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        real = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, real] = torch.randint(4, SMALL["vocab_size"], (length,), generator=generator)
        ids[row, real.stop - 1] = 3
        mask[row, real] = 1
    return {"input_ids": ids, "attention_mask": mask}


def rows(batch: dict[str, torch.Tensor], *index: int) -> dict[str, torch.Tensor]:
    return {name: tensor[list(index)] for name, tensor in batch.items()}


ENCODER_WIDTH = 12  # of the encoder


def random_encoder(dtype=torch.float64):
    torch.manual_seed(11)
    config = hf.M2M100Config(
        vocab_size=40,
        d_model=ENCODER_WIDTH,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        init_std=0.3,
        max_position_embeddings=64,
        pad_token_id=1,
        encoder_layerdrop=0.0,
    )
    return (
        hf.M2M100ForConditionalGeneration(config)
        .get_encoder()
        .to(dtype)
        .eval()
        .requires_grad_(False)
    )
