"""Load backbones and their tokenizers with one strict loader, and check that they are whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from flare_exp.errors import UNREADABLE, UserError, first_line, why_unreadable
from flare_exp.hub import local
from flare_exp.models.families import Family, family_of
from flare_exp.utils.finite import check_finite


@dataclass(frozen=True)
class Backbone:
    """A loaded model with what a task type needs.

    The type is "label" (classify a text), "span" (find a span in it) or "prompt" (continue it).
    """

    model: Any  # a PreTrainedModel, or a PeftModel that holds the frozen English adapter
    family: Family
    task_type: str
    head: tuple[str, ...]
    stacks: dict[str, str]  # name -> path from the model's root

    @property
    def encoder_decoder(self) -> bool:
        """Return True if the model has an encoder and a decoder."""
        return "encoder" in self.stacks and "decoder" in self.stacks


@dataclass(frozen=True)
class Precision:
    """The precision in which weights are kept.

    Args:
        dtype: precision of the parameters.
        quantize: None, or "nf4" (bitsandbytes, arXiv 2305.14314).
        double_quant: whether the quantization constants are quantized too.
        compute_dtype: precision of matrix products with quantized weights.
    """

    dtype: str = "float32"
    quantize: str | None = None
    double_quant: bool = True
    compute_dtype: str = "bfloat16"

    @property
    def holds_updates(self) -> bool:
        """Return True if the weights can take a trained update without losing it.

        In 16 bits most of an update is below the resolution of the weights.
        """
        return self.quantize is None and getattr(torch, self.dtype).itemsize >= 4


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the checkpoint's own fast tokenizer, padding on its family's side.

    Raises:
        UserError: it cannot be read, or does not fit the checkpoint's model.
    """
    family = family_of(path, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            local(path), revision=revision, padding_side=family.padding_side
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={path}: its tokenizer could not be read: {first_line(error)}"
        ) from error
    config = AutoConfig.from_pretrained(local(path), revision=revision)
    check_vocabulary(tokenizer, config.get_text_config().vocab_size, f"model.path={path}")
    if tokenizer.pad_token_id is None:
        # Llama has none. Only attention masks mark padding, so any token serves and no embedding is
        # added.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, place: str) -> None:
    """Check that a tokenizer fits the embedding of a model.

    Where a checkpoint has no tokenizer files, transformers builds a tokenizer of a few special
    tokens. Embeddings are often padded to somewhat more rows than there are tokens, but never to
    twice as many. Special tokens without a row are allowed (Gemma 3 has one for images), since no
    text holds them.

    Args:
        tokenizer: the tokenizer.
        rows: number of rows of the embedding.
        place: the option and the checkpoint, for the message.

    Raises:
        UserError: the tokenizer has less than half as many tokens as there are rows, or tokens
            without a row.
    """
    added = tokenizer.added_tokens_decoder
    lost = [
        t
        for t, number in tokenizer.get_vocab().items()
        if number >= rows and not (number in added and added[number].special)
    ]
    files = (
        "; are the tokenizer's files (tokenizer.json, or the model of SentencePiece) in it, "
        "and its own?"
    )
    if 2 * len(tokenizer) < rows:
        raise UserError(
            f"{place}: its tokenizer has {len(tokenizer)} tokens, and its model {rows}{files}"
        )
    if lost:
        raise UserError(
            f"{place}: {len(lost)} tokens of its tokenizer, e.g. {lost[0]!r}, are none of its "
            f"model's {rows}{files}"
        )


def load(
    path: str,
    task_type: str,
    *,
    num_labels: int | None = None,
    revision: str | None = None,
    precision: Precision | None = None,
    attention: str | None = None,
    device: str = "cpu",
) -> Backbone:
    """Load a checkpoint for a task type (see `Backbone`); only the head may be newly initialized.

    The head is drawn from torch's global generator. Code from the checkpoint is never run, and its
    weights are never unpickled unsafely.

    Args:
        path: hub id or folder.
        task_type: "label", "span" or "prompt".
        num_labels: number of classes, for task type "label".
        revision: revision of the hub id, or None for the hub's default.
        precision: precision of the weights; None for 32-bit floats.
        attention: attention implementation; None for the first that works for the family.
        device: device on which 4-bit weights are created; others are loaded on the CPU.

    Raises:
        UserError: the weights are missing, truncated, incomplete or contain NaN, or the family does
            not have the task type or the attention.
    """
    family, precision = family_of(path, revision), precision or Precision()
    if task_type not in family.heads:
        raise UserError(
            f"model.path={path}: this family has no {task_type} form, only "
            f"{', '.join(family.heads)}"
        )
    if attention not in (None, *family.attention):
        raise UserError(
            f"model.attention={attention}: for {path} choose one of {', '.join(family.attention)}"
        )
    options: dict[str, Any] = {"num_labels": num_labels} if task_type == "label" else {}
    model, missing = _pretrained(
        path,
        task_type,
        revision=revision,
        attn_implementation=attention or family.attention[0],
        dtype=getattr(torch, precision.dtype),
        **options,
        **_quantization(precision, family.unquantized(task_type), device),
    )
    head = _head(path, family, task_type, missing)
    check_finite(model.named_parameters(), f"model.path={path}")
    for module in model.modules():
        # In the first pass without gradient, bitsandbytes would repack 4-bit weights permanently,
        # and later training passes would have no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return wrap(model, family, task_type, head)


def _pretrained(
    path: str, task_type: str, revision: str | None, **options: Any
) -> tuple[Any, Collection[str]]:
    """Read the weights of a checkpoint; return the model and the names of what is not there.

    Raises:
        UserError: the weights cannot be read, or are quantized: trained updates would be merged
            into them and lost.
    """
    from safetensors import SafetensorError

    try:
        config = AutoConfig.from_pretrained(local(path), revision=revision)
        if getattr(config, "quantization_config", None):
            raise UserError(
                f"model.path={path}: its weights are quantized already; give the checkpoint with "
                "those that are not, for 4 bits with model.quantize=nf4"
            )
        model, report = auto_class(task_type, config.is_encoder_decoder).from_pretrained(
            local(path), revision=revision, output_loading_info=True, **options
        )
    except (*UNREADABLE, SafetensorError) as error:
        reason = why_unreadable(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "some have another shape, as those of a head for another number of labels"
        raise UserError(f"model.path={path}: its weights could not be read: {reason}") from error
    return model, report["missing_keys"]


def _head(path: str, family: Family, task_type: str, missing: Collection[str]) -> tuple[str, ...]:
    """Return the modules that are trained in full: the head, and what joins it when it is new.

    Raises:
        UserError: weights are missing that are none of the head's.
    """
    head = family.heads[task_type]
    if task_type == "label":
        parts = {part for name in missing for part in name.split(".")}
        head = (*head, *(part for part in family.new if part in parts))
    lost = [name for name in missing if not any(part in name.split(".") for part in head)]
    if lost:
        raise UserError(
            f"model.path={path}: the checkpoint lacks {len(lost)} weights of the backbone "
            f"({', '.join(sorted(lost)[:3])}, ...); "
            "they would be silently random"
        )
    return head


def wrap(
    model: nn.Module, family: Family, task_type: str, head: tuple[str, ...] | None = None
) -> Backbone:
    """Build a Backbone of a model that is already in memory.

    Raises:
        UserError: the family's row does not fit the model.
    """
    prefix = f"{model.base_model_prefix}." if hasattr(model, str(model.base_model_prefix)) else ""
    stacks = {name: prefix + stack for name, stack in family.stacks.items()}
    if problem := next(_misfits(model, family, stacks.values()), None):
        row = f"the row of {model.config.model_type} in FAMILIES of families.py"  # type: ignore[union-attr]
        raise UserError(f"{row} does not fit: {problem} (docs/adding_a_model.md)")
    return Backbone(
        model, family, task_type, family.heads[task_type] if head is None else head, stacks
    )


def _misfits(model: nn.Module, family: Family, stacks: Iterable[str]) -> Iterator[str]:
    """Yield every mismatch between a family's row and a model.

    A misspelled module name would otherwise silently adapt fewer layers.
    """
    if family.query == family.value:
        yield f"query and value are both {family.query!r}, and they must be two linear layers"
    names = {name for name, _ in model.named_modules()}
    for stack in stacks:
        numbers = {
            name[len(stack) + 1 :].partition(".")[0]
            for name in names
            if name.startswith(f"{stack}.")
        }
        if not numbers:
            yield f"there are no blocks at {stack!r}"
        for block in (f"{stack}.{number}" for number in sorted(numbers)):
            for projection in family.fused:
                found = [
                    name
                    for name in names
                    if name.startswith(f"{block}.") and name.endswith(f".{projection}")
                ]
                if len(found) != 1:
                    yield f"{block} has {len(found)} layers called {projection!r} instead of one"
    for name in (*family.plain, *family.linear, *family.vocabulary.values()):
        if not any(f".{n}".endswith(f".{name}") for n in names):
            yield f"no layer is called {name!r}"


def auto_class(task_type: str, encoder_decoder: bool) -> Any:
    """Return the transformers class that loads a model for a task type."""
    generative = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    return {
        "label": AutoModelForSequenceClassification,
        "span": AutoModelForQuestionAnswering,
        "prompt": generative,
    }[task_type]


def _quantization(precision: Precision, unquantized: list[str], device: str) -> dict[str, Any]:
    if precision.quantize is None:
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=precision.quantize,
        bnb_4bit_use_double_quant=precision.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, precision.compute_dtype),
        llm_int8_skip_modules=unquantized,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def quantization_problem() -> str | None:
    """Return the reason why bitsandbytes cannot be used here, or None."""
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return first_line(error)
    return None


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count the trainable parameters and all parameters.

    Packed 4-bit weights count as the weights that they hold.
    """
    sizes = [(_numel(p), p.requires_grad) for p in model.parameters()]
    return {"trainable": sum(n for n, trains in sizes if trains), "total": sum(n for n, _ in sizes)}


def _numel(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
