"""Mean and standard deviation over seeds of every cell below some folders of runs: `python sweeps/summarise.py FOLDER...`"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table


def cell(metrics: dict) -> tuple[str, ...]:
    """task, model, language, translation, method with its fusion and ablation."""
    source = metrics.get("source") or {}
    ablation = "".join(f", {name} source" for name in ("shuffle", "empty") if source.get(name))
    method = metrics["method"] + (f" ({metrics['fusion']}{ablation})" if metrics["fusion"] else "")
    return metrics["task"], metrics["model"], metrics["lang"], metrics["mt"], method


def spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def main(folders: list[str]) -> None:
    cells = defaultdict(dict)
    for folder in folders:
        for path in sorted(Path(folder).rglob("metrics.json")):
            metrics = json.loads(path.read_text())
            cells[cell(metrics)][metrics["seed"]] = metrics
    table = Table(title="macro F1 / accuracy on the test set, % (mean ± standard deviation over seeds)")
    for name in ("task", "model", "lang", "mt", "method", "seeds", "macro F1", "accuracy", "English macro F1", "transfer s"):
        table.add_column(
            name, justify="right" if name[0] in "mEast" and name not in ("task", "model", "mt", "method") else "left"
        )
    for key, seeds in sorted(cells.items()):
        runs = list(seeds.values())
        wanted = (("test", "macro_f1"), ("test", "accuracy"), ("english", "macro_f1"))
        scores = [spread([run[block][metric] for run in runs]) for block, metric in wanted]
        seconds = statistics.mean(run["seconds"]["transfer"] for run in runs)
        table.add_row(*key, ",".join(map(str, sorted(seeds))), *scores, f"{seconds:.0f}")
    console = Console(width=150)
    console.print(table)
    if any(key[3] == "gold" for key in cells):
        console.print("mt=gold: sources and translations are human, at test time too, so these figures are an upper bound.")


if __name__ == "__main__":
    main(sys.argv[1:] or ["outputs"])
