"""Write a run's adapters as one plain LoRA, which needs PEFT alone.

The target language's adapter was trained on the English model, which is the pre-trained model with
an adapter of its own. The sum of both updates is one LoRA of the sum of their ranks:

    s_1 B_1 A_1 + s_2 B_2 A_2 = [B_1 B_2] [s_1 A_1; s_2 A_2]        s = alpha / r

PEFT has this as `add_weighted_adapter(combination_type="cat")`, but not for adapters that both
train a head, as these do: there the target language's head is the one that counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, load_peft_weights
from safetensors.torch import save_file
from torch import Tensor

from flare_exp.errors import UserError
from flare_exp.flare.mixup import NAME as MIXUP
from flare_exp.flare.peft_method import FlareConfig

Adapter = tuple[FlareConfig, Mapping[str, Tensor]]


def read(folder: Path) -> Adapter:
    """Read a saved adapter: its configuration and its weights."""
    return FlareConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu")


def check_plain(adapter: FlareConfig) -> None:
    """Check that an adapter's update depends on its input alone.

    Raises:
        UserError: it fuses or mixes a source.
    """
    if adapter.fusion is not None:
        what = "mixing blocks (x_mixup)" if adapter.fusion == MIXUP else f"fusion {adapter.fusion}"
        raise UserError(
            f"format=lora: this adapter has {what}, so its update depends on the English text of "
            "every example, and no LoRA equals it; leave format=lora out, or train a LoRA that "
            "answers like it (method=distil)"
        )


def combined(adapters: Sequence[Adapter]) -> tuple[int, dict[str, Tensor]]:
    """Return rank and weights of the one LoRA (of scale 1) whose update is the sum of several.

    Args:
        adapters: lowest first. Of modules that several of them train in full, such as the head,
            the last one's weights count.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    whole: dict[str, Tensor] = {}
    for config, weights in adapters:
        for name, weight in weights.items():
            if ".lora_A." in name:
                parts[name].append(weight * (config.lora_alpha / config.r))
            elif ".lora_B." in name:
                parts[name].append(weight)
            else:
                whole[name] = weight
    joined = {
        name: torch.cat(blocks, dim=0 if ".lora_A." in name else 1).contiguous()
        for name, blocks in parts.items()
    }
    return sum(config.r for config, _ in adapters), {**joined, **whole}


def write(
    adapters: Sequence[Adapter], folder: Path, base: str | None, commit: str | None
) -> LoraConfig:
    """Write the sum of some plain adapters as a LoRA in PEFT's format; return its configuration.

    Args:
        adapters: lowest first.
        folder: where adapter_config.json and adapter_model.safetensors go.
        base: hub id of the model below, or None.
        commit: its commit.
    """
    rank, weights = combined(adapters)
    last = adapters[-1][0]
    own = {f.name: getattr(last, f.name) for f in fields(LoraConfig) if f.init}
    own |= {"r": rank, "lora_alpha": rank, "inference_mode": True, "peft_type": None}
    own |= {"base_model_name_or_path": base, "revision": commit}
    config = LoraConfig(**own)
    config.save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return config
