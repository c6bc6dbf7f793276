"""LightningModules: the mPLM with its adapters and task head, one optimisation recipe; a class per form.

Shapes: B examples, T target tokens, S source tokens, A answer tokens, K candidate answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import GenerationConfig, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from flare_exp.data.generation import padded_answers
from flare_exp.data.preprocessing import Prediction
from flare_exp.data.question_answering import best_spans
from flare_exp.flare.source_encoders import Source
from flare_exp.flare.source_states import positions
from flare_exp.models.backbones import blocks
from flare_exp.training import distributed

IGNORED = -100  # label of a row that counts for nothing
Score = Callable[[Mapping[int, Prediction]], Mapping[str, float]]


class FusionModule(LightningModule):
    """What the forms share: reading the source before the target, optimisation, scoring of predicted texts.

    A batch may be one of the parts of a global batch, which this process reads one after the other (`batch["whole"]`,
    `flare_exp.data.sampling.Shares`). Losses are means over the global batch (`mean`), and all processes must go through the
    same steps. Rows with an index below 0 are stand-ins.

    Args:
        model: a (PEFT) model, trainable where it is to be trained.
        source: reads the batch's source before the target pass; None for methods without source.
        score: predictions of the validation set, by row -> metrics; needed for validation only.
        optimizer: parameters -> optimiser (`functools.partial`); needed for training only.
        warmup: share of the steps with rising learning rate; then it falls linearly to zero.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: Source | None = None,
        score: Score | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        warmup: float = 0.1,
    ):
        super().__init__()
        self.strict_loading = False  # checkpoints hold the trained weights only
        self.model, self.source, self.score, self.optimizer, self.warmup = (
            model,
            source,
            score,
            optimizer,
            warmup,
        )
        self.found: dict[int, Prediction] = {}
        self.parts: list[Tensor] = []  # losses of the present global batch

    model: Any

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean loss of a batch."""
        raise NotImplementedError  # pragma: no cover

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        """Return one prediction per row."""
        raise NotImplementedError  # pragma: no cover

    def evaluate(self, batch: dict[str, Any]) -> tuple[Tensor, list[Prediction]]:
        """Loss and predictions."""
        return self.loss(batch), self.predict(batch)

    def read_source(self, batch: dict[str, Any], prompt: int | None = None) -> None:
        if self.source is not None:
            self.source.read(batch.get("source"), prompt)

    def configure_model(self) -> None:
        """Where Lightning lets a module shard itself over the processes (trainer=fsdp)."""
        if (mesh := self.device_mesh) is not None:
            called = self.source.called if self.source else ()
            distributed.shard(self, (*called, *blocks(self.model)), mesh["data_parallel"])

    def on_fit_end(self) -> None:
        """Give up the last batch's source states: the module may live on."""
        if self.source is not None:
            self.source.states.clear()

    on_predict_end = on_fit_end

    def on_fit_start(self) -> None:
        # from_pretrained returns modules in eval mode and Lightning leaves them so: dropout would stay off
        self.model.train()

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        loss = self.loss(batch)
        self.parts.append(loss.detach())
        if len(self.parts) == self.trainer.accumulate_grad_batches:
            whole, self.parts = torch.stack(self.parts).mean(), []
            self.log(
                "train/loss",
                whole,
                batch_size=rows_of(batch),
                on_step=True,
                on_epoch=True,
                prog_bar=True,
                sync_dist=True,
            )
        return loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        loss, found = self.evaluate(batch)
        self.log("validation/loss", loss, batch_size=rows_of(batch), sync_dist=True)
        self.found |= by_row(batch, found)

    def on_validation_epoch_end(self) -> None:
        if self.score is None:
            raise ValueError("validation needs a score")
        scores = self.score(distributed.gathered(self.found))
        # the same on every process, and of equal numbers the largest is exact where a mean may round
        self.log_dict(
            {f"validation/{k}": v for k, v in scores.items()},
            prog_bar=True,
            sync_dist=True,
            reduce_fx="max",
        )
        self.found = {}

    def predict_step(self, batch: dict[str, Any], _: int) -> dict[int, Prediction]:
        """Row of the dataset -> prediction."""
        return by_row(batch, self.predict(batch))

    def configure_optimizers(self):
        if self.optimizer is None:
            raise ValueError("training needs an optimizer")
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trained(checkpoint["state_dict"])

    def trained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was trained of a state."""
        names = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in state.items() if k in names}


def wide(logits: Tensor) -> Tensor:
    """Logits in at least float32, where losses are computed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mean(total: Tensor, count: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The mean loss of the global batch, as this batch's part of it: the average over all parts, on all processes, is the mean.

    Trainers average gradients over processes and over the batches of a step.

    Args:
        total: sum of the batch's loss terms, a scalar.
        count: how many these are; of a batch that is no part of another one.
    """
    if (whole := batch.get("whole")) is None:
        return total / count.clamp(min=1)
    return total * whole.parts / max(1, whole.terms)


def counted(batch: Mapping[str, Any]) -> Tensor:
    """Which rows are examples, and no stand-ins: [B] bool. All are in a batch that no data set numbered."""
    ids = batch["target"]["input_ids"]
    return batch.get("index", torch.zeros(len(ids), device=ids.device)) >= 0


def by_row(batch: Mapping[str, Any], found: Sequence[Prediction]) -> dict[int, Prediction]:
    """Row of the dataset -> prediction, without stand-ins."""
    return {row: one for row, one in zip(batch["index"].tolist(), found, strict=True) if row >= 0}


def rows_of(batch: Mapping[str, Any]) -> int:
    """Examples in the global batch."""
    return batch["whole"].rows if "whole" in batch else len(batch["index"])


class HeadModule(FusionModule):
    """A model whose one output gives both loss and prediction."""

    def loss_of(self, output: Any, batch: dict[str, Any]) -> Tensor:
        raise NotImplementedError  # pragma: no cover

    def predictions_of(self, output: Any, batch: dict[str, Any]) -> list[Prediction]:
        raise NotImplementedError  # pragma: no cover

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return self.loss_of(self(batch), batch)

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        return self.predictions_of(self(batch), batch)

    def evaluate(self, batch: dict[str, Any]) -> tuple[Tensor, list[Prediction]]:
        output = self(batch)
        return self.loss_of(output, batch), self.predictions_of(output, batch)


class ClassificationModule(HeadModule):
    """A sequence classifier. Args: labels: the classes' names."""

    def __init__(self, model: nn.Module, labels: Sequence[str], **options):
        super().__init__(model, **options)
        self.labels = list(labels)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B, labels] of the batch's target texts."""
        self.read_source(batch)
        return self.model(**batch["target"]).logits

    def loss_of(self, output: Tensor, batch: dict[str, Any]) -> Tensor:
        labels = batch["labels"].masked_fill(~counted(batch), IGNORED)
        total = nn.functional.cross_entropy(
            wide(output), labels, ignore_index=IGNORED, reduction="sum"
        )
        return mean(total, (labels != IGNORED).sum(), batch)

    def predictions_of(self, output: Tensor, batch: dict[str, Any]) -> list[Prediction]:
        return [Prediction(self.labels[i]) for i in output.argmax(-1).tolist()]


class SpanModule(HeadModule):
    """Extractive question answering. Args: longest: longest answer in tokens."""

    def __init__(self, model: nn.Module, longest: int = 30, **options):
        super().__init__(model, **options)
        self.longest = longest

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Start and end logits [B, T] of the batch's target texts."""
        self.read_source(batch)
        output = self.model(**batch["target"])
        return output.start_logits, output.end_logits

    def loss_of(self, output: tuple[Tensor, Tensor], batch: dict[str, Any]) -> Tensor:
        """Cross-entropy of start and end over the context's tokens; an answer that is cut off or lost teaches nothing.

        In windows the first special token competes with them, for a window that does not hold the answer points at it.
        """
        legal, known = batch["offsets"][..., 0] >= 0, (batch["span"][:, 0] >= 0) & counted(batch)
        if (null := batch.get("null")) is not None:
            legal = legal | (torch.arange(legal.shape[1], device=legal.device) == null[:, None])
        total = torch.zeros((), device=legal.device)
        for logits, wanted in zip(output, batch["span"].T, strict=True):
            logits = wide(logits).masked_fill(~legal, float("-inf"))
            total = total + nn.functional.cross_entropy(
                logits[known], wanted[known], reduction="sum"
            )
        return mean(total, 2 * known.sum(), batch)

    def predictions_of(
        self, output: tuple[Tensor, Tensor], batch: dict[str, Any]
    ) -> list[Prediction]:
        start, end = output
        return best_spans(start, end, batch["offsets"], batch["contexts"], self.longest)


@dataclass(frozen=True)
class Decoding:
    """How a generative model answers. `candidates`: choose the likeliest of these texts; empty: generate freely, with `beams`
    (1: greedy), at most `max_new_tokens`, and a "dynamic" or "static" `cache`."""

    candidates: tuple[str, ...] = ()
    beams: int = 1
    max_new_tokens: int = 100
    cache: str = "dynamic"


class GenerationModule(FusionModule):
    """A decoder, or an encoder-decoder, that continues a prompt.

    Args:
        tokenizer: of the model.
        encode_answer: text -> token ids of an answer and EOS (`PromptForm.answer`).
        decoding: how it answers.
        rows: most rows of a pass that scores candidates (but one candidate per prompt); None: no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        encode_answer: Callable[[str], list[int]],
        decoding: Decoding,
        rows: int | None = None,
        **options,
    ):
        super().__init__(model, **options)
        self.tokenizer, self.decoding, self.rows = tokenizer, decoding, rows
        self.candidates = (
            padded_answers([encode_answer(text) for text in decoding.candidates])
            if decoding.candidates
            else None
        )

    def configure_model(self) -> None:
        super().configure_model()
        register_fsdp_forward_method(self, "generate")  # nothing where nothing is sharded

    def forward(
        self, batch: dict[str, Any], answers: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of every answer token given its prompt, teacher-forced.

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
        """Log-probabilities [B * K, A] of answers, 0 where they are padded; the source has been read.

        encoded: what an encoder made of the prompts.
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
        return wide(logits).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) * mask

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Negative log-likelihood per answer token."""
        chosen, mask = self(batch, batch["answer"])
        mask = mask * counted(batch)[:, None]
        return mean(-(chosen * mask).sum(), mask.sum(), batch)

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        return [
            Prediction(text)
            for text in (self.choose(batch) if self.candidates else self.generate(batch))
        ]

    def choose(self, batch: dict[str, Any]) -> list[str]:
        """The likeliest candidate of each prompt, EOS included, scored exactly."""
        rows = len(batch["index"])
        repeated = {name: x.to(self.device).repeat(rows, 1) for name, x in self.candidates.items()}  # type: ignore[union-attr]
        chosen, _ = self(batch, repeated)
        best = chosen.sum(1).view(rows, -1).argmax(1)
        return [self.decoding.candidates[i] for i in best.tolist()]

    @torch.no_grad()
    def generate(self, batch: dict[str, Any]) -> list[str]:
        """What the model writes after each prompt, up to EOS."""
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
        # sharded weights are gathered by all processes: none may stop before the others have
        written = self.model.generate(
            **prompt, generation_config=settings, synced_gpus=self.device_mesh is not None
        )
        if not self.model.config.is_encoder_decoder:
            written = written[:, prompt["input_ids"].shape[1] :]
        return [
            text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)
        ]
