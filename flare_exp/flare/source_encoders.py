"""Read the source of a batch with the frozen backbone or with a translation model's encoder.

The states of either can be computed once and kept (flare_exp.data.source_cache).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import TaskType
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from flare_exp.flare.mixup import MixupStates
from flare_exp.flare.peft_method import SOURCE_MAP
from flare_exp.flare.source_states import SourceStates, linear_dtype, narrowed, positions


class SourceEncoder:
    """Compute the hidden states of the source, the text that a FLARE adapter fuses.

    `encode` is called before each forward pass of the model: it returns nothing and fills the
    model's `SourceStates`. In training, `FusionModule.read_source` calls it. `compute` returns
    states that are worth keeping (flare_exp.data.source_cache).

    See flare_exp.flare.peft_method for the adapter. Each batch is read on its own.
    """

    def __init__(self, model: nn.Module):
        self.config, self.states = source_states(model)
        self.stacks = list(self.config.stacks)
        self.model, self.reader = model, model  # `reader` reads a source's text

    reader: nn.Module

    @property
    def reads(self) -> dict[str, Any]:
        """Return the options that determine a text's states besides the weights of the reader.

        The fusion function is not among them: the states do not depend on it.
        """
        raise NotImplementedError  # pragma: no cover

    # whether states stay the same in training, so that they can be computed once
    cacheable = True
    # parts of the adapter that the source itself calls, outside the layer that holds them
    called: tuple[nn.Module, ...] = ()

    def encode(self, inputs: Mapping[str, Tensor] | None, prompt: int | None = None) -> None:
        """Set the source states that the next target pass fuses.

        Args:
            inputs: attention_mask [B, S] and input_ids [B, S], or `states` [B, S, n, d] from
                `compute` in place of input_ids. With K sources for each text, all have K as a first
                dimension: [K, B, S]. A row whose mask is all zero has no source; None
                means that no row has one. A target batch of k x B rows (beams, candidate answers)
                is read as k successive rows per source.
            prompt: number of prompt positions in a decoder's next target pass; None counts all
                positions of its first forward.
        """
        count = 1
        if inputs is not None and (mask := inputs["attention_mask"]).ndim == 3:
            count, inputs = len(mask), {name: x.flatten(0, 1) for name, x in inputs.items()}
        self.states.clear(prompt, count)
        if inputs is not None:
            self._fill(inputs)
        self.states.allow_pass()

    def _fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Fill the source states from the inputs that `encode` got."""
        raise NotImplementedError  # pragma: no cover

    def compute(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the states of a batch that are worth keeping: [B, S, n, d], without gradient."""
        raise NotImplementedError  # pragma: no cover


class BackboneSourceEncoder(SourceEncoder):
    """Source that reads the English text with the mPLM itself.

    It runs without the fusion adapter, without gradient and without dropout.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        whole = model.get_base_model()  # type: ignore[operator]
        self.encoder_decoder: bool = whole.config.is_encoder_decoder
        self.backbone: nn.Module = whole.base_model  # without the task head
        self.shift_right = getattr(whole, "_shift_right", None)

    @property
    def reads(self) -> dict[str, Any]:
        """Return the layer, the kind of state and the blocks that are read."""
        states = self.states
        return {
            "layer": states.source_layer,
            "state": states.source_state,
            "blocks": [list(block) for block in states.blocks],
        }

    def _fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Set the source states to the given `states`, or record them in a source pass."""
        if "states" in inputs:
            self.states.set_states(inputs["states"].unbind(2), inputs["attention_mask"])
        else:
            self.record(inputs)

    def compute(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the state v^S that each fused block reads: [B, S, blocks, d]."""
        self.record(inputs)
        found = [self.states.states_for(block) for block in self.states.blocks]
        return torch.stack([states for states, _ in filter(None, found)], dim=2)

    @torch.no_grad()
    def record(self, inputs: Mapping[str, Tensor]) -> None:
        """Run the recording pass over input_ids and attention_mask, both [B, S]."""
        mask = inputs["attention_mask"].bool()
        readable = mask.clone()
        # attention over no position gives NaN; the mask of such a row stays empty
        readable[:, 0] |= ~mask.any(dim=1)
        training = [module for module in self.backbone.modules() if module.training]
        self.backbone.eval()
        self.states.begin_recording()
        try:
            self._pass({**inputs, "attention_mask": readable.to(inputs["attention_mask"].dtype)})
        finally:
            self.states.recording = False
            for module in training:
                module.training = True
        self.states.end_recording(mask)

    def _pass(self, inputs: Mapping[str, Tensor]) -> None:
        """Read the source in every stack that fuses.

        The fused layers record their own inputs. This method keeps the other states.
        """
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
        # A head on the decoder: it reads the input shifted right (arXiv 2501.06892, section 3).
        if "decoder" in self.stacks:
            decoded = self.backbone.decoder(  # type: ignore[operator]
                input_ids=self.shift_right(inputs["input_ids"]),  # type: ignore[misc]
                encoder_hidden_states=encoded.last_hidden_state,
                encoder_attention_mask=inputs["attention_mask"],
                use_cache=False,
                **outputs,
            )
            self._keep("decoder", decoded)

    def _embedded(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of the backbone, embedded with its frozen embeddings.

        Trained embeddings belong to the target: the source is read with the frozen ones below them.
        """
        embeddings = self.backbone.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(embeddings, ModulesToSaveWrapper):
            return dict(inputs)
        inputs = dict(inputs)
        return {"inputs_embeds": embeddings.original_module(inputs.pop("input_ids")), **inputs}

    def _keep(self, stack: str, output: Any) -> None:
        """Keep all hidden states of a stack, or only its final one."""
        if self.states.reads_outputs:
            for index, states in enumerate(output.hidden_states):
                self.states.record((stack, index), states)
        else:
            last = max(index for name, index in self.states.blocks if name == stack)
            self.states.record((stack, last + 1), output.last_hidden_state)


class MixupSourceEncoder(BackboneSourceEncoder):
    """X-Mixup: a classifier reads the source with its head, whose logits the losses compare.

    The head is the one that is trained, without gradient. Other models read states alone.
    """

    states: MixupStates
    cacheable = False

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.classifies = self.config.task_type == TaskType.SEQ_CLS
        if self.classifies:
            self.backbone = model.get_base_model()  # type: ignore[operator]

    def compute(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Refuse to compute states in advance.

        Raises:
            ValueError: always; the logits would be those of a head before its training.
        """
        raise ValueError("x_mixup reads every source anew: its head is trained")

    def _pass(self, inputs: Mapping[str, Tensor]) -> None:
        if not self.classifies:
            super()._pass(inputs)
            return
        output = self.backbone(**self._embedded(inputs), output_hidden_states=True)
        self.states.logits = output.logits
        for stack in self.stacks:
            name = f"{stack}_hidden_states" if self.encoder_decoder else "hidden_states"
            for index, states in enumerate(output[name]):
                self.states.record((stack, index), states)


class MTSourceEncoder(SourceEncoder):
    """FLARE MT: a translation model's encoder reads the text in the target language.

    The encoder's last hidden state goes through one trainable linear map to width d, which is part
    of the adapter. Every block fuses the same tensor (arXiv 2501.06892, section 2).

    Args:
        model: PEFT model whose adapter has a `source_width`.
        encoder: frozen and in eval mode; needed unless all states are computed in advance.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module | None = None):
        super().__init__(model)
        self.map, self.encoder = source_map(model), encoder
        self.reader, self.called = encoder or model, (self.map,)

    @property
    def reads(self) -> dict[str, Any]:
        """Return the kind of state that is read."""
        return {"state": "last_hidden_state"}

    def drop_encoder(self) -> None:
        """Release the encoder; from here on all states must be computed in advance."""
        self.encoder, self.reader = None, self.model

    def _fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Map the encoder's states to width d and set them for every block."""
        states = inputs["states"] if "states" in inputs else self.compute(inputs)
        mapped = self.map(states[:, :, 0].to(linear_dtype(self.map.weight)))
        self.states.set_states([mapped] * len(self.states.blocks), inputs["attention_mask"])

    @torch.no_grad()
    def compute(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the encoder's states: [B, S, 1, d_mt].

        Raises:
            ValueError: there is no encoder.
        """
        if self.encoder is None:
            raise ValueError("there is no encoder, and the states were not computed before")
        output = self.encoder(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
        return narrowed(output.last_hidden_state)[:, :, None]


def source_states(model: Any) -> tuple[Any, SourceStates]:
    """Return the configuration of a PEFT model's fusion adapter and its `SourceStates`.

    Raises:
        ValueError: no adapter, or more than one, fuses.
    """
    found = model.base_model.__dict__.get("source_states", {})
    if len(found) != 1:
        raise ValueError(
            f"one adapter with a fusion is needed; of {', '.join(model.peft_config)} there are "
            f"{len(found)}"
        )
    ((name, states),) = found.items()
    return model.peft_config[name], states


def source_map(model: Any) -> nn.Linear:
    """Return the linear map of a FLARE MT adapter.

    Raises:
        ValueError: the model has none.
    """
    found = [maps for name, maps in model.named_modules() if name.endswith(f".{SOURCE_MAP}")]
    if len(found) != 1:
        raise ValueError(
            "the adapter has no map for the states of a translation model: its source_width is not "
            "set"
        )
    return next(iter(found[0].values()))
