"""Train and read models that continue a prompt: score candidate answers, or write an answer.

Shapes: B examples, T target tokens, A answer tokens, K candidate answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import GenerationConfig, PreTrainedTokenizerBase

from flare_exp.data.generation import padded_answers
from flare_exp.data.preprocessing import Prediction
from flare_exp.flare.source_states import positions
from flare_exp.training.global_batch import global_mean, likeliest, real_row_mask, upcast
from flare_exp.training.modules import FusionModule

# of a model's generation_config: all that decoding keeps of it
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class AnswerDecoding:
    """Settings for the answers of a generative model.

    Args:
        candidates: the model chooses the likeliest of these texts; empty: it generates freely.
        beams: number of beams; 1 is greedy search.
        max_new_tokens: longest generated answer in tokens.
        cache: key-value cache, "dynamic" or "static".
    """

    candidates: tuple[str, ...] = ()
    beams: int = 1
    max_new_tokens: int = 100
    cache: str = "dynamic"


class GenerationModule(FusionModule):
    """A decoder, or an encoder-decoder, that continues a prompt.

    Args:
        model: a generative model.
        tokenizer: the model's tokenizer.
        encode_answer: text -> token ids of an answer and EOS (`GenerationPreprocessor.answer`).
        decoding: settings for its answers.
        rows: most rows of a forward pass that scores candidates, but at least one candidate per
            prompt; None: no limit.
        **options: arguments of `FusionModule`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        encode_answer: Callable[[str], list[int]],
        decoding: AnswerDecoding,
        rows: int | None = None,
        **options,
    ):
        super().__init__(model, **options)
        # `generate` takes from it what it is not told, such as a checkpoint's repetition penalty
        own = model.generation_config
        ids = {name: getattr(own, name, None) for name in SPECIAL_IDS}
        model.generation_config = GenerationConfig(**ids)  # type: ignore[assignment]
        self.tokenizer, self.decoding, self.rows = tokenizer, decoding, rows
        self.candidates = (
            padded_answers([encode_answer(text) for text in decoding.candidates])
            if decoding.candidates
            else None
        )

    def configure_model(self) -> None:
        """Shard the module; `generate` is registered, because FSDP2 only hooks into `forward`."""
        super().configure_model()
        register_fsdp_forward_method(self, "generate")  # no effect without sharding

    def forward(
        self, batch: dict[str, Any], answers: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probability of every answer token given its prompt, teacher-forced.

        Args:
            batch: B prompts (and their sources).
            answers: input_ids and attention_mask [B * K, A], K successive rows per prompt.

        Returns:
            log-probabilities and mask, both [B * K, A].
        """
        prompt = batch["target"]
        count, length = prompt["input_ids"].shape
        self.read_source(batch, length)
        encoded = (
            self.model.get_encoder()(**prompt).last_hidden_state
            if self.model.config.is_encoder_decoder
            else None
        )
        repeats = len(answers["input_ids"]) // count
        at_once = max(1, self.rows // count) if self.rows else repeats
        if self.rows and self.device_mesh is not None:
            at_once = 1  # processes with fewer rows gather sharded weights as often
        by_prompt = {name: x.reshape(count, repeats, -1) for name, x in answers.items()}
        scored = []
        for i in range(0, repeats, at_once):
            if i and self.source is not None and encoded is None:
                self.source.states.allow_pass()  # all candidates have the source of their prompt
            scored.append(
                self._score(
                    prompt,
                    encoded,
                    {name: x[:, i : i + at_once].flatten(0, 1) for name, x in by_prompt.items()},
                )
            )
        chosen = torch.cat([part.view(count, -1, part.shape[1]) for part in scored], 1).flatten(
            0, 1
        )
        return chosen, answers["attention_mask"]

    def _score(
        self, prompt: Mapping[str, Tensor], encoded: Tensor | None, answers: Mapping[str, Tensor]
    ) -> Tensor:
        """Return log-probabilities [B * K, A] of answers, 0 at padding; the source has been read.

        Args:
            prompt: input_ids and attention_mask [B, T].
            encoded: an encoder's last hidden states of the prompts; None for decoders.
            answers: input_ids and attention_mask [B * K, A].
        """
        ids, mask = answers["input_ids"], answers["attention_mask"]
        repeats = len(ids) // len(prompt["input_ids"])
        if encoded is not None:
            start = torch.full_like(ids[:, :1], self.model.config.decoder_start_token_id)
            logits = self.model(
                attention_mask=prompt["attention_mask"].repeat_interleave(repeats, 0),
                encoder_outputs=(encoded.repeat_interleave(repeats, 0),),
                decoder_input_ids=torch.cat([start, ids[:, :-1]], 1),
                use_cache=False,
            ).logits
        else:
            whole = {
                name: torch.cat([prompt[name].repeat_interleave(repeats, 0), answers[name]], 1)
                for name in answers
            }
            kept = ids.shape[1] + 1
            logits = self.model(
                **whole,
                position_ids=positions(whole["attention_mask"]),
                logits_to_keep=kept,
                use_cache=False,
            ).logits[:, -kept:-1]
        return upcast(logits).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) * mask

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean negative log-likelihood per answer token, a scalar."""
        chosen, mask = self(batch, batch["answer"])
        mask = mask * real_row_mask(batch)[:, None]
        loss = global_mean(-(chosen * mask).sum(), mask.sum(), batch)
        return loss + self.added.loss(batch) if self.added else loss

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        """Return one answer per row: the likeliest candidate or a generated text."""
        if self.candidates:
            return self.choose(batch)
        return [Prediction(text) for text in self.generate(batch)]

    def choose(self, batch: dict[str, Any]) -> list[Prediction]:
        """Return the likeliest candidate of each prompt, scored exactly with EOS.

        The probabilities are those of the candidates given that the answer is one of them.
        """
        rows = len(batch["index"])
        repeated = {name: x.to(self.device).repeat(rows, 1) for name, x in self.candidates.items()}  # type: ignore[union-attr]
        chosen, _ = self(batch, repeated)
        return likeliest(chosen.sum(1).view(rows, -1), self.decoding.candidates)

    @torch.no_grad()
    def generate(self, batch: dict[str, Any]) -> list[str]:
        """Return the text that the model generates after each prompt, up to EOS."""
        prompt = batch["target"]
        self.read_source(batch)
        settings = GenerationConfig(
            max_new_tokens=self.decoding.max_new_tokens,
            num_beams=self.decoding.beams,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            decoder_start_token_id=getattr(self.model.config, "decoder_start_token_id", None),
            cache_implementation="static" if self.decoding.cache == "static" else None,
            disable_compile=True,
        )
        # all processes gather sharded weights together: none may stop before the others
        written = self.model.generate(
            **prompt, generation_config=settings, synced_gpus=self.device_mesh is not None
        )
        if not self.model.config.is_encoder_decoder:
            written = written[:, prompt["input_ids"].shape[1] :]
        return [
            text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)
        ]
