"""Write a report as LaTeX: tables of booktabs, best scores bold, second ones underlined."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import groupby

from flare_exp.report.making import Report
from flare_exp.report.tables import Table, Value

WIDE = 90  # characters; wider tables are scaled to the width of the text
LONG = 45  # rows that fit a page with the caption; longer tables are parted
SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    **{sign: f"\\{sign}" for sign in "&%$#_"},
}
MINUS = re.compile(r"(?<!\S)-(?=\d)")
# the file is a document of its own, and can be read by another document, too
HEAD = r"""% Compile this file, or \input it into a document that loads booktabs and graphicx.
\makeatletter
\newif\ifreportalone
\ifx\documentclass\@twoclasseserror\reportalonefalse\else\reportalonetrue\fi
\makeatother
\ifreportalone
\documentclass[a4paper]{article}
\usepackage[margin=2cm]{geometry}
\usepackage{booktabs,graphicx}
\begin{document}
\fi
"""
TAIL = r"""
\ifreportalone
\end{document}
\fi
"""


def latex(report: Report) -> str:
    """Return the report in LaTeX."""
    tables = [part for table in report.all_tables() for part in _narrower(table)]
    parts = [_table(part) for table in tables for part in _shorter(table)]
    sentences = [line for section in report.sections for line in section.sentences]
    parts += [f"\\noindent {escaped(line)}\n" for line in (*sentences, *report.notes)]
    return HEAD + "\n" + "\n".join(parts) + TAIL


def escaped(text: str) -> str:
    """Escape the special characters of TeX.

    Other characters than ASCII, which a font may lack, are written as their code points.
    """
    return "".join(SPECIAL.get(c) or (c if c.isascii() else f"U+{ord(c):04X}") for c in text)


def _width(table: Table) -> int:
    """Return the characters of a line of the table, with two between columns."""
    lines = [[column.name for column in table.columns]]
    lines += [[value.text for value in row] for row in table.rows]
    return sum(max(map(len, column)) + 2 for column in zip(*lines, strict=True))


def _narrower(table: Table) -> list[Table]:
    """Return a table, or the parts of one that is too wide for a page."""
    if _width(table) <= WIDE:
        return [table]
    shorter = table.without_constants("model", "lang", "mt", "seeds")
    return [shorter] if _width(shorter) <= WIDE else shorter.costs_apart()


def _shorter(table: Table) -> list[Table]:
    """Return a table, or the parts of one that is too long for a page."""
    if len(table.rows) <= LONG:
        return [table]
    starts = range(0, len(table.rows), LONG)
    return [
        replace(
            table,
            name=f"{table.name}-{number}",
            title=f"{table.title} (part {number} of {len(starts)})",
            rows=table.rows[start : start + LONG],
            notes=table.notes if start == starts[-1] else (),
        )
        for number, start in enumerate(starts, 1)
    ]


def _table(table: Table) -> str:
    """Return one table as a float, with caption, label and notes."""
    spec = "".join("r" if column.numeric else "l" for column in table.columns)
    heads = " & ".join(escaped(column.name) for column in table.columns)
    rows = [" & ".join(map(_value, row)) + r" \\" for row in table.rows]
    body = [f"\\begin{{tabular}}{{{spec}}}", r"\toprule", *_groups(table), heads + r" \\"]
    body += [r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    if _width(table) > WIDE:
        body = [r"\resizebox{\linewidth}{!}{%", *body[:-1], body[-1] + "}"]
    caption = " ".join([f"{escaped(table.title)}.", *map(escaped, table.notes)])
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            *body,
            f"\\caption{{{caption}}}",
            f"\\label{{tab:{''.join(c if c.isalnum() else '-' for c in table.name)}}}",
            r"\end{table}",
            "",
        ]
    )


def _groups(table: Table) -> list[str]:
    """Return the line of heads over several columns, with its rules; empty without any."""
    if not any(column.group for column in table.columns):
        return []
    cells, rules, start = [], [], 1
    for name, columns in groupby(column.group for column in table.columns):
        width = len(list(columns))
        cells.append(
            f"\\multicolumn{{{width}}}{{c}}{{{escaped(name)}}}" if name else "&" * (width - 1)
        )
        rules += [f"\\cmidrule(lr){{{start}-{start + width - 1}}}"] if name else []
        start += width
    return [" & ".join(cells) + r" \\", "".join(rules)]


def _value(value: Value) -> str:
    """Return a value of a table with its mark."""
    text = MINUS.sub("$-$", escaped(value.text)) + "$^{*}$" * value.star
    if value.quoted:
        text = f"\\textit{{{text}}}"
    return {"best": f"\\textbf{{{text}}}", "second": f"\\underline{{{text}}}"}.get(value.mark, text)
