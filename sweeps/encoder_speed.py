"""FLARE MT's source, three epochs of training: encoder states computed once per text, in batches,
and kept, against the pattern of the paper's released code, one call per example in every epoch.
`python sweeps/encoder_speed.py --help`

The pattern is measured twice: as released, every text padded to 256 tokens, and without padding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
import transformers
from rich.console import Console
from rich.table import Table

from flare_exp.artifacts import ArtifactStore
from flare_exp.data.preprocessing import SourceTextPreprocessor
from flare_exp.data.source_cache import cached_states
from flare_exp.tasks import Example, NusaX
from flare_exp.translation import nllb

RELEASED_LENGTH = 256


class Encoder:
    """What `cached_states` asks of a source."""

    def __init__(self, encoder: torch.nn.Module):
        self.encoder = encoder

    @torch.no_grad()
    def compute(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.encoder(**inputs).last_hidden_state[:, :, None]


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mt", required=True, help="folder or hub id of an NLLB checkpoint")
    parser.add_argument("--texts", required=True, type=Path, help="parquet file with a column text")
    parser.add_argument("--source", required=True, help="FLORES-200 code of the texts")
    parser.add_argument("--epochs", type=int, default=3, help="of training (default: 3)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    encoder, tokenizer = nllb.load_encoder(args.mt, None, args.device)
    tokenizer.src_lang = args.source
    texts = pq.read_table(args.texts, columns=["text"])["text"].to_pylist()
    form, source, device = (
        SourceTextPreprocessor(NusaX(), tokenizer, RELEASED_LENGTH),
        Encoder(encoder),
        torch.device(args.device),
    )
    items = form.encode(
        [Example(f"nusax/x/train/{i}", str(i), (text,)) for i, text in enumerate(texts)]
    )
    kept = {}

    @torch.no_grad()
    def released(padding: str | bool) -> None:
        for text in texts:
            inputs = tokenizer(
                text,
                padding=padding,
                truncation=True,
                max_length=RELEASED_LENGTH,
                return_tensors="pt",
            )
            encoder(**inputs.to(device)).last_hidden_state.cpu()

    def cached(folder: str | None) -> None:
        store = ArtifactStore(folder) if folder else None
        cache = kept[folder] = cached_states(
            source, items, form, device, torch.float32, store, {"mt": args.mt}
        )  # type: ignore[arg-type]
        for _ in range(args.epochs):
            for i in range(len(items)):
                cache[i].sum()  # read every state, in every epoch

    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        seconds["once, in memory"] = timed(lambda: cached(None))
        seconds["once, on disk"] = timed(lambda: cached(folder))
        same = all(torch.equal(kept[None][i], kept[folder][i]) for i in range(len(items)))
    for name, padding in (
        ("every example, unpadded", False),
        (f"every example, padded to {RELEASED_LENGTH}", "max_length"),
    ):
        # one epoch takes what another takes; measured each, so that noise averages out
        seconds[name] = sum(
            timed(lambda padding=padding: released(padding)) for _ in range(args.epochs)
        )  # type: ignore[misc]
    table = Table(
        title=f"encoder seconds of {args.epochs} epochs of {len(texts)} texts; memory and disk "
        f"agree: {same}"
    )
    table.add_column("states are computed")
    for name in ("seconds", "times the fastest"):
        table.add_column(name, justify="right")
    for name, spent in seconds.items():
        table.add_row(name, f"{spent:.2f}", f"{spent / min(seconds.values()):.1f}")
    Console().print(table)
    if args.json:
        args.json.write_text(
            json.dumps({"texts": len(texts), "epochs": args.epochs, "seconds": seconds}, indent=1)
        )


if __name__ == "__main__":
    main()
