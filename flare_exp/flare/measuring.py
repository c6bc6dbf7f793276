"""Measure what a fusion adapter reads, and how similar the states of two languages are.

Padding counts in no mean. Shapes: B rows, S and T tokens of source and target, r channels of a
bottleneck, d width, N examples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flare_exp.flare.mixup import pooled
from flare_exp.flare.peft_method import FUSION, FlareVariant
from flare_exp.flare.source_states import BlockKey, positions

PROJECTIONS = ("query", "value")  # in the order of FlareConfig.fused_modules


@dataclass(frozen=True)
class Activation:
    """Mean activations of one fused projection.

    Args:
        stack: "encoder" or "decoder".
        layer: number of the block, from 1.
        projection: "query" or "value".
        source: mean of f(S) over tokens and channels; f is the fusion's ReLU, or the identity.
        target: mean of f(T).
        source_size: mean of |S|, before f.
        target_size: mean of |T|.

    None: no row has a source.
    """

    stack: str
    layer: int
    projection: str
    source: float | None
    target: float | None
    source_size: float | None
    target_size: float | None


@dataclass(frozen=True)
class Cosine:
    """Cosine similarities of N pairs of states.

    Args:
        mean: of the states of the same example.
        deviation: their sample standard deviation; 0 for one pair.
        others: mean of each target's with the English states of all other examples; None for one
            pair. It tells how much of `mean` any two texts have.
    """

    mean: float
    deviation: float
    others: float | None


class BottleneckRecorder:
    """Sum up the inputs of every fusion function while it is entered (`with`).

    S = A v^S and T = A v^T are taken as the fusion function gets them. T counts at the tokens of
    the target. S counts at the tokens of the source; where the function fuses position by
    position, at those that have a token of the target beside them: the others are never fused.

    Args:
        model: a PEFT model in eval mode; without a fusion adapter nothing is recorded.

    Attributes:
        mask: [B, T] bool, the tokens of the next target pass; to be set before each pass.
    """

    def __init__(self, model: nn.Module):
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self._fusions = {(*block, name): phi for block, name, phi in fusions_of(model)}
        self._sums = {key: torch.zeros(6, dtype=torch.float64) for key in self._fusions}
        self._hooks: list[Any] = []

    def __enter__(self) -> BottleneckRecorder:
        """Begin to record."""
        self._hooks = [
            phi.register_forward_pre_hook(functools.partial(self._add, key))
            for key, phi in self._fusions.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Stop recording."""
        for hook in self._hooks:
            hook.remove()

    def _add(self, key: tuple[str, int, str], phi: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add the sums of one call: source [B, S, r], target [B, T, r] and source_mask [B, S]."""
        source, target, there = args
        mask = self.mask.to(target.device)
        if getattr(phi, "aligned", False):
            there = there & mask
        f = getattr(phi, "f", None) or nn.Identity()
        found = []
        for states, kept in ((source, there), (target, mask)):
            tokens = states[kept].double()
            found += [f(tokens).sum(), tokens.abs().sum(), torch.tensor(tokens.numel())]
        self._sums[key] += torch.stack([x.cpu().double() for x in found])

    def activations(self) -> list[Activation]:
        """Return the means so far, block by block."""
        made = []
        for (stack, index, name), sums in self._sums.items():
            one, other = sums.tolist()[:3], sums.tolist()[3:]
            source, source_size = (x / one[2] if one[2] else None for x in one[:2])
            target, target_size = (x / other[2] if other[2] else None for x in other[:2])
            made.append(
                Activation(stack, index + 1, name, source, target, source_size, target_size)
            )
        return made


def fusions_of(model: Any) -> Iterator[tuple[BlockKey, str, nn.Module]]:
    """Yield block, projection ("query" or "value") and fusion function of every fused layer."""
    for path, layer in model.named_modules():
        for adapter, variant in layer.lora_variant.items() if isinstance(layer, LoraLayer) else ():
            if isinstance(variant, FlareVariant) and variant.block is not None:
                names = model.peft_config[adapter].fused_modules
                (number,) = [i for i, name in enumerate(names) if path.endswith(f".{name}")]
                yield variant.block, PROJECTIONS[number], getattr(layer, FUSION)[adapter]


def hidden_states(
    model: Any, inputs: Mapping[str, Tensor], writes: bool
) -> dict[str, Sequence[Tensor]]:
    """Return stack -> the embeddings and the output of every block, [B, T, d] each.

    Args:
        model: a transformers model or a PEFT model, whose source has been read.
        inputs: input_ids and attention_mask [B, T].
        writes: whether the model continues a prompt. Of an encoder-decoder that does, the encoder
            alone is run.
    """
    if model.config.is_encoder_decoder:
        if writes:
            output = model.get_encoder()(**inputs, output_hidden_states=True)
            return {"encoder": output.hidden_states}
        output = model(**inputs, output_hidden_states=True)
        return {"encoder": output.encoder_hidden_states, "decoder": output.decoder_hidden_states}
    if not writes:
        return {"encoder": model(**inputs, output_hidden_states=True).hidden_states}
    output = model(
        **inputs,
        position_ids=positions(inputs["attention_mask"]),
        output_hidden_states=True,
        use_cache=False,
        logits_to_keep=1,
    )
    return {"decoder": output.hidden_states}


def means(layers: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the mean state of each row's tokens in every layer: [B, layers, d], in float64.

    Args:
        layers: states [B, T, d].
        mask: [B, T] bool.
    """
    return torch.stack([pooled(states.double(), mask, "mean") for states in layers], dim=1)


def cosine(target: Tensor, english: Tensor) -> Cosine:
    """Compare the states of N examples with their English states, both [N, d]."""
    one, other = (nn.functional.normalize(x.double(), dim=-1) for x in (target, english))
    table = one @ other.T
    own, count = table.diagonal(), len(table)
    if count == 1:
        return Cosine(float(own), 0.0, None)
    others = (table.sum() - own.sum()) / (count * (count - 1))
    return Cosine(float(own.mean()), float(own.std()), float(others))
