"""Figures and tables of an analysis show its numbers."""

import pytest

from flare_exp.experiment.analysis import Analysis, Similarity
from flare_exp.flare.measuring import Activation, Cosine
from flare_exp.report import drawing, layers

RUN = {"task": "toy", "lang": "far", "model": "tiny", "method": "flare", "fusion": "add_relu"}


@pytest.fixture
def analysis():
    """Two blocks and three layers of numbers that all differ."""
    activations = [
        Activation("encoder", block, name, block + shift, block + shift + 0.25, 1.0, 1.0)
        for block in (1, 2)
        for name, shift in (("query", 0.0), ("value", 0.5))
    ]
    similarities = [
        Similarity(
            "encoder",
            layer,
            Cosine(0.5 + layer / 10, 0.05, 0.1 + layer / 10),
            Cosine(0.6 + layer / 10, 0.02, 0.2 + layer / 10),
        )
        for layer in range(3)
    ]
    return Analysis(RUN, 7, True, activations, similarities)


def lines(figure, panel):
    return {
        line.get_label(): ([*line.get_xdata()], [*line.get_ydata()])
        for line in figure.axes[panel].get_lines()
        if not line.get_label().startswith("_")
    }


def test_the_figures_have_the_numbers(analysis, tmp_path):
    activation, similarity = layers.drawings_of(analysis)
    figure = drawing.draw(activation)
    assert [axes.get_title() for axes in figure.axes] == ["encoder, query", "encoder, value"]
    assert lines(figure, 0) == {
        "source S": ([1, 2], [1.0, 2.0]),
        "target T": ([1, 2], [1.25, 2.25]),
    }
    assert lines(figure, 1)["target T"] == ([1, 2], [1.75, 2.75])
    assert "after ReLU" in figure.axes[0].get_ylabel()
    figure = drawing.draw(similarity)
    assert lines(figure, 0) == {
        "before the transfer": ([0, 1, 2], [0.5, 0.6, 0.7]),
        "after the transfer": ([0, 1, 2], [0.6, 0.7, 0.8]),
        "before, other examples": ([0, 1, 2], [0.1, 0.2, pytest.approx(0.3)]),
        "after, other examples": ([0, 1, 2], [0.2, pytest.approx(0.3), 0.4]),
    }
    band = figure.axes[0].collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.58, 0.82))
    for one in (activation, similarity):
        texts = [drawing.svg_text(drawing.draw(one), name=one.name) for _ in range(2)]
        assert texts[0] == texts[1]


def test_the_tables_have_the_numbers(analysis):
    activation, similarity = layers.tables_of(analysis)
    assert [v.text for v in activation.rows[1]] == ["encoder", "1", "value", "1.5000", "1.7500"]
    assert [v.text for v in similarity.rows[1]] == [
        *("encoder", "1", "0.600", "0.700", "0.200", "0.300")
    ]


def test_what_was_not_measured_is_not_drawn():
    """Zero-shot, one example: nothing is fused, adapted or compared with others."""
    found = [Similarity("encoder", 0, Cosine(0.5, 0.0, None), None)]
    analysis = Analysis(RUN, 1, False, [], found)
    (similarity,) = layers.drawings_of(analysis)
    ((_, (line,)),) = similarity.panels
    assert (line.label, line.y) == ("before the transfer", [0.5])
    (table,) = layers.tables_of(analysis)
    assert [v.text for v in table.rows[0]] == ["encoder", "0", "0.500", "-", "-", "-"]
