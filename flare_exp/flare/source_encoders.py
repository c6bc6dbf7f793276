"""Read the source of a batch: with the frozen backbone, or with the encoder of a translation model.

Either can be read once and kept (flare_exp.data.source_cache).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from flare_exp.flare.peft_method import SOURCE_MAP
from flare_exp.flare.source_states import SourceStates, linear_dtype, narrowed, positions


class Source:
    """Fills the `SourceStates` of a PEFT model with a FLARE adapter that fuses (flare_exp.flare.peft_method), batch by batch."""

    def __init__(self, model: nn.Module):
        self.states, self.stacks = source_states(model)
        self.model, self.reader = model, model  # `reader` reads a source's text

    reader: nn.Module

    @property
    def reads(self) -> dict[str, Any]:
        """What decides the states of a text, beside the weights of the reader: no fusion function does."""
        raise NotImplementedError  # pragma: no cover

    called: tuple[
        nn.Module, ...
    ] = ()  # parts of the adapter that the source itself calls, outside the layer that holds them

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
        return {
            "layer": states.source_layer,
            "state": states.source_state,
            "blocks": [list(block) for block in states.blocks],
        }

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
        readable[:, 0] |= ~mask.any(
            dim=1
        )  # attention over nothing is not a number; the row's mask stays empty
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
            counted = (
                {"position_ids": positions(inputs["attention_mask"])}
                if self.states.padding_side == "left"
                else {}
            )
            self._keep(
                self.stacks[0],
                self.backbone(**self._embedded(inputs), **counted, **outputs, use_cache=False),
            )
            return
        encoded = self.backbone.encoder(**inputs, **outputs)  # type: ignore[operator]
        self._keep("encoder", encoded)
        if (
            "decoder" in self.stacks
        ):  # heads on the decoder: it reads the input shifted right (PAPER, section 3)
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
        output = self.encoder(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
        return narrowed(output.last_hidden_state)[:, :, None]


def source_states(model: Any) -> tuple[SourceStates, list[str]]:
    """The `SourceStates` that a PEFT model's fusion adapter reads, and the names of the stacks that fuse.

    Raises:
        ValueError: no adapter, or more than one, fuses.
    """
    found = model.base_model.__dict__.get("source_states", {})
    if len(found) != 1:
        raise ValueError(
            f"one adapter with a fusion is needed; of {', '.join(model.peft_config)} there are {len(found)}"
        )
    ((name, states),) = found.items()
    return states, list(model.peft_config[name].stacks)


def source_map(model: Any) -> nn.Linear:
    """The linear map of a FLARE MT adapter.

    Raises:
        ValueError: the model has none.
    """
    found = [maps for name, maps in model.named_modules() if name.endswith(f".{SOURCE_MAP}")]
    if len(found) != 1:
        raise ValueError(
            "the adapter has no map for the states of a translation model: its source_width is not set"
        )
    return next(iter(found[0].values()))
