"""Pre-train the tiny multilingual models on the generated world's text.

The models are real transformers classes with their own objectives. Target languages are
under-represented on purpose.
"""

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


STATE = "state.ckpt"  # state of an unfinished training, in a folder without a checkpoint
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

    Returns:
        facts for the manifest: parameter count, vocabulary size, loss over the last 100 steps.
    """
    import torch

    kind = ARCHITECTURES[architecture]
    with reproducible():
        texts = World(world_seed).corpus(documents, target_share, recall)
        signals.raise_if_signalled("before pre-training")
        tokenizer = kind.tokenizer(texts, vocab_size)
        signals.raise_if_signalled("before pre-training")
        torch.manual_seed(seed)
        model = kind.blank(tokenizer, hidden_size, layers, heads)
        rows = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        signals.raise_if_signalled("before pre-training")
        losses = train(
            model, rows, kind.collate(tokenizer), steps, batch_size, lr, state=folder / STATE
        )
    # dropout is for fine-tuning; in pre-training, one pass over little text, it slows learning
    for name in kind.dropout:
        setattr(model.config, name, 0.1)
    return save(folder, model, tokenizer, kind.objective, losses)


@contextmanager
def reproducible() -> Iterator[None]:
    """Compute with one thread, so that sums are the same on every machine.

    At this size one thread is as fast as several. The caller's random state is not changed.
    """
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
    """Write an ordinary checkpoint and return its facts for the manifest.

    Raises:
        UserError: weights are not finite.
    """
    from flare_exp.utils.finite import check_finite  # imports torch

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
    """Minimize the model's own loss on batches of `rows`; return the loss of every step.

    Batches are drawn at random, with rows of similar length. A progress bar is shown.

    Args:
        model: a model whose output has a loss.
        rows: the training examples.
        collate: rows -> arguments of the model.
        steps: number of optimizer steps.
        batch_size: rows per step.
        lr: peak learning rate.
        length: row -> its length, by which rows are batched.
        state: file for the state of a training that was stopped. The training resumes from it and
            removes it at its end.

    Raises:
        StopRequested: a signal asked the run to stop.
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
            # rows of similar length: draw four times as many, sort them, take a run
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
            by = signals.pending_signal()
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
                raise signals.StopRequested(by, f"after {len(losses)} steps of pre-training")
    if state:
        state.unlink(missing_ok=True)
    return losses


def keep_state(path: Path, **state: Any) -> None:
    """Write the state of a training atomically."""
    import torch

    partial, buffer = path.with_suffix(".partial"), io.BytesIO()
    torch.save(state, buffer)  # with a file its error would not say that the disk is full
    try:
        partial.write_bytes(buffer.getbuffer())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def kept_state(path: Path) -> dict[str, Any] | None:
    """Return the state of a training, or None without one.

    A damaged state is logged and removed.
    """
    import torch

    if not path.exists():
        return None
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch, zip and pickle raise many kinds
        log.warning("damaged state %s (%s); pre-training starts anew", path, first_line(error))
        path.unlink()
        return None


# --- models ---------------------------------------------------------------------------------------


def blank_xlmr(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, heads: int
) -> PreTrainedModel:
    """Build an untrained XLM-R."""
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
    """Return the options that Llama and Gemma 2 share.

    These are gated feed-forward layers, grouped queries, and one matrix for input and output
    embeddings.
    """
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
    """Build an untrained Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**decoder_options(*size)))


def blank_gemma2(*size) -> PreTrainedModel:
    """Build an untrained Gemma 2."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    options = decoder_options(*size)
    config = Gemma2Config(**options, query_pre_attn_scalar=options["head_dim"], sliding_window=32)
    config._attn_implementation = "eager"  # the only one with soft-capped attention
    return Gemma2ForCausalLM(config)


def blank_mt5(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, heads: int
) -> PreTrainedModel:
    """Build an untrained mT5."""
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=hidden_size // heads,
        d_ff=3 * hidden_size,
        num_layers=layers,  # the decoder has as many
        num_heads=heads,
        dropout_rate=0.0,
        tie_word_embeddings=False,  # as in mT5
    )
    model = MT5ForConditionalGeneration(config)
    # the head is drawn with a standard deviation of 1, which would give a first loss of 60
    model.lm_head.weight.data.mul_(hidden_size**-0.5)
    return model


# --- objectives -----------------------------------------------------------------------------------


def masked(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """Return a collator for masked language modeling."""
    from transformers import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25)
    return lambda rows: collate([{"input_ids": row} for row in rows])


def causal(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """Return a collator for next-token prediction up to the end of the document."""

    def collate(rows: list[list[int]]) -> dict[str, Tensor]:
        ended = [[*row, tokenizer.eos_token_id] for row in rows]
        return {"input_ids": padded(ended, tokenizer.eos_token_id), "labels": padded(ended, -100)}

    return collate


def span_corruption(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """Return a collator for T5's objective (arXiv 1910.10683).

    Spans of tokens are replaced by sentinels in the input; the target is each sentinel with its
    span.
    """
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
    """Return rows as one tensor, padded with `value` to the longest row."""
    import torch

    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )


@dataclass(frozen=True)
class Architecture:
    """The parts of pre-training that differ between model families.

    Args:
        tokenizer: texts and vocabulary size -> tokenizer.
        blank: tokenizer, width, layers, heads -> untrained model.
        collate: tokenizer -> collator of the objective.
        objective: name of the objective.
        dropout: names of the dropout rates in the model's config.
    """

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
