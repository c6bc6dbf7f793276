"""Where source states come from: a pass of the frozen backbone over the English text, recorded block by block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

SOURCE_LAYERS = ("ahead", "same")
SOURCE_STATES = ("layer_input", "block_output")

BlockKey = tuple[str, int]  # (stack, index): encoder and decoder layers of one model share numbers


def align(states: Tensor, mask: Tensor, length: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Bring source positions to `length` target positions: by start for right padding, by end for left padding.

    Surplus source is dropped; target positions without source get mask False.

    Args:
        states: [B, S, d]; mask: [B, S] bool; side: the tokenizer's padding side.

    Returns:
        states [B, length, d] and mask [B, length].
    """
    surplus = states.shape[1] - length
    if surplus > 0:
        return (states[:, surplus:], mask[:, surplus:]) if side == "left" else (states[:, :length], mask[:, :length])
    pad = (-surplus, 0) if side == "left" else (0, -surplus)
    return nn.functional.pad(states, (0, 0, *pad)), nn.functional.pad(mask, pad)


class SourceStates:
    """The source states of one batch, shared by every fused layer of an adapter.

    Filled by a recording pass, read by the target pass and again by gradient checkpointing's recomputation, so they
    live until the next recording overwrites them.

    Args:
        source_layer: "ahead" gives block i what block i+1 read (the last one the model's final hidden state), "same"
            what block i read (PAPER: v^S_{i+1} in the text, v^S_i in the released code).
        source_state: "layer_input" takes what the fused projections read, on the same footing as the target's;
            "block_output" takes the raw hidden states between blocks.
        padding_side: how the tokenizer pads, for `align`.
    """

    def __init__(self, source_layer: str = "ahead", source_state: str = "layer_input", padding_side: str = "right"):
        if source_layer not in SOURCE_LAYERS:
            raise ValueError(f"source_layer={source_layer!r} is none of {', '.join(SOURCE_LAYERS)}")
        if source_state not in SOURCE_STATES:
            raise ValueError(f"source_state={source_state!r} is none of {', '.join(SOURCE_STATES)}")
        self.source_layer, self.source_state, self.padding_side = source_layer, source_state, padding_side
        self.recording = False
        self.clear()

    def clear(self) -> None:
        """Forget the source: every fused layer falls back to the target alone."""
        self._inputs: dict[BlockKey, Tensor] = {}
        self._outputs: dict[str, tuple[Tensor, ...]] = {}
        self._mask: Tensor | None = None

    def record(self, block: BlockKey, states: Tensor) -> None:
        """Keep what block `block` reads in the source pass, [B, S, d]."""
        self._inputs[block] = states

    def finish(self, mask: Tensor, hidden_states: Mapping[str, tuple[Tensor, ...]]) -> None:
        """End a source pass. mask: [B, S]; hidden_states: per stack, embeddings and each block's output (the last one
        being the model's final hidden state)."""
        self._mask = mask.bool()
        self._outputs = dict(hidden_states)

    def of(self, block: BlockKey, length: int | None) -> tuple[Tensor, Tensor] | None:
        """v^S for `block`: states [B, S, d] and mask [B, S], aligned to `length` positions unless that is None; None
        when there is no source."""
        if self._mask is None:
            return None
        stack, index = block
        index += self.source_layer == "ahead"
        if self.source_state == "layer_input" and (stack, index) in self._inputs:
            states = self._inputs[stack, index]
        else:
            states = self._outputs[stack][index]
        return (states, self._mask) if length is None else align(states, self._mask, length, self.padding_side)


class BackboneSource:
    """The mPLM itself as source: reads the English text without the fusion adapter, without gradient and dropout.

    Args:
        model: a PEFT model whose active adapter is a FLARE adapter with a fusion (flare_exp.adapter).
    """

    def __init__(self, model: nn.Module):
        from flare_exp.adapter import source_states

        self.states = source_states(model)
        self.backbone: nn.Module = model.get_base_model().base_model  # type: ignore[operator]  # without the task head

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Tensor] | None) -> None:
        """Record the source states of a batch: tokenizer output with input_ids and attention_mask [B, S], or None for
        no source. A row whose mask is all zero has no source."""
        self.states.clear()
        if inputs is None:
            return
        mask = inputs["attention_mask"].bool()
        readable = mask.clone()
        readable[:, 0] |= ~mask.any(dim=1)  # attention over nothing is not a number; the row's mask stays empty
        training = [module for module in self.backbone.modules() if module.training]
        self.backbone.eval()
        self.states.recording = True
        try:
            output = self.backbone(**{**inputs, "attention_mask": readable.to(mask.dtype).long()}, output_hidden_states=True)
        finally:
            self.states.recording = False
            for module in training:
                module.training = True
        self.states.finish(mask, {"encoder": output.hidden_states})
