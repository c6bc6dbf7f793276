"""Train a tiny model reproducibly, and resume a training that was stopped."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flare_exp.errors import first_line
from flare_exp.utils import signals
from flare_exp.utils.files import replacing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

STATE = "state.ckpt"  # state of an unfinished training, in a folder without a checkpoint
Row = TypeVar("Row", bound=Sized)


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
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    losses = _resumed(state, parts)
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
            loss = model(**collate(_drawn(rows, batch_size, length))).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            by = signals.pending_signal()
            if state and (by or pace.due):
                with pace.keeping():
                    held = {name: part.state_dict() for name, part in parts.items()}
                    keep_state(state, **held, losses=losses, random=torch.get_rng_state())
            if by:
                raise signals.StopRequested(by, f"after {len(losses)} steps of pre-training")
    if state:
        state.unlink(missing_ok=True)
    return losses


def _drawn(rows: Sequence[Row], count: int, length: Callable[[Row], int]) -> list[Row]:
    """Draw rows of similar length: draw four times as many, sort them, take a run."""
    import torch

    drawn = sorted(torch.randint(len(rows), (4 * count,)).tolist(), key=lambda i: length(rows[i]))
    start = int(torch.randint(3 * count + 1, ()))
    return [rows[i] for i in drawn[start : start + count]]


def _resumed(state: Path | None, parts: Mapping[str, Any]) -> list[float]:
    """Load the state of a stopped training into its parts; return the losses of its steps."""
    import torch

    if not state or not (kept := kept_state(state)):
        return []
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    torch.set_rng_state(kept["random"])
    log.info("tiny model: pre-training goes on after %d steps", len(kept["losses"]))
    return kept["losses"]


def keep_state(path: Path, **state: Any) -> None:
    """Write the state of a training atomically."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)  # with a file its error would not say that the disk is full
    with replacing(path) as part:
        part.write_bytes(buffer.getbuffer())


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
