"""Multilingual backbones: one table row per architecture, one strict loader.

To add a family: a row in FAMILIES (see docs/adding_a_model.md); nothing else knows about architectures.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flare_exp.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps what FLARE needs; module names are those of its classification model.

    `stacks`: name of a stack of blocks -> path of its module list. `query`, `value`: the projections that are fused.
    `linear`: the other linear layers of a block (adapter.targets=all_linear). `head`: modules trained in full with the
    adapter; `new`: modules that join the head when the checkpoint has no weights for them.
    `attention`: implementations that work, preferred first.
    """

    stacks: dict[str, str]
    query: str
    value: str
    linear: tuple[str, ...]
    head: tuple[str, ...]
    new: tuple[str, ...] = ()
    padding_side: str = "right"
    attention: tuple[str, ...] = ("sdpa", "eager")

    @property
    def fused(self) -> tuple[str, str]:
        return self.query, self.value


_BERT_LINEAR = ("key", "attention.output.dense", "intermediate.dense", "output.dense")

FAMILIES = {
    # BERT's pooler is usually pre-trained and then stays frozen: trained with the adapter it gave a higher validation
    # loss on NusaX. Checkpoints saved from a masked language model lack it.
    "bert": Family({"encoder": "bert.encoder.layer"}, "query", "value", _BERT_LINEAR, head=("classifier",), new=("pooler",)),
    "xlm-roberta": Family({"encoder": "roberta.encoder.layer"}, "query", "value", _BERT_LINEAR, head=("classifier",)),
}


def family_of(path: str, revision: str | None = None) -> Family:
    """The table row of a checkpoint (hub id or folder), by its config.

    Raises:
        UserError: no such checkpoint, or its architecture has no row.
    """
    if looks_local(path) and not (Path(path).expanduser() / "config.json").is_file():
        raise UserError(f"model.path={path}: there is no checkpoint (config.json) in this folder")
    try:
        model_type = AutoConfig.from_pretrained(local(path), revision=revision).model_type
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={path}: its configuration could not be read: {str(error).splitlines()[0]}") from error
    if model_type not in FAMILIES:
        raise UserError(
            f"model.path={path}: the architecture {model_type!r} is not known here; known: {', '.join(FAMILIES)}.\n"
            f"  To add it, write its row in FAMILIES of {Path(__file__).name} (docs/adding_a_model.md)"
        )
    return FAMILIES[model_type]


def looks_local(path: str) -> bool:
    """Whether `path` means a folder rather than a hub id (`name` or `owner/name`)."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path)


def local(path: str) -> str:
    return str(Path(path).expanduser()) if looks_local(path) else path


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The checkpoint's own fast tokenizer, padding on its family's side."""
    family = family_of(path, revision)
    try:
        return AutoTokenizer.from_pretrained(local(path), revision=revision, padding_side=family.padding_side)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={path}: its tokenizer could not be read: {str(error).splitlines()[0]}") from error


def load_classifier(path: str, num_labels: int, revision: str | None = None) -> tuple[PreTrainedModel, Family]:
    """A checkpoint with a sequence-classification head, and its family's row; only the head may be newly initialised.

    Draws the head from torch's global generator. Never runs code from the checkpoint, never unpickles it unsafely.

    Raises:
        UserError: missing, truncated or incomplete weights.
    """
    from safetensors import SafetensorError

    family = family_of(path, revision)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            local(path),
            revision=revision,
            num_labels=num_labels,
            attn_implementation=family.attention[0],
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path={path}: its weights could not be read: {str(error).splitlines()[0]}") from error
    missing = {part for name in report["missing_keys"] for part in name.split(".")}
    family = replace(family, head=(*family.head, *(part for part in family.new if part in missing)))
    lost = [name for name in report["missing_keys"] if not any(part in name.split(".") for part in family.head)]
    if lost or report["mismatched_keys"]:
        raise UserError(
            f"model.path={path}: the checkpoint lacks {len(lost)} weights of the backbone ({', '.join(sorted(lost)[:3])}, ...) "
            f"and {len(report['mismatched_keys'])} have another shape; it would be silently random"
        )
    return model, family


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of trainable and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"trainable": sum(n for n, trains in sizes if trains), "total": sum(n for n, _ in sizes)}
