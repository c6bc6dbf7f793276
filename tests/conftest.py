"""Tiny random models of every family (float64, seconds to build), and a cache of its own for the tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["WANDB_MODE"] = "offline"  # no test talks to W&B's servers
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from flare_exp import backbones

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "initializer_range": 0.3,  # large enough that a change anywhere shows at the output
}


def random_bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SMALL, pad_token_id=0))


def random_xlmr() -> XLMRobertaForSequenceClassification:
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(**SMALL, type_vocab_size=1, pad_token_id=1))


BUILDERS = {"bert": random_bert, "xlm-roberta": random_xlmr}


@pytest.fixture(params=list(BUILDERS))
def family_name(request) -> str:
    return request.param


@pytest.fixture
def make_model(family_name):
    """(seed) -> a random float64 classifier of the family, in eval mode, and the family's table row."""

    def make(seed: int = 0):
        torch.manual_seed(seed)
        return BUILDERS[family_name]().double().eval(), backbones.FAMILIES[family_name]

    return make


def token_batch(lengths: list[int], seed: int, width: int | None = None) -> dict[str, torch.Tensor]:
    """Random token ids of the given lengths, right-padded with 1 to `width`."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), 1)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, SMALL["vocab_size"], (length,), generator=generator)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def rows(batch: dict[str, torch.Tensor], *index: int) -> dict[str, torch.Tensor]:
    return {name: tensor[list(index)] for name, tensor in batch.items()}


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """One artefact cache for the session, so that the tests build the debug-sized tiny model once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real benchmark data; skips where it is not."""
    folder = Path(os.environ.get("FLARE_EXP_SHARED", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "nusax").is_dir():
        pytest.skip(f"the real benchmark data is not here ({folder}); set FLARE_EXP_SHARED")
    return folder
