"""Compute source states once and read them in every epoch, from memory or a memory-mapped file."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from flare_exp.artifacts import ArtifactStore
from flare_exp.errors import UserError
from flare_exp.flare.source_encoders import SourceEncoder
from flare_exp.utils import signals

if TYPE_CHECKING:
    from flare_exp.data.preprocessing import Item, Preprocessor


log = logging.getLogger(__name__)

BATCH_TOKENS = 4096  # tokens of a computing pass, padding included
FILE = "states.bin"  # [tokens, n, d], row by row


class SourceStateCache:
    """The source states of every text of a data set, computed once: texts of S tokens as [S, n, d].

    Args:
        states: [all tokens, n, d], in memory or memory-mapped.
        starts: position of each text in `states`.
        lengths: length of each text.
    """

    def __init__(self, states: Tensor, starts: Sequence[int], lengths: Sequence[int]):
        self.states, self.starts, self.lengths = states, list(starts), list(lengths)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = self.starts[index]
        return self.states[start : start + self.lengths[index]]


def padded_states(rows: Sequence[Tensor], side: str) -> dict[str, Tensor]:
    """Pad cached states to a batch: `states` [B, S, n, d] and attention_mask [B, S].

    The padding is zeros on `side`. The states keep their stored precision; they are cast on the
    device that reads them.
    """
    masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    return {"states": pad(list(rows)), "attention_mask": pad(masks)}


def cached_states(
    source: SourceEncoder,
    items: Sequence[Item],
    preprocessor: Preprocessor,
    device: torch.device,
    dtype: torch.dtype | None,
    store: ArtifactStore | None,
    key: Mapping[str, Any],
) -> SourceStateCache:
    """Compute the states of every item, each distinct text once.

    Args:
        source: computes the states, with its reader on `device`.
        items: encoded source texts of `preprocessor`.
        preprocessor: pads the items.
        device: device of the source's reader.
        dtype: stored precision; None keeps the precision of the computed states.
        store: keeps the states as an artifact; None keeps them in memory, for this run only.
        key: key of the artifact.

    Raises:
        UserError: the memory or the disk is too small for the states.
    """
    texts = [tuple(item["inputs"]["input_ids"]) for item in items]
    unique = list(dict.fromkeys(texts))
    order = sorted(range(len(unique)), key=lambda i: len(unique[i]), reverse=True)
    one = dict(zip(texts, items, strict=True))
    sample = source.compute(_to(preprocessor.pad([one[unique[order[-1]]]]), device))
    shape, dtype = (sum(map(len, unique)), *sample.shape[2:]), dtype or sample.dtype
    _log_size(len(unique), shape, dtype, "in memory" if store is None else "on disk")
    batches = [[one[unique[i]] for i in rows] for rows in _batches(order, unique)]
    compute = functools.partial(_compute, source, batches, preprocessor, device, dtype)
    if store is None:
        flat = _in_memory(compute, shape, dtype)
    else:
        flat = _on_disk(store, {**key, "dtype": str(dtype)}, compute, len(unique), shape, dtype)
    starts, at = {}, 0
    for i in order:
        starts[unique[i]], at = at, at + len(unique[i])
    return SourceStateCache(flat, [starts[text] for text in texts], [len(text) for text in texts])


def _log_size(texts: int, shape: Sequence[int], dtype: torch.dtype, place: str) -> None:
    """Log how many states there are, and what they take in `place`."""
    tokens, count, width = shape
    said = (
        f"{texts:,} source texts, {tokens:,} tokens x {count} x {width} "
        f"{str(dtype).removeprefix('torch.')}"
    )
    log.info("%s: %s %s", said, _megabytes(math.prod(shape) * dtype.itemsize), place)


def _compute(
    source: SourceEncoder,
    batches: Sequence[Sequence[Item]],
    preprocessor: Preprocessor,
    device: torch.device,
    dtype: torch.dtype,
    keep: Callable[[Tensor], Any],
) -> None:
    """Compute the states of batches of items and hand those of each item to `keep`.

    Raises:
        StopRequested: a signal asked the run to stop.
    """
    from rich.progress import track

    # the other processes of a run would wait for one that stops
    alone = not torch.distributed.is_initialized()
    with torch.no_grad():
        for items in track(batches, description="reading the sources once", transient=True):
            if alone:
                signals.raise_if_signalled("while it read the sources once")
            inputs = _to(preprocessor.pad(items), device)
            for states, mask in zip(
                source.compute(inputs), inputs["attention_mask"].bool(), strict=True
            ):
                keep(states[mask].to("cpu", dtype))


def _in_memory(
    compute: Callable[[Callable[[Tensor], Any]], None], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Return states in memory; the arguments are those of `_on_disk`.

    Raises:
        UserError: there is less memory. The system would kill the process without a message.
    """
    size = math.prod(shape) * dtype.itemsize
    if size > (free := psutil.virtual_memory().available):
        raise UserError(
            f"source.cache=memory: needs {_megabytes(size)}, and {_megabytes(free)} of memory are "
            "free; choose source.cache=disk or off, or source.dtype=float16"
        )
    flat, at = torch.empty(*shape, dtype=dtype), 0

    def keep(states: Tensor) -> None:
        nonlocal at
        flat[at : at + len(states)] = states
        at += len(states)

    compute(keep)
    return flat


def _on_disk(
    store: ArtifactStore,
    key: Mapping[str, Any],
    compute: Callable[[Callable[[Tensor], Any]], None],
    texts: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return states as an artifact, memory-mapped; they are computed if it is not there.

    Args:
        store: keeps the artifact.
        key: key of the artifact.
        compute: hands the states of each text to its argument.
        texts: number of texts.
        shape: shape of the states of all texts: tokens, n, d.
        dtype: stored precision.

    Raises:
        UserError: the disk is too small for the states.
    """
    tokens, *width = shape
    size = math.prod(shape) * dtype.itemsize

    def build(folder: Path) -> dict[str, Any]:
        if size > (free := shutil.disk_usage(folder).free):
            raise UserError(
                f"source.cache=disk: needs {_megabytes(size)}, and {folder.parent} has "
                f"{_megabytes(free)} left; "
                "choose source.cache=memory or off, or source.dtype=float16"
            )
        with (folder / FILE).open("wb") as file:
            compute(
                lambda states: file.write(states.contiguous().view(torch.uint8).numpy().tobytes())
            )
        return {"texts": texts, "tokens": tokens, "width": width, "dtype": str(dtype)}

    place = store.get("states", key, build).path / FILE
    with warnings.catch_warnings():
        # Nothing writes to it. A writable mapping would count as memory that the process may need.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(place, np.uint8, "r")).view(dtype).view(*shape)


def _batches(order: Sequence[int], texts: Sequence[Sequence[int]]):
    """Yield runs of `order` (longest text first) of at most BATCH_TOKENS tokens with padding."""
    rows: list[int] = []
    for i in order:
        if rows and (len(rows) + 1) * len(texts[rows[0]]) > BATCH_TOKENS:
            yield rows
            rows = []
        rows.append(i)
    yield rows


def _to(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
