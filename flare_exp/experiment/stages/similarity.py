"""Measure how alike a text and its source are, without labels: a sign of a bad translation.

The pre-trained model reads both alone, before any training. Its hidden states after the last block
are averaged over the tokens; the similarity is the cosine of the two means. Models that were
trained to embed sentences (multilingual E5, LaBSE) tell a translation from another text well;
others may not, so `separation` says how well this one does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from flare_exp.artifacts import Artifact
from flare_exp.code import code_of
from flare_exp.data.dataset import PairedDataset
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Item, Preprocessor
from flare_exp.experiment.context import RunContext, device_of, pairs_digest
from flare_exp.utils import files

AT_MEAN = 0.95  # weight of a source that is as similar as pairs are on average


def similarities(run: RunContext, role: str, lang: str | None = None) -> Artifact:
    """Measure the similarity of every text of a split with its source, and with another one's.

    Args:
        role: "validation" or "test".
        lang: the language of the texts; None: all that are trained on.

    Returns:
        similarities.parquet with the columns id, own and other (NaN where there is no source). Its
        facts are their means, and `separation`: the probability that a text is more similar to its
        own source than another text is to a source that is not its own (area under the ROC curve).
    """
    data = run.data(PairingMode.PAIRED, lang=lang)
    dataset = data.dataset(role)
    key = {
        "stage": "similarity",
        "backbone": run.backbone.digest,
        "data": pairs_digest(data, role),
        **run.reading,
        "code": code_of("similarity"),
    }

    def build(folder: Path) -> dict[str, Any]:
        own = other = np.full(len(dataset), np.nan)  # no source: nothing is like it
        if dataset.source:
            target, source = embedded(run, encoder_of(run), dataset)
            own, other = cosines(target, source), cosines(target, source.roll(1, 0))
        ids = [pair.target.id for pair in dataset.pairs]
        columns = {"id": ids, "own": own.tolist(), "other": other.tolist()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        files.write_parquet(folder / "similarities.parquet", rows)
        if not dataset.source:
            return {}
        facts = {"own": own.mean(), "other": other.mean(), "separation": separation(own, other)}
        return {name: round(float(value), 6) for name, value in facts.items()}

    return run.store.get("similarity", key, build)


def encoder_of(run: RunContext) -> nn.Module:
    """Load the encoder of the pre-trained model, on its device and in eval mode."""
    model = run.models.load(str(run.backbone.path), run.cfg.model.revision).model
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    return encoder.to(device_of(run.cfg)).eval()


def embedded(run: RunContext, encoder: nn.Module, dataset: PairedDataset) -> tuple[Tensor, Tensor]:
    """Return the mean states of the targets and of the sources of a dataset: [rows, d] each."""
    assert dataset.source is not None
    size = run.cfg.data.batch_size
    return (
        embed(encoder, dataset.target, run.preprocessor, size),
        embed(encoder, dataset.source, run.preprocessor, size),
    )


def cosines(target: Tensor, source: Tensor) -> np.ndarray:
    """Return the cosine of each row of two tables of vectors of length 1."""
    return (target * source).sum(-1).double().numpy()


@torch.no_grad()
def embed(
    encoder: nn.Module, items: Sequence[Item], preprocessor: Preprocessor, batch_size: int
) -> Tensor:
    """Return the mean hidden state of every text, of length 1: [texts, d].

    Args:
        encoder: gives last_hidden_state [B, T, d] of input_ids and attention_mask.
        items: encoded texts.
        preprocessor: pads them.
        batch_size: texts of a pass.
    """
    device = next(encoder.parameters()).device
    order = sorted(range(len(items)), key=lambda i: len(items[i]["inputs"]["input_ids"]))
    found: list[Tensor] = [torch.empty(0)] * len(items)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = preprocessor.pad([items[i] for i in rows])
        inputs = {name: x.to(device) for name, x in inputs.items()}
        states = encoder(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None].float()
        means = (states * mask).sum(1) / mask.sum(1)
        for row, mean in zip(rows, nn.functional.normalize(means, dim=-1).cpu(), strict=True):
            found[row] = mean
    return torch.stack(found)


def separation(own: np.ndarray, other: np.ndarray) -> float:
    """Return P(own > other) over all pairs of a value of each, ties counted as one half."""
    ordered = np.sort(other)
    below, not_above = (np.searchsorted(ordered, own, side) for side in ("left", "right"))
    return float((below + not_above).mean() / 2 / len(other))


def reliability(
    validation: Mapping[str, float], tested: Artifact, ids: Sequence[str]
) -> np.ndarray:
    """Return the weight of every test example's source (`trust`): [examples].

    Args:
        validation: facts of the validation split (`similarities`).
        tested: similarities of the test split.
        ids: the test examples, in the order of the weights.

    Raises:
        ValueError: the similarities are not those of these examples in this order.
    """
    table = pq.read_table(tested.path / "similarities.parquet")
    if table["id"].to_pylist() != [*ids]:
        raise ValueError("the similarities are of other examples than the predictions")
    return trust(table["own"].to_numpy(), validation)


def trust(own: np.ndarray, validation: Mapping[str, float]) -> np.ndarray:
    """Return the weight of each source, from 0 to 1: [texts].

        w = sigmoid(k (s - (m + m') / 2)),    k = 2 logit(AT_MEAN) / (m - m')

    s is the similarity of the text and its source; m and m' are the means over validation texts of
    the similarity with their own sources and with other texts' sources. A source that is as similar
    as pairs are on average gets AT_MEAN, one that is as similar as unrelated texts 1 - AT_MEAN.
    A text without a source gets 0. No label is used.

    Args:
        own: similarity of each text with its source; NaN where there is none.
        validation: facts of the validation split (`similarities`).
    """
    m, unrelated = validation["own"], validation["other"]
    k = 2 * np.log(AT_MEAN / (1 - AT_MEAN)) / max(m - unrelated, 1e-6)
    with np.errstate(over="ignore"):  # a weight of 0
        return np.nan_to_num(1 / (1 + np.exp(-k * (own - (m + unrelated) / 2))), nan=0.0)
