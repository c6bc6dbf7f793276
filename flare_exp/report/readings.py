"""Say in a sentence what a table shows about methods that fuse."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from flare_exp.config.methods import ENSEMBLE, METHODS
from flare_exp.report.cells import Cell

TIE = 1.0  # points; smaller differences are called ties


def readings(cells: Sequence[Cell], metric: str) -> list[str]:
    """Return a sentence per language and translation that compares fusion with the baselines.

    Differences of at most TIE points count as ties. Rows without a method that fuses, or without
    LoRA, are left out, and so are those that were trained on other languages, too.
    """
    groups: dict[tuple[Any, ...], dict[str, Cell]] = defaultdict(dict)
    for cell in (cell for cell in cells if not cell.trained_on):
        fusing = sorted((k, v) for k, v in cell.changed if k.startswith(("fusion.", "source.")))
        name = ", ".join([cell.label, *(f"{key}={value}" for key, value in fusing)])
        groups[cell.model, cell.lang, cell.mt, cell.changed - {*fusing}][name] = cell
    return [
        said
        for (model, lang, *_), own in groups.items()
        if (said := _sentence(model, lang, own, metric))
    ]


def _sentence(model: str, lang: str, methods: Mapping[str, Cell], metric: str) -> str:
    """Return the sentence of one group of methods, or ""."""
    scores = {
        name: _mean(cell, "test", metric)
        for name, cell in methods.items()
        if None not in cell.values("test", metric)
    }
    fused = [
        name
        for name in scores
        if methods[name].first.fuses and methods[name].method != ENSEMBLE and " source)" not in name
    ]
    if not fused or "lora" not in scores:
        return ""
    best = max(fused, key=scores.__getitem__)
    said = (
        f"{model}, {lang}: {best} has {metric} {scores[best]:.1f}, {_against(scores, best, 'lora')}"
    )
    if "translate_test" in scores:
        said += f" and {_against(scores, best, 'translate_test')}"
        if METHODS[methods[best].method].reads_translated_tests:
            zero_shot = _mean(methods[best], "zero_shot", metric)
            said += f". {_why(scores[best] - scores['translate_test'], zero_shot, lang)}"
    for name in sorted(scores):
        if methods[name].method == ENSEMBLE and not methods[name].first.fuses:
            said += f". {best} has {_against(scores, best, name)}"
    return f"{said}.{_caution(methods[best])}"


def _mean(cell: Cell, block: str, metric: str) -> float:
    """Return the mean of a metric over the runs of a cell, in percent."""
    return 100 * statistics.mean(value for value in cell.values(block, metric) if value is not None)


def _against(scores: Mapping[str, float], name: str, other: str) -> str:
    """Compare the score of a method with that of another method."""
    gain = scores[name] - scores[other]
    if abs(gain) <= TIE:
        return f"as much as {other} ({scores[other]:.1f})"
    return (
        f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'} {other} ({scores[other]:.1f})"
    )


def _why(gain: float, zero_shot: float, lang: str) -> str:
    """Explain the difference between a fusion and translate_test."""
    if gain > TIE:
        return "It uses the text itself besides its English translation"
    if gain < -TIE:
        return "Reading the English translation alone is better here"
    return (
        f"Both read the English translation. The model knows little of {lang} (zero-shot "
        f"{zero_shot:.1f}), so the text itself adds nothing to it"
        if zero_shot < 50
        else "The text itself adds nothing to its English translation here"
    )


def _caution(cell: Cell) -> str:
    """Return a warning if there is only one seed."""
    few = len(cell.runs) == 1
    return " One seed: differences of a few points mean nothing." if few else ""
