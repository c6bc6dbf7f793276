"""Define FLARE as a PEFT method: LoRA whose query and value adapters fuse a source state.

    S = A v^S,  T = A v^T,  h = W0 v^T + (alpha / r) B phi(S, T)    (arXiv 2501.06892, section 3)

Importing this module registers the peft_type "FLARE", so that PeftModel.from_pretrained and the
other loaders of PEFT accept such adapters. `fusion=None` is plain LoRA: the English adapter, which
can be merged. A fusion adapter cannot be merged.

FLARE is a LoRA variant in PEFT's sense. The layers list it in `lora_variants`; the configuration's
field `fusion` has the metadata `is_lora_variant`; PEFT then creates and initializes the variant.
Three things used here are private in peft 0.21.2 and have no public counterpart:
`LoraConfig._register_custom_module` (documented in PEFT's guide to custom models),
`_remove_adapter_name_from_key`, and the methods of `LoraVariant`, which PEFT may change.
"""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import Tensor, nn

from flare_exp.flare import fusion as fusions
from flare_exp.flare import mixup
from flare_exp.flare.source_states import BlockKey, SourceStates, linear_dtype

# Attributes of LoRA layers that hold modules by adapter name: the fusion functions; on the first
# fused layer, FLARE MT's map; on the query of a block, its mixing (X-Mixup).
FUSION, SOURCE_MAP, MIXING = LEARNED = ("flare_fusion", "flare_source", "flare_mixup")


class FlarePeftType(str, enum.Enum):
    """The peft_type that this module adds to PEFT's own."""

    FLARE = "FLARE"


@dataclass
class FlareConfig(LoraConfig):
    """LoRA's configuration plus the fusion.

    Args:
        fusion: name of the fusion function (`flare_exp.flare.fusion.FUSIONS`), "x_mixup" for plain
            LoRA beside blocks that mix (`flare_exp.flare.mixup`), or None for plain LoRA.
        fusion_options: options of the fusion function. x_mixup: `depths`, the blocks that mix as
            shares of the depth of the first of `stacks`, and the arguments of `Mixing` but `width`.
        fused_modules: names of the projections that fuse; other targets stay plain LoRA.
        stacks: name -> path of each stack of blocks that fuses, from the base model's root.
        source_layer: see `SourceStates`.
        source_state: see `SourceStates`.
        answer_source: see `SourceStates`.
        source_combine: see `SourceStates`, `combine`.
        padding_side: see `SourceStates`.
        source_width: width of source states that a linear map projects to d (FLARE MT); None if
            they are the model's own.
    """

    fusion: str | None = field(default=None, metadata={"is_lora_variant": True})
    fusion_options: dict[str, Any] = field(default_factory=dict)
    fused_modules: list[str] = field(default_factory=list)
    stacks: dict[str, str] = field(default_factory=dict)
    source_layer: str = "ahead"
    source_state: str = "layer_input"
    answer_source: str = "last"
    source_combine: str = "attention"
    padding_side: str = "right"
    source_width: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = FlarePeftType.FLARE
        # in the order in which they run: a saved configuration has them in alphabetical order
        self.stacks = dict(sorted(self.stacks.items(), key=lambda stack: stack[0] == "decoder"))

    def block_of(self, name: str) -> BlockKey | None:
        """Return (stack, index) of the block with the projection `name`, or None if not fused."""
        if not name.endswith(tuple(f".{fused}" for fused in self.fused_modules)):
            return None
        for stack, path in self.stacks.items():
            if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
                return stack, int(match[1])
        return None


class FlareVariant(LoraVariant):
    """The forward of one adapted layer. In the source pass it returns the base result unchanged.

    `block` is None for layers that are adapted but not fused; the source pass leaves their adapter
    out as well.
    """

    # one for all layers of an adapter, assigned by `FlareModel.inject_adapter`
    states: SourceStates
    block: BlockKey | None

    def init(  # type: ignore[override]
        self, module: LoraLayer, adapter_name: str, config: FlareConfig, target_name: str, **_
    ) -> None:
        """Add the learned modules of a fused layer.

        Every fused layer gets a fusion function. The first one of all also gets FLARE MT's linear
        map.
        """
        self.block = None if config.fusion == mixup.NAME else config.block_of(target_name)
        if self.block is None:
            return
        phi = fusions.build(str(config.fusion), module.r[adapter_name], **config.fusion_options)
        _learn(module, FUSION, adapter_name, phi)
        stack = "encoder" if "encoder" in config.stacks else next(iter(config.stacks))
        first = self.block == (stack, 0) and target_name.endswith(f".{config.fused_modules[0]}")
        if config.source_width and first:
            width: int = module.in_features  # type: ignore[assignment]
            _learn(module, SOURCE_MAP, adapter_name, nn.Linear(config.source_width, width))

    def supports_lora_conversion(self) -> bool:
        """Return False: the update depends on the source, so no plain LoRA weights equal it."""
        return False

    def forward(  # type: ignore[override]
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs
    ) -> Tensor:
        """Add the fused update to the base result.

        x: [B, T, d], result = W0 x: [B, T, d_out] -> [B, T, d_out].
        """
        if self.states.recording:
            return result
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        bottleneck = down(module.lora_dropout[active_adapter](x))
        if self.block is not None:
            bottleneck = self._fuse(getattr(module, FUSION)[active_adapter], down, bottleneck)
        return result + up(bottleneck) * module.scaling[active_adapter]

    def record(self, x: Tensor) -> None:
        """Store the input x [B, S, d] of the layer if this is the source pass."""
        if self.block is not None and self.states.recording and not self.states.reads_outputs:
            self.states.record(self.block, x)

    def _fuse(self, phi: fusions.Fusion, down: nn.Module, target: Tensor) -> Tensor:
        """Compute phi(A v^S, target).

        The source is projected before it is aligned, so that no second copy of width d is kept.
        """
        batch, length = target.shape[:2]
        self.states.use(batch)
        found = self.states.states_for(self.block, linear_dtype(down.weight))  # type: ignore[arg-type]
        if found is None:
            return phi(
                torch.zeros_like(target), target, torch.zeros_like(target[..., 0], dtype=torch.bool)
            )
        states, mask = found
        # a step of generation: only one position is needed
        if phi.aligned and length == 1 < states.shape[1]:
            source, mask = self.states.align(states, mask, length)
            source = down(source)
        else:
            source = down(states)
            if phi.aligned:
                source, mask = self.states.align(source, mask, length)
        source, mask = (x.unflatten(0, (self.states.count, -1)) for x in (source, mask))
        if batch != mask.shape[1]:  # beams and candidate answers: successive rows of one source
            times = batch // mask.shape[1]
            source, mask = (x.repeat_interleave(times, dim=1) for x in (source, mask))
        if self.states.count == 1:
            source, mask = source[0], mask[0]
        elif phi.aligned:
            source, mask = fusions.combine_sources(source, mask, target, self.states.combine)
        else:  # their tokens follow one another
            source, mask = (x.transpose(0, 1).flatten(1, 2) for x in (source, mask))
        fused = phi(source, target, mask)
        if phi.aligned:
            return fused
        return torch.where(self.states.may_attend(length, target.device)[:, None], fused, target)

    def merge_safe(self, module, active_adapter, orig_weight):  # type: ignore[override]
        """Refuse to merge or unmerge a fusion adapter.

        Raises:
            ValueError: always.
        """
        raise ValueError(MERGE_REFUSED)

    merge_unsafe = unmerge = merge_safe


MERGE_REFUSED = (
    "a fusion adapter cannot be merged into the backbone's weights: "
    "its update depends on the source text of every example"
)


class FlareLayer(LoraLayer):
    """Mixin for PEFT's linear layers that adds FLARE to their LoRA variants."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, target_name: str, **options):
        # PEFT's quantized layers do not pass the name on to `update_layer`
        self.target_name = target_name
        super().__init__(base_layer, adapter_name, target_name=target_name, **options)  # type: ignore[arg-type]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """Return PEFT's LoRA variants and FLARE's."""
        return {**super().lora_variants, ("fusion",): FlareVariant}

    def resolve_lora_variant(self, **options) -> LoraVariant | None:
        """Choose the variant from `lora_variants`, for quantized layers too."""
        # quantized layers override this method and look at their own variants only
        return LoraLayer.resolve_lora_variant(self, **options)

    def forward(self, x: Tensor, *args, **options) -> Tensor:
        """Compute the adapted layer, [B, T, d] -> [B, T, d_out].

        In the source pass, its input is recorded too.
        """
        # Autocast casts the input itself. PEFT's cast would keep one more 32-bit copy per
        # projection for the backward pass.
        self.cast_input_dtype_enabled = not torch.is_autocast_enabled(x.device.type)
        for variant in self.lora_variant.values():
            variant.record(x)  # type: ignore[attr-defined]
        return super().forward(x, *args, **options)  # type: ignore[misc]

    def update_layer(self, adapter_name: str, *args, **options) -> None:
        """Add an adapter to the layer, with the layer's name among the options."""
        super().update_layer(adapter_name, *args, **{**options, "target_name": self.target_name})


@functools.cache
def layer_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Map each linear layer class to the class that adapts it.

    Quantized layers come first, because they are subclasses of `nn.Linear`.
    """
    found: dict[type[nn.Module], type[nn.Module]] = {}
    if is_bnb_4bit_available():
        from bitsandbytes.nn import Linear4bit
        from peft.tuners.lora.bnb import Linear4bit as Adapted4bit

        found[Linear4bit] = type("FlareLinear4bit", (FlareLayer, Adapted4bit), {})
    if is_bnb_available():
        from bitsandbytes.nn import Linear8bitLt
        from peft.tuners.lora.bnb import Linear8bitLt as Adapted8bit

        found[Linear8bitLt] = type("FlareLinear8bitLt", (FlareLayer, Adapted8bit), {})
    return {**found, nn.Linear: type("FlareLinear", (FlareLayer, Linear), {})}


class FlareModel(LoraModel):
    """LoraModel whose adapters fuse; all fused layers of an adapter share one `SourceStates`."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **options) -> None:
        """Add the adapter's layers to the model, and connect them to source states if they fuse."""
        config: FlareConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        config._register_custom_module(layer_classes())
        super().inject_adapter(model, adapter_name, *args, **options)
        if config.fusion is not None:
            self._connect(config, adapter_name)

    def _connect(self, config: FlareConfig, adapter_name: str) -> None:
        """Create the adapter's source states and assign them to its layers."""
        kind = mixup.MixupStates if config.fusion == mixup.NAME else SourceStates
        states = kind(
            config.source_layer,
            config.source_state,
            config.padding_side,
            config.answer_source,
            config.source_combine,
        )
        self.__dict__.setdefault("source_states", {})[adapter_name] = states
        for layer in self.model.modules():
            variant = layer.lora_variant.get(adapter_name) if isinstance(layer, LoraLayer) else None
            if isinstance(variant, FlareVariant):
                variant.states = states
                if variant.block is not None and variant.block not in states.blocks:
                    states.blocks.append(variant.block)
        # the module that runs the first fusing stack: the encoder, or the decoder without its head
        stacks = [self.model.get_submodule(p.rpartition(".")[0]) for p in config.stacks.values()]
        stacks[0].register_forward_pre_hook(functools.partial(_enter, states), with_kwargs=True)
        if isinstance(states, mixup.MixupStates):
            self._mix(config, adapter_name, states)
            mixup.watch(states, self.model, stacks)

    def _mix(self, config: FlareConfig, adapter_name: str, states: mixup.MixupStates) -> None:
        """Let the chosen blocks of the first stack mix; their weights are on the block's query.

        Raises:
            ValueError: the source states are not those between blocks.
        """
        if not states.reads_outputs or states.source_layer != "ahead":
            raise ValueError("x_mixup needs source_state='block_output' and source_layer='ahead'")
        (first, path), *_, (last, end) = [*config.stacks.items()] * 2
        options = dict(config.fusion_options)
        blocks: Any = self.model.get_submodule(path)
        chosen = [mixup.block_at(depth, len(blocks)) for depth in options.pop("depths")]
        for key in dict.fromkeys((first, index) for index in chosen):
            block = blocks[key[1]]
            query = next(
                layer
                for name, layer in block.named_modules()
                if isinstance(layer, LoraLayer) and name.endswith(config.fused_modules[0])
            )
            mixing = mixup.Mixing(int(query.in_features or 0), **options)
            _learn(query, MIXING, adapter_name, mixing)
            states.blocks.append(key)
            block.register_forward_hook(
                functools.partial(mixup.mix, states, key, query, MIXING, adapter_name)
            )
        # the losses read the final states
        ending: Any = self.model.get_submodule(end)
        final = (last, len(ending) - 1)
        states.blocks = [*(key for key in states.blocks if key != final), final]

    def merge_and_unload(self, *args, **options) -> nn.Module:
        """Merge the adapters as LoRA does.

        Raises:
            ValueError: one of the adapters fuses.
        """
        self._refuse_merge()
        return super().merge_and_unload(*args, **options)

    def merge_adapter(self, *args, **options) -> None:
        """Merge the active adapters as LoRA does.

        Raises:
            ValueError: one of the adapters fuses.
        """
        self._refuse_merge()
        super().merge_adapter(*args, **options)

    def _refuse_merge(self) -> None:
        """Raise ValueError if an adapter fuses.

        The check runs before any layer is merged: otherwise a frozen English adapter beside the
        fusion would already be merged.
        """
        if any(getattr(config, "fusion", None) is not None for config in self.peft_config.values()):
            raise ValueError(MERGE_REFUSED)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Keys of learned fusions name the adapter in the middle. PEFT only looks at the end, and
        # would silently drop these weights when they are loaded under another name.
        for name in LEARNED:
            key = key.replace(f".{name}.{adapter_name}.", f".{name}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)


def _learn(layer: Any, attribute: str, adapter_name: str, module: nn.Module) -> None:
    """Add a learned module of an adapter to a LoRA layer."""
    if not hasattr(layer, attribute):
        layer.add_module(attribute, nn.ModuleDict())
        # peft finds trainable, savable and movable parts of a layer through these names
        layer.adapter_layer_names = (*layer.adapter_layer_names, attribute)
    weight = layer.lora_A[adapter_name].weight
    getattr(layer, attribute)[adapter_name] = module.to(weight.device, weight.dtype)


PEFT_TYPE_TO_CONFIG_MAPPING[FlarePeftType.FLARE] = FlareConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[FlarePeftType.FLARE] = FlareModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[FlarePeftType.FLARE] = FlareModel.prefix  # type: ignore[index]


def _enter(states: SourceStates, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Pass the start and length of a forward of the first fusing stack to the source states."""
    if not states.recording:
        named = (kwargs.get(name) for name in ("hidden_states", "input_ids", "inputs_embeds"))
        tokens = next(x for x in (*args, *named) if x is not None)
        # transformers 5.24 calls it `cache`; under an unknown name every step would be the first
        cache = next(
            (c for c in map(kwargs.get, ("past_key_values", "cache")) if c is not None), None
        )
        states.begin_target_pass(
            int(cache.get_seq_length()) if cache is not None else 0, tokens.shape[1]
        )
