"""Write a report as one HTML page that loads nothing else.

The columns of its tables are sorted by a click on their heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import groupby

from flare_exp.report.making import Report
from flare_exp.report.tables import Table, Value

STYLE = """\
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --back: #ffffff;
  --head: #f3f5f7; --line: #d5dae0; --accent: #0b5cad; --best: #e3f1e3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --soft: #9aa5b1; --back: #14181d; --head: #1f252c;
    --line: #353d47; --accent: #7db7f2; --best: #1e3a26; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
.box { overflow-x: auto; margin: 1rem 0 .3rem; border: 1px solid var(--line);
  border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .6rem; font-weight: 600; }
th, td { padding: .35rem .6rem; text-align: left; white-space: nowrap; }
thead th { background: var(--head); border-bottom: 1px solid var(--line); }
thead tr.groups th { text-align: center; font-weight: 500; color: var(--soft); }
tbody tr + tr td { border-top: 1px solid var(--line); }
th.number, td.number { text-align: right; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:hover { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td.best { font-weight: 700; background: var(--best); }
td.second { text-decoration: underline; text-underline-offset: 3px; }
td.quoted { font-style: italic; color: var(--soft); }
p { max-width: 60rem; margin: .5rem 0; overflow-wrap: anywhere; }
p.note { color: var(--soft); font-size: .875rem; }
figure { margin: 1.2rem 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
figcaption { font-weight: 600; font-size: .875rem; margin-bottom: .4rem; }
"""

# a value without a number comes last, in either direction
SCRIPT = """\
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    const head = button.parentNode, table = head.closest("table"), body = table.tBodies[0];
    const column = Number(head.dataset.column), numeric = head.classList.contains("number");
    const old = head.getAttribute("aria-sort");
    const up = old ? old === "descending" : !numeric;
    table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = function (row) {
      const cell = row.cells[column];
      return numeric ? parseFloat(cell.dataset.number) : cell.textContent;
    };
    Array.from(body.rows).sort(function (a, b) {
      const x = key(a), y = key(b);
      if (!numeric) { return up ? x.localeCompare(y) : y.localeCompare(x); }
      if (isNaN(x) || isNaN(y)) { return isNaN(x) - isNaN(y); }
      return up ? x - y : y - x;
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""

SAID = ("model", "seeds")  # columns that the title takes over where they have one value
HELP = (
    "Bold: the best of a block; underlined: the second. A click on the head of a column sorts "
    "the table."
)


def page(report: Report, figures: Mapping[str, str] | None = None) -> str:
    """Return the report as an HTML document.

    Args:
        report: tables, sentences and notes. Their text is escaped.
        figures: title -> an SVG element, which is inserted as it is.
    """
    parts = []
    for section in report.sections:
        parts.append(f"<h2>{escape(section.task)}</h2>")
        parts += [_table(t.without_constants(*SAID)) for t in section.tables]
        parts += [f"<p>{escape(line)}</p>" for line in section.sentences]
    if report.tables:
        parts.append("<h2>All tasks</h2>")
        parts += [_table(table) for table in report.tables]
    if figures:
        parts.append("<h2>Figures</h2>")
        parts += [_figure(title, svg) for title, svg in figures.items()]
    if report.notes:
        parts.append("<h2>Notes</h2>")
        parts += [f'<p class="note">{escape(line)}</p>' for line in report.notes]
    title = f"Results: {', '.join(section.task for section in report.sections)}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="note">{HELP}</p>',
            *parts,
            f"<script>\n{SCRIPT}</script>",
            "</body>",
            "</html>\n",
        ]
    )


def _figure(title: str, svg: str) -> str:
    """Return a figure with its title above it."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _table(table: Table) -> str:
    """Return one table in a box that scrolls, and its notes."""
    heads = "".join(
        f'<th scope="col" data-column="{i}"{_class("number" * column.numeric)}>'
        f'<button type="button">{escape(column.name)}</button></th>'
        for i, column in enumerate(table.columns)
    )
    rows = [
        "<tr>" + "".join(map(_cell, row, (c.numeric for c in table.columns))) + "</tr>"
        for row in table.rows
    ]
    return "\n".join(
        [
            '<div class="box" tabindex="0"><table>',
            f"<caption>{escape(table.title)}</caption>",
            f"<thead>{_groups(table)}<tr>{heads}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody></table></div>",
            *(f'<p class="note">{escape(note)}</p>' for note in table.notes),
        ]
    )


def _groups(table: Table) -> str:
    """Return the row of heads over several columns; empty without any."""
    if not any(column.group for column in table.columns):
        return ""
    spans = [(name, len(list(own))) for name, own in groupby(c.group for c in table.columns)]
    heads = "".join(f'<th colspan="{width}">{escape(name)}</th>' for name, width in spans)
    return f'<tr class="groups">{heads}</tr>'


def _cell(value: Value, numeric: bool) -> str:
    """Return a value of a table with its mark."""
    names = ["number" * numeric, value.mark, "quoted" * value.quoted]
    number = "" if value.number is None else f' data-number="{value.number:.6g}"'
    text = escape(value.text) + "*" * value.star
    return f"<td{_class(*names)}{number}>{text}</td>"


def _class(*names: str) -> str:
    """Return a class attribute with the names that are not empty."""
    given = " ".join(filter(None, names))
    return f' class="{given}"' if given else ""
