"""The FLARE PEFT method: LoRA whose query and value adapters fuse a source state in their bottleneck.

    S = A v^S,  T = A v^T,  h = W0 v^T + (alpha / r) B phi(S, T)        (arXiv 2501.06892, section 3)

Importing this module registers the peft_type "FLARE", so that PeftModel.from_pretrained and friends load such adapters.
`fusion=None` is plain LoRA: the English adapter, which can be merged; a fusion adapter cannot.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from transformers import PreTrainedModel

from flare_exp import fusion as fusions
from flare_exp.backbones import Family
from flare_exp.sources import BlockKey, SourceStates

FUSION = "flare_fusion"  # the attribute of a LoRA layer that holds its fusion functions, by adapter name


class FlarePeftType(str, enum.Enum):
    FLARE = "FLARE"


@dataclass
class FlareConfig(LoraConfig):
    """LoRA's configuration plus the fusion.

    Args:
        fusion: name of the fusion function (`flare_exp.fusion.FUSIONS`), or None for plain LoRA.
        fusion_options: its options.
        fused_modules: names of the projections that fuse; other targets stay plain LoRA.
        stacks: name -> path of each stack of blocks, from the base model's root.
        source_layer, source_state, padding_side: see `SourceStates`.
    """

    fusion: str | None = None
    fusion_options: dict[str, Any] = field(default_factory=dict)
    fused_modules: list[str] = field(default_factory=list)
    stacks: dict[str, str] = field(default_factory=dict)
    source_layer: str = "ahead"
    source_state: str = "layer_input"
    padding_side: str = "right"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = FlarePeftType.FLARE

    def block_of(self, name: str) -> BlockKey:
        """(stack, index) of the block that a module belongs to."""
        for stack, path in self.stacks.items():
            if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
                return stack, int(match[1])
        raise ValueError(f"{name} is in none of the stacks {self.stacks}")


class FlareVariant(LoraVariant):
    """The forward of one adapted layer. In the source pass it records its input and returns the base result unchanged.

    `block` is None for layers that are adapted but not fused; they only stand aside in the source pass.
    """

    def __init__(self, states: SourceStates, block: BlockKey | None):
        self.states, self.block = states, block

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:  # type: ignore[override]
        """x: [B, T, d], result = W0 x: [B, T, d_out] -> [B, T, d_out]."""
        if self.states.recording:
            if self.block is not None:
                self.states.record(self.block, x)
            return result
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        bottleneck = down(module.lora_dropout[active_adapter](x))
        if self.block is not None:
            bottleneck = self._fuse(getattr(module, FUSION)[active_adapter], down, bottleneck)
        return result + up(bottleneck) * module.scaling[active_adapter]

    def _fuse(self, phi: fusions.Fusion, down: nn.Module, target: Tensor) -> Tensor:
        found = self.states.of(self.block, target.shape[1] if phi.aligned else None)  # type: ignore[arg-type]
        if found is None:
            return phi(torch.zeros_like(target), target, torch.zeros_like(target[..., 0], dtype=torch.bool))
        states, mask = found
        return phi(down(states.to(target.dtype)), target, mask)

    def merge_safe(self, module, active_adapter, orig_weight):  # type: ignore[override]
        raise ValueError(MERGE_REFUSED)

    merge_unsafe = unmerge = merge_safe


MERGE_REFUSED = (
    "a fusion adapter cannot be merged into the backbone's weights: its update depends on the source text of every example"
)


class FlareModel(LoraModel):
    """LoraModel that gives fused layers their fusion function and a common `SourceStates` per adapter."""

    def _create_and_replace(  # type: ignore[override]
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ):
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        if lora_config.fusion is None:
            return
        states = self.__dict__.setdefault("source_states", {})
        if adapter_name not in states:
            states[adapter_name] = SourceStates(lora_config.source_layer, lora_config.source_state, lora_config.padding_side)
        layer = getattr(parent, target_name)
        fused = target_name in lora_config.fused_modules
        block = lora_config.block_of(current_key) if fused else None
        layer.lora_variant[adapter_name] = FlareVariant(states[adapter_name], block)
        if not fused:
            return
        if not hasattr(layer, FUSION):
            layer.add_module(FUSION, nn.ModuleDict())
            # peft finds trainable, savable and movable parts of a layer through these names
            layer.adapter_layer_names = (*layer.adapter_layer_names, FUSION)
        phi = fusions.build(lora_config.fusion, layer.r[adapter_name], **lora_config.fusion_options)
        getattr(layer, FUSION)[adapter_name] = phi
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        phi.requires_grad_(layer.lora_A[adapter_name].weight.requires_grad)

    def _check_merge_allowed(self):
        super()._check_merge_allowed()
        if any(getattr(config, "fusion", None) is not None for config in self.peft_config.values()):
            raise ValueError(MERGE_REFUSED)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Keys of learned fusions name the adapter in the middle; peft only looks at the end, and would then drop them
        # without a word when they are loaded under another name.
        key = key.replace(f".{FUSION}.{adapter_name}.", f".{FUSION}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)


PEFT_TYPE_TO_CONFIG_MAPPING[FlarePeftType.FLARE] = FlareConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[FlarePeftType.FLARE] = FlareModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[FlarePeftType.FLARE] = FlareModel.prefix  # type: ignore[index]


def source_states(model: nn.Module, adapter_name: str | None = None) -> SourceStates:
    """The `SourceStates` that a PEFT model's (active) fusion adapter reads.

    Raises:
        ValueError: the adapter has no fusion.
    """
    name = adapter_name or model.active_adapter
    states = model.base_model.__dict__.get("source_states", {})
    if name not in states:
        raise ValueError(f"the adapter {name!r} has no fusion, so it has no source states")
    return states[name]


def add_adapter(
    model: PreTrainedModel,
    family: Family,
    *,
    r: int,
    alpha: int,
    dropout: float = 0.0,
    targets: str = "qv",
    fusion: str | None = None,
    fusion_options: dict[str, Any] | None = None,
    source_layer: str = "ahead",
    source_state: str = "layer_input",
) -> PeftModel:
    """Wrap `model` with a new adapter (and a trainable copy of its head); everything else is frozen.

    `targets`: "qv" adapts query and value, "all_linear" the block's other linear layers too; fusion is in query and
    value only.
    """
    names = [*family.fused, *(family.linear if targets == "all_linear" else ())]
    blocks = "|".join(re.escape(path) for path in family.stacks.values())
    config = FlareConfig(
        task_type=TaskType.SEQ_CLS,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"({blocks})\.\d+\.(.*\.)?({'|'.join(re.escape(name) for name in names)})",
        modules_to_save=list(family.head),
        fusion=fusion,
        fusion_options=dict(fusion_options or {}),
        fused_modules=list(family.fused),
        stacks=dict(family.stacks),
        source_layer=source_layer,
        source_state=source_state,
        padding_side=family.padding_side,
    )
    return get_peft_model(model, config)
