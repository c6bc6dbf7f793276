"""Draw lines, bands and points of panels, and write figures as SVG and PNG.

Every line has a color of Okabe and Ito (https://jfly.uni-koeln.de/color), which differ for the
color-blind too, and its own marker and dashes, which differ in gray. SVG has glyphs as paths: it
looks the same everywhere, and what was laid out without overlap stays so. The same figure gives
the same bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from flare_exp.utils.files import write_text

# numbers without a common divisor: 7 x 8 x 5 lines in a row differ
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "svg.fonttype": "path",
    "text.parse_math": False,  # the $ of a command begins no formula
}
PANELS = 12  # of one figure
COLUMNS = 3
WIDTH, HEIGHT = 3.1, 2.7  # of a panel in inches
LEAST = 4.8  # width of a figure in inches
LETTERS = 13  # of a text in 9 points, to an inch
LINE = 0.16  # height of a line of the legend in inches
SHORT = 3  # lines of a legend for which a figure has room anyway
DODGE = 2.0  # points between lines whose bars would cover each other

Kind = Literal["bars", "band", "points"]


@dataclass(frozen=True)
class Line:
    """One line of a panel, or its points.

    Args:
        label: its text in the legend.
        x: places on the axis.
        y: heights.
        low: lower ends of bars or of the band; empty: none are drawn.
        high: upper ends.
        style: number of its color, marker and dashes.
        joined: whether a line joins the points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default_factory=tuple)
    high: Sequence[float] = field(default_factory=tuple)
    style: int = 0
    joined: bool = True


@dataclass(frozen=True)
class Drawing:
    """A figure as data.

    Args:
        name: of its files.
        title: what it shows.
        caption: what its points and bars are, in sentences.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        panels: title and lines of each panel.
        kind: whether `low` and `high` are drawn as bars or as a band; points have bars.
        log: whether the horizontal axis is logarithmic.
        whole: whether it has whole numbers alone.
        zero: whether there is a line at height 0.
    """

    name: str
    title: str
    caption: str
    x: str
    y: str
    panels: Sequence[tuple[str, Sequence[Line]]]
    kind: Kind = "bars"
    log: bool = False
    whole: bool = False
    zero: bool = False

    def parts(self) -> list[Drawing]:
        """Return the figure, or several figures of at most PANELS panels."""
        if len(self.panels) <= PANELS:
            return [self]
        chunks = [self.panels[i : i + PANELS] for i in range(0, len(self.panels), PANELS)]
        return [
            replace(
                self,
                name=f"{self.name}-{n}",
                title=f"{self.title} ({n} of {len(chunks)})",
                panels=chunk,
            )
            for n, chunk in enumerate(chunks, start=1)
        ]


def draw(drawing: Drawing) -> Figure:
    """Draw a figure.

    Panels share their axes. Lines are moved by a few points of paper beside each other, so
    that bars at one place do not cover each other; their data are not changed.
    """
    columns = min(COLUMNS, len(drawing.panels))
    rows = math.ceil(len(drawing.panels) / columns)
    width = max(LEAST, columns * WIDTH + 0.6)
    with _style():
        figure = Figure(figsize=(width, rows * HEIGHT + 0.7), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        room = int(LETTERS * width / columns)
        for place, axes in enumerate(grid.flat):
            if place >= len(drawing.panels):
                axes.remove()
                continue
            title, lines = drawing.panels[place]
            _panel(axes, drawing, lines)
            axes.set_title("\n".join(textwrap.wrap(title, room)))
            axes.tick_params(labelbottom=True)
            if place + columns >= len(drawing.panels):
                axes.set_xlabel("\n".join(textwrap.wrap(drawing.x, room)))
            if place % columns == 0:
                axes.set_ylabel("\n".join(textwrap.wrap(drawing.y, int(LETTERS * HEIGHT))))
        _legend(figure, width)
    return figure


def _panel(axes: Axes, drawing: Drawing, lines: Sequence[Line]) -> None:
    """Draw the lines of one panel."""
    if drawing.log:
        axes.set_xscale("log")
    if drawing.zero:
        axes.axhline(0, color="#555555", linewidth=0.9)
    for number, line in enumerate(lines):
        color = COLORS[line.style % len(COLORS)]
        look: dict[str, Any] = {
            "color": color,
            "marker": MARKERS[line.style % len(MARKERS)],
            "linestyle": DASHES[line.style % len(DASHES)] if line.joined else "none",
            "label": "\n".join(textwrap.wrap(line.label, int(LETTERS * LEAST) - 8)),
            "markersize": 5.5,
            "linewidth": 1.5,
        }
        if drawing.kind == "band":
            axes.plot(line.x, line.y, **look)
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
            continue
        ends = None
        if line.low:
            both = zip(line.low, line.y, line.high, strict=True)
            ends = [*zip(*((y - low, high - y) for low, y, high in both), strict=True)]
        shift = DODGE * (number - (len(lines) - 1) / 2) if drawing.kind == "bars" else 0.0
        middle, caps, bars = axes.errorbar(
            line.x, line.y, ends, capsize=2.5, elinewidth=1, **look
        ).lines
        inches = ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
        # afterwards: matplotlib takes no limits of an axis from what is moved
        for artist in (middle, *caps, *bars):
            artist.set_transform(axes.transData + inches)
    _ticks(axes, drawing)


def _ticks(axes: Axes, drawing: Drawing) -> None:
    """Choose ticks that can be read: whole numbers, and plain ones on a logarithmic axis.

    On that of bars, they are the places of the bars.
    """
    axes.margins(x=0.08, y=0.1)
    if drawing.whole:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if drawing.log:
        places = sorted({x for _, lines in drawing.panels for line in lines for x in line.x})
        wide = places[-1] / places[0] > 200
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        if drawing.kind == "bars":
            axes.xaxis.set_major_locator(FixedLocator(places))
        elif places[-1] / places[0] < 3:
            axes.set_xlim(places[0] / 2, places[-1] * 2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _legend(figure: Figure, width: float) -> None:
    """Put one legend of all panels below them."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= {label: handle for handle, label in zip(handles, labels, strict=True)}
    longest = max((len(part) for label in named for part in label.split("\n")), default=0)
    columns = max(1, min(len(named), int(LETTERS * width / (longest + 8))))
    # the panels keep their height, however long the legend is
    rows = [[*named][i : i + columns] for i in range(0, len(named), columns)]
    lines = sum(max(label.count("\n") + 1.3 for label in row) for row in rows)
    figure.set_figheight(figure.get_figheight() + LINE * max(0.0, lines - SHORT))
    figure.legend(named.values(), named, loc="outside lower center", ncols=columns)


def svg_text(figure: Figure, title: str = "", caption: str = "", name: str = "figure") -> str:
    """Return a figure as an SVG element, which can stand in an HTML page.

    Args:
        figure: the figure.
        title: what it shows; a reader of the screen says it.
        caption: its description.
        name: of the figure. Figures of one page need different names, since the ids of an SVG's
            parts are made of it.
    """
    file = io.StringIO()
    metadata: Any = {"Title": title, "Description": caption, "Date": None, "Creator": None}
    with _style(), matplotlib.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(file, metadata=metadata)
    FigureCanvasAgg(figure)  # back to the canvas that lays out
    text = file.getvalue()
    return text[text.index("<svg") :]


def png_bytes(figure: Figure) -> bytes:
    """Return a figure as PNG with 200 dots per inch."""
    file = io.BytesIO()
    with _style():
        figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    return file.getvalue()


def write(drawing: Drawing, folder: Path) -> None:
    """Write a figure as `<name>.svg` and `<name>.png` into an existing folder."""
    figure = draw(drawing)
    text = svg_text(figure, drawing.title, drawing.caption, drawing.name)
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    write_text(folder / f"{drawing.name}.svg", head + text)
    (folder / f"{drawing.name}.png").write_bytes(png_bytes(figure))


def _style() -> AbstractContextManager[None]:
    """Return a context with matplotlib's defaults and STYLE, whatever its user has set."""
    return matplotlib.style.context(["default", STYLE])
