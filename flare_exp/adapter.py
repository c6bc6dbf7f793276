"""The FLARE PEFT method: LoRA whose query and value adapters fuse a source state in their bottleneck.

    S = A v^S,  T = A v^T,  h = W0 v^T + (alpha / r) B phi(S, T)        (arXiv 2501.06892, section 3)

Importing this module registers the peft_type "FLARE", so that PeftModel.from_pretrained and friends load such adapters.
`fusion=None` is plain LoRA: the English adapter, which can be merged; a fusion adapter cannot.

FLARE is a LoRA variant in PEFT's sense. The layers name it in `lora_variants`; the configuration's field `fusion` has the
metadata `is_lora_variant`; PEFT then makes and initialises it. What is private in peft 0.21.2, and has no public counterpart:
`LoraConfig._register_custom_module` (documented in PEFT's guide to custom models), `_remove_adapter_name_from_key`, and the
methods of `LoraVariant`, which PEFT may change.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftModel, TaskType, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from flare_exp import fusion as fusions
from flare_exp.backbones import FAMILIES, Backbone
from flare_exp.errors import UserError
from flare_exp.sources import BlockKey, SourceStates, linear_dtype
from flare_exp.utils.finite import check_finite

ENGLISH = "english"  # the frozen English adapter, where it cannot be merged
# attributes of LoRA layers, modules by adapter name: the fusion functions; and, on the first fused layer, FLARE MT's map
FUSION, SOURCE_MAP = LEARNED = ("flare_fusion", "flare_source")


class FlarePeftType(str, enum.Enum):
    FLARE = "FLARE"


@dataclass
class FlareConfig(LoraConfig):
    """LoRA's configuration plus the fusion.

    Args:
        fusion: name of the fusion function (`flare_exp.fusion.FUSIONS`), or None for plain LoRA.
        fusion_options: its options.
        fused_modules: names of the projections that fuse; other targets stay plain LoRA.
        stacks: name -> path of each stack of blocks that fuses, from the base model's root.
        source_layer, source_state, answer_source, padding_side: see `SourceStates`.
        source_width: width of source states that a linear map brings to d (FLARE MT); None: they are the model's own.
    """

    fusion: str | None = field(default=None, metadata={"is_lora_variant": True})
    fusion_options: dict[str, Any] = field(default_factory=dict)
    fused_modules: list[str] = field(default_factory=list)
    stacks: dict[str, str] = field(default_factory=dict)
    source_layer: str = "ahead"
    source_state: str = "layer_input"
    answer_source: str = "last"
    padding_side: str = "right"
    source_width: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = FlarePeftType.FLARE

    def block_of(self, name: str) -> BlockKey | None:
        """(stack, index) of the block whose fused projection `name` is; None when it does not fuse."""
        if not name.endswith(tuple(f".{fused}" for fused in self.fused_modules)):
            return None
        for stack, path in self.stacks.items():
            if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
                return stack, int(match[1])
        return None


class FlareVariant(LoraVariant):
    """The forward of one adapted layer. In the source pass it returns the base result unchanged.

    `block` is None for layers that are adapted but not fused; they only stand aside in the source pass.
    """

    states: SourceStates  # one for all layers of an adapter: `FlareModel.inject_adapter` hands it out
    block: BlockKey | None

    def init(self, module: LoraLayer, adapter_name: str, config: FlareConfig, target_name: str, **_) -> None:  # type: ignore[override]
        """Give a fused layer its learned parts: the fusion function, and the first one of all FLARE MT's map."""
        self.block = config.block_of(target_name)
        if self.block is None:
            return
        phi = fusions.build(str(config.fusion), module.r[adapter_name], **config.fusion_options)
        _learn(module, FUSION, adapter_name, phi)
        stack = "encoder" if "encoder" in config.stacks else next(iter(config.stacks))
        first = self.block == (stack, 0) and target_name.endswith(f".{config.fused_modules[0]}")
        if config.source_width and first:
            _learn(module, SOURCE_MAP, adapter_name, nn.Linear(config.source_width, module.in_features))  # type: ignore[arg-type]

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:  # type: ignore[override]
        """x: [B, T, d], result = W0 x: [B, T, d_out] -> [B, T, d_out]."""
        if self.states.recording:
            return result
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        bottleneck = down(module.lora_dropout[active_adapter](x))
        if self.block is not None:
            bottleneck = self._fuse(getattr(module, FUSION)[active_adapter], down, bottleneck)
        return result + up(bottleneck) * module.scaling[active_adapter]

    def record(self, x: Tensor) -> None:
        """Keep what the layer reads in the source pass: x [B, S, d]."""
        if self.block is not None and self.states.recording and not self.states.reads_outputs:
            self.states.record(self.block, x)

    def _fuse(self, phi: fusions.Fusion, down: nn.Module, target: Tensor) -> Tensor:
        """phi(A v^S, target): the source is projected first and aligned then, so that no copy of width d is kept."""
        batch, length = target.shape[:2]
        self.states.use(batch)
        found = self.states.of(self.block, linear_dtype(down.weight))  # type: ignore[arg-type]
        if found is None:
            return phi(torch.zeros_like(target), target, torch.zeros_like(target[..., 0], dtype=torch.bool))
        states, mask = found
        if phi.aligned and length == 1 < states.shape[1]:  # a step of generation: only one position is needed
            source, mask = self.states.align(states, mask, length)
            source = down(source)
        else:
            source = down(states)
            if phi.aligned:
                source, mask = self.states.align(source, mask, length)
        if batch != len(mask):  # beams and candidate answers: successive rows of one source
            source, mask = (x.repeat_interleave(batch // len(mask), dim=0) for x in (source, mask))
        fused = phi(source, target, mask)
        if phi.aligned:
            return fused
        return torch.where(self.states.asks(length, target.device)[:, None], fused, target)

    def merge_safe(self, module, active_adapter, orig_weight):  # type: ignore[override]
        raise ValueError(MERGE_REFUSED)

    merge_unsafe = unmerge = merge_safe


MERGE_REFUSED = (
    "a fusion adapter cannot be merged into the backbone's weights: its update depends on the source text of every example"
)


class FlareLayer(LoraLayer):
    """What PEFT's linear layers lack: the FLARE variant among those that they know."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, target_name: str, **options):
        self.target_name = target_name  # PEFT's quantised layers do not hand it on to `update_layer`
        super().__init__(base_layer, adapter_name, target_name=target_name, **options)  # type: ignore[arg-type]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return {**super().lora_variants, ("fusion",): FlareVariant}

    def resolve_lora_variant(self, **options) -> LoraVariant | None:
        return LoraLayer.resolve_lora_variant(self, **options)  # quantised layers look at their own variants only

    def forward(self, x: Tensor, *args, **options) -> Tensor:
        """[B, T, d] -> [B, T, d_out]."""
        # autocast casts by itself: PEFT's copy in 32 bits would be kept for the backward, of every projection its own
        self.cast_input_dtype_enabled = not torch.is_autocast_enabled(x.device.type)
        for variant in self.lora_variant.values():
            variant.record(x)  # type: ignore[attr-defined]
        return super().forward(x, *args, **options)  # type: ignore[misc]

    def update_layer(self, adapter_name: str, *args, **options) -> None:
        super().update_layer(adapter_name, *args, **{**options, "target_name": self.target_name})


@functools.cache
def layer_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Linear layer -> the class that adapts it; quantised layers first, since they are linear layers too."""
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
    """LoraModel whose adapters fuse; the fused layers of an adapter have one `SourceStates`."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **options) -> None:
        config: FlareConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        config._register_custom_module(layer_classes())
        super().inject_adapter(model, adapter_name, *args, **options)
        if config.fusion is not None:
            self._connect(config, adapter_name)

    def _connect(self, config: FlareConfig, adapter_name: str) -> None:
        """Hand the adapter's source states to its layers."""
        states = SourceStates(config.source_layer, config.source_state, config.padding_side, config.answer_source)
        self.__dict__.setdefault("source_states", {})[adapter_name] = states
        for layer in self.model.modules():
            variant = layer.lora_variant.get(adapter_name) if isinstance(layer, LoraLayer) else None
            if isinstance(variant, FlareVariant):
                variant.states = states
                if variant.block is not None and variant.block not in states.blocks:
                    states.blocks.append(variant.block)
        # the module that runs the first fusing stack: the encoder's, or the decoder without its head
        stack = self.model.get_submodule(next(iter(config.stacks.values())).rpartition(".")[0])
        stack.register_forward_pre_hook(functools.partial(_enter, states), with_kwargs=True)

    def merge_and_unload(self, *args, **options) -> nn.Module:
        self._refuse_merge()
        return super().merge_and_unload(*args, **options)

    def merge_adapter(self, *args, **options) -> None:
        self._refuse_merge()
        super().merge_adapter(*args, **options)

    def _refuse_merge(self) -> None:
        """Before any layer is merged: a frozen English adapter beside the fusion would be."""
        if any(getattr(config, "fusion", None) is not None for config in self.peft_config.values()):
            raise ValueError(MERGE_REFUSED)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Keys of learned fusions name the adapter in the middle; peft only looks at the end, and would then drop them
        # without a word when they are loaded under another name.
        for name in LEARNED:
            key = key.replace(f".{name}.{adapter_name}.", f".{name}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)


def _learn(layer: Any, attribute: str, adapter_name: str, module: nn.Module) -> None:
    """Give a LoRA layer a learned module of an adapter."""
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
    """Tell the states where in the target a forward of the first fusing stack begins."""
    if not states.recording:
        named = (kwargs.get(name) for name in ("hidden_states", "input_ids", "inputs_embeds"))
        tokens = next(x for x in (*args, *named) if x is not None)
        # transformers 5.24 calls it `cache`; a name that is missed would make every step the first
        cache = next((c for c in map(kwargs.get, ("past_key_values", "cache")) if c is not None), None)
        states.enter(int(cache.get_seq_length()) if cache is not None else 0, tokens.shape[1])


def source_states(model: Any) -> tuple[SourceStates, list[str]]:
    """The `SourceStates` that a PEFT model's fusion adapter reads, and the names of the stacks that fuse.

    Raises:
        ValueError: no adapter, or more than one, fuses.
    """
    found = model.base_model.__dict__.get("source_states", {})
    if len(found) != 1:
        raise ValueError(f"one adapter with a fusion is needed; of {', '.join(model.peft_config)} there are {len(found)}")
    ((name, states),) = found.items()
    return states, list(model.peft_config[name].stacks)


def source_map(model: Any) -> nn.Linear:
    """The linear map of a FLARE MT adapter.

    Raises:
        ValueError: the model has none.
    """
    found = [maps for name, maps in model.named_modules() if name.endswith(f".{SOURCE_MAP}")]
    if len(found) != 1:
        raise ValueError("the adapter has no map for the states of a translation model: its source_width is not set")
    return next(iter(found[0].values()))


TASK_TYPES = {"label": TaskType.SEQ_CLS, "span": TaskType.QUESTION_ANS, "prompt": TaskType.CAUSAL_LM}


def add_adapter(
    backbone: Backbone,
    *,
    r: int,
    alpha: int,
    dropout: float = 0.0,
    targets: str = "qv",
    fusion: str | None = None,
    fusion_options: dict[str, Any] | None = None,
    source_layer: str = "ahead",
    source_state: str = "layer_input",
    answer_source: str = "last",
    source_width: int | None = None,
    also_train: Sequence[str] = (),
) -> PeftModel:
    """Put a new adapter (and a trainable copy of the head) on a backbone; everything else is frozen.

    `targets`: "qv" adapts query and value, "all_linear" the block's other linear layers too; fusion is in query and
    value only. `also_train`: "embeddings" and "lm_head" are trained in full beside it. A model that has an adapter already (the
    frozen English one) gets a second.

    Raises:
        UserError: `also_train` is not possible for this model.
    """
    family = backbone.family
    names = [*family.fused, *family.plain, *(family.linear if targets == "all_linear" else ())]
    blocks = "|".join(re.escape(path) for path in backbone.stacks.values())
    fusing = ("encoder",) if backbone.form == "prompt" and backbone.encoder_decoder else tuple(backbone.stacks)
    task_type = TaskType.SEQ_2_SEQ_LM if backbone.form == "prompt" and backbone.encoder_decoder else TASK_TYPES[backbone.form]
    config = FlareConfig(
        task_type=task_type,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"({blocks})\.\d+\.(.*\.)?({'|'.join(re.escape(name) for name in names)})",
        modules_to_save=[*backbone.head, *_vocabulary(backbone, also_train)] or None,
        fusion=fusion,
        fusion_options=dict(fusion_options or {}),
        fused_modules=list(family.fused),
        stacks={name: backbone.stacks[name] for name in fusing},
        source_layer=source_layer,
        source_state=source_state,
        answer_source=answer_source,
        source_width=source_width,
        padding_side=family.padding_side,
    )
    return _attach(backbone, config)


def _vocabulary(backbone: Backbone, also_train: Sequence[str]) -> list[str]:
    """Modules of the vocabulary that are trained in full."""
    asked = f"adapter.also_train=[{','.join(also_train)}]"
    if not set(also_train) <= backbone.family.vocabulary.keys():
        have = ", ".join(name for name, family in FAMILIES.items() if family.vocabulary)
        raise UserError(f"{asked}: only families with a name for it in FAMILIES have it ({have}); leave it out")
    model = backbone.model
    if also_train and model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        raise UserError(f"{asked}: this model's embeddings and LM head are one weight, which would be two; leave it out")
    return [backbone.family.vocabulary[name] for name in also_train]


def _attach(backbone: Backbone, config: FlareConfig) -> PeftModel:
    """A new adapter on a backbone, beside the frozen English one where there is one; all that it trains is in 32-bit floats."""
    model = backbone.model
    if isinstance(model, PeftModel):
        model.add_adapter("default", config)
        model.base_model.set_adapter([*model.peft_config])  # type: ignore[operator]
        for name, parameter in model.named_parameters():  # activating an adapter thaws it; the English one stays as it is
            if f".{ENGLISH}." in name:
                parameter.requires_grad_(False)
    else:
        model = get_peft_model(model, config)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                in_full_precision(copy)
    return model


def in_full_precision(module: nn.Module) -> None:
    """Keep a module that is trained in 32-bit floats at least: 16-bit weights lose updates that are small beside them.

    It is called with states of the backbone, so its inputs are brought to the precision of its weights. Embeddings give states
    to the backbone, so these are brought to the backbone's.
    """
    narrow = [p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize < 4]
    if narrow:
        module.float()
        module.register_forward_pre_hook(_as_weights, with_kwargs=True)
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(functools.partial(_as_backbone, narrow[0]))


def _as_weights(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    dtype = next(module.parameters()).dtype

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(map(cast, args)), {name: cast(x) for name, x in kwargs.items()}


def _as_backbone(dtype: torch.dtype, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.to(dtype) if output.dtype == torch.float32 else output


def english_model(backbone: Backbone, folder: str, merge: bool) -> Backbone:
    """The English model of a saved adapter.

    Args:
        merge: into the backbone's weights; else the adapter stays beside them, frozen. Weights of 16 or 4 bits would lose the
            update: most of it is below their resolution.
    """
    if merge:
        return replace(backbone, model=load_adapter(backbone, folder).merge_and_unload())
    return add_frozen(backbone, folder)


def add_frozen(backbone: Backbone, folder: str) -> Backbone:
    """Put a saved English adapter on a backbone as a first, frozen one.

    Two adapters cannot both own a head (or embeddings), so these become the backbone's: without modules_to_save, their weights
    have the names of the backbone's own.
    """
    backbone = frozen(backbone, FlareConfig.from_pretrained(folder))
    _load_weights(backbone.model, folder, ENGLISH)
    return backbone


def frozen(backbone: Backbone, config: FlareConfig) -> Backbone:
    """A first, frozen adapter like the English one of `config`, without its weights."""
    trained, config.modules_to_save, config.lora_dropout = tuple(config.modules_to_save or ()), None, 0.0
    if backbone.form != "prompt":
        config.task_type = None  # with a type, peft gives the adapter a copy of the head
    for name, module in backbone.model.named_modules():
        if name.rpartition(".")[2] in trained:
            in_full_precision(module)
    model = get_peft_model(backbone.model, config, adapter_name=ENGLISH)
    model.requires_grad_(False)
    return replace(backbone, model=model)


def load_adapter(backbone: Backbone, folder: str) -> PeftModel:
    """Put a saved adapter on a backbone, for inference; beside the frozen English one where there is one."""
    model = _attach(backbone, FlareConfig.from_pretrained(folder))
    _load_weights(model, folder, "default")
    model.requires_grad_(False)
    return model


def _load_weights(model: PeftModel, folder: str, name: str) -> None:
    weights = load_peft_weights(folder, device="cpu")
    check_finite(weights.items(), folder)
    found: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
    wrong = [*found.unexpected_keys, *(key for key in found.missing_keys if f".{name}." in key)]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} weights are not those of its adapter_config.json, e.g. {wrong[0]}")
