"""Whole runs on a debug-sized world: their commands, and what they leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import processes


def last_of_each(words: Sequence[str]) -> list[str]:
    """Keep the last word of each key: a test's own overrides come after the defaults."""
    last = {word.partition("=")[0]: number for number, word in enumerate(words)}
    return [
        word
        for number, word in enumerate(words)
        if "=" not in word or last[word.partition("=")[0]] == number
    ]


TINY = [
    "model.pretrain.steps=20",
    "model.pretrain.documents=1000",
    "model.pretrain.hidden_size=32",
    "model.pretrain.layers=2",
    "task.limit=64",
    "finetune.epochs=2",
    "transfer.epochs=2",
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
]


def command(cache: Path, *overrides: str) -> list[str]:
    embedded = not any(o == "model=custom" for o in overrides)
    tiny = [o for o in TINY if embedded or not o.startswith("model.")]
    return [
        sys.executable,
        "-m",
        "flare_exp",
        *last_of_each([*tiny, f"cache_dir={cache}", *overrides]),
    ]


def launch(
    cache: Path, out: Path | None, *overrides: str, **env: str
) -> subprocess.CompletedProcess:
    """Run to the end."""
    words = command(cache, *([f"output_dir={out}"] if out else []), *overrides)
    return processes.run(words, {**os.environ, **env})


def with_finished(kind: str, before: Path, cache: Path) -> Path:
    """A new cache that has the finished artifacts of a kind that another one has."""
    shutil.copytree(before / kind, cache / kind, ignore=shutil.ignore_patterns(".*"))
    return cache


def result(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())
