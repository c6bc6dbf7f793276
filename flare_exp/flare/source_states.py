"""Hold the source states of one batch, and align them with the positions of the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SOURCE_LAYERS = ("ahead", "same")
SOURCE_STATES = ("layer_input", "block_output")
ANSWER_SOURCES = ("last", "none")

BlockKey = tuple[str, int]  # (stack, index): encoder and decoder layers of one model share numbers


def align(
    states: Tensor,
    mask: Tensor,
    positions: Tensor,
    side: str = "right",
    prompt: int = 0,
    answer_source: str = "last",
) -> tuple[Tensor, Tensor]:
    """The source state of each target position: position by position from the start (right padding), or from the end of the
    two prompts (left padding), where positions after the prompt take the last source state (or none).

    Source beyond the target is dropped; target positions without source get mask False.

    Args:
        states: [B, S, d]; mask: [B, S] bool; positions: [L] positions of the target; side: the tokenizer's padding side.
        prompt: number of target positions that are prompt (left padding only).
        answer_source: what positions after the prompt get: "last" or "none".

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
    """Position of every token [B, T] under padding on either side, as transformers' generate counts them."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


class SourceStates:
    """The source states of one batch, shared by every fused layer of an adapter.

    Filled by a recording pass or given, read by the target pass and again by gradient checkpointing's recomputation, so they
    live until the next source overwrites them. They belong to one target pass: the next pass needs a new source, or `allow_pass`.
    A pass may come in pieces (generation with a cache): `enter` says where each piece begins, and the first piece is the prompt
    unless `prompt` says how long that is.

    Args:
        source_layer: "ahead" gives block i what block i+1 read (the last one the model's final hidden state), "same"
            what block i read (PAPER: v^S_{i+1} in the text, v^S_i in the released code).
        source_state: "layer_input" takes what the fused projections read, on the same footing as the target's;
            "block_output" takes the raw hidden states between blocks.
        padding_side, answer_source: see `align`.
    """

    def __init__(
        self,
        source_layer: str = "ahead",
        source_state: str = "layer_input",
        padding_side: str = "right",
        answer_source: str = "last",
    ):
        for name, value, allowed in (
            ("source_layer", source_layer, SOURCE_LAYERS),
            ("source_state", source_state, SOURCE_STATES),
            ("answer_source", answer_source, ANSWER_SOURCES),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}")
        self.source_layer, self.source_state = source_layer, source_state
        self.padding_side, self.answer_source = padding_side, answer_source
        self.recording = False
        self.blocks: list[BlockKey] = []  # those that fuse, as the adapter was built
        self.clear()

    def clear(self, prompt: int | None = None) -> None:
        """Forget the source. `prompt`: as in `Source.read`."""
        self._allowed, self._begins = False, False
        self._states: dict[BlockKey, Tensor] = {}  # by `_key`
        self._mask: Tensor | None = None
        self._known_prompt, self._prompt, self._start = prompt, prompt or 0, 0

    def allow_pass(self) -> None:
        """Let one more pass fuse the present source, or none where there is none."""
        self._allowed = True

    def enter(self, start: int, length: int) -> None:
        """Begin a target pass over positions start .. start + length - 1."""
        self._start = start
        self._begins = start == 0
        if self._begins and self._known_prompt is None:
            self._prompt = length

    def use(self, rows: int) -> None:
        """Take the source for the present pass, which has `rows` rows; every fused layer calls this.

        Raises:
            ValueError: no source was read for this pass, or the source is of another batch.
        """
        if self._begins:
            self._begins = False
            if not self._allowed:
                raise ValueError(
                    "this adapter fuses a source, and none was read for this forward: call source.read(english_batch) "
                    "before every forward, or source.read(None) to fuse nothing"
                )
            self._allowed = False
        if self._mask is not None and rows % len(self._mask):
            raise ValueError(
                f"the source that was read has {len(self._mask)} rows, and the target has {rows}: they are not of one batch"
            )

    def _key(self, block: BlockKey) -> BlockKey:
        """Where v^S of a block comes from: what block number `index` reads; past the last one, the stack's final state."""
        stack, index = block
        return stack, index + (self.source_layer == "ahead")

    @property
    def read_keys(self) -> set[BlockKey]:
        """What some block reads; the rest of a source pass is not kept."""
        return {self._key(block) for block in self.blocks}

    @property
    def reads_outputs(self) -> bool:
        """Whether hidden states between the blocks are needed, and not what the projections read."""
        return self.source_state == "block_output"

    def begin(self) -> None:
        """Begin a source pass."""
        self._states = {}
        self.recording = True

    def record(self, key: BlockKey, states: Tensor) -> None:
        """Keep what a block reads in the source pass, [B, S, d], if some block fuses it and nothing is kept there yet."""
        if key in self.read_keys and key not in self._states:
            self._states[key] = narrowed(states)

    def finish(self, mask: Tensor) -> None:
        """End a source pass. mask: [B, S]."""
        self._mask = mask.bool()

    def give(self, states: Sequence[Tensor], mask: Tensor) -> None:
        """Set v^S of each of `blocks`, without a pass. states: [B, S, d] each; mask: [B, S]."""
        self._states = dict(zip(map(self._key, self.blocks), states, strict=True))
        self._mask = mask.bool()

    def of(self, block: BlockKey, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor] | None:
        """v^S for `block`, as it was read: states [B, S, d] and mask [B, S]; None when there is no source.

        Args:
            dtype: of the states; they stay in it, so that all projections of a block keep one tensor for the backward.
        """
        if self._mask is None:
            return None
        states = self._states[self._key(block)]
        if dtype is not None and states.dtype != dtype:
            states = self._states[self._key(block)] = states.to(dtype)
        return states, self._mask

    def align(self, states: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Source states [B, S, c] and mask [B, S] at the `length` positions of the present target pass: [B, length, c] and
        [B, length]."""
        where = self._positions(length, states.device)
        return align(states, mask, where, self.padding_side, self._prompt, self.answer_source)

    def asks(self, length: int, device: torch.device) -> Tensor:
        """Which positions of the present target pass may look at the source: [length] bool."""
        if self.padding_side == "right" or self.answer_source == "last":
            return torch.ones(length, dtype=torch.bool, device=device)
        return self._positions(length, device) < self._prompt

    def _positions(self, length: int, device: torch.device) -> Tensor:
        return torch.arange(self._start, self._start + length, device=device)


def linear_dtype(weight: Tensor) -> torch.dtype:
    """The precision in which a linear layer computes: autocast's where that is on (it leaves float64 alone), else that of its
    weight."""
    kind = weight.device.type
    casts = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else weight.dtype


def narrowed(states: Tensor) -> Tensor:
    """States in the precision in which autocast will hand them to linear layers, where that is on: nothing else reads them."""
    return states.to(linear_dtype(states))
