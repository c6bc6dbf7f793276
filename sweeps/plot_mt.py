"""Two figures of runs below a folder: `python sweeps/plot_mt.py FOLDER`

gain_by_quality.png: what FLARE and FLARE MT gain over LoRA on the same translations, against their
chrF++ (human: 100). noise.png: LoRA and FLARE on human translations with errors of a known rate.
Points are means over seeds, bars standard deviations.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from flare_exp.tasks import TASKS
from flare_exp.translation.translators import BENCHMARK

STYLES = {
    "lora": ("tab:gray", "s", "LoRA"),
    "flare": ("tab:blue", "o", "FLARE"),
    "flare_mt": ("tab:orange", "^", "FLARE MT"),
}
ABLATED = {
    "shuffle": ("tab:red", "x", "FLARE, another example's source"),
    "empty": ("tab:green", "+", "FLARE, no source"),
}


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("metrics.json"))]


def chrf(run: dict[str, Any]) -> float | None:
    """Return chrF++ of a run's training translations: 100 of human ones, None without a human
    reference.
    """
    score = run["translation"]["chrf++"].get(run["lang"])
    human = run["mt"] in BENCHMARK and not TASKS[run["task"]].machine_splits
    return 100.0 if score is None and human else score


def score(run: dict[str, Any]) -> float:
    return 100 * run["test"][TASKS[run["task"]].metric]


def style(run: dict[str, Any]) -> tuple[str, str, str]:
    ablation = next((name for name in ABLATED if (run.get("source") or {}).get(name)), None)
    return ABLATED[ablation] if ablation else STYLES[run["method"]]


def compared(run: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a run has in common with the LoRA run that it is compared with."""
    return *(run[name] for name in ("task", "lang", "model", "mt", "seed")), chrf(run)


def gains(runs: list[dict[str, Any]]) -> dict[str, dict[tuple, dict[float, list[float]]]]:
    """task -> style -> chrF++ -> gains over LoRA, one per seed.

    The noise sweep is left out: it has its own figure.
    """
    base = {compared(r): score(r) for r in runs if r["method"] == "lora"}
    found: dict[str, dict[tuple, dict[float, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for run in runs:
        quality, fits = chrf(run), run["method"] != "lora" and compared(run) in base
        if fits and quality is not None and not run["translation"]["noise"]:
            found[run["task"]][style(run)][quality].append(score(run) - base[compared(run)])
    return found


def noisy(runs: list[dict[str, Any]]) -> dict[str, dict[tuple, dict[float, list[float]]]]:
    """task -> style -> error rate -> scores, one per seed."""
    found: dict[str, dict[tuple, dict[float, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    swept = {run["task"] for run in runs if run["mt"] == "gold" and run["translation"]["noise"]}
    for run in runs:
        if run["mt"] == "gold" and run["task"] in swept:
            found[run["task"]][style(run)][100 * run["translation"]["noise"]].append(score(run))
    return found


def draw(
    data: dict[str, dict[tuple, dict[float, list[float]]]], path: Path, x: str, y: str, zero: bool
) -> None:
    """A panel per task, a line per style."""
    if not data:
        print(f"no runs for {path.name}")
        return
    figure, panels = plt.subplots(
        1, len(data), figsize=(4.2 * len(data) + 0.6, 3.8), squeeze=False, layout="constrained"
    )
    for axes, (task, lines) in zip(panels[0], sorted(data.items()), strict=True):
        span = max(v for points in lines.values() for v in points) - min(
            v for points in lines.values() for v in points
        )
        for n, ((color, marker, label), points) in enumerate(lines.items()):
            xs = sorted(points)
            at = [
                v + (n - (len(lines) - 1) / 2) * span / 100 for v in xs
            ]  # beside each other where they have the same quality
            means = [statistics.mean(points[v]) for v in xs]
            spread = [statistics.stdev(points[v]) if len(points[v]) > 1 else 0.0 for v in xs]
            axes.errorbar(
                at, means, spread, color=color, marker=marker, label=label, capsize=3, markersize=7
            )
        seeds = {len(values) for points in lines.values() for values in points.values()}
        axes.set_title(
            f"{task} ({'-'.join(map(str, sorted({min(seeds), max(seeds)})))} "
            f"seed{'s' if max(seeds) > 1 else ''})"
        )
        axes.set_xlabel(x)
        axes.set_ylabel(f"{y} ({TASKS[task].metric})")
        axes.grid(alpha=0.3)
        if zero:
            axes.axhline(0, color="black", linewidth=0.8)
    named = {
        label: line
        for axes in panels[0]
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(named))
    figure.savefig(path, dpi=150)
    print(path)


def main(folder: Path) -> None:
    runs = read(folder)
    draw(
        gains(runs),
        folder / "gain_by_quality.png",
        "chrF++ of the training translations",
        "points over LoRA",
        zero=True,
    )
    draw(
        noisy(runs),
        folder / "noise.png",
        "wrong words in human translations (%)",
        "test score in %",
        zero=False,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/mt_gain"))
