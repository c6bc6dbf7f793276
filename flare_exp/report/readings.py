"""Say in a sentence what a table shows about methods that fuse."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from flare_exp.config.methods import ENSEMBLE, METHODS
from flare_exp.report.cells import Cell, setting_of, variant_of, varying

TIE = 1.0  # points; smaller differences are called ties


def readings(cells: Sequence[Cell], metric: str) -> list[str]:
    """Return a sentence per language and setting that compares fusion with the baselines.

    Differences of at most TIE points count as ties. Settings without a method that fuses, or
    without LoRA, are left out, and so are rows that were trained on other languages, too.
    """
    options = varying(cells)
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in cells:
        if not cell.trained_on and None not in cell.values("test", metric):
            key = (cell.lang, *setting_of(cell, options))
            groups[key].append(cell)
    several = len({key[2:] for key in groups}) > 1
    found = []
    for (lang, model, *setting), own in groups.items():
        place = ", ".join([model, lang, *(setting if several else [])])
        if said := _sentence(place, _named(own, options), metric):
            found.append(said)
    return found


def _named(cells: Sequence[Cell], options: Sequence[str]) -> dict[str, Cell]:
    """Return name -> cell, by the method alone where no other cell has its name."""
    count = Counter(cell.label for cell in cells)
    return {c.label if count[c.label] == 1 else variant_of(c, options): c for c in cells}


def _sentence(place: str, methods: Mapping[str, Cell], metric: str) -> str:
    """Return the sentence of one group of methods, or ""."""
    best = _best(methods, metric, _fuses)
    lora = _best(methods, metric, lambda cell: cell.method == "lora")
    if not best or not lora:
        return ""
    translated = _best(methods, metric, lambda cell: cell.method == "translate_test")
    ensembles = sorted(
        name for name, c in methods.items() if c.method == ENSEMBLE and not c.first.fuses
    )
    seeds = {*methods[best].runs} & {*methods[lora].runs}
    rows = [best, lora]
    for name in filter(None, [translated, *ensembles]):
        if shared := seeds & {*methods[name].runs}:
            seeds = shared
            rows.append(name)
    if not seeds:
        return ""
    scores = {name: _mean(methods[name], seeds, "test", metric) for name in rows}
    said = f"{place}: {best} has {metric} {scores[best]:.1f}, {_against(scores, best, lora)}"
    if translated in scores:
        said += f" and {_against(scores, best, translated)}"
        if METHODS[methods[best].method].reads_translated_tests:
            zero_shot = _mean(methods[best], seeds, "zero_shot", metric)
            gain = scores[best] - scores[translated]
            said += f". {_why(gain, zero_shot, methods[best].lang)}"
    for name in (name for name in rows if name in ensembles):
        against = _against(scores, best, name)
        said += f". {best} {'has' if against.startswith('as much') else 'is'} {against}"
    return f"{said}.{_caution([methods[name] for name in rows], seeds)}"


def _fuses(cell: Cell) -> bool:
    """Return whether a cell is of a method that fuses, and no ablation or ensemble of it."""
    return cell.first.fuses and cell.method != ENSEMBLE and " source" not in cell.label


def _best(methods: Mapping[str, Cell], metric: str, wanted: Callable[[Cell], bool]) -> str:
    """Return the name of the best of the cells that are wanted, or ""."""
    found = [name for name, cell in methods.items() if wanted(cell)]
    return max(found, key=lambda n: _mean(methods[n], methods[n].runs, "test", metric), default="")


def _mean(cell: Cell, seeds: Iterable[int], block: str, metric: str) -> float:
    """Return the mean of a metric over the runs of some seeds, in percent."""
    return 100 * statistics.mean(cell.runs[seed].metrics[block][metric] for seed in seeds)


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


def _caution(cells: Sequence[Cell], seeds: Collection[int]) -> str:
    """Return a warning if not all seeds of all cells count, or if there is only one."""
    fewer = any({*cell.runs} != {*seeds} for cell in cells)
    shared = ", ".join(map(str, sorted(seeds)))
    said = f" Seeds that all of these have: {shared}." if fewer else ""
    few = len(seeds) == 1
    return said + (" One seed: differences of a few points mean nothing." if few else "")
