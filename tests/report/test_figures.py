"""Figures of a report: which there are, that they show the report's numbers, and their files."""

import json
import re
import shutil
import statistics

import pytest
from run_folders import finished, predicted, traced

from flare_exp.cli import report as command
from flare_exp.cli.main import main
from flare_exp.errors import UserError
from flare_exp.report import drawing
from flare_exp.report.drawing import COLORS, DASHES, MARKERS, PANELS, Drawing, Line
from flare_exp.report.figures import figures_of, parameters
from flare_exp.report.making import make_report
from flare_exp.tasks import metrics

LABELS = ("negative", "neutral", "positive")
GOLD = ["negative", "neutral", "positive", "neutral"] * 5
CURVES = """epoch,step,train/loss_epoch,validation/macro_f1
0,1,,{}
0,1,1.5,
1,2,,{}
1,2,1.2,
"""
NUSAX = ("task=nusax", "task.lang=jav")
# name -> words of the translation, chrF++, wrong predictions of LoRA; FLARE has half as many
TRANSLATIONS = {
    "small": (["mt=nllb_600m"], 30.0, 10),
    "large": (["mt=nllb_3b3"], 40.0, 8),
    "human": (["mt=gold"], None, 4),
    "noisy": (["mt=gold", "mt.noise=0.2"], 80.0, 6),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """LoRA and FLARE on four translations, two seeds each; seed 1 has one mistake more."""
    folder = tmp_path_factory.mktemp("figures")
    for name, (words, chrf, wrong) in TRANSLATIONS.items():
        for method, seconds in (("lora", 10.0), ("flare", 20.0)):
            run = finished(folder / f"{name}-{method}-0", f"method={method}", *NUSAX, *words)
            # a configuration is composed in half a second, and copied in none
            again = shutil.copytree(run, folder / f"{name}-{method}-1")
            options = (again / "config.yaml").read_text()
            (again / "config.yaml").write_text(options.replace("seed: 0", "seed: 1", 1))
            for seed, place in enumerate((run, again)):
                mistakes = (wrong if method == "lora" else wrong // 2) + seed
                guess = ["junk"] * mistakes + GOLD[mistakes:]
                measured = json.loads((place / "metrics.json").read_text()) | {
                    "seed": seed,
                    "test": metrics.classification(guess, GOLD, LABELS),
                    "translation": {"noise": 0.0, "chrf++": {"jav": chrf}},
                    "seconds": {"transfer": seconds + seed, "test": 2.0},
                }
                (place / "metrics.json").write_text(json.dumps(measured))
                (place / "curves").mkdir()
                text = CURVES.format(0.25 + seed / 10, 0.5 + seed / 10)
                (place / "curves" / "transfer.csv").write_text(text)
                traced(predicted(place, GOLD, guess))
    return folder


@pytest.fixture(scope="module")
def made(folder):
    report, problems = make_report([str(folder)])
    assert not problems
    drawings, lacking = figures_of(report)
    assert not lacking
    comparisons = {c.cell.mt: c for c in report.sections[0].comparisons}
    return {d.name.removeprefix("nusax-"): d for d in drawings}, comparisons, report


def shown(figure):
    """Label -> x, y, and the ends of its bars, of a figure's first panel."""
    axes = figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    found = {}
    for handle, label in zip(handles, labels, strict=True):
        middle, _, bars = handle.lines
        ends = [[tuple(end) for end in segment] for segment in bars[0].get_segments()]
        found[label] = [*middle.get_xdata()], [*middle.get_ydata()], ends
    return found


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("gain-quality", {30: "nllb_600m", 40: "nllb_3b3", 100: "gold"}),
        ("gain-size", {0.6: "nllb_600m", 3.3: "nllb_3b3"}),
        ("gain-noise", {0: "gold", 20: "gold, 20% noise"}),
    ],
)
def test_gains_are_the_differences_with_their_intervals(made, name, places):
    drawings, comparisons, _ = made
    lines = shown(drawing.draw(drawings[name]))
    assert list(lines) == ["flare (add_relu)"]
    x, y, ends = lines["flare (add_relu)"]
    found = [comparisons[mt].found for mt in places.values()]
    assert x == pytest.approx([*places])
    assert y == pytest.approx([100 * d.mean for d in found])
    bars = [((a, 100 * d.low), (a, 100 * d.high)) for a, d in zip(places, found, strict=True)]
    for segment, bar in zip(ends, bars, strict=True):
        assert segment == [pytest.approx(end) for end in bar]
    assert "lora" in drawings[name].y
    assert "95 % intervals" in drawings[name].caption


def test_costs_are_seconds_of_transfer_and_test(made):
    drawings, _, report = made
    cell = next(c for c in report.sections[0].cells if (c.method, c.mt) == ("lora", "gold"))
    scores = [100 * score for score in cell.values("test", "macro_f1")]
    mean, deviation = statistics.mean(scores), statistics.stdev(scores)
    (place,) = [i for i, (t, _) in enumerate(drawings["cost"].panels) if t.endswith("gold")]
    line = drawings["cost"].panels[place][1][0]
    assert (line.label, line.x) == ("lora", [12.5])
    assert [*line.low, *line.y, *line.high] == pytest.approx(
        [mean - deviation, mean, mean + deviation]
    )
    assert drawing.draw(drawings["cost"]).axes[0].get_xscale() == "log"


def test_learning_curves_are_means_over_seeds_in_bands(made):
    drawings, _, _ = made
    assert len(drawings["learning"].panels) == len(TRANSLATIONS)
    axes = drawing.draw(drawings["learning"]).axes[0]
    line, _ = axes.get_lines()
    assert [*line.get_xdata()] == [1, 2]
    assert line.get_ydata() == pytest.approx([30, 55])
    band = axes.collections[0].get_paths()[0].vertices
    deviation = statistics.stdev([25, 35])
    assert band[:, 1].min() == pytest.approx(30 - deviation)
    assert band[:, 1].max() == pytest.approx(55 + deviation)


def test_where_languages_have_one_translation_each_they_are_the_points(tmp_path):
    for lang, chrf in (("ace", 30.0), ("jav", 40.0)):
        for method in ("lora", "flare"):
            found = {"translation": {"noise": 0.0, "chrf++": {lang: chrf}}}
            found["test"] = metrics.classification(GOLD, GOLD, LABELS)
            given = [f"method={method}", "task=nusax", "mt=nllb_600m", f"task.lang={lang}"]
            run = finished(tmp_path / f"{lang}{method}", *given, metrics=found)
            traced(predicted(run, GOLD, GOLD))
    drawings, lacking = figures_of(make_report([str(tmp_path)])[0])
    assert [d.name for d in drawings] == ["nusax-gain-quality", "nusax-cost"]
    ((title, (line,)),) = drawings[0].panels
    assert title == "tiny, nllb_600m"
    assert (line.x, line.joined) == ([30, 40], False)
    assert [text.partition(" (")[0] for text in lacking] == [
        "nusax-gain-noise",
        "nusax-gain-size",
        "nusax-learning",
    ]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("nllb_600m", 0.6),
        ("nllb_1b3_distilled", 1.3),
        ("nllb_54b", 54),
        ("gold", None),
        ("toy_nllb", None),
    ],
)
def test_parameters_are_read_from_the_name_of_a_model(name, billions):
    assert parameters(name) == billions


def sample(panels=1, lines=2):
    """A figure of labels that are long and of markup."""
    label = r"a <method> & its options, transfer.lr=5e-4, mt.command=sed 's/\s$//;s/^\s$//' "
    drawn = [
        Line(f"{label}{n}", [1, 2], [n, n + 1], [n - 0.5, n], [n + 1, n + 2], n)
        for n in range(lines)
    ]
    return Drawing("sample", "Title", "Caption.", "x (s)", "y (%)", [("panel", drawn)] * panels)


def test_a_figure_has_the_same_bytes_twice_and_says_what_it_shows(tmp_path, monkeypatch):
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        drawing.write(sample(), tmp_path / name)
        found.append([(tmp_path / name / f"sample.{end}").read_bytes() for end in ("svg", "png")])
        # whatever the user has set
        monkeypatch.setitem(drawing.matplotlib.rcParams, "font.size", 20)
    assert found[0] == found[1]
    svg, png = found[0]
    assert svg.startswith(b"<?xml")
    assert b"<dc:title>Title</dc:title>" in svg
    assert b"<dc:description>Caption.</dc:description>" in svg
    assert b"<dc:date>" not in svg
    # width in the header: 200 dots to an inch
    assert int.from_bytes(png[16:20], "big") == round(drawing.LEAST * 200)


@pytest.mark.parametrize(("panels", "lines"), [(5, 6), (1, 12)])
def test_nothing_overlaps_and_nothing_is_cut_off(panels, lines):
    """However long the legend of a small figure is."""
    figure = drawing.draw(sample(panels, lines))
    figure.draw_without_rendering()
    whole = figure.bbox
    axes = [one.get_tightbbox() for one in figure.axes]
    boxes = [*axes, figure.legends[0].get_window_extent()]
    for i, box in enumerate(boxes):
        assert whole.x0 - 1 <= box.x0 < box.x1 <= whole.x1 + 1
        assert whole.y0 - 1 <= box.y0 < box.y1 <= whole.y1 + 1
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert min(one.get_window_extent().height for one in figure.axes) > figure.dpi  # an inch


def test_lines_differ_without_their_colors():
    assert len({(m, str(d)) for m in MARKERS for d in DASHES}) == 40
    looks = {
        (COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)], str(DASHES[n % len(DASHES)]))
        for n in range(280)
    }
    assert len(looks) == 280


def test_many_panels_are_several_figures():
    parts = sample(panels=PANELS + 1).parts()
    assert [(p.name, len(p.panels)) for p in parts] == [("sample-1", PANELS), ("sample-2", 1)]
    assert parts[1].title == "Title (2 of 2)"


def test_the_command_writes_figures_and_a_page_has_them(folder, tmp_path, capsys):
    one = [str(place) for place in folder.iterdir() if place.name.startswith("human")]
    target, page = tmp_path / "figures", tmp_path / "report.html"
    assert main(["report", *one, "--figures", str(target), "--out", str(page)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("left out: no figure for nusax-gain-quality (needs ")
    names = ["nusax-cost", "nusax-learning"]
    assert sorted(p.name for p in target.iterdir()) == [
        f"{name}.{end}" for name in names for end in ("png", "svg")
    ]
    text = page.read_text()
    assert text.count("<svg ") == len(names)
    assert "standard deviation over seeds" in text
    assert not re.search(r"<(link|img|script src)", text)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place, said in (("file", "is a file"), ("no/where", "there is no folder")):
        with pytest.raises(UserError, match=f"--figures .*{place}: {said}"):
            command.parse(["--figures", str(tmp_path / place)])
