"""LightningModules: the language model with its adapters and task head, one class per task type.

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
from flare_exp.flare.source_encoders import SourceEncoder
from flare_exp.flare.source_states import positions
from flare_exp.models.backbones import blocks
from flare_exp.training import distributed

IGNORED = -100  # label of a row that does not count in the loss
Score = Callable[[Mapping[int, Prediction]], Mapping[str, float]]


class FusionModule(LightningModule):
    """Base of all modules: reads the source before the target, optimizes, and scores predictions.

    A batch may be a part of a global batch, which this process reads one part after the other
    (`batch["whole"]`, `flare_exp.data.sampling.RankShardBatchSampler`). Losses are means over the
    global batch (`global_mean`). All processes must run the same number of steps. Rows with an
    index below 0 are padding rows and do not count.

    Args:
        model: a (PEFT) model, in which the parameters to be trained require a gradient.
        source: reads the batch's source before the target pass; None for methods without a source.
        score: predictions of the validation set, by row -> metrics; needed for validation only.
        optimizer: parameters -> optimizer (`functools.partial`); needed for training only.
        warmup: share of the steps with a rising learning rate; afterwards it falls linearly to
            zero.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: SourceEncoder | None = None,
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
        self.parts: list[Tensor] = []  # losses of the current global batch

    model: Any

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        raise NotImplementedError  # pragma: no cover

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        """Return one prediction per row."""
        raise NotImplementedError  # pragma: no cover

    def evaluate(self, batch: dict[str, Any]) -> tuple[Tensor, list[Prediction]]:
        """Return the loss of a batch and one prediction per row."""
        return self.loss(batch), self.predict(batch)

    def read_source(self, batch: dict[str, Any], prompt: int | None = None) -> None:
        """Encode the batch's source, if the method has one.

        Args:
            batch: the batch; `batch["source"]` holds the source texts.
            prompt: length of the prompt in tokens; None: the whole first forward pass is prompt.
        """
        if self.source is not None:
            self.source.encode(batch.get("source"), prompt)

    def configure_model(self) -> None:
        """Shard the module over the processes (trainer=fsdp) when Lightning calls this."""
        if (mesh := self.device_mesh) is not None:
            called = self.source.called if self.source else ()
            distributed.shard(self, (*called, *blocks(self.model)), mesh["data_parallel"])

    def on_fit_end(self) -> None:
        """Release the last batch's source states, because the module may be kept."""
        if self.source is not None:
            self.source.states.clear()

    on_predict_end = on_fit_end

    def on_fit_start(self) -> None:
        """Switch the model to training mode."""
        # from_pretrained returns modules in eval mode, which Lightning keeps: dropout would be off
        self.model.train()

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        """Return the loss of a batch; the loss of a whole global batch is logged."""
        loss = self.loss(batch)
        self.parts.append(loss.detach())
        if len(self.parts) == self.trainer.accumulate_grad_batches:
            whole, self.parts = torch.stack(self.parts).mean(), []
            self.log(
                "train/loss",
                whole,
                batch_size=global_batch_size(batch),
                on_step=True,
                on_epoch=True,
                prog_bar=True,
                sync_dist=True,
            )
        return loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        """Log the loss of a batch and collect its predictions."""
        loss, found = self.evaluate(batch)
        self.log("validation/loss", loss, batch_size=global_batch_size(batch), sync_dist=True)
        self.found |= predictions_by_row(batch, found)

    def on_validation_epoch_end(self) -> None:
        """Score the predictions of all processes and log the metrics.

        Raises:
            ValueError: the module has no `score`.
        """
        if self.score is None:
            raise ValueError("validation needs a score")
        scores = self.score(distributed.all_gather_dict(self.found))
        # every process has the same scores: their maximum is exact, while their mean may round
        self.log_dict(
            {f"validation/{k}": v for k, v in scores.items()},
            prog_bar=True,
            sync_dist=True,
            reduce_fx="max",
        )
        self.found = {}

    def predict_step(self, batch: dict[str, Any], _: int) -> dict[int, Prediction]:
        """Return row of the dataset -> prediction."""
        return predictions_by_row(batch, self.predict(batch))

    def configure_optimizers(self):
        """Build the optimizer of the trainable parameters and its warmup schedule.

        Raises:
            ValueError: the module has no `optimizer`.
        """
        if self.optimizer is None:
            raise ValueError("training needs an optimizer")
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out of a checkpoint."""
        checkpoint["state_dict"] = self.trained(checkpoint["state_dict"])

    def trained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the entries of `state` that belong to trainable parameters."""
        names = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in state.items() if k in names}


def upcast(logits: Tensor) -> Tensor:
    """Return logits in at least float32, the type in which losses are computed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def global_mean(total: Tensor, count: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return this batch's part of the mean loss of the global batch.

    Trainers average gradients over processes and over the batches of a step. The average of the
    returned values over all parts, on all processes, is the mean loss of the global batch.

    Args:
        total: sum of the batch's loss terms, a scalar.
        count: number of these terms; read only if the batch is no part of a global batch.
        batch: the batch; `batch["whole"]` describes the global batch.
    """
    if (whole := batch.get("whole")) is None:
        return total / count.clamp(min=1)
    return total * whole.parts / max(1, whole.terms)


def real_row_mask(batch: Mapping[str, Any]) -> Tensor:
    """Return which rows are real examples and no padding rows: [B] bool.

    Without an index, all rows are real examples.
    """
    ids = batch["target"]["input_ids"]
    return batch.get("index", torch.zeros(len(ids), device=ids.device)) >= 0


def predictions_by_row(
    batch: Mapping[str, Any], found: Sequence[Prediction]
) -> dict[int, Prediction]:
    """Return row of the dataset -> prediction, without padding rows."""
    return {row: one for row, one in zip(batch["index"].tolist(), found, strict=True) if row >= 0}


def global_batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of examples in the global batch."""
    return batch["whole"].rows if "whole" in batch else len(batch["index"])


class HeadModule(FusionModule):
    """A model whose single output gives both the loss and the predictions."""

    def loss_from_output(self, output: Any, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of an output, a scalar."""
        raise NotImplementedError  # pragma: no cover

    def predictions_from_output(self, output: Any, batch: dict[str, Any]) -> list[Prediction]:
        """Return one prediction per row of an output."""
        raise NotImplementedError  # pragma: no cover

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        return self.loss_from_output(self(batch), batch)

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        """Return one prediction per row."""
        return self.predictions_from_output(self(batch), batch)

    def evaluate(self, batch: dict[str, Any]) -> tuple[Tensor, list[Prediction]]:
        """Return the loss and the predictions of a batch after a single forward pass."""
        output = self(batch)
        return self.loss_from_output(output, batch), self.predictions_from_output(output, batch)


class ClassificationModule(HeadModule):
    """A sequence classifier.

    Args:
        model: a model with a classification head.
        labels: names of the classes, in the order of the logits.
        **options: arguments of `FusionModule`.
    """

    def __init__(self, model: nn.Module, labels: Sequence[str], **options):
        super().__init__(model, **options)
        self.labels = list(labels)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return logits [B, labels] of the batch's target texts."""
        self.read_source(batch)
        return self.model(**batch["target"]).logits

    def loss_from_output(self, output: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return the mean cross-entropy of the labels, a scalar."""
        labels = batch["labels"].masked_fill(~real_row_mask(batch), IGNORED)
        total = nn.functional.cross_entropy(
            upcast(output), labels, ignore_index=IGNORED, reduction="sum"
        )
        return global_mean(total, (labels != IGNORED).sum(), batch)

    def predictions_from_output(self, output: Tensor, batch: dict[str, Any]) -> list[Prediction]:
        """Return the likeliest label of every row."""
        return [Prediction(self.labels[i]) for i in output.argmax(-1).tolist()]


class SpanModule(HeadModule):
    """A model for extractive question answering.

    Args:
        model: a model with a head for start and end logits.
        longest: longest answer in tokens.
        **options: arguments of `FusionModule`.
    """

    def __init__(self, model: nn.Module, longest: int = 30, **options):
        super().__init__(model, **options)
        self.longest = longest

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return start and end logits, both [B, T], of the batch's target texts."""
        self.read_source(batch)
        output = self.model(**batch["target"])
        return output.start_logits, output.end_logits

    def loss_from_output(self, output: tuple[Tensor, Tensor], batch: dict[str, Any]) -> Tensor:
        """Return the mean cross-entropy of start and end over the context's tokens, a scalar.

        An answer that was cut off or lost does not count. With windows, the first special token is
        a further choice: it is the label of a window without the answer.
        """
        legal, known = (
            batch["offsets"][..., 0] >= 0,
            (batch["span"][:, 0] >= 0) & real_row_mask(batch),
        )
        if (null := batch.get("null")) is not None:
            legal = legal | (torch.arange(legal.shape[1], device=legal.device) == null[:, None])
        total = torch.zeros((), device=legal.device)
        for logits, wanted in zip(output, batch["span"].T, strict=True):
            logits = upcast(logits).masked_fill(~legal, float("-inf"))
            total = total + nn.functional.cross_entropy(
                logits[known], wanted[known], reduction="sum"
            )
        return global_mean(total, 2 * known.sum(), batch)

    def predictions_from_output(
        self, output: tuple[Tensor, Tensor], batch: dict[str, Any]
    ) -> list[Prediction]:
        """Return the likeliest answer of every row."""
        start, end = output
        return best_spans(start, end, batch["offsets"], batch["contexts"], self.longest)


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
        return global_mean(-(chosen * mask).sum(), mask.sum(), batch)

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        """Return one answer per row: the likeliest candidate or a generated text."""
        return [
            Prediction(text)
            for text in (self.choose(batch) if self.candidates else self.generate(batch))
        ]

    def choose(self, batch: dict[str, Any]) -> list[str]:
        """Return the likeliest candidate of each prompt, scored exactly with EOS."""
        rows = len(batch["index"])
        repeated = {name: x.to(self.device).repeat(rows, 1) for name, x in self.candidates.items()}  # type: ignore[union-attr]
        chosen, _ = self(batch, repeated)
        best = chosen.sum(1).view(rows, -1).argmax(1)
        return [self.decoding.candidates[i] for i in best.tolist()]

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
