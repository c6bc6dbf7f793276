"""Add FLARE adapters to backbones, load them, and merge or keep the English adapter below them."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from flare_exp.errors import UserError
from flare_exp.flare.peft_method import FlareConfig
from flare_exp.models.backbones import Backbone
from flare_exp.models.families import FAMILIES
from flare_exp.utils.finite import check_finite

ENGLISH = "english"  # the frozen English adapter, where it cannot be merged


TASK_TYPES = {
    "label": TaskType.SEQ_CLS,
    "span": TaskType.QUESTION_ANS,
    "prompt": TaskType.CAUSAL_LM,
}


def add_adapter(backbone: Backbone, **options: Any) -> PeftModel:
    """Add a new adapter and a trainable copy of the head to a backbone, and freeze everything else.

    A model that already has an adapter (the frozen English one) gets a second one. `options` are
    those of `adapter_config`.

    Raises:
        UserError: `also_train` is not possible for this model.
    """
    return _attach(backbone, adapter_config(backbone, **options))


def adapter_config(
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
    source_combine: str = "attention",
    source_width: int | None = None,
    also_train: Sequence[str] = (),
) -> FlareConfig:
    """Build the configuration of a backbone's adapter.

    Args:
        backbone: the model to adapt; its family names the modules.
        r: rank of the bottleneck.
        alpha: LoRA's alpha; the update is scaled by alpha / r.
        dropout: dropout probability of the adapter's input.
        targets: "qv" adapts query and value; "all_linear" also adapts the block's other linear
            layers. Only query and value fuse.
        fusion: name of the fusion function, or None for plain LoRA.
        fusion_options: options of the fusion function.
        source_layer: see `SourceStates`.
        source_state: see `SourceStates`.
        answer_source: see `flare_exp.flare.source_states.align`.
        source_combine: see `flare_exp.flare.fusion.combine_sources`.
        source_width: width of a translation model's states (FLARE MT), or None for the backbone's
            own.
        also_train: "embeddings" and "lm_head" are trained in full beside the adapter.

    Raises:
        UserError: `also_train` is not possible for this model.
    """
    family = backbone.family
    names = [*family.fused, *family.plain, *(family.linear if targets == "all_linear" else ())]
    blocks = "|".join(re.escape(path) for path in backbone.stacks.values())
    fusing = (
        ("encoder",)
        if backbone.task_type == "prompt" and backbone.encoder_decoder
        else tuple(backbone.stacks)
    )
    task_type = (
        TaskType.SEQ_2_SEQ_LM
        if backbone.task_type == "prompt" and backbone.encoder_decoder
        else TASK_TYPES[backbone.task_type]
    )
    return FlareConfig(
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
        source_combine=source_combine,
        source_width=source_width,
        padding_side=family.padding_side,
    )


def _vocabulary(backbone: Backbone, also_train: Sequence[str]) -> list[str]:
    """Return the names of the vocabulary modules that are trained in full."""
    asked = f"adapter.also_train=[{','.join(also_train)}]"
    if not set(also_train) <= backbone.family.vocabulary.keys():
        have = ", ".join(name for name, family in FAMILIES.items() if family.vocabulary)
        raise UserError(
            f"{asked}: only families with a name for it in FAMILIES have it ({have}); leave it out"
        )
    model = backbone.model
    if also_train and model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        raise UserError(
            f"{asked}: this model's embeddings and LM head are one weight, which would be two; "
            "leave it out"
        )
    return [backbone.family.vocabulary[name] for name in also_train]


def _attach(backbone: Backbone, config: FlareConfig) -> PeftModel:
    """Add a new adapter beside the frozen English one, if there is one.

    Everything that the new adapter trains is kept in 32-bit floats.
    """
    model = backbone.model
    if isinstance(model, PeftModel):
        model.add_adapter("default", config)
        model.base_model.set_adapter([*model.peft_config])  # type: ignore[operator]
        # activating an adapter makes it trainable; the English one stays frozen
        for name, parameter in model.named_parameters():
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
    """Keep the weights of a trained module in 32-bit floats or wider.

    Weights of 16 bits lose updates that are small beside them. The backbone calls the module with
    states of its own precision, so the inputs are cast to the precision of the weights. The output
    of embeddings is cast back to the precision of the backbone.
    """
    narrow = [p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize < 4]
    if narrow:
        module.float()
        module.register_forward_pre_hook(_as_weights, with_kwargs=True)
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(functools.partial(_as_backbone, narrow[0]))


def _as_weights(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    dtype = next(module.parameters()).dtype

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(map(cast, args)), {name: cast(x) for name, x in kwargs.items()}


def _as_backbone(dtype: torch.dtype, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.to(dtype) if output.dtype == torch.float32 else output


def english_model(backbone: Backbone, folder: str, merge: bool) -> Backbone:
    """Return the backbone with a saved English adapter, merged or frozen.

    Args:
        backbone: the model that the adapter was trained on.
        folder: the saved adapter.
        merge: whether to merge the adapter into the backbone's weights. Otherwise it stays beside
            them, frozen. Weights of 16 or 4 bits would lose most of the update, which is below
            their resolution.
    """
    if merge:
        return replace(backbone, model=load_adapter(backbone, folder).merge_and_unload())
    return add_frozen(backbone, folder)


def add_frozen(backbone: Backbone, folder: str) -> Backbone:
    """Add a saved English adapter to a backbone as its first, frozen adapter.

    Two adapters cannot both own a head or embeddings, so those of the English adapter become the
    backbone's: without `modules_to_save`, their weights have the names of the backbone's own.
    """
    backbone = frozen(backbone, FlareConfig.from_pretrained(folder))
    _load_weights(backbone.model, folder, ENGLISH)
    return backbone


def frozen(backbone: Backbone, config: FlareConfig) -> Backbone:
    """Add a frozen adapter with the shape of `config`, without loading its weights."""
    trained, config.modules_to_save, config.lora_dropout = (
        tuple(config.modules_to_save or ()),
        None,
        0.0,
    )
    if backbone.task_type != "prompt":
        config.task_type = None  # with a type, peft gives the adapter a copy of the head
    for name, module in backbone.model.named_modules():
        if name.rpartition(".")[2] in trained:
            in_full_precision(module)
    model = get_peft_model(backbone.model, config, adapter_name=ENGLISH)
    model.requires_grad_(False)
    return replace(backbone, model=model)


def load_adapter(backbone: Backbone, folder: str) -> PeftModel:
    """Load a saved adapter onto a backbone for inference.

    If the backbone has the frozen English adapter, the loaded one goes beside it.
    """
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
        raise ValueError(
            f"{folder}: {len(wrong)} weights are not those of its adapter_config.json, e.g. "
            f"{wrong[0]}"
        )
