"""Hold the source states of one batch, and align them with the positions of the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SOURCE_LAYERS = ("ahead", "same")
SOURCE_STATES = ("layer_input", "block_output")
ANSWER_SOURCES = ("last", "none")
COMBINE = ("attention", "mean")

BlockKey = tuple[str, int]  # (stack, index): encoder and decoder layers of one model share numbers


def align(
    states: Tensor,
    mask: Tensor,
    positions: Tensor,
    side: str = "right",
    prompt: int = 0,
    answer_source: str = "last",
) -> tuple[Tensor, Tensor]:
    """Return the source state of each target position.

    With right padding, positions are matched from the start. With left padding they are matched
    from the end of the two prompts, and positions after the prompt get the last source state or
    none. Source positions beyond the target are dropped. Target positions without source get mask
    False.

    Args:
        states: [B, S, d].
        mask: [B, S] bool.
        positions: [L] positions of the target.
        side: padding side of the tokenizer.
        prompt: number of target positions that are prompt (left padding only).
        answer_source: source state of positions after the prompt, "last" or "none".

    Returns:
        states [B, L, d] and mask [B, L].
    """
    length = states.shape[1]
    index = positions
    if side == "left":
        answer = positions.new_tensor(length - 1 if answer_source == "last" else -1)
        index = torch.where(positions < prompt, positions + length - prompt, answer)
    inside = (index >= 0) & (index < length)
    index = index.clamp(0, length - 1)
    return states[:, index], mask[:, index] & inside


def positions(mask: Tensor) -> Tensor:
    """Return the position of every token [B, T], as transformers' generate counts them.

    Padding may be on either side.
    """
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


class SourceStates:
    """The source states of one batch, shared by every fused layer of an adapter.

    They are recorded in a source pass or set directly. The target pass reads them, and gradient
    checkpointing reads them again when it recomputes, so they are kept until the next source
    overwrites them. They belong to one target pass: the next pass needs a new source, or
    `allow_pass`. A pass may come in pieces (generation with a cache): `begin_target_pass` sets
    where each piece begins. The first piece is the prompt unless `prompt` gives another length.

    Args:
        source_layer: "ahead" gives block i the input of block i+1 (the last block gets the model's
            final hidden state), as in the paper's text. "same" gives block i its own input, as in
            the paper's released code.
        source_state: "layer_input" takes the inputs of the fused projections, the same kind of
            state as the target's; "block_output" takes the raw hidden states between blocks.
        padding_side: see `align`.
        answer_source: see `align`.
        combine: how several sources of one text become one
            (`flare_exp.flare.fusion.combine_sources`).
    """

    def __init__(
        self,
        source_layer: str = "ahead",
        source_state: str = "layer_input",
        padding_side: str = "right",
        answer_source: str = "last",
        combine: str = "attention",
    ):
        for name, value, allowed in (
            ("source_layer", source_layer, SOURCE_LAYERS),
            ("source_state", source_state, SOURCE_STATES),
            ("answer_source", answer_source, ANSWER_SOURCES),
            ("source_combine", combine, COMBINE),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}")
        self.source_layer, self.source_state = source_layer, source_state
        self.padding_side, self.answer_source = padding_side, answer_source
        self.combine = combine
        self.recording = False
        self.blocks: list[BlockKey] = []  # blocks that fuse, in the order of the adapter's layers
        self.clear()

    def clear(self, prompt: int | None = None, count: int = 1) -> None:
        """Drop the source.

        Args:
            prompt: see `SourceEncoder.encode`.
            count: number of sources of each text that will be read; those of one number are
                successive rows.
        """
        self.count = count
        self._allowed, self._begins = False, False
        self._states: dict[BlockKey, Tensor] = {}  # keys are those of `_key`
        self._mask: Tensor | None = None
        self._known_prompt, self._prompt, self._start = prompt, prompt or 0, 0

    def allow_pass(self) -> None:
        """Let one more pass fuse the present source, or nothing if there is no source."""
        self._allowed = True

    def begin_target_pass(self, start: int, length: int) -> None:
        """Begin a target pass over positions start .. start + length - 1."""
        self._start = start
        self._begins = start == 0
        if self._begins and self._known_prompt is None:
            self._prompt = length

    def use(self, rows: int) -> None:
        """Check and use up the source for a pass of `rows` rows; every fused layer calls this.

        Raises:
            ValueError: no source was read for this pass, or the source is of another batch.
        """
        if self._begins:
            self._begins = False
            if not self._allowed:
                raise ValueError(
                    "this adapter fuses a source, and none was read for this forward: call "
                    "source.encode(english_batch) "
                    "before every forward, or source.encode(None) to fuse nothing"
                )
            self._allowed = False
        if self._mask is not None and rows % (own := len(self._mask) // self.count):
            raise ValueError(
                f"the source that was read has {own} rows, and the target has {rows}: they are not "
                "of one batch"
            )

    def _key(self, block: BlockKey) -> BlockKey:
        """Return the key of v^S for a block.

        That is the input of block number `index`; past the last block, it is the stack's final
        state.
        """
        stack, index = block
        return stack, index + (self.source_layer == "ahead")

    @property
    def read_keys(self) -> set[BlockKey]:
        """Return the keys that some block reads; no other state of a source pass is kept."""
        return {self._key(block) for block in self.blocks}

    @property
    def reads_outputs(self) -> bool:
        """Return True if states between the blocks are needed, not the projections' inputs."""
        return self.source_state == "block_output"

    def begin_recording(self) -> None:
        """Begin a source pass."""
        self._states = {}
        self.recording = True

    def record(self, key: BlockKey, states: Tensor) -> None:
        """Keep the states [B, S, d] that a block reads in the source pass.

        States that no block fuses are ignored, and so are all but the first for a key.
        """
        if key in self.read_keys and key not in self._states:
            self._states[key] = narrowed(states)

    def end_recording(self, mask: Tensor) -> None:
        """End a source pass. mask: [B, S]."""
        self._mask = mask.bool()

    def set_states(self, states: Sequence[Tensor], mask: Tensor) -> None:
        """Set v^S of each of `blocks`, without a pass. states: [B, S, d] each; mask: [B, S]."""
        self._states = dict(zip(map(self._key, self.blocks), states, strict=True))
        self._mask = mask.bool()

    def states_for(
        self, block: BlockKey, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Return v^S of `block`: states [B, S, d] and mask [B, S], or None when there is no source.

        Args:
            block: (stack, index) of the block that fuses.
            dtype: precision of the states. The converted states are kept, so that all projections
                of a block share one tensor for the backward pass.
        """
        if self._mask is None:
            return None
        states = self._states[self._key(block)]
        if dtype is not None and states.dtype != dtype:
            states = self._states[self._key(block)] = states.to(dtype)
        return states, self._mask

    def align(self, states: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Align source states [B, S, c] and mask [B, S] with the present target pass.

        Args:
            states: [B, S, c].
            mask: [B, S] bool.
            length: number of positions of the target pass.

        Returns:
            states [B, length, c] and mask [B, length].
        """
        where = self._positions(length, states.device)
        return align(states, mask, where, self.padding_side, self._prompt, self.answer_source)

    def may_attend(self, length: int, device: torch.device) -> Tensor:
        """Return which positions of the present target pass may read the source: [length] bool."""
        if self.padding_side == "right" or self.answer_source == "last":
            return torch.ones(length, dtype=torch.bool, device=device)
        return self._positions(length, device) < self._prompt

    def _positions(self, length: int, device: torch.device) -> Tensor:
        return torch.arange(self._start, self._start + length, device=device)


def linear_dtype(weight: Tensor) -> torch.dtype:
    """Return the precision in which a linear layer computes.

    That is autocast's precision where autocast is on (it leaves float64 alone), and the weight's
    own otherwise.
    """
    kind = weight.device.type
    casts = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else weight.dtype


def narrowed(states: Tensor) -> Tensor:
    """Cast states to the precision in which linear layers will read them under autocast.

    Nothing else reads these states. Without autocast they are returned unchanged.
    """
    return states.to(linear_dtype(states))
