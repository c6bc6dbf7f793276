"""Make the tables of a report, in one neutral form that every format is written from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from flare_exp.report.cells import Cell, option_of, setting_of, variant_of, varying
from flare_exp.report.comparisons import Comparison, Ranking, named
from flare_exp.report.runs import TIMED

Mark = Literal["", "best", "second"]
ALPHA = 0.05  # corrected p-values below it get a star
MISSING = "-"


@dataclass(frozen=True)
class Value:
    """One field of a table.

    Args:
        text: as it is shown.
        number: what it is sorted by; None: by the text.
        mark: whether it is the best or the second of its block.
        star: whether it differs from the baseline.
        quoted: whether it is a published number.
    """

    text: str
    number: float | None = None
    mark: Mark = ""
    star: bool = False
    quoted: bool = False


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: its head.
        numeric: whether it holds numbers.
        group: the head above several columns.
        cost: whether it says what a method costs; a narrow terminal shows costs below the scores.
    """

    name: str
    numeric: bool = False
    group: str = ""
    cost: bool = False


@dataclass(frozen=True)
class Table:
    """A table of any format.

    Args:
        name: short name, for labels.
        title: what it shows.
        columns: its columns.
        rows: a value per column.
        notes: sentences below it.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    notes: Sequence[str] = field(default_factory=tuple)

    def without_constants(self, *names: str) -> Table:
        """Return the table without those of some columns that have one value, which the title says.

        A table of one row keeps them.
        """
        places = [i for i, column in enumerate(self.columns) if column.name in names]
        same = [i for i in places if len({row[i].text for row in self.rows}) == 1]
        if len(self.rows) < 2 or not same:
            return self
        kept = [i for i in range(len(self.columns)) if i not in same]
        shared = ", ".join(f"{self.columns[i].name} {self.rows[0][i].text}" for i in same)
        return replace(
            self.part(kept), title=f"{self.title}{', ' if '; ' in self.title else '; '}{shared}"
        )

    def part(self, places: Sequence[int]) -> Table:
        """Return the table with some of its columns."""
        return replace(
            self,
            columns=[self.columns[i] for i in places],
            rows=[[row[i] for i in places] for row in self.rows],
        )

    def costs_apart(self) -> list[Table]:
        """Return the table without its costs, and one with them."""
        costs = [i for i, column in enumerate(self.columns) if column.cost]
        if not costs:
            return [self]
        texts = [i for i, column in enumerate(self.columns) if not column.numeric]
        scores = [i for i in range(len(self.columns)) if i not in costs]
        below = self.part([*texts, *costs])
        _, semicolon, shared = self.title.partition("; ")
        title = f"costs of the same runs{semicolon}{shared}"
        return [self.part(scores), replace(below, name=f"{self.name}-costs", title=title)]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean; None unless every run has a value."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def moments(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return mean and standard deviation; None unless every run has a value, or of one run."""
    mean, known = mean_of(values), [value for value in values if value is not None]
    return mean, statistics.stdev(known) if mean is not None and len(known) > 1 else None


def spread(values: Sequence[float | None], sign: bool = False) -> Value:
    """Return mean and standard deviation in percent; missing unless every run has a value.

    Args:
        values: a fraction per run.
        sign: show a positive mean with its sign.
    """
    mean, deviation = moments(values)
    if mean is None:
        return Value(MISSING)
    text = signed(100 * mean) if sign else f"{100 * mean:.1f}"
    return Value(text + (f" ± {100 * deviation:.1f}" if deviation is not None else ""), 100 * mean)


def count(values: Sequence[float | None], digits: int = 0) -> Value:
    """Return the mean of numbers; missing unless every run has one."""
    mean = mean_of(values)
    return Value(MISSING) if mean is None else Value(f"{mean:,.{digits}f}", mean)


def memory(values: Sequence[float | None]) -> Value:
    """Return the largest of some sizes in GB; missing without any."""
    known = [value for value in values if value is not None]
    return Value(f"{max(known) / 1e9:.2f}", max(known) / 1e9) if known else Value(MISSING)


def marked(values: Sequence[Value]) -> list[Value]:
    """Return the values of a block with the best and the second marked.

    Values that are shown alike share a mark. A single value, or a block of equal ones, has none.
    """
    shown = [None if v.number is None else round(v.number, 1) for v in values]
    order = sorted({number for number in shown if number is not None}, reverse=True)
    if len(order) < 2:
        return list(values)
    marks: dict[float | None, Mark] = {order[0]: "best", order[1]: "second"}
    return [replace(v, mark=marks.get(n, "")) for v, n in zip(values, shown, strict=True)]


def metrics_of(cells: Sequence[Cell]) -> list[str]:
    """Return the metrics that any run of some cells has, in their order."""
    runs = [run for cell in cells for run in cell.runs.values()]
    return list(dict.fromkeys(name for run in runs for name in run.metrics["test"]))


def gap(cell: Cell, metric: str) -> list[float | None]:
    """Return the metric on the target's test set minus that on the English one, for every run."""
    pairs = zip(cell.values("test", metric), cell.values("english", metric), strict=True)
    return [None if a is None or b is None else a - b for a, b in pairs]


def runs_table(task: str, cells: Sequence[Cell], metric: str) -> Table:
    """Return the table with a row for each cell: scores, parameters, seconds and memory.

    Args:
        task: name of the task.
        cells: its cells, in the order of the rows.
        metric: the task's main metric, of which the gap to English is shown.
    """
    metrics, options = metrics_of(cells), varying(cells)
    texts = ["model", "lang", "mt", "method", *options, "seeds"]
    numbers = [*metrics, f"English {metric}", "gap to English"]
    costs = ["trained", *(f"{stage} s" for stage in TIMED), "peak GB"]
    columns = [*(Column(name) for name in texts), *(Column(name, True) for name in numbers)]
    columns += [Column(name, True, cost=True) for name in costs]
    rows = [_row(cell, options, metrics, metric) for cell in cells]
    blocks: dict[tuple[object, ...], list[int]] = {}
    for place, cell in enumerate(cells):
        blocks.setdefault((cell.lang, setting_of(cell, options)), []).append(place)
    for column in range(len(texts), len(texts) + len(metrics)):
        for places in blocks.values():
            values = marked([rows[place][column] for place in places])
            for place, value in zip(places, values, strict=True):
                rows[place][column] = value
    title = f"{task}: test scores in % (mean ± standard deviation over seeds)"
    return Table(f"{task}-runs", title, columns, rows)


def _row(cell: Cell, options: Sequence[str], metrics: Sequence[str], metric: str) -> list[Value]:
    """Return the row of one cell."""
    runs = list(cell.runs.values())
    quality = [run.chrf for run in runs if run.chrf is not None]
    mt = cell.mt + (f", chrF++ {statistics.mean(quality):.0f}" if quality else "")
    texts = [cell.model, cell.lang, mt, cell.label, *(option_of(cell, key) for key in options)]
    texts.append(",".join(map(str, sorted(cell.runs))))
    return [
        *map(Value, texts),
        *(spread(cell.values("test", name)) for name in metrics),
        spread(cell.values("english", metric)),
        spread(gap(cell, metric), sign=True),
        count([run.trained_parameters for run in runs]),
        *(count([run.metrics["seconds"][stage] for run in runs]) for stage in TIMED),
        memory([run.peak_memory for run in runs]),
    ]


def scores_table(
    task: str, cells: Sequence[Cell], metric: str, found: Sequence[Comparison]
) -> Table:
    """Return the table with a row for each method and a column for each language.

    A cell without a run is shown as missing. The average is over all languages; a method that lacks
    one has none.
    """
    options, langs = varying(cells), list(dict.fromkeys(sorted(cell.lang for cell in cells)))
    stars = {c.cell for c in found if c.p_holm < ALPHA}
    lines: dict[tuple[tuple[str, ...], str], dict[str, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.model, cell.mt, cell.place()[3:])):
        lines.setdefault((setting_of(cell, options), variant_of(cell, options)), {})[cell.lang] = (
            cell
        )
    rows: list[list[Value]] = []
    for setting in dict.fromkeys(setting for setting, _ in lines):
        block = {name: own for (other, name), own in lines.items() if other == setting}
        texts = [[Value(setting[0]), Value(", ".join(setting[1:])), Value(n)] for n in block]
        scores = [_scores(own, langs, metric) for own in block.values()]
        ranked = list(zip(*(marked(column) for column in zip(*scores, strict=True)), strict=True))
        for text, line, own in zip(texts, ranked, block.values(), strict=True):
            starred = [
                replace(value, star=lang in own and own[lang] in stars)
                for lang, value in zip([*langs, ""], line, strict=False)
            ]
            rows.append([*text, *starred])
    heads = [Column(lang, True, metric) for lang in langs]
    average = [Column("average", True, metric)] if len(langs) > 1 else []
    columns = [Column("model"), Column("mt"), Column("method"), *heads, *average]
    notes = [_star_note(found)] if stars else []
    title = f"{task}: {metric} on the test sets in % (mean ± standard deviation over seeds)"
    return Table(f"{task}-scores", title, columns, rows, notes).without_constants("model", "mt")


def _scores(own: Mapping[str, Cell], langs: Sequence[str], metric: str) -> list[Value]:
    """Return the scores of a method in some languages, and their average if there are several."""
    found = [
        spread(own[lang].values("test", metric)) if lang in own else Value(MISSING)
        for lang in langs
    ]
    if len(langs) == 1:
        return found
    mean = mean_of([value.number for value in found])
    return [*found, Value(MISSING) if mean is None else Value(f"{mean:.1f}", mean)]


def _star_note(found: Sequence[Comparison]) -> str:
    """Return what a star means."""
    names = " and ".join(dict.fromkeys(c.baseline.label for c in found))
    return f"* differs from {names}: p < {ALPHA}, paired bootstrap, Holm over languages."


def signed(points: float) -> str:
    """Return points with a sign and one decimal; zero has none."""
    text = f"{points:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def p_text(p: float) -> str:
    """Return a p-value with three decimals."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def differences_table(task: str, metric: str, found: Sequence[Comparison]) -> Table:
    """Return the table of differences from the baseline, with intervals and p-values."""
    columns = [Column(name) for name in ("model", "lang", "mt", "method", "against")]
    columns += [Column("difference", True), Column("95 % interval", True)]
    columns += [Column("p", True), Column("p (Holm)", True), Column("seeds")]
    columns.append(Column("examples", True))
    options = varying([cell for c in found for cell in (c.cell, c.baseline)])
    rows = []
    for c in sorted(found, key=lambda c: c.cell.place()):
        mean, low, high = (100 * x for x in (c.found.mean, c.found.low, c.found.high))
        model, mt, *shared = setting_of(c.cell, options)
        texts = [model, c.cell.lang, ", ".join([mt, *shared])]
        texts += [variant_of(c.cell, options), c.baseline.label]
        rows.append(
            [
                *map(Value, texts),
                Value(signed(mean), mean),
                Value(f"{signed(low)} to {signed(high)}", low),
                Value(p_text(c.found.p), c.found.p),
                Value(p_text(c.p_holm), c.p_holm),
                Value(",".join(map(str, c.seeds))),
                Value(f"{c.examples:,}", c.examples),
            ]
        )
    single = any(len(c.seeds) == 1 for c in found)
    notes = ["With one seed, the interval is over test examples alone."] if single else []
    title = f"{task}: difference in {metric} from the baseline in points (paired bootstrap)"
    if all(c.p_holm == c.found.p for c in found):  # one language: nothing to correct
        place = [column.name for column in columns].index("p (Holm)")
        columns.pop(place)
        for row in rows:
            row.pop(place)
    table = Table(f"{task}-differences", title, columns, rows, notes)
    return table.without_constants("model", "mt", "against")


def ranks_table(found: Sequence[Ranking]) -> Table | None:
    """Return the table of average ranks; None without any."""
    ranked = [ranking for ranking in found if ranking.ranks]
    if not ranked:
        return None
    columns = [Column("model"), Column("mt"), Column("method")]
    columns += [Column("average rank", True), Column("95 % interval", True), Column("cells", True)]
    rows, notes = [], []
    for ranking in ranked:
        model, *others = ranking.setting
        for method, (mean, low, high) in ranking.ranks.items():
            rows.append(
                [
                    *map(Value, (model, ", ".join(others), method)),
                    Value(f"{mean:.2f}", mean),
                    Value(f"{low:.2f} to {high:.2f}", low),
                    Value(str(len(ranking.cells)), len(ranking.cells)),
                ]
            )
        notes += lacking_notes(ranking)
    table = Table(
        "ranks", "average rank over tasks and languages (1 is best)", columns, rows, notes
    )
    return table.without_constants("model", "mt", "cells")


def lacking_notes(ranking: Ranking) -> list[str]:
    """Return a sentence for each method that lacks cells."""
    setting = ", ".join(ranking.setting)
    return [
        f"Not ranked ({setting}): {method} has no {named(lacks)}."
        for method, lacks in ranking.lacking.items()
    ]
