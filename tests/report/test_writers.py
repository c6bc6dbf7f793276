"""One report in every format: names are escaped, marks are kept, LaTeX compiles."""

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from run_folders import finished, predicted, traced

from flare_exp.cli import report as command
from flare_exp.cli.main import main
from flare_exp.report.making import Report, Section, make_report
from flare_exp.report.tables import Column, Table, Value, marked
from flare_exp.report.writers import latex, page, plain
from flare_exp.tasks import metrics

NASTY = r"a_b & 50% #1 {x} $y$ ~ ^ \n <script>|`*[z]\" ± 語"
LABELS = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def nasty() -> Report:
    """A report whose every text has characters that some format reads as markup."""
    columns = [Column(NASTY), Column("s", True, NASTY), Column("t", True, NASTY)]
    rows = [
        [Value(NASTY), Value("-1.5 ± 0.1", -1.5, star=True), Value("2.0", 2.0, "best")],
        [Value("z"), Value("-", None), Value("1.0", 1.0, "second", quoted=True)],
    ]
    table = Table("nasty", NASTY, columns, rows, [NASTY])
    wide = Table("wide", NASTY, columns * 20, [row * 20 for row in rows])
    return Report([Section("toy", [], [], [table, wide], [NASTY])], [table], [], [NASTY])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """LoRA and FLARE in two languages, one seed."""
    folder = tmp_path_factory.mktemp("written")
    gold = list(LABELS) * 10
    for lang in ("near", "far"):
        for method, guess in (("lora", ["neutral"] * 30), ("flare", gold)):
            found = {"test": metrics.classification(guess, gold, LABELS)}
            words = [f"method={method}", f"task.lang={lang}"]
            run = finished(folder / f"{lang}_{method}", *words, metrics=found)
            traced(predicted(run, gold, guess))
    return folder


def compiled(folder, text):
    """Compile a document; return the text of its log."""
    if not shutil.which("pdflatex"):
        pytest.skip("pdflatex is not installed")
    (folder / "document.tex").write_text(text)
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert (folder / "document.pdf").stat().st_size > 1000
    return done.stdout


def test_latex_compiles_alone_and_within_a_document(nasty, folder, tmp_path):
    runs, _ = make_report([str(folder)], published=True)
    assert "Overfull" not in compiled(tmp_path, latex.latex(runs))
    text = latex.latex(nasty)
    compiled(tmp_path, text)
    (tmp_path / "report.tex").write_text(text)
    packages = r"\documentclass{article}\usepackage{booktabs,graphicx}"
    compiled(tmp_path, packages + r"\begin{document}\input{report}\end{document}")


def test_latex_has_booktabs_bold_underline_and_stars(nasty):
    text = latex.latex(nasty)
    assert r"\textbf{2.0}" in text
    assert r"\underline{\textit{1.0}}" in text
    assert r"$-$1.5 $\pm$ 0.1$^{*}$ & \textbf{2.0} \\" in text
    assert all(f"\\{name}rule" in text for name in ("top", "mid", "bottom", "cmid"))


class Balanced(HTMLParser):
    """Collects the text of a page, and checks that its elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def test_latex_parts_a_table_that_is_longer_than_a_page():
    rows = [[Value(f"row {n}")] for n in range(100)]
    table = Table("long", "many", [Column("x")], rows, ["A note."])
    text = latex.latex(Report([], [table], [], []))
    parts = text.split(r"\begin{table}")[1:]
    assert [part.count("row ") for part in parts] == [45, 45, 10]
    assert [f"many (part {n} of 3)." in part for n, part in enumerate(parts, 1)] == [True] * 3
    assert ["A note." in part for part in parts] == [False, False, True]
    assert len(set(re.findall(r"\\label\{(.*?)\}", text))) == 3


def test_html_is_one_file_with_escaped_text_and_figures(nasty):
    text = page.page(nasty, {"<b>": '<svg xmlns="http://www.w3.org/2000/svg"></svg>'})
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert [tag for tag, data in parser.texts].count("script") == 1
    assert ("caption", NASTY) in parser.texts
    assert ("td", NASTY) in parser.texts
    assert ("figcaption", "<b>") in parser.texts
    assert not re.search(r"""(src|href)=|@import|url\(""", text)
    assert '<td class="number best" data-number="2">2.0</td>' in text
    assert '<td class="number second quoted" data-number="1">1.0</td>' in text


def test_markdown_escapes_and_marks(nasty):
    text = plain.markdown(nasty)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4, 61}
    assert "<script>" not in text
    assert "| **2.0** |" in text
    assert "| <u>*1.0*</u> |" in text
    assert r"-1.5 ± 0.1\*" in text


def test_csv_has_a_row_per_cell_in_full_precision(folder, capsys):
    assert command.print_report([str(folder)], "csv", published=True) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    runs = [row for row in rows if row["origin"] == "run"]
    assert [(row["lang"], row["method"]) for row in runs] == [
        (lang, method) for lang in ("far", "near") for method in ("lora", "flare (add_relu)")
    ]
    flare = runs[1]
    assert (flare["test/macro_f1/mean"], flare["test/macro_f1/std"]) == ("1.0", "")
    assert float(flare["gap_to_english/mean"]) == pytest.approx(0.1)
    assert (flare["baseline"], flare["average_rank"]) == ("lora", "1.0")
    assert float(flare["difference"]) == pytest.approx(5 / 6, abs=1e-6)  # LoRA: 1/2, 0 and 0
    assert float(flare["p_holm"]) == pytest.approx(2 * float(flare["p"]))
    assert (flare["trained_parameters"], flare["peak_memory_bytes"]) == ("1234", "2000000000")
    quoted = next(row for row in rows if row["origin"] == "quoted")
    assert (quoted["method"], quoted["test/average/mean"]) == ("lora", "0.6588")


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("a.tex", "% Compile"),
        ("a.html", "<!doctype html>"),
        ("a.md", "## toy"),
        ("a.csv", "origin,task"),
        ("a.txt", "toy_sentiment: "),
    ],
)
def test_the_ending_of_the_file_is_its_format(name, begins, folder, tmp_path, capsys):
    assert main(["report", str(folder), f"--out={tmp_path / name}"]) == 0
    assert (tmp_path / name).read_text().startswith(begins)
    assert capsys.readouterr().out == f"wrote {tmp_path / name}\n"


def test_all_mistakes_of_a_command_line_come_in_one_message(tmp_path, capsys):
    words = ["report", "--formt", "--format", "pdf", "--out", f"{tmp_path}/no/a.tex", "--baseline"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flare_exp report: --formt: there is no such flag; allowed: --baseline,")
    assert "did you mean --format?" in line
    assert "--format pdf: choose one of terminal, csv, markdown, latex, html" in line
    assert f"there is no folder {tmp_path}/no" in line
    assert "--baseline: needs a value" in line
    assert main(["report", "--out", "table.doc"]) == 2
    assert "a file that ends in .txt, .csv, .md, .tex, .html" in capsys.readouterr().err


def test_a_narrow_terminal_shows_costs_below_scores(folder, capsys):
    from rich.console import Console

    from flare_exp.report.writers import terminal

    report, _ = make_report([str(folder)])
    heads = []
    for width in (250, 100):
        terminal.write(report, Console(width=width))
        lines = capsys.readouterr().out.splitlines()
        heads.append([line for line in lines if "┃" in line and "method" in line])
        assert not [line for line in lines if "translate_t " in line or len(line) > width]
    assert ["peak GB" in head and "macro_f1" in head for head in heads[0]].count(True) == 1
    assert ["peak GB" in head and "macro_f1" in head for head in heads[1]].count(True) == 0
    assert ["peak GB" in head for head in heads[1]].count(True) == 1


def test_best_and_second_of_a_block():
    values = [Value("", number) for number in (80.04, 79.96, 71.0, None, 60.0)]
    assert [v.mark for v in marked(values)] == ["best", "best", "second", "", ""]
    assert [v.mark for v in marked([Value("", 1.0), Value("", 1.01)])] == ["", ""]
