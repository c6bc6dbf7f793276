"""Where source states come from: a pass of the frozen backbone over the English text, recorded block by block; or the
encoder of a translation model, reading the target text itself. Either can be
read once and kept (flare_exp.states)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

SOURCE_LAYERS = ("ahead", "same")
SOURCE_STATES = ("layer_input", "block_output")
ANSWER_SOURCES = ("last", "none")

BlockKey = tuple[str, int]  # (stack, index): encoder and decoder layers of one model share numbers


def align(
    states: Tensor, mask: Tensor, positions: Tensor, side: str = "right", prompt: int = 0, answer_source: str = "last"
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


class Source:
    """Fills the `SourceStates` of a PEFT model with a FLARE adapter that fuses (flare_exp.adapter), batch by batch."""

    def __init__(self, model: nn.Module):
        from flare_exp.adapter import source_states

        self.states, self.stacks = source_states(model)
        self.model, self.reader = model, model  # `reader` reads a source's text

    reader: nn.Module

    @property
    def reads(self) -> dict[str, Any]:
        """What decides the states of a text, beside the weights of the reader: no fusion function does."""
        raise NotImplementedError  # pragma: no cover

    called: tuple[nn.Module, ...] = ()  # parts of the adapter that the source itself calls, outside the layer that holds them

    def read(self, inputs: Mapping[str, Tensor] | None, prompt: int | None = None) -> None:
        """Make the source states of a batch the ones that the coming target pass fuses.

        Args:
            inputs: attention_mask [B, S] and input_ids [B, S], or instead of these `states` [B, S, n, d] as `compute` gave
                them before. A row whose mask is all zero has no source; None: no row has. A target batch of k x B rows
                (beams, candidate answers) is read as k successive rows per source.
            prompt: how many positions of a decoder's coming target pass are prompt; None: all of its first forward.
        """
        self.states.clear(prompt)
        if inputs is not None:
            self.fill(inputs)
        self.states.allow_pass()

    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        raise NotImplementedError  # pragma: no cover

    def compute(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What is worth keeping of a batch: [B, S, n, d], without graph."""
        raise NotImplementedError  # pragma: no cover


class BackboneSource(Source):
    """The mPLM itself as source: reads the English text without the fusion adapter, without gradient and dropout."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        whole = model.get_base_model()  # type: ignore[operator]
        self.encoder_decoder: bool = whole.config.is_encoder_decoder
        self.backbone: nn.Module = whole.base_model  # without the task head
        self.shift_right = getattr(whole, "_shift_right", None)

    @property
    def reads(self) -> dict[str, Any]:
        states = self.states
        return {"layer": states.source_layer, "state": states.source_state, "blocks": [list(block) for block in states.blocks]}

    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        if "states" in inputs:
            self.states.give(inputs["states"].unbind(2), inputs["attention_mask"])
        else:
            self.record(inputs)

    def compute(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What each fused block reads as v^S."""
        self.record(inputs)
        return torch.stack([self.states.of(block)[0] for block in self.states.blocks], dim=2)  # type: ignore[index]

    @torch.no_grad()
    def record(self, inputs: Mapping[str, Tensor]) -> None:
        """The recording pass: input_ids and attention_mask [B, S]."""
        mask = inputs["attention_mask"].bool()
        readable = mask.clone()
        readable[:, 0] |= ~mask.any(dim=1)  # attention over nothing is not a number; the row's mask stays empty
        training = [module for module in self.backbone.modules() if module.training]
        self.backbone.eval()
        self.states.begin()
        try:
            self._pass({**inputs, "attention_mask": readable.to(inputs["attention_mask"].dtype)})
        finally:
            self.states.recording = False
            for module in training:
                module.training = True
        self.states.finish(mask)

    def _pass(self, inputs: Mapping[str, Tensor]) -> None:
        """Read the source in every stack that fuses. The fused layers record what they read; the rest is kept here."""
        outputs = {"output_hidden_states": self.states.reads_outputs}
        if not self.encoder_decoder:
            counted = {"position_ids": positions(inputs["attention_mask"])} if self.states.padding_side == "left" else {}
            self._keep(self.stacks[0], self.backbone(**self._embedded(inputs), **counted, **outputs, use_cache=False))
            return
        encoded = self.backbone.encoder(**inputs, **outputs)  # type: ignore[operator]
        self._keep("encoder", encoded)
        if "decoder" in self.stacks:  # heads on the decoder: it reads the input shifted right (PAPER, section 3)
            decoded = self.backbone.decoder(  # type: ignore[operator]
                input_ids=self.shift_right(inputs["input_ids"]),  # type: ignore[misc]
                encoder_hidden_states=encoded.last_hidden_state,
                encoder_attention_mask=inputs["attention_mask"],
                use_cache=False,
                **outputs,
            )
            self._keep("decoder", decoded)

    def _embedded(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of the backbone. Trained embeddings are the target's: a source reads the frozen ones below them."""
        embeddings = self.backbone.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(embeddings, ModulesToSaveWrapper):
            return dict(inputs)
        inputs = dict(inputs)
        return {"inputs_embeds": embeddings.original_module(inputs.pop("input_ids")), **inputs}

    def _keep(self, stack: str, output: Any) -> None:
        """Keep a stack's hidden states, or its final one alone."""
        if self.states.reads_outputs:
            for index, states in enumerate(output.hidden_states):
                self.states.record((stack, index), states)
        else:
            last = max(index for name, index in self.states.blocks if name == stack)
            self.states.record((stack, last + 1), output.last_hidden_state)


class MTSource(Source):
    """FLARE MT (PAPER, section 2): the last hidden state of a translation model's encoder, which reads the target-language
    text, through one trainable linear map to d (part of the adapter); the same tensor for every block.

    Args:
        model: its adapter has a `source_width`.
        encoder: frozen, in eval mode; needed unless all states come precomputed.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module | None = None):
        super().__init__(model)
        from flare_exp.adapter import source_map

        self.map, self.encoder = source_map(model), encoder
        self.reader, self.called = encoder or model, (self.map,)

    @property
    def reads(self) -> dict[str, Any]:
        return {"state": "last_hidden_state"}

    def drop_encoder(self) -> None:
        """Go on with computed states alone."""
        self.encoder, self.reader = None, self.model

    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        states = inputs["states"] if "states" in inputs else self.compute(inputs)
        mapped = self.map(states[:, :, 0].to(linear_dtype(self.map.weight)))
        self.states.give([mapped] * len(self.states.blocks), inputs["attention_mask"])

    @torch.no_grad()
    def compute(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The encoder's states [B, S, 1, d_mt]."""
        if self.encoder is None:
            raise ValueError("there is no encoder, and the states were not computed before")
        output = self.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return narrowed(output.last_hidden_state)[:, :, None]
