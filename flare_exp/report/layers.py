"""Choose the figures and tables of an analysis of a run's layers."""

from __future__ import annotations

from flare_exp.experiment.analysis import Analysis, Similarity
from flare_exp.flare.measuring import Activation, Cosine
from flare_exp.report.drawing import Drawing, Line
from flare_exp.report.tables import Column, Table, Value

ROLES = ("source S", "target T")


def drawings_of(analysis: Analysis) -> list[Drawing]:
    """Return the figures of an analysis; activations are missing where nothing is fused."""
    made = [activation_drawing(analysis)] if analysis.activations else []
    return [*made, similarity_drawing(analysis)]


def activation_drawing(analysis: Analysis) -> Drawing:
    """Return the mean activation of source and target in each block, a panel per projection."""
    panels = []
    for stack, name in dict.fromkeys((a.stack, a.projection) for a in analysis.activations):
        own = [a for a in analysis.activations if (a.stack, a.projection) == (stack, name)]
        values = [[(a.layer, a.source) for a in own], [(a.layer, a.target) for a in own]]
        lines = []
        for number, (role, pairs) in enumerate(zip(ROLES, values, strict=True)):
            known = [(x, y) for x, y in pairs if y is not None]
            lines.append(Line(role, [x for x, _ in known], [y for _, y in known], style=number))
        panels.append((f"{stack}, {name}", lines))
    relu = " after ReLU" if analysis.relu else ""
    return Drawing(
        "activation",
        f"Mean activation of the bottleneck{relu}: {_run(analysis)}",
        f"Means over channels and tokens of the first {analysis.examples} test examples, without "
        "padding.",
        "block",
        f"mean activation{relu}",
        panels,
        kind="band",
        whole=True,
        zero=True,
    )


def similarity_drawing(analysis: Analysis) -> Drawing:
    """Return the similarity of English and target states in each layer, a panel per stack."""
    panels = []
    for stack in dict.fromkeys(s.stack for s in analysis.similarities):
        own = [s for s in analysis.similarities if s.stack == stack]
        lines = [
            _line("before the transfer", [(s.layer, s.before) for s in own], 0),
            _others("before, other examples", [(s.layer, s.before) for s in own], 2),
        ]
        after = [(s.layer, s.after) for s in own if s.after is not None]
        if after:
            lines.insert(1, _line("after the transfer", after, 1))
            lines.append(_others("after, other examples", after, 3))
        panels.append((stack, [line for line in lines if line.x]))
    return Drawing(
        "similarity",
        f"Similarity of English and target states: {_run(analysis)}",
        f"Cosine of mean states of the first {analysis.examples} test examples: mean, and standard "
        "deviation over examples as a band. English states are those of the English model. Other "
        "examples: each target with the English states of all other examples.",
        "layer (0: embeddings)",
        "cosine similarity",
        panels,
        kind="band",
        whole=True,
    )


def _line(label: str, found: list[tuple[int, Cosine]], style: int) -> Line:
    """Return the line of the same example's similarities, with their standard deviation."""
    return Line(
        label,
        [layer for layer, _ in found],
        [c.mean for _, c in found],
        [c.mean - c.deviation for _, c in found],
        [c.mean + c.deviation for _, c in found],
        style,
    )


def _others(label: str, found: list[tuple[int, Cosine]], style: int) -> Line:
    """Return the line of the similarities with other examples; empty if there is one alone."""
    known = [(layer, c.others) for layer, c in found if c.others is not None]
    return Line(label, [x for x, _ in known], [y for _, y in known], style=style)


def tables_of(analysis: Analysis) -> list[Table]:
    """Return the tables of an analysis; activations are missing where nothing is fused."""
    names = ("stack", "block", "projection", *ROLES)
    columns = [Column(name, name not in ("stack", "projection")) for name in names]
    relu = " after ReLU" if analysis.relu else ""
    title = f"mean activation of the bottleneck{relu}, {analysis.examples} examples"
    rows = [_activation_row(a) for a in analysis.activations]
    made = [Table("activation", title, columns, rows)] if rows else []
    heads = ("stack", "layer", "before", "after", "before, others", "after, others")
    columns = [Column(name, name != "stack") for name in heads]
    title = f"cosine of English and target states, {analysis.examples} examples"
    rows = [_similarity_row(s) for s in analysis.similarities]
    return [*made, Table("similarity", title, columns, rows)]


def _activation_row(found: Activation) -> list[Value]:
    texts = [Value(found.stack), _number(found.layer, 0), Value(found.projection)]
    return [*texts, _number(found.source, 4), _number(found.target, 4)]


def _similarity_row(found: Similarity) -> list[Value]:
    before, after = found.before, found.after
    own, others = (after.mean, after.others) if after else (None, None)
    values = [before.mean, own, before.others, others]
    return [Value(found.stack), _number(found.layer, 0), *(_number(v, 3) for v in values)]


def _number(value: float | None, digits: int) -> Value:
    return Value("-") if value is None else Value(f"{value:.{digits}f}", value)


def _run(analysis: Analysis) -> str:
    """Return what tells the run apart, for a title."""
    facts = analysis.run
    return ", ".join(
        str(facts[k]) for k in ("task", "lang", "model", "method", "fusion") if facts[k]
    )
