"""Name the parts of every architecture that FLARE adapts, in one table with a row per family.

To add a family, add a row to FAMILIES (see docs/adding_a_model.md). No other module depends on the
architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig

from flare_exp.errors import UserError, first_line
from flare_exp.hub import local, looks_local


@dataclass(frozen=True)
class Family:
    """The module names and options by which FLARE uses an architecture's transformers classes.

    Args:
        stacks: name of a stack of blocks -> path of its module list below the model without head.
        query: the query projection, which fuses.
        value: the value projection, which fuses.
        linear: the block's other linear layers (adapter.targets=all_linear).
        heads: task type -> modules trained in full with the adapter. Its keys are the types that
            the family can take, the preferred one for each kind of task first.
        plain: projections that are adapted beside query and value, without fusion.
        new: modules that join the label head when the checkpoint has no weights for them.
        vocabulary: option of adapter.also_train -> module.
        padding_side: side on which the tokenizer pads.
        attention: implementations that work, preferred first.
        reserved: number of position embeddings that are not positions.
    """

    stacks: dict[str, str]
    query: str
    value: str
    linear: tuple[str, ...]
    heads: dict[str, tuple[str, ...]]
    plain: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    vocabulary: dict[str, str] = field(default_factory=dict)
    padding_side: str = "right"
    attention: tuple[str, ...] = ("sdpa", "eager")
    reserved: int = 0

    @property
    def fused(self) -> tuple[str, str]:
        """Return the names of the projections that fuse: query and value."""
        return self.query, self.value

    def unquantized(self, task_type: str) -> list[str]:
        """Return patterns of the modules that stay as they are beside 4-bit weights.

        They may be trained in full. The patterns are those of transformers' `BitsAndBytesConfig`.
        """
        new = self.new if task_type == "label" else ()
        return [*self.heads[task_type], *(rf".*\.{part}" for part in new), "lm_head"]


def _encoder(**options) -> Family:
    """Build the row of a descendant of BERT."""
    linear = ("key", "attention.output.dense", "intermediate.dense", "output.dense")
    heads: dict[str, tuple[str, ...]] = {"label": ("classifier",), "span": ("qa_outputs",)}
    return Family({"encoder": "encoder.layer"}, "query", "value", linear, heads, **options)


def _decoder(**options) -> Family:
    """Build the row of a descendant of Llama.

    It has no head, so nothing beside the adapter is trained.
    """
    linear = ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    vocabulary = {"embeddings": "embed_tokens", "lm_head": "lm_head"}
    return Family(
        {"decoder": "layers"},
        "q_proj",
        "v_proj",
        linear,
        {"prompt": ()},
        padding_side="left",
        vocabulary=vocabulary,
        **options,
    )


FAMILIES = {
    # BERT's pooler is usually pre-trained and then stays frozen: trained with the adapter, it gave
    # a higher validation loss on NusaX. Checkpoints saved from a masked language model lack it.
    "bert": _encoder(new=("pooler",)),
    "xlm-roberta": _encoder(reserved=2),
    "mt5": Family(
        {"encoder": "encoder.block", "decoder": "decoder.block"},
        "SelfAttention.q",
        "SelfAttention.v",
        (
            "SelfAttention.k",
            "SelfAttention.o",
            "EncDecAttention.k",
            "EncDecAttention.o",
            "DenseReluDense.wi_0",
            "DenseReluDense.wi_1",
            "DenseReluDense.wo",
        ),
        {"label": ("classification_head",), "span": ("qa_outputs",), "prompt": ()},
        plain=("EncDecAttention.q", "EncDecAttention.v"),
    ),
    "llama": _decoder(),
    "mistral": _decoder(),
    "qwen2": _decoder(),
    "qwen3": _decoder(),
    # its soft-capped attention has no other exact implementation
    "gemma2": _decoder(attention=("eager",)),
    "gemma3_text": _decoder(),
}


def family_of(path: str, revision: str | None = None) -> Family:
    """Return the table row of a checkpoint (hub id or folder), by its config.

    Raises:
        UserError: there is no such checkpoint, or its architecture has no row.
    """
    model_type = config_of(path, revision, "model.path").model_type
    if model_type not in FAMILIES:
        raise UserError(
            f"model.path={path}: the architecture {model_type!r} is not known here; known: "
            f"{', '.join(FAMILIES)}.\n"
            f"  To add it, write its row in FAMILIES of {Path(__file__).name} "
            "(docs/adding_a_model.md)"
        )
    return FAMILIES[model_type]


def config_of(path: str, revision: str | None, option: str, instead: str = "") -> Any:
    """Read the configuration of a checkpoint (hub id or folder) that an option names.

    Raises:
        UserError: it cannot be read; `instead` says what else one can do than ask the hub.
    """
    if looks_local(path) and not (Path(path).expanduser() / "config.json").is_file():
        raise UserError(f"{option}={path}: there is no checkpoint (config.json) in this folder")
    try:
        return AutoConfig.from_pretrained(local(path), revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option}={path}: its configuration could not be read: {first_line(error)}"
            f"{'' if looks_local(path) else instead}"
        ) from error


def blocks(model: Any) -> list[nn.Module]:
    """Return the blocks of a transformers model, with or without adapters.

    A single block fits on a device where the whole model may not.
    """
    return [block for stack in stacks(model) for block in stack]


def stacks(model: Any) -> list[list[nn.Module]]:
    """Return the blocks of each stack of a transformers model, with or without adapters."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    paths = FAMILIES[whole.config.model_type].stacks.values()
    return [list(whole.base_model.get_submodule(path)) for path in paths]


def choose_task_type(family: Family, head: str, wanted: str, model: str) -> str:
    """Return the task type with which a family takes a task.

    Args:
        family: the model's family.
        head: the type of the task with a head, "label" or "span".
        wanted: "auto" takes `head` if the family has it and a prompt otherwise; "head" and
            "generative" require one of the two.
        model: its name, for the message.

    Raises:
        UserError: the family does not have that type.
    """
    types = {
        "auto": [f for f in (head, "prompt") if f in family.heads],
        "head": [head],
        "generative": ["prompt"],
    }[wanted]
    if types[0] not in family.heads:
        other = "generative" if wanted == "head" else "head"
        raise UserError(
            f"task.form={wanted}: {model} is of a family without it; choose task.form={other}"
        )
    return types[0]


def longest_input(path: str, revision: str | None = None) -> int | None:
    """Return the maximum number of input tokens, or None if the architecture sets no limit."""
    limit = getattr(
        AutoConfig.from_pretrained(local(path), revision=revision), "max_position_embeddings", None
    )
    return limit - family_of(path, revision).reserved if limit else None
