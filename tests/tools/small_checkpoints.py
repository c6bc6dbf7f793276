"""Checkpoints for the tests: small, on disk, and where the hub's library would keep them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import transformers as hf

from flare_exp.toy.pretrain import pretrain


def tiny_checkpoint(folder: Path, architecture: str = "xlm-roberta", **settings) -> Path:
    """A tiny model that knows next to nothing, with `settings` changed in its config.json."""
    pretrain(
        folder,
        architecture=architecture,
        documents=500,
        steps=5,
        batch_size=8,
        lr=1e-3,
        vocab_size=300,
        hidden_size=32,
        layers=2,
        heads=2,
        target_share=0.5,
        recall=0.0,
        world_seed=0,
    )
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


COMMIT = "a" * 40


def put(cache: Path, hub_id: str, folder: Path, commit: str = COMMIT, ref: str = "main") -> Path:
    """A checkpoint in a hub cache, as huggingface_hub lays it out; the snapshot's folder."""
    place = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    for each in (place / "blobs", place / "refs", snapshot):
        each.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (place / "refs" / ref).write_text(commit)
    return snapshot


def untied(checkpoint: Path, folder: Path) -> Path:
    """A tiny decoder whose LM head is a weight of its own, as in the 8B models."""
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder
