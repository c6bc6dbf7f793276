"""Kill runs at random moments, start each again until it ends, and compare what it leaves with an
uninterrupted run.

    python tests/tools/kills.py [--kills 20] [--seed 0] [--signals KILL TERM INT] [--work <folder>]
        [--into docs/inputs.md]

Prints a Markdown table. The exit code is 0 if every run left the same bytes. A run has its own
empty cache. The signal, the stage and the moment within the stage are drawn with a seed; the
lengths of the stages are those of the uninterrupted run. Lost seconds are CPU seconds, of both
processes together minus those of the uninterrupted run, because other work on the machine changes
wall-clock time more than a kill does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from page import replace_section

SMALL = [
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "model.pretrain.documents=3000",
    "mt=custom",
    "mt.max_length=64",
    "mt.shard=32",
    "finetune.epochs=3",
    "transfer.epochs=3",
]
RUNS = {
    "toy_sentiment": [
        "task=toy_sentiment",
        "method=flare",
        "task.limit=96",
        "model.pretrain.steps=150",
    ],
    "toy_qa": [
        "task=toy_qa",
        "method=flare_mt",
        "fusion=gated",
        "task.limit=96",
        "model.pretrain.steps=150",
    ],
    "toy_sentiment, prompt": [
        "model=tiny_decoder",
        "task=toy_sentiment",
        "method=flare",
        "fusion=cross_attn",
        "task.limit=96",
        "model.pretrain.steps=120",
    ],
}
# stage -> the kinds of artifacts that it builds; the first is the one whose start it is known by
STAGES = {
    "pre-training": ("backbone",),
    "English": ("finetune",),
    "translation": ("translation_shard", "translation"),
    "transfer": ("transfer",),
    "test": ("test",),
}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
LIMIT = 400  # seconds that a process may take


@dataclass
class Watched:
    """A process that ran, and when its stages were seen to begin and end."""

    code: int
    said: str
    wall: float
    cpu: float
    spans: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # stage -> first and last sight
    hit: str = ""  # stage in which the signal came


def stage_of(cache: Path) -> str | None:
    """Return the stage whose artifact is being built, the innermost if there are several."""
    kinds = {part.parent.name for part in cache.glob("*/.*.part")}
    order = ("translation_shard", "translation", "backbone", "finetune", "transfer", "test")
    kind = next((k for k in order if k in kinds), None)
    return next((name for name, own in STAGES.items() if kind in own), None)


def watch(
    words: Sequence[str], folder: Path, by: Callable[[str | None, float], signal.Signals | None]
) -> Watched:
    """Run a command in `folder` and give it a signal.

    Args:
        by: called with the present stage and the seconds since its start; returns the signal to
            send, once.

    """
    cache, start, before = (
        folder / "cache",
        time.monotonic(),
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    env = {**os.environ, "FLARE_EXP_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flare_exp", *words, f"output_dir={folder / 'out'}"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        spans: dict[str, tuple[float, float]] = {}
        hit = ""
        while process.poll() is None:
            now, stage = time.monotonic() - start, stage_of(cache)
            if stage:
                spans[stage] = (spans.get(stage, (now, now))[0], now)
            if not hit and (chosen := by(stage, now - spans[stage][0] if stage else now)):
                process.send_signal(chosen)
                hit = stage or "between stages"
            if now > LIMIT:
                process.kill()
            time.sleep(0.01)
        wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        said.seek(0)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Watched(process.returncode, said.read(), wall, cpu, spans, hit)


def left(out: Path) -> dict[str, str]:
    """Return name -> hash of what a run leaves: predictions, weights, and metrics.json without the
    seconds.
    """
    metrics = json.loads((out / "metrics.json").read_text())
    metrics.pop("seconds")
    files = [out / "predictions.parquet", *sorted(out.glob("*/*.safetensors"))]
    named = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    return {**named, "metrics.json": json.dumps(metrics, sort_keys=True)}


def translation_model(folder: Path) -> Path:
    """Train the embedded translation model, as mt=toy_nllb does; it is the same for all runs."""
    from flare_exp.config import validation
    from flare_exp.toy.translation_model import train_mt

    if not (folder / "model.safetensors").is_file():
        (job,), _ = validation.validate(["mt=toy_nllb"], multirun=False)
        folder.mkdir(parents=True, exist_ok=True)
        train_mt(folder, **dict(job.mt.pretrain), world_seed=0)
    return folder


def steps_said(pattern: str, said: str) -> str:
    found = re.findall(pattern, said)
    return found[-1] if found else "-"


def kill(
    words: Sequence[str],
    folder: Path,
    whole: Watched,
    expected: dict[str, str],
    draw: random.Random,
    stage: str,
    signals: Sequence[str],
) -> list[str]:
    """Kill one run, finish it, and return the cells of its row from the signal on."""
    begin, end = whole.spans[stage]
    chosen, moment = SIGNALS[draw.choice(signals)], draw.random() * (end - begin)
    seen = False

    def by(present: str | None, since: float) -> signal.Signals | None:
        nonlocal seen
        seen = seen or present == stage
        left = (
            seen and present != stage and stage != "test"
        )  # it was quicker than the last time; tests come in parts
        return chosen if left or (present == stage and since >= moment) else None

    first = watch(words, folder, by)
    tries, cpu, said = 1, first.cpu, first.said
    while first.code and tries < 4:
        again = watch(words, folder, lambda *_: None)
        tries, cpu, said = tries + 1, cpu + again.cpu, again.said
        if again.code == 0:
            break
    expected_code = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[chosen]
    clean = "Traceback" not in first.said + said and first.code in (expected_code, 0)
    same = (folder / "out" / "metrics.json").is_file() and left(folder / "out") == expected
    at = steps_said(r"stopped by \w+ after (\d+) steps", first.said)
    on = steps_said(r"goes on after (\d+) steps", said)
    outcome = (
        "yes"
        if same and clean
        else f"NO (exit {first.code}; {(said.strip().splitlines() or [''])[-1][:80]})"
    )
    if first.code == 0:
        outcome += ", it had ended before"
    return [
        chosen.name,
        first.hit or "never sent",
        str(first.code),
        at,
        on,
        str(tries),
        f"{cpu - whole.cpu:.1f}",
        outcome,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--signals", nargs="+", choices=list(SIGNALS), default=list(SIGNALS), help="to draw from"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for runs and caches (default: a temporary one)"
    )
    parser.add_argument(
        "--into", type=Path, help="a Markdown page whose section of kills is replaced"
    )
    given = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell has it ignored in what it starts in the background
    work = given.work or Path(tempfile.mkdtemp(prefix="kills"))
    draw = random.Random(given.seed)
    head = (
        "task",
        "method",
        "signal",
        "stage",
        "exit",
        "step at the stop",
        "goes on after",
        "starts",
        "CPU seconds lost",
        "same bytes",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    print("\n".join(lines), flush=True)
    about, failed = [], 0
    machine = translation_model(work / "mt")
    for number, (name, own) in enumerate(RUNS.items()):
        words = [*SMALL, *own, f"mt.path={machine}"]
        folder = work / f"whole{number}"
        whole = watch(words, folder, lambda *_: None)
        if whole.code:
            print(whole.said, file=sys.stderr)
            return 1
        expected = left(folder / "out")
        shares = ", ".join(
            f"{stage} {end - begin:.1f}" for stage, (begin, end) in whole.spans.items()
        )
        took = f"uninterrupted {whole.cpu:.1f} CPU seconds ({whole.wall:.1f} of wall-clock)"
        about.append(
            f"- {name}: {took}; seconds from the first to the last sight of each stage: {shares}."
        )
        print(about[-1], file=sys.stderr, flush=True)
        method = next(w.partition("=")[2] for w in own if w.startswith("method="))
        count = given.kills // len(RUNS) + (number < given.kills % len(RUNS))
        stages = [stage for stage in STAGES if stage in whole.spans]
        chosen = [stages[(k + number) % len(stages)] for k in range(count)]
        for k, stage in enumerate(chosen):
            place = work / f"run{number}.{k}"
            cells = kill(words, place, whole, expected, draw, stage, given.signals)
            failed += not cells[-1].startswith("yes")
            lines.append("| " + " | ".join([name, method, *cells]) + " |")
            print(lines[-1], flush=True)
            if cells[-1].startswith("yes"):
                shutil.rmtree(place)
    if given.into:
        replace_section(given.into, "kills", "\n".join([*about, "", *lines]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
