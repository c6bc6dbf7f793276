"""Write a report as CSV or as Markdown."""

from __future__ import annotations

import csv
import io
from typing import Any

from flare_exp.report.cells import Cell, option_of, setting_of, variant_of, varying
from flare_exp.report.making import Report, Section
from flare_exp.report.runs import TIMED
from flare_exp.report.tables import Table, Value, gap, mean_of, metrics_of, moments
from flare_exp.tasks import TASKS


def markdown(report: Report) -> str:
    """Return the report in Markdown, best scores bold and second ones underlined."""
    parts = []
    for section in report.sections:
        parts.append(f"## {section.task}")
        parts += [_table(t.without_constants("model", "seeds")) for t in section.tables]
        parts += [_escaped(line) for line in section.sentences]
    parts += [_table(table) for table in report.tables]
    parts += [_escaped(line) for line in report.notes]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    """Return a table with its title and notes."""
    head = "| " + " | ".join(_escaped(column.name) for column in table.columns) + " |"
    rule = "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|"
    rows = ["| " + " | ".join(map(_value, row)) + " |" for row in table.rows]
    notes = [text for note in table.notes for text in ("", _escaped(note))]
    return "\n".join([f"**{_escaped(table.title)}**", "", head, rule, *rows, *notes])


def _value(value: Value) -> str:
    """Return a value of a table with its mark."""
    text = _escaped(value.text) + r"\*" * value.star
    if value.quoted:
        text = f"*{text}*"
    return {"best": f"**{text}**", "second": f"<u>{text}</u>"}.get(value.mark, text)


def _escaped(text: str) -> str:
    """Escape what Markdown reads as markup."""
    for sign in ("\\", "`", "*", "_", "[", "]", "|"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("&", "&amp;").replace("<", "&lt;")


def csv_text(report: Report) -> str:
    """Return a row for each cell, with fractions in full precision, and for each quoted number.

    A value that is missing is empty. Rows of all tasks have the same columns.
    """
    ranks = {
        (ranking.setting, method): found
        for ranking in report.rankings
        for method, found in ranking.ranks.items()
    }
    records = [
        _record(section, cell, ranks)
        for section in report.sections
        for cell in (*section.cells, *section.means)
    ]
    for table in report.tables:
        if table.name == "published":
            records += [_quoted(row) for row in table.rows]
    columns = list(dict.fromkeys(name for record in records for name in record))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _record(
    section: Section, cell: Cell, ranks: dict[tuple[tuple[str, ...], str], Any]
) -> dict[str, Any]:
    """Return the facts of one cell, by column."""
    options, metric, runs = varying(section.cells), cell.first.metric, cell.by_seed
    record: dict[str, Any] = {"origin": "run", "task": section.task, "model": cell.model}
    record |= {"lang": cell.lang, "mt": cell.mt, "method": cell.label}
    record |= {key: option_of(cell, key) for key in options}
    record["seeds"] = " ".join(map(str, sorted(cell.runs)))
    for block in ("test", "english", "zero_shot"):
        for name in metrics_of(section.cells):
            record |= _moments(f"{block}/{name}", cell.values(block, name))
    record |= _moments("gap_to_english", gap(cell, metric))
    record["trained_parameters"] = mean_of([run.trained_parameters for run in runs])
    for stage in TIMED:
        record[f"{stage}_seconds"] = mean_of([run.metrics["seconds"][stage] for run in runs])
    record["peak_memory_bytes"] = max((run.peak_memory or 0 for run in runs), default=0) or None
    for c in section.comparisons:
        if c.cell is cell:
            record |= {"baseline": c.baseline.label, "difference": c.found.mean}
            record |= {"difference_low": c.found.low, "difference_high": c.found.high}
            record |= {"p": c.found.p, "p_holm": c.p_holm, "test_examples": c.examples}
            record["compared_seeds"] = " ".join(map(str, c.seeds))
    setting = setting_of(cell, options)
    found = ranks.get((setting, variant_of(cell, options))) or ranks.get((setting, cell.label))
    record |= dict(zip(("average_rank", "rank_low", "rank_high"), found or (), strict=False))
    return record


def _moments(name: str, values: list[float | None]) -> dict[str, float | None]:
    """Return mean and standard deviation of a score."""
    return dict(zip((f"{name}/mean", f"{name}/std"), moments(values), strict=True))


def _quoted(row: Any) -> dict[str, Any]:
    """Return a row of the table of published numbers by column, as fractions."""
    task, model, method, score, rank, *_ = row
    record: dict[str, Any] = {"origin": "quoted", "task": task.text, "model": model.text}
    metric = TASKS[task.text].metric if task.text in TASKS else "average"
    record |= {"method": method.text, f"test/{metric}/mean": round(score.number / 100, 6)}
    return record | ({"average_rank": rank.number} if rank.number is not None else {})
