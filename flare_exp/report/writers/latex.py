"""Write a report as LaTeX: tables of booktabs, best scores bold, second ones underlined."""

from __future__ import annotations

from itertools import groupby

from flare_exp.report.making import Report
from flare_exp.report.tables import Table, Value

WIDE = 8  # columns; wider tables are scaled to the width of the text
SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    **{sign: f"\\{sign}" for sign in "&%$#_"},
}
# the file is a document of its own, and can be read by another document, too
HEAD = r"""% Compile this file, or \input it into a document that loads booktabs and graphicx.
\makeatletter
\newif\ifreportalone
\ifx\documentclass\@twoclasseserror\reportalonefalse\else\reportalonetrue\fi
\makeatother
\ifreportalone
\documentclass[a4paper]{article}
\usepackage[T1]{fontenc}
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
    parts = [_table(table) for table in report.all_tables()]
    sentences = [line for section in report.sections for line in section.sentences]
    parts += [f"\\noindent {escaped(line)}\n" for line in (*sentences, *report.notes)]
    return HEAD + "\n" + "\n".join(parts) + TAIL


def escaped(text: str) -> str:
    """Escape the special characters of TeX.

    Characters that T1 fonts lack are written as their code points.
    """
    return "".join(SPECIAL.get(c) or (c if ord(c) < 0x180 else f"U+{ord(c):04X}") for c in text)


def _table(table: Table) -> str:
    """Return one table as a float, with caption, label and notes."""
    spec = "".join("r" if column.numeric else "l" for column in table.columns)
    heads = " & ".join(escaped(column.name) for column in table.columns)
    rows = [" & ".join(map(_value, row)) + r" \\" for row in table.rows]
    body = [f"\\begin{{tabular}}{{{spec}}}", r"\toprule", *_groups(table), heads + r" \\"]
    body += [r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    if len(table.columns) > WIDE:
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
    text = escaped(value.text) + "$^{*}$" * value.star
    if value.quoted:
        text = f"\\textit{{{text}}}"
    return {"best": f"\\textbf{{{text}}}", "second": f"\\underline{{{text}}}"}.get(value.mark, text)
