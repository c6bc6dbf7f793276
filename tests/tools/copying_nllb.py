"""A tiny NLLB checkpoint that has learned to copy, not to perfection; an engine that reads it."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as hf

from flare_exp.translation import engines, nllb
from flare_exp.translation.engines import TransformersEngine
from flare_exp.translation.nllb import MTDecoding
from flare_exp.translation.segmentation import Translation

LETTERS = "abcdefgh"
CODES = ["eng_Latn", "quy_Latn", "zho_Hans"]
SHORT = MTDecoding(max_length=48)


def text(rng: random.Random, words: int) -> str:
    return " ".join("".join(rng.choices(LETTERS, k=rng.randint(1, 3))) for _ in range(words)) + "."


def texts(number: int, seed: int = 5, words: int = 9) -> list[str]:
    rng = random.Random(seed)
    return [text(rng, rng.randint(1, words)) for _ in range(number)]


def blank(tokenizer, **options) -> hf.M2M100ForConditionalGeneration:
    stacks = {"layers": 1, "attention_heads": 2, "ffn_dim": 64}
    size = {
        f"{stack}_{name}": number
        for stack in ("encoder", "decoder")
        for name, number in stacks.items()
    }
    config = hf.M2M100Config(
        vocab_size=len(tokenizer), d_model=32, max_position_embeddings=64, **size, **options
    )
    return hf.M2M100ForConditionalGeneration(config)


# the parameter marks what uses it: it trains
@pytest.fixture(scope="session", params=[pytest.param("tiny", marks=pytest.mark.slow)])
def nllb_folder(tmp_path_factory) -> str:
    """Folder of a checkpoint that copies short texts, after seconds of training."""
    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        ".",
        "。",
        *LETTERS,
        *(f"▁{c}" for c in LETTERS),
    ]
    merges = [("▁", c) for c in LETTERS]
    tokenizer = hf.NllbTokenizer(
        vocab={p: i for i, p in enumerate(pieces)}, merges=merges, extra_special_tokens=CODES
    )
    rng = random.Random(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = blank(tokenizer, init_std=0.1, encoder_layerdrop=0.0, decoder_layerdrop=0.0).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
        for _ in range(200):
            lines = [
                " ".join(text(rng, rng.randint(1, 3)) for _ in range(rng.randint(1, 2)))
                for _ in range(24)
            ]
            batch = tokenizer(lines, padding=True, return_tensors="pt")
            labels = batch["input_ids"].clone()
            labels[:, 0] = nllb.language_id(tokenizer, "quy_Latn")
            labels[labels == tokenizer.pad_token_id] = -100
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("nllb")
    # as the real ones: layers are dropped in training mode, and generation has habits of its own
    model.config.encoder_layerdrop = model.config.decoder_layerdrop = model.config.dropout = 0.5
    model.generation_config.update(num_beams=3, max_length=7)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def engine(nllb_folder) -> TransformersEngine:
    return TransformersEngine(nllb_folder, decoding=SHORT)


def translate(engine, these, **options) -> list[Translation]:
    return engine.translate(these, "eng_Latn", "quy_Latn", **options)


@pytest.fixture(scope="session")
def converted(nllb_folder, tmp_path_factory) -> dict[str, str]:
    pytest.importorskip("ctranslate2", reason="the extra ct2 is not installed")
    folders = {name: tmp_path_factory.mktemp(name) for name in ("float32", "int8")}
    for name, folder in folders.items():
        engines.convert(nllb_folder, None, folder, name)
    return {name: str(folder) for name, folder in folders.items()}
