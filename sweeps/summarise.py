"""Mean and standard deviation over seeds of every cell below some folders of runs: `python sweeps/summarise.py FOLDER...`

One table per task, in the task's own metrics.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONSOLE = Console(width=150)


def cell(metrics: dict) -> tuple[str, ...]:
    """model, language, translation, method with its fusion and ablation."""
    source = metrics.get("source") or {}
    ablation = "".join(f", {name} source" for name in ("shuffle", "empty") if source.get(name))
    method = metrics["method"] + (f" ({metrics['fusion']}{ablation})" if metrics["fusion"] else "")
    return metrics["model"], metrics["lang"], translation(metrics), method


def translation(metrics: dict) -> str:
    """The translation, with its errors and its quality (of training data; of test data where that is all there is)."""
    facts = metrics.get("translation") or {"noise": 0, "chrf++": {}}
    noise = f", {facts['noise']:.0%} noise" if facts["noise"] else ""
    scores = [facts["chrf++"].get(metrics["lang"]), *facts["chrf++"].values()]
    quality = next((f", chrF++ {score:.0f}" for score in scores if score is not None), "")
    return metrics["mt"] + noise + quality


def spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def show(task: str, cells: dict[tuple[str, ...], dict[int, dict]]) -> None:
    """The table of one task."""
    names = list(next(iter(next(iter(cells.values())).values()))["test"])
    table = Table(title=f"{task}: test scores in % (mean ± standard deviation over seeds)", title_justify="left")
    for name in ("model", "lang", "mt", "method", "seeds"):
        table.add_column(name)
    for name in (*names, *(f"English {name}" for name in names), "transfer s"):
        table.add_column(name, justify="right")
    for key, seeds in sorted(cells.items()):
        runs = list(seeds.values())
        scores = [spread([run[block][name] for run in runs]) for block in ("test", "english") for name in names]
        seconds = statistics.mean(run["seconds"]["transfer"] for run in runs)
        table.add_row(*key, ",".join(map(str, sorted(seeds))), *scores, f"{seconds:.0f}")
    CONSOLE.print(table)


def main(folders: list[str]) -> None:
    tasks: dict[str, dict] = defaultdict(lambda: defaultdict(dict))
    for folder in folders:
        for path in sorted(Path(folder).rglob("metrics.json")):
            metrics = json.loads(path.read_text())
            tasks[metrics["task"]][cell(metrics)][metrics["seed"]] = metrics
    for task, cells in sorted(tasks.items()):
        show(task, cells)
    if any(key[2].startswith("gold") for cells in tasks.values() for key in cells):
        CONSOLE.print("mt=gold: sources and translations are human, at test time too, so these figures are an upper bound.")


if __name__ == "__main__":
    main(sys.argv[1:] or ["outputs"])
