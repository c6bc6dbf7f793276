"""Put the numbers that the paper printed beside those of runs.

Source: the tables of FLARE (arXiv 2501.06892). Scores are in %: accuracy for XNLI,
exact match for TyDiQA, macro F1 for NusaX, averaged over the languages of the paper. They are
quoted, not computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flare_exp.report.cells import Cell, setting_of, variant_of, varying
from flare_exp.report.runs import ABLATIONS
from flare_exp.report.tables import MISSING, Column, Table, Value, mean_of

SOURCE = "arXiv 2501.06892"
TASK_NAMES = ("xnli", "tydiqa", "nusax")
ALL = "average"  # over the three tasks


@dataclass(frozen=True)
class Quoted:
    """One published number: its task (or ALL), model, method with fusion, score and rank."""

    task: str
    model: str
    method: str
    score: float
    rank: float | None = None


def _averages() -> list[Quoted]:
    """Return the averages over the three tasks, with the average rank among methods."""
    models = ("xlmr_large", "mt5_xl", "llama31", "gemma2")
    rows: dict[str, list[tuple[float, float | None] | None]] = {
        "lora": [(65.88, 3.33), (68.99, 3.67), (55.55, 3.33), (52.37, 3.67)],
        "x_mixup": [(64.69, 4.67), (68.82, 4.00), None, None],
        "input_fusion": [(65.41, 3.00), (68.84, 4.33), (55.86, 3.33), (52.54, 3.00)],
        "flare_mt": [(65.89, None), None, None, None],
        "flare (add_relu)": [(67.03, 1.33), (69.89, 1.33), (57.42, 1.33), (53.54, 1.67)],
    }
    return [
        Quoted(ALL, model, method, *number)
        for method, numbers in rows.items()
        for model, number in zip(models, numbers, strict=True)
        if number
    ]


def _fusions() -> list[Quoted]:
    """Return the scores of fusion functions with XLM-R Large."""
    rows = {
        "add": (80.53, 40.31, 78.73),
        "mul": (79.59, 36.23, 77.73),
        "add_relu": (80.99, 40.93, 79.18),
        "cross_attn": (80.66, 39.15, 77.72),
    }
    return [
        Quoted(task, "xlmr_large", f"flare ({fusion})", score)
        for fusion, scores in rows.items()
        for task, score in zip(TASK_NAMES, scores, strict=True)
    ]


QUOTED = (
    *_fusions(),
    Quoted("tydiqa", "xlmr_large", "lora", 40.14),
    Quoted("tydiqa", "mt5_xl", "lora", 46.76),
    Quoted("tydiqa", "mt5_xl", "flare (add_relu)", 48.94),
    Quoted("tydiqa", "llama31", "lora", 15.88),
    Quoted("tydiqa", "llama31", "flare (add_relu)", 20.77),
    Quoted("tydiqa", "gemma2", "lora", 4.21),
    Quoted("tydiqa", "gemma2", "flare (add_relu)", 6.38),
    *_averages(),
)


def published_table(tasks: Mapping[str, Sequence[Cell]]) -> Table:
    """Return the published numbers, each beside ours where there are such runs.

    Ours is the average over the languages that were run, and names them. Tasks without runs are
    left out, and so are models without runs, unless none of the paper's models has any.
    """
    columns = [*map(Column, ("task", "model", "method"))]
    columns += [Column("paper (quoted)", True), Column("its rank (quoted)", True)]
    columns += [Column("ours", True), Column("our languages"), Column("our translation")]
    shown = [q for q in QUOTED if q.task in tasks or q.task == ALL]
    models = {cell.model for cells in tasks.values() for cell in cells}
    shown = [q for q in shown if q.model in models] or shown
    rows = []
    for q in sorted(shown, key=lambda q: (q.task == ALL, q.task)):
        rank = Value(MISSING) if q.rank is None else Value(f"{q.rank:.2f}", q.rank, quoted=True)
        quoted = [Value(f"{q.score:.2f}", q.score, quoted=True), rank]
        for own in _ours(q, tasks) or [(Value(MISSING), "", "")]:
            rows.append(
                [*map(Value, (q.task, q.model, q.method)), *quoted, own[0], *map(Value, own[1:])]
            )
    title = f"published numbers in %, quoted from {SOURCE}, beside ours"
    notes = [
        f"Quoted numbers are averages over the paper's languages and seeds ({SOURCE}); they were "
        "not measured here.",
    ]
    if not set(tasks) & {*TASK_NAMES}:
        notes.append(f"The paper has no numbers of {', '.join(sorted(tasks))}.")
    return Table("published", title, columns, rows, notes)


def _ours(quoted: Quoted, tasks: Mapping[str, Sequence[Cell]]) -> list[tuple[Value, str, str]]:
    """Return our score, languages and translation for each setting that has the method."""
    if quoted.task != ALL:
        return [
            (Value(f"{score:.2f}", score), ", ".join(langs), mt)
            for mt, (score, langs) in _averages_of(quoted, quoted.task, tasks).items()
        ]
    found = [_averages_of(quoted, task, tasks) for task in TASK_NAMES]
    shared = [mt for mt in found[0] if all(mt in other for other in found)]
    means = [(mt, sum(own[mt][0] for own in found) / len(found)) for mt in shared]
    return [(Value(f"{mean:.2f}", mean), "those of the three tasks", mt) for mt, mean in means]


def _averages_of(
    quoted: Quoted, task: str, tasks: Mapping[str, Sequence[Cell]]
) -> dict[str, tuple[float, list[str]]]:
    """Return setting, with the options that differ -> our average in %, and its languages.

    Ablations are none of the paper's numbers.
    """
    cells = tasks.get(task, ())
    options = varying(cells)
    found: dict[str, dict[str, float]] = {}
    for cell in cells:
        score = mean_of(cell.values("test", cell.first.metric))
        # the paper trains on each language alone
        named = quoted.method in (cell.label, cell.method) and not cell.trained_on
        ablated = any(cell.first.options.get(f"source.{name}") for name in ABLATIONS)
        if cell.model == quoted.model and named and not ablated and score is not None:
            _, *setting = setting_of(cell, options)
            extra = variant_of(cell, options).removeprefix(quoted.method)
            found.setdefault(", ".join(setting) + extra, {})[cell.lang] = 100 * score
    return {mt: (sum(own.values()) / len(own), sorted(own)) for mt, own in found.items()}
