"""Machine translation, the engine against the pattern of the paper's released code: how many texts
a second, and how many come out the same. `python sweeps/mt_speed.py --help`

The pattern: batches of 64 in the order of the file, every text padded to 256 tokens. Both arms
decode alike (same model in memory, same options, same limit for each row) and take turns on small
runs of texts, so that noise of the machine hits both.
"""

from __future__ import annotations

import argparse
import functools
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
from transformers import StoppingCriteria, StoppingCriteriaList

from flare_exp.translation import engines, nllb
from flare_exp.utils import progress

RELEASED_BATCH, RELEASED_LENGTH = 64, 256


class RowLimits(StoppingCriteria):
    """Stops each row at the engine's limit for it."""

    def __init__(self, limits: torch.Tensor):
        self.limits = limits + 2  # the decoder's own first token and the language code do not count

    def __call__(self, input_ids: torch.Tensor, scores: object, **_) -> torch.Tensor:
        return (
            self.limits.repeat_interleave(len(input_ids) // len(self.limits)) <= input_ids.shape[1]
        )


@torch.inference_mode()
def released(
    engine: engines.TransformersEngine, texts: list[str], source: str, target: str
) -> list[str]:
    """Translations by the released pattern."""
    found, tokenizer = [], engine.tokenizer
    tokenizer.src_lang = source
    code = nllb.language_id(tokenizer, target)
    for start in range(0, len(texts), RELEASED_BATCH):
        options = {
            "padding": "max_length",
            "truncation": True,
            "max_length": RELEASED_LENGTH,
            "return_tensors": "pt",
        }
        inputs = tokenizer(texts[start : start + RELEASED_BATCH], **options).to(engine.device)
        limits = torch.tensor(
            [engine.decoding.limit(n) for n in inputs["attention_mask"].sum(1).tolist()],
            device=engine.device,
        )
        made = engine.model.generate(
            **inputs,
            forced_bos_token_id=code,
            max_new_tokens=int(limits.max()) + 1,
            stopping_criteria=StoppingCriteriaList([RowLimits(limits)]),
        )
        found += [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
    return found


def translated(engine: engines.Engine, source: str, target: str, texts: list[str]) -> list[str]:
    return [one.text for one in engine.translate(texts, source, target)]


def measure(
    arms: dict[str, Callable[[list[str]], list[str]]], texts: list[str], run: int
) -> tuple[dict, dict]:
    """Seconds and translations of every arm, taking turns on `run` texts at a time."""
    seconds: dict[str, float] = dict.fromkeys(arms, 0.0)
    found: dict[str, list[str]] = {name: [] for name in arms}
    for arm in arms.values():
        arm(texts[:2])  # the first call allocates
    with progress.bar("translating", len(texts)) as moved:
        for number, start in enumerate(range(0, len(texts), run)):
            chunk = texts[start : start + run]
            for name in list(arms)[:: (-1) ** number]:
                begin = time.perf_counter()
                found[name] += arms[name](chunk)
                seconds[name] += time.perf_counter() - begin
            moved(len(chunk))
    return seconds, found


def show(result: dict) -> None:
    table = Table(
        title=f"{result['texts']} texts, {result['different']} of them different, on "
        f"{result['device']}"
    )
    for name in ("arm", "seconds", "texts/s", "times the pattern"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for name, seconds in result["seconds"].items():
        table.add_row(
            name,
            f"{seconds:.1f}",
            f"{result['texts'] / seconds:.2f}",
            f"{result['ratio'][name]:.2f}",
        )
    console = Console()
    console.print(table)
    for name, same in result["same"].items():
        console.print(f"{name}: {same} of {result['texts']} translations are those of the engine")
    if result["too_long"]:
        console.print(
            f"{result['too_long']} texts are left out: the pattern would cut them at "
            f"{RELEASED_LENGTH} tokens"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mt", required=True, help="folder or hub id of an NLLB checkpoint")
    parser.add_argument("--revision", help="of the checkpoint")
    parser.add_argument("--texts", required=True, type=Path, help="parquet file")
    parser.add_argument("--column", default="text", help="its column of texts (default: text)")
    parser.add_argument(
        "--source", required=True, help="FLORES-200 code of the texts, e.g. eng_Latn"
    )
    parser.add_argument("--target", required=True, help="FLORES-200 code to translate into")
    parser.add_argument("--limit", type=int, help="only the first so many texts")
    parser.add_argument(
        "--run",
        type=int,
        default=512,
        help="texts of a turn; the engine sorts within it (default: 512)",
    )
    parser.add_argument("--beams", type=int, default=1, help="1: greedy (default)")
    parser.add_argument("--batch-tokens", type=int, help="of the engine (default: its own)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--ct2",
        nargs="*",
        default=[],
        help="also CTranslate2 with these weights, e.g. float32 int8",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    decoding = engines.MTDecoding(beams=args.beams, max_length=RELEASED_LENGTH)
    engine = engines.TransformersEngine(
        args.mt, args.revision, decoding, args.batch_tokens, args.device
    )
    everything = pq.read_table(args.texts, columns=[args.column])[args.column].to_pylist()[
        : args.limit
    ]
    engine.tokenizer.src_lang = args.source
    lengths = map(len, engine.tokenizer(everything, verbose=False)["input_ids"])
    texts = [
        text
        for text, length in zip(everything, lengths, strict=True)
        if length <= RELEASED_LENGTH and text.strip()
    ]
    arms = {
        "engine": functools.partial(translated, engine, args.source, args.target),
        "released pattern": lambda chunk: released(engine, chunk, args.source, args.target),
    }
    with tempfile.TemporaryDirectory() as folder:
        for quantization in args.ct2:
            place = Path(folder) / quantization
            place.mkdir()
            engines.convert(args.mt, args.revision, place, quantization)
            faster = engines.CTranslate2Engine(str(place), decoding, args.batch_tokens, args.device)
            arms[f"CTranslate2, {quantization}"] = functools.partial(
                translated, faster, args.source, args.target
            )
        seconds, found = measure(arms, texts, args.run)
    result = {
        "mt": args.mt,
        "device": torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"CPU (threads: {torch.get_num_threads()})",
        "direction": [args.source, args.target],
        "beams": args.beams,
        "batch_tokens": engine.batch_tokens,
        "run": args.run,
        "texts": len(texts),
        "different": len(set(texts)),
        "too_long": len([text for text in everything if text.strip()]) - len(texts),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratio": {
            name: round(seconds["released pattern"] / value, 3) for name, value in seconds.items()
        },
        "same": {
            name: sum(a == b for a, b in zip(found["engine"], texts, strict=True))
            for name, texts in found.items()
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
