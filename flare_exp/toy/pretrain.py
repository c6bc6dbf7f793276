"""Pre-trains the tiny multilingual models on the generated world's text: real transformers classes and objectives, target
languages under-represented on purpose."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flare_exp.errors import first_line
from flare_exp.toy.tokenizers import (
    MAX_LENGTH,
    SENTINELS,
    bpe_tokenizer,
    t5_tokenizer,
    train_tokenizer,
)
from flare_exp.toy.world import World
from flare_exp.utils import signals

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


STATE = "state.ckpt"  # of an unfinished training, beside which nothing is there yet
Row = TypeVar("Row", bound=Sized)

log = logging.getLogger(__name__)


def pretrain(
    folder: Path,
    *,
    architecture: str,
    world_seed: int,
    documents: int,
    steps: int,
    batch_size: int,
    lr: float,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    target_share: float,
    recall: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a tiny model and save it, with its tokenizer, as an ordinary checkpoint in `folder`.

    Returns facts for the manifest: parameter count, loss over the last 100 steps.
    """
    import torch

    kind = ARCHITECTURES[architecture]
    with reproducible():
        texts = World(world_seed).corpus(documents, target_share, recall)
        signals.check("before pre-training")
        tokenizer = kind.tokenizer(texts, vocab_size)
        signals.check("before pre-training")
        torch.manual_seed(seed)
        model = kind.blank(tokenizer, hidden_size, layers, heads)
        rows = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        signals.check("before pre-training")
        losses = train(
            model, rows, kind.collate(tokenizer), steps, batch_size, lr, state=folder / STATE
        )
    for name in (
        kind.dropout
    ):  # for fine-tuning; pre-training is one pass over little text: dropout only delays it
        setattr(model.config, name, 0.1)
    return save(folder, model, tokenizer, kind.objective, losses)


@contextmanager
def reproducible() -> Iterator[None]:
    """One thread, as fast at this size, and the same sums on every machine; the caller's random state is left alone."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: str,
    losses: list[float],
) -> dict[str, Any]:
    """Write an ordinary checkpoint; returns its facts."""
    from flare_exp.utils.finite import check_finite  # with torch

    check_finite(
        model.named_parameters(),
        f"the embedded model, after {len(losses)} steps (too high a learning rate?)",
    )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    final = sum(losses[-100:]) / len(losses[-100:])
    log.info("tiny model: %s loss %.3f after %d steps", objective, final, len(losses))
    return {
        "parameters": model.num_parameters(),
        f"{objective}_loss": round(final, 4),
        "vocabulary": len(tokenizer),
    }


def train(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Callable[[list[Row]], dict[str, Tensor]],
    steps: int,
    batch_size: int,
    lr: float,
    length: Callable[[Row], int] = len,
    state: Path | None = None,
) -> list[float]:
    """Minimise the model's own loss on batches of `rows`, with a progress bar; returns the loss of every step.

    Args:
        state: file that holds the state of a training that was stopped; it goes on from there, and removes it at its end.

    Raises:
        Stopped: a signal asked for it.
    """
    import torch
    from rich.progress import track
    from transformers import get_linear_schedule_with_warmup

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    losses: list[float] = []
    if state and (kept := kept_state(state)):
        for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
            part.load_state_dict(kept[name])
        losses = kept["losses"]
        torch.set_rng_state(kept["random"])
        log.info("tiny model: pre-training goes on after %d steps", len(losses))
    pace = signals.Pace(1.0)
    todo = range(len(losses), steps)
    with signals.deferred():
        for _ in track(
            todo,
            total=steps,
            completed=len(losses),
            description="pre-training the tiny model (once)",
            transient=True,
        ):
            # batches of similar length: draw four times as many, sort, take a run
            drawn = sorted(
                torch.randint(len(rows), (4 * batch_size,)).tolist(), key=lambda i: length(rows[i])
            )
            start = int(torch.randint(3 * batch_size + 1, ()))
            loss = model(**collate([rows[i] for i in drawn[start : start + batch_size]])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            by = signals.asked()
            if state and (by or pace.due):
                with pace.keeping():
                    keep_state(
                        state,
                        model=model.state_dict(),
                        optimizer=optimizer.state_dict(),
                        schedule=schedule.state_dict(),
                        losses=losses,
                        random=torch.get_rng_state(),
                    )
            if by:
                raise signals.Stopped(by, f"after {len(losses)} steps of pre-training")
    if state:
        state.unlink(missing_ok=True)
    return losses


def keep_state(path: Path, **state: Any) -> None:
    """Write the state of a training, whole or not at all."""
    import torch

    partial, buffer = path.with_suffix(".partial"), io.BytesIO()
    torch.save(state, buffer)  # to a file it does not say that the disk is full
    try:
        partial.write_bytes(buffer.getbuffer())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def kept_state(path: Path) -> dict[str, Any] | None:
    """Read the state of a training; None where there is none, or a damaged one, which is named and removed."""
    import torch

    if not path.exists():
        return None
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch, zip and pickle raise many kinds
        log.warning("damaged state %s (%s); pre-training starts anew", path, first_line(error))
        path.unlink()
        return None


# --- models ----------------------------------------------------------------------------------------------------------


def blank_xlmr(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, heads: int
) -> PreTrainedModel:
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=MAX_LENGTH + 2,
        type_vocab_size=1,
        initializer_range=0.05,  # the default, 0.02, is for a width of 768
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return XLMRobertaForMaskedLM(config)


def decoder_options(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, heads: int
) -> dict[str, Any]:
    """What Llama and Gemma 2 share: gated feed-forward, grouped queries, one matrix for words in and out."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": hidden_size // heads,
        "intermediate_size": 3 * hidden_size,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def blank_llama(*size) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**decoder_options(*size)))


def blank_gemma2(*size) -> PreTrainedModel:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    options = decoder_options(*size)
    config = Gemma2Config(**options, query_pre_attn_scalar=options["head_dim"], sliding_window=32)
    config._attn_implementation = "eager"  # its soft-capped attention has no other
    return Gemma2ForCausalLM(config)


def blank_mt5(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, heads: int
) -> PreTrainedModel:
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=hidden_size // heads,
        d_ff=3 * hidden_size,
        num_layers=layers,  # and as many in the decoder
        num_heads=heads,
        dropout_rate=0.0,
        tie_word_embeddings=False,  # as in mT5
    )
    model = MT5ForConditionalGeneration(config)
    model.lm_head.weight.data.mul_(
        hidden_size**-0.5
    )  # drawn with a deviation of 1, which makes the first loss 60
    return model


# --- objectives ------------------------------------------------------------------------------------------------------


def masked(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """Masked language modelling."""
    from transformers import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25)
    return lambda rows: collate([{"input_ids": row} for row in rows])


def causal(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """Next-token prediction up to the end of the document."""

    def collate(rows: list[list[int]]) -> dict[str, Tensor]:
        ended = [[*row, tokenizer.eos_token_id] for row in rows]
        return {"input_ids": padded(ended, tokenizer.eos_token_id), "labels": padded(ended, -100)}

    return collate


def span_corruption(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """T5's objective (arXiv 1910.10683): runs of tokens are replaced by sentinels, and generated after them."""
    import torch

    vocab = tokenizer.get_vocab()
    sentinels = [vocab[f"<extra_id_{i}>"] for i in range(SENTINELS)]

    def corrupt(row: list[int]) -> tuple[list[int], list[int]]:
        kept: list[int] = []
        lost: list[int] = []
        spans, i = iter(sentinels), 0
        while i < len(row) - 1:  # the last token ends the sequence
            if torch.rand(()) < 0.15:
                length = min(int(torch.randint(1, 4, ())), len(row) - 1 - i)
                sentinel = next(spans)
                kept.append(sentinel)
                lost += [sentinel, *row[i : i + length]]
                i += length
            if i < len(row) - 1:  # two spans never touch
                kept.append(row[i])
                i += 1
        return [*kept, row[-1]], [*lost, next(spans), row[-1]]

    def collate(rows: list[list[int]]) -> dict[str, Tensor]:
        kept, lost = zip(*map(corrupt, rows), strict=True)
        ids = padded(kept, tokenizer.pad_token_id)
        return {
            "input_ids": ids,
            "attention_mask": (ids != tokenizer.pad_token_id).long(),
            "labels": padded(lost, -100),
        }

    return collate


def padded(rows, value: int) -> Tensor:
    import torch

    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )


@dataclass(frozen=True)
class Architecture:
    """What is a family's own in pre-training. `dropout`: names of its rates in the model's config."""

    tokenizer: Callable[[list[str], int], PreTrainedTokenizerBase]
    blank: Callable[..., PreTrainedModel]
    collate: Callable[[PreTrainedTokenizerBase], Callable[[list[list[int]]], dict[str, Tensor]]]
    objective: str
    dropout: tuple[str, ...] = ()


ARCHITECTURES = {
    "xlm-roberta": Architecture(
        train_tokenizer,
        blank_xlmr,
        masked,
        "masked_token",
        ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "llama": Architecture(
        bpe_tokenizer("LlamaTokenizer", ("<unk>", "<s>", "</s>"), " "),
        blank_llama,
        causal,
        "next_token",
    ),
    "gemma2": Architecture(
        bpe_tokenizer("GemmaTokenizer", ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), ""),
        blank_gemma2,
        causal,
        "next_token",
    ),
    "mt5": Architecture(t5_tokenizer, blank_mt5, span_corruption, "lost_span", ("dropout_rate",)),
}
