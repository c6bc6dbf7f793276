"""Which runs are compared, which are refused, and what the comparisons say."""

import json
import shutil

import pytest
from run_folders import finished, predicted, traced
from tables import write_rows

from flare_exp.experiment.checksums import CHECKSUMS, seal
from flare_exp.report import predictions
from flare_exp.report.making import make_report
from flare_exp.report.published import published_table
from flare_exp.report.runs import read
from flare_exp.tasks import metrics
from flare_exp.utils.files import write_json

LABELS = ("negative", "neutral", "positive")
GOLD = ["negative", "neutral", "positive", "neutral"] * 5


def nusax(folder, method, lang, seed, wrong, *overrides):
    """Write a run of NusaX whose first `wrong` predictions are no class."""
    guess = ["junk"] * wrong + GOLD[wrong:]
    found = {"test": metrics.classification(guess, GOLD, LABELS)}
    words = [f"method={method}", "task=nusax", f"task.lang={lang}", f"seed={seed}"]
    place = finished(folder / f"{lang}{method}{seed}", *words, *overrides, metrics=found)
    return traced(predicted(place, GOLD, guess))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two languages, two seeds, and methods of which translate_test lacks a language."""
    folder = tmp_path_factory.mktemp("runs")
    for lang in ("ace", "jav"):
        for seed in (0, 1):
            nusax(folder, "lora", lang, seed, 8 + seed)
            nusax(folder, "flare", lang, seed, 2)
    nusax(folder, "translate_test", "ace", 0, 8)
    return folder


def test_comparisons_are_paired_by_seed_and_example(folder):
    report, problems = make_report([str(folder)])
    assert not problems
    found = {(c.cell.lang, c.cell.method): c for c in report.sections[0].comparisons}
    assert set(found) == {("ace", "flare"), ("jav", "flare"), ("ace", "translate_test")}
    flare, translated = found["ace", "flare"], found["ace", "translate_test"]
    assert (flare.seeds, flare.examples) == ((0, 1), 20)
    assert flare.found.low <= flare.found.mean <= flare.found.high
    assert flare.found.p < 0.05
    # the same predictions for the seed that both have
    assert translated.seeds == (0,)
    assert (translated.found.mean, translated.found.p) == (0, 1)
    # two languages with equal p-values: Holm doubles them
    assert flare.p_holm == pytest.approx(2 * flare.found.p)
    assert translated.p_holm == translated.found.p
    again, _ = make_report([str(folder)])
    assert [c.found for c in again.sections[0].comparisons] == [c.found for c in found.values()]


def test_the_baseline_is_chosen_by_method_or_by_method_and_fusion(folder):
    for name in ("flare", "flare (add_relu)"):
        report, _ = make_report([str(folder)], baseline=name)
        found = report.sections[0].comparisons
        assert {(c.cell.method, c.found.mean < 0) for c in found} == {
            ("lora", True),
            ("translate_test", True),
        }
    for name, said in (("flair", "no such method"), ("flare_mt", "no run here has this method")):
        _, (problem,) = make_report([str(folder)], baseline=name)
        assert problem.startswith(f"--baseline {name}: ")
        assert said in problem
        assert "choose one of translate_test, lora, flare, flare (add_relu)" in problem


def test_methods_with_every_cell_are_ranked_and_the_others_are_named(folder):
    report, _ = make_report([str(folder)])
    (ranking,) = report.rankings
    assert ranking.cells == (("nusax", "ace"), ("nusax", "jav"))
    assert ranking.ranks == {"flare (add_relu)": (1, 1, 1), "lora": (2, 2, 2)}
    assert ranking.lacking == {"translate_test": (("nusax", "jav"),)}
    (table,) = report.tables
    (note,) = table.notes
    assert note.startswith("Not ranked (")
    assert note.endswith("): translate_test has no nusax/jav.")


def test_a_missing_cell_is_shown_and_has_no_average(folder):
    report, _ = make_report([str(folder)])
    scores = report.sections[0].tables[0]
    assert [column.name for column in scores.columns] == ["method", "ace", "jav", "average"]
    rows = {row[0].text: row[1:] for row in scores.rows}
    assert [value.text for value in rows["translate_test"][1:]] == ["-", "-"]
    assert [value.mark for value in rows["flare (add_relu)"]] == ["best"] * 3
    assert [value.star for value in rows["flare (add_relu)"]] == [True, True, False]
    assert rows["lora"][2].mark == "second"


def test_a_row_has_the_gap_to_english_and_the_costs(folder):
    report, _ = make_report([str(folder)])
    runs = report.sections[0].tables[1]
    names = [column.name for column in runs.columns]
    row = dict(zip(names, runs.rows[0], strict=True))
    assert row["method"].text == "translate_test"
    score = metrics.classification(["junk"] * 8 + GOLD[8:], GOLD, LABELS)["macro_f1"]
    assert row["gap to English"].number == pytest.approx(100 * (score - 0.9))
    assert [row[name].text for name in ("trained", "transfer s", "test s", "peak GB")] == [
        "1,234",
        "1",
        "2",
        "2.00",
    ]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"data": {"en/train": {"examples": 9, "fingerprint": "f2"}}},
            "data fingerprint of en/train: f1 and f2",
        ),
        (
            {"artefacts": {"backbone": {"digest": "b2"}, "zero_shot": {"code": "code1"}}},
            "digest of the checkpoint: b1 and b2",
        ),
        (
            {"artefacts": {"backbone": {"digest": "b1"}, "zero_shot": {"code": "code2"}}},
            "code version: code1 and code2",
        ),
        ({"code": {"fusion": "fusion2"}}, "code version of fusion: fusion1 and fusion2"),
    ],
)
def test_a_mixed_folder_is_refused_with_the_difference(facts, said, tmp_path):
    first = traced(finished(tmp_path / "0", "method=x_mixup"))
    second = traced(finished(tmp_path / "1", "method=flare"), **facts)
    # code of fusion says nothing about a method without it, nor the code of an ensemble's mean
    traced(finished(tmp_path / "2", "method=lora"), code={"fusion": "fusion3"})
    _, problems = make_report([str(tmp_path)])
    (problem,) = problems
    assert problem.startswith(f"{first} and {second} differ in {said}. Such runs are not compared")
    assert "--mixed" in problem
    report, problems = make_report([str(tmp_path)], mixed=True)
    assert not problems
    assert report.notes[0] == f"Mixed: {first} and {second} differ in {said}."


def test_other_translations_by_one_system_are_refused(tmp_path):
    """As of files that were edited; another system translates in another way on purpose."""
    name = "translation of toy_sentiment/en/train into far"
    words = ["seed=0", "seed=1", "mt=gold"]
    for number, (word, digest) in enumerate(zip(words, ("m0", "m1", "m2"), strict=True)):
        run = finished(tmp_path / f"{number}", "method=flare", word)
        traced(run, artefacts={name: {"digest": digest}})
    _, (problem,) = make_report([str(tmp_path)])
    assert f"/0 and {tmp_path}/1 differ in digest of the {name}: m0 and m1. Such" in problem
    shutil.rmtree(tmp_path / "1")
    assert make_report([str(tmp_path)])[1] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("translation of toy_sentiment/far/unlabeled into en", []),
        (
            "translation of toy_sentiment/en/train into far",
            ["task.train_split=train[:50]", "task.validation_split=train[50:]"],
        ),
    ],
)
def test_translations_whose_names_do_not_tell_their_texts_are_not_compared(name, words, tmp_path):
    """Those of a method's own texts, and of parts of one split, which are named as they come."""
    for seed in (0, 1):
        run = finished(tmp_path / f"{seed}", "method=flare", f"seed={seed}", *words)
        traced(run, artefacts={name: {"digest": f"m{seed}"}})
    assert make_report([str(tmp_path)])[1] == []


def test_another_split_is_refused_and_another_language_or_model_is_not(tmp_path):
    for number, words in enumerate((["task.lang=far"], ["task.lang=near"], ["model=tiny_decoder"])):
        data = {"en/train": {"fingerprint": "f1"}, f"{number}/test": {"fingerprint": str(number)}}
        made = {"backbone": {"digest": "b" + words[0]}, "zero_shot": {"code": "c"}}
        made["backbone"]["digest"] = "other" if "model" in words[0] else "same"
        traced(finished(tmp_path / f"{number}", *words), data=data, artefacts=made)
    assert make_report([str(tmp_path)])[1] == []
    finished(tmp_path / "limited", "method=lora", "task.limit=50")
    _, (problem,) = make_report([str(tmp_path)])
    place = tmp_path / "limited"
    assert f"{tmp_path / '0'} and {place} differ in task.limit: None and 50" in problem


@pytest.mark.parametrize("option", ["seed", "task.lang"])
def test_another_metric_of_a_users_own_data_is_refused(option, tmp_path):
    """Also in another language, whose scores stand in the same table."""
    values = {"seed": "01", "task.lang": ("far", "near")}[option]
    for value, metric in zip(values, ("macro_f1", "accuracy"), strict=True):
        own = {"task": "reviews", "metric": metric, "labels": ["a", "b"]}
        finished(tmp_path / value, "method=flare", f"{option}={value}", metrics=own)
    _, (problem,) = make_report([str(tmp_path)])
    assert "differ in metric: macro_f1 and accuracy. Such runs are not compared" in problem


def test_commits_whose_code_is_the_same_are_a_note(tmp_path):
    for name, commit in (("0", "a" * 40), ("1", "b" * 40)):
        run = finished(tmp_path / name, f"seed={name}")
        traced(run, commit={"hash": commit, "dirty": name == "1"})
    report, problems = make_report([str(tmp_path)])
    assert not problems
    assert report.notes[0].startswith("The runs are of 2 commits (aaaaaaaaaaaa, bbbbbbbbbbbb).")
    assert report.notes[1] == "Some runs were made with changes that were not committed."


def test_a_baseline_with_other_options_alone_is_a_note(tmp_path):
    nusax(tmp_path, "lora", "ace", 0, 3)
    nusax(tmp_path, "flare", "ace", 0, 0, "data.batch_size=16")
    report, problems = make_report([str(tmp_path)])
    assert (problems, report.sections[0].comparisons) == ([], [])
    (note,) = report.notes
    assert note.endswith("flare (add_relu) is not compared: no row of lora has data.batch_size=16")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: predicted(run, GOLD[:-1], GOLD[:-1]), "only in the first: 019"),
        (lambda run: predicted(run, GOLD[::-1], GOLD[::-1]), "the gold answer differs for: 000"),
    ],
)
def test_other_test_examples_are_refused(change, said, tmp_path):
    nusax(tmp_path, "lora", "ace", 0, 3)
    change(nusax(tmp_path, "flare", "ace", 0, 0))
    _, problems = make_report([str(tmp_path)])
    assert "differ in test examples" in problems[0]
    assert said in problems[0]
    report, problems = make_report([str(tmp_path)], mixed=True)
    assert not problems
    assert report.sections[0].comparisons == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: (run / predictions.FILE).unlink(), "is missing"),
        (lambda run: (run / predictions.FILE).write_text("x"), "is unreadable"),
        (lambda run: predicted(run, GOLD, ["neutral"] * 20), "was scored by other code"),
    ],
)
def test_predictions_that_cannot_be_used_are_a_note(change, said, tmp_path):
    nusax(tmp_path, "lora", "ace", 0, 3)
    change(nusax(tmp_path, "flare", "ace", 0, 0))
    report, problems = make_report([str(tmp_path)])
    assert not problems
    assert report.sections[0].comparisons == []
    (note,) = report.notes
    assert "flare (add_relu) is not compared: " in note
    assert said in note


def test_answers_are_compared_by_the_metric_of_their_task(tmp_path):
    """Of two accepted answers either counts; 10 of 20 questions differ between the methods."""
    gold = [["the cat", "cat"]] * 20
    for method, guess in (("lora", ["cat"] * 10 + ["dog"] * 10), ("flare", ["Cat!"] * 20)):
        exact = metrics.answers(guess, gold)
        run = finished(
            tmp_path / method, "task=toy_qa", f"method={method}", metrics={"test": exact}
        )
        predicted(run, gold, guess)
    report, problems = make_report([str(tmp_path)])
    assert not problems
    (found,) = report.sections[0].comparisons
    assert found.found.mean == pytest.approx(0.5)
    assert found.found.p < 0.001


def test_rows_with_several_baselines_are_matched_by_their_options(tmp_path):
    for method in ("lora", "flare"):
        for lr in ("1e-3", "2e-3"):
            run = finished(tmp_path / f"{method}{lr}", f"method={method}", f"transfer.lr={lr}")
            gold = ["positive"] * 10
            score = metrics.classification(gold, gold, LABELS)
            stored = json.loads((run / "metrics.json").read_text()) | {"test": score}
            (run / "metrics.json").write_text(json.dumps(stored))
            predicted(run, gold, gold)
    report, _ = make_report([str(tmp_path)])
    pairs = [(c.cell.first, c.baseline.first) for c in report.sections[0].comparisons]
    assert {(a.options["transfer.lr"], b.options["transfer.lr"]) for a, b in pairs} == {
        (0.001, 0.001),
        (0.002, 0.002),
    }
    words = ["method=flare", "transfer.lr=1e-3", "predict.sources=[given,none]"]
    passes = finished(tmp_path / "passes", *words, "source.dropout=0.1")
    predicted(passes, gold, gold)
    (passes / "metrics.json").write_text(json.dumps(stored))
    report, _ = make_report([str(tmp_path)])
    assert [
        c.baseline.first.options["transfer.lr"]
        for c in report.sections[0].comparisons
        if c.cell.first.folder == passes
    ] == [0.001], "what LoRA does not have does not count"
    shutil.rmtree(passes)
    alone = finished(tmp_path / "third", "method=flare", "transfer.lr=3e-3")
    predicted(alone, gold, gold)
    report, _ = make_report([str(tmp_path)])
    assert len(report.sections[0].comparisons) == 2
    assert "transfer.lr=0.003 is not compared, because 2 rows are lora" in report.notes[0]


def test_peak_memory_is_unknown_if_the_transfer_came_from_the_cache(tmp_path):
    run = finished(tmp_path / "run")
    assert (read(run).peak_memory, read(run).trained_parameters) == (None, None)
    traced(run, peak_gpu_memory_bytes=3)
    assert (read(run).peak_memory, read(run).trained_parameters) == (3, 1234)
    traced(run, artefacts={"transfer": {"reused": True}}, training={"finetune": {}})
    assert (read(run).peak_memory, read(run).trained_parameters) == (None, None)
    without = traced(finished(tmp_path / "no", "method=zero_shot"), training={"finetune": {}})
    assert read(without).trained_parameters == 0


def test_a_run_whose_provenance_was_changed_is_left_out(tmp_path):
    """Otherwise a run could be shown beside others that it must not be compared with."""
    run = traced(finished(tmp_path / "run"))
    write_json(run / CHECKSUMS, seal(run))
    assert make_report([str(tmp_path)])[1] == []
    traced(run, data={})
    _, (left_out, _) = make_report([str(tmp_path)])
    assert left_out.startswith(f"left out: {run}: damaged: provenance.json")


def test_published_numbers_stand_beside_ours_and_are_marked_as_quoted(tmp_path):
    nusax(tmp_path, "flare", "ace", 0, 0, "model=xlmr_large")
    nusax(tmp_path, "flare", "jav", 0, 4, "model=xlmr_large")
    shuffled = ["model=xlmr_large", "source.shuffle=true"]
    nusax(tmp_path / "ablation", "x_mixup", "jav", 0, 4, *shuffled)
    shorter = ["model=xlmr_large", "data.max_length=64"]
    nusax(tmp_path / "shorter", "flare", "jav", 0, 9, *shorter)
    report, problems = make_report([str(tmp_path)], published=True)
    assert not problems
    table = report.tables[-1]
    rows = {(row[0].text, row[2].text): row for row in table.rows}
    own = [row for row in table.rows if row[0].text == "nusax" and row[5].text != "-"]
    found = {row[6 + 1].text: row for row in own if row[2].text == "flare (add_relu)"}
    assert len(found) == 2, "a row for each setting"
    assert {row[2].text for row in own} == {"flare (add_relu)"}, "no ablation"
    row = found["nllb_3b3, data.max_length=128"]
    assert (row[3].text, row[3].quoted) == ("79.18", True)
    runs = [read(tmp_path / f"{lang}flare0") for lang in ("ace", "jav")]
    mean = sum(run.metrics["test"]["macro_f1"] for run in runs) / 2
    assert row[5].number == pytest.approx(100 * mean)
    assert (row[5].quoted, row[6].text) == (False, "ace, jav")
    assert rows["average", "lora"][5].text == "-"
    assert {row[1].text for row in table.rows} == {"xlmr_large"}
    assert published_table({}).notes[-1].startswith("The paper has no numbers")


def several(folder, method, wrong, *overrides):
    """Write a run that trained on ace and jav, with wrong predictions in each language."""
    guesses = {lang: ["junk"] * n + GOLD[n:] for lang, n in wrong.items()}
    own = {
        lang: {
            "unseen": False,
            "test": metrics.classification(guess, GOLD, LABELS),
            "zero_shot": {"accuracy": 0.2, "macro_f1": 0.2},
        }
        for lang, guess in guesses.items()
    }
    mean = metrics.mean_of([scores["test"] for scores in own.values()])
    found = {"lang": [*wrong], "languages": own, "test": mean}
    words = [f"method={method}", "task=nusax", f"task.lang=[{','.join(wrong)}]"]
    place = finished(folder / f"several_{method}", *words, *overrides, metrics=found)
    rows = [
        {"id": f"nusax/{lang}/test/{i:03}", "gold": gold, "prediction": said}
        for lang, guess in guesses.items()
        for i, (gold, said) in enumerate(zip(GOLD, guess, strict=True))
    ]
    write_rows(place / "predictions.parquet", rows)
    return traced(place)


def test_runs_on_several_languages_are_rows_of_their_own(tmp_path):
    """They are compared with runs on the same languages, and with what trains on none."""
    nusax(tmp_path, "lora", "jav", 0, 9)
    nusax(tmp_path, "flare", "jav", 0, 7)
    nusax(tmp_path, "zero_shot", "jav", 0, 12)
    several(tmp_path, "lora", {"jav": 4, "ace": 8})
    several(tmp_path, "flare", {"jav": 2, "ace": 6})
    several(tmp_path, "zero_shot", {"jav": 12, "ace": 12})
    report, problems = make_report([str(tmp_path)], mixed=True)
    assert problems == [], "zero_shot on jav is the same run twice"
    (section,) = report.sections
    suffix = "trained on jav+ace"
    labels = {lang: [c.label for c in section.cells if c.lang == lang] for lang in ("ace", "jav")}
    both = [f"lora ({suffix})", f"flare (add_relu, {suffix})"]
    assert labels["ace"] == ["zero_shot", *both]
    assert sorted(labels["jav"]) == sorted(["zero_shot", "lora", "flare (add_relu)", *both])
    found = {(c.cell.lang, c.cell.label): c for c in section.comparisons}
    baselines = {key: c.baseline.label for key, c in found.items() if key[0] == "jav"}
    assert baselines == {
        ("jav", "zero_shot"): "lora",
        ("jav", "flare (add_relu)"): "lora",
        ("jav", both[1]): both[0],
    }
    assert {c.examples for c in found.values()} == {20}
    guesses = [["junk"] * n + GOLD[n:] for n in (2, 4)]
    flare, lora = (metrics.classification(guess, GOLD, LABELS)["macro_f1"] for guess in guesses)
    assert found["jav", both[1]].found.mean == pytest.approx(flare - lora, abs=1e-5)
    (scores, runs, _) = section.tables
    rows = {row[0].text: [value.text for value in row[1:]] for row in scores.rows}
    assert rows["lora"][0] == "-", "no run on ace alone"
    assert rows[both[1]][1] == f"{100 * flare:.1f}"
    langs = [column.name for column in runs.columns].index("lang")
    assert [row[langs].text for row in runs.rows][-3:] == ["mean of jav+ace"] * 3
    assert not [line for line in section.sentences if suffix in line]
