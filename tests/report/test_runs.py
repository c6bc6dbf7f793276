"""The table of runs: which runs share a row, what is left out, and what it says in a sentence."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import finished

from flare_exp.cli import report
from flare_exp.report.cells import cells_of, option_of, setting_of, varying
from flare_exp.report.making import GOLD, make_report
from flare_exp.report.runs import READING, Run, read, run_folders
from flare_exp.report.writers import plain


def table(capsys, *folders):
    """The exit code, and what is printed with the cells of its rows."""
    code = report.main([str(folder) for folder in folders])
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line[:1] in "│┃"]
    rows = [[part.strip() for part in re.split("[│┃]", line)[1:-1]] for line in lines]
    return code, printed, rows


def test_runs_that_differ_in_any_option_are_different_cells(tmp_path, capsys):
    for layer, base in (("ahead", 0.8), ("same", 0.6)):
        for seed in (0, 1):
            options = [f"fusion.source_layer={layer}", f"seed={seed}", f"output_dir={layer}{seed}"]
            finished(tmp_path / f"{layer}{seed}", *options, score=base + seed / 10)
    code, printed, rows = table(capsys, tmp_path)
    assert code == 0, printed.err
    head, *cells = rows
    assert head[:6] == ["model", "lang", "mt", "method", "fusion.source_layer", "seeds"]
    column = head.index("macro_f1")
    found = {row[4]: (row[5], row[column]) for row in cells}
    assert found == {"ahead": ("0,1", "85.0 ± 7.1"), "same": ("0,1", "65.0 ± 7.1")}


@pytest.mark.parametrize(
    "words",
    [
        ("model=tiny_decoder", "decode=score", "decode=generate"),
        ("model=tiny", "mt.noise=0.12", "mt.noise=0.125"),
    ],
)
def test_runs_that_differ_in_how_they_answer_or_in_fine_noise_are_different_cells(words, tmp_path):
    model, *values = words
    for number, value in enumerate(values):
        finished(tmp_path / f"{number}", "method=lora", model, value)
    tasks, problems = cells_of([read(folder) for folder in run_folders([str(tmp_path)])])
    assert problems == []
    (cells,) = tasks.values()
    shown = {(*cell.name, *(option_of(cell, key) for key in varying(cells))) for cell in cells}
    assert len(shown) == 2


def test_many_languages_are_all_named_where_runs_are_told_apart(tmp_path):
    langs = ["ace", "ban", "bjn", "bug", "jav", "mad", "min", "nij", "sun"]
    for left_out in langs[-2:]:
        seen = [lang for lang in langs if lang != left_out]
        words = [f"task.lang=[{','.join(seen)}]", f"task.unseen=[{left_out}]", "task=nusax"]
        scores = {"accuracy": 0.5, "macro_f1": 0.5}
        own = {lang: {"unseen": False, "test": scores, "zero_shot": scores} for lang in langs}
        metrics = {"lang": seen, "languages": own}
        finished(tmp_path / left_out, "mt=gold", "method=lora", *words, metrics=metrics)
    report, problems = make_report([str(tmp_path)])
    assert problems == []
    (scores, *_) = report.sections[0].tables
    assert [row[0].text for row in scores.rows] == [
        f"lora (trained on {'+'.join(lang for lang in langs if lang != out)})"
        for out in reversed(langs[-2:])
    ]
    text = plain.csv_text(report)
    assert len(re.findall(",mean of ace.+", text)) == 2


def test_the_quality_of_a_run_is_that_of_its_own_translation_system():
    scores = {"far": None, "en by toy": 60.0, "en": 50.0}
    metrics = {"lang": "far", "translation": {"noise": 0.0, "chrf++": scores}}
    assert Run(Path(), metrics, {}).chrf == 50.0


def test_only_options_that_differ_from_the_shipped_ones_need_a_column(tmp_path, capsys):
    """The defaults of a model or task, and what cannot change a result, tell no cells apart."""
    finished(tmp_path / "0", "model=tiny", "trainer=cpu", "data.workers=1")
    finished(tmp_path / "1", "model=tiny_decoder", "trainer=cpu", "output_dir=elsewhere")
    finished(
        tmp_path / "2",
        "model=tiny",
        "trainer=cpu",
        "seed=1",
        "trainer.devices=2",
        "trainer.strategy=ddp",
    )
    finished(tmp_path / "3", "model=tiny", "trainer=cpu", "method=lora")
    finished(tmp_path / "4", "model=tiny", "trainer=cpu", "source.shuffle=true")
    measured = {"translation": {"noise": 0.4, "chrf++": {"en": 55.0, "far": 50.0}}}
    finished(
        tmp_path / "5", "trainer=cpu", "mt=gold", "mt.noise=0.4", "method=lora", metrics=measured
    )
    _, _, (head, *cells) = table(capsys, tmp_path)
    assert head[:5] == ["model", "lang", "mt", "method", "seeds"]
    assert {tuple(row[:5]) for row in cells} == {
        ("tiny", "far", "toy, 10% noise", "flare (add_relu)", "0,1"),
        ("tiny_decoder", "far", "toy, 10% noise", "flare (add_relu)", "0"),
        ("tiny", "far", "toy, 10% noise", "lora", "0"),
        ("tiny", "far", "toy, 10% noise", "flare (add_relu, shuffle source)", "0"),
        ("tiny", "far", "gold, 40% noise, chrF++ 50", "lora", "0"),
    }


def test_a_second_run_of_a_cell_and_seed_is_an_error_that_names_both(tmp_path, capsys):
    finished(tmp_path / "one", "seed=3", score=0.8)
    finished(tmp_path / "two", "seed=3", "logger=wandb", score=0.6)
    code, printed, rows = table(capsys, tmp_path)
    assert code == 2
    assert rows == []
    assert str(tmp_path / "one") in printed.err
    assert str(tmp_path / "two") in printed.err
    assert "seed 3" in printed.err
    # one folder that is given twice is one run
    assert table(capsys, tmp_path / "one", tmp_path / "one")[0] == 0


def test_half_and_damaged_runs_are_named_and_the_rest_is_shown(tmp_path, capsys):
    finished(tmp_path / "whole", metrics={"test": {"accuracy": 0.1, "macro_f1": 0.5, "new": 0.7}})
    finished(tmp_path / "older", "seed=1")
    damaged = {
        "torn": lambda run: (run / "metrics.json").write_text('{"task": "toy_sen'),
        "empty": lambda run: (run / "metrics.json").write_text("{}"),
        "list": lambda run: (run / "metrics.json").write_text("[1]"),
        "running": lambda run: (run / "metrics.json").unlink(),
        "bare": lambda run: (run / "config.yaml").unlink(),
        "cut": lambda run: (run / "config.yaml").write_text("model: {name: ["),
        "nothing": lambda run: (run / "config.yaml").write_text(""),
    }
    for seed, (name, damage) in enumerate(damaged.items(), start=2):
        damage(finished(tmp_path / name, f"seed={seed}"))
    wandb_file = tmp_path / "whole/wandb/run-1/files/config.yaml"
    wandb_file.parent.mkdir(parents=True)
    wandb_file.write_text("seed: {value: 0}")
    code, printed, (head, *cells) = table(capsys, tmp_path)
    assert code == 0
    assert [row[head.index("seeds")] for row in cells] == ["0,1"]
    assert cells[0][head.index("new")] == "-", (
        "a metric that only some runs have is no mean over all"
    )
    left_out = [line for line in printed.out.splitlines() if line.startswith("left out: ")]
    assert sorted(line.split(": ")[1] for line in left_out) == sorted(
        str(tmp_path / n) for n in damaged
    )
    assert table(capsys, tmp_path / "torn")[0] == 2, "no run at all"
    for folders in (
        [tmp_path / "nowhere"],
        [tmp_path, tmp_path / "nowhere"],
    ):  # a mistyped one is not left out in silence
        code, printed, rows = table(capsys, *folders)
        assert (code, rows) == (2, [])
        assert printed.err == f"flare_exp report: {tmp_path / 'nowhere'}: there is no such folder\n"


@pytest.mark.parametrize(
    ("method", "task", "said"),
    [
        ("fresh", "toy_sentiment", "this version has no method fresh"),
        ("flare", "reviews", "this version has no task reviews"),
    ],
)
def test_a_run_of_an_unknown_method_or_task_is_left_out(method, task, said, tmp_path):
    finished(tmp_path / "known", "method=lora")
    other = finished(tmp_path / "other", "method=flare", metrics={"task": task})
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("name: flare\n", f"name: {method}\n"))
    report, problems = make_report([str(tmp_path)])
    assert problems == []
    assert report.notes[-1] == f"left out: {other}: {said}"


def test_an_export_is_no_second_run(tmp_path):
    run = finished(tmp_path / "run", "method=lora")
    copy = shutil.copytree(run, tmp_path / "shared")
    (copy / READING).write_text("{}")
    report, problems = make_report([str(tmp_path)])
    assert problems == []
    assert report.notes == [f"left out: {copy}: an export, whose run counts where it is"]


def test_links_to_runs_are_followed_once(tmp_path):
    run = finished(tmp_path / "elsewhere" / "run", "method=lora")
    grid = tmp_path / "grid"
    grid.mkdir()
    (grid / "one").symlink_to(run)
    (grid / "two").symlink_to(run.parent)
    (grid / "back").symlink_to(tmp_path)
    assert run_folders([str(grid)]) == [run]


def said(capsys, folder, scores):
    """The sentence under the table of runs of method -> macro F1."""
    for method, score in scores.items():
        finished(folder / method, f"method={method}", score=score)
    _, printed, _ = table(capsys, folder)
    text = " ".join(printed.out.splitlines())
    return [text[text.index("tiny, far: ") :]] if "tiny, far: " in text else []


@pytest.mark.parametrize(
    ("translate_test", "expected"),
    [
        (0.795, "as much as translate_test (79.5). Both read the English translation."),
        (0.7, "10.0 points above translate_test (70.0). It uses the text itself besides"),
        (0.9, "10.0 points below translate_test (90.0). Reading the English translation alone"),
    ],
)
def test_a_sentence_compares_flare_with_the_baselines(translate_test, expected, tmp_path, capsys):
    scores = {"lora": 0.4, "translate_test": translate_test, "flare": 0.8, "zero_shot": 0.2}
    (line,) = said(capsys, tmp_path, scores)
    assert line.startswith(
        "tiny, far: flare (add_relu) has macro_f1 80.0, 40.0 points above lora (40.0) and "
    )
    assert expected in line
    assert "One seed" in line


def test_without_lora_or_flare_there_is_no_sentence(tmp_path, capsys):
    assert said(capsys, tmp_path / "a", {"flare": 0.8, "translate_test": 0.8}) == []
    assert said(capsys, tmp_path / "b", {"lora": 0.8, "translate_test": 0.8}) == []


def test_options_that_a_method_does_not_have_make_no_difference(tmp_path):
    """As in a grid over a learning rate, whose baseline trains nothing."""
    for number, method in enumerate(("zero_shot", "zero_shot", "lora", "lora")):
        rate = "transfer.lr=1e-3" if number % 2 else "transfer.lr=2e-3"
        finished(tmp_path / f"{number}", f"method={method}", rate)
    tasks, problems = cells_of([read(folder) for folder in run_folders([str(tmp_path)])])
    assert problems == []
    (cells,) = tasks.values()
    assert [cell.method for cell in cells] == ["zero_shot", "lora", "lora"]
    assert varying(cells) == ["transfer.lr"]
    assert [option_of(cell, "transfer.lr") for cell in cells] == ["-", "0.001", "0.002"]


def test_options_that_a_translation_system_does_not_have_make_no_difference(tmp_path):
    finished(tmp_path / "gold", "mt=gold")
    for name in ("cat", "tac"):
        finished(tmp_path / name, "mt=command", f"mt.command={name} {{from}} {{to}}")
    tasks, _ = cells_of([read(folder) for folder in run_folders([str(tmp_path)])])
    (cells,) = tasks.values()
    assert varying(cells) == ["mt.command"]
    settings = [setting_of(cell, ["mt.command"])[1:] for cell in cells]
    assert settings[:1] == [("command", "mt.command=cat {from} {to}")]
    assert settings[2:] == [("gold",)]


def test_an_ensemble_that_trains_nothing_still_depends_on_all_its_languages(tmp_path):
    """By its weights, unless they are equal."""
    given = ["method=ensemble", "method.of=[zero_shot,translate_test]"]
    for number, weights in enumerate(("validation", "equal")):
        folder = finished(tmp_path / f"{number}", *given, f"method.weights={weights}")
        run = read(folder)
        several = replace(run, options={**run.options, "task.lang": ["near", "far"]})
        assert several.has("task.lang") == (weights == "validation")
        assert several.trained_on == (("near", "far") if weights == "validation" else ())


@pytest.mark.parametrize(("method", "expected"), [("distil", 100), ("ensemble", 300)])
def test_the_teachers_of_a_student_do_not_count_as_trained(method, expected, tmp_path):
    run = read(finished(tmp_path / "run", f"method={method}", "method.of=[lora,flare]"))
    sizes = {"transfer lora": 100, "transfer flare": 200}
    if method == "distil":
        sizes["transfer"] = 100
    training = {name: {"parameters": {"trainable": n}} for name, n in sizes.items()}
    run.__dict__["provenance"] = {"training": training}
    assert run.trained_parameters == expected


def test_only_an_ensemble_has_weights_and_only_a_fusion_has_passes(tmp_path):
    finished(tmp_path / "lora", "method=lora")
    finished(tmp_path / "ensemble", "method=ensemble", "method.weights=similarity")
    lora, ensemble = (read(tmp_path / name) for name in ("lora", "ensemble"))
    assert not any(lora.has(key) for key in ("method.weights", "predict.sources"))
    assert ensemble.has("method.weights")
    assert not ensemble.has("predict.sources")  # its members are lora and translate_test


def test_a_sentence_takes_the_best_rows_of_a_translation_whatever_their_options(tmp_path):
    """A learning rate of its own, as an option of the training, does not divide the methods."""
    given = {
        "lora": ("lora", "transfer.lr=2e-3", 0.6),
        "worse": ("lora", "transfer.lr=5e-3", 0.5),
        "flare": ("flare", "transfer.lr=1e-3", 0.8),
        "gated": ("flare", "fusion=gated", 0.7),
        "translate_test": ("translate_test", "mt=toy", 0.8),
    }
    for name, (method, option, score) in given.items():
        for noise in ("0.1", "0.3"):
            words = [f"method={method}", option, f"mt.noise={noise}"]
            finished(tmp_path / f"{name}{noise}", *words, score=score - float(noise))
    report, _ = make_report([str(tmp_path)])
    first, second = report.sections[0].sentences
    assert first.startswith(
        "tiny, far, toy, 10% noise: flare (add_relu) has macro_f1 70.0, 20.0 points above "
        "lora, transfer.lr=0.002 (50.0) and as much as translate_test (70.0). "
    )
    assert second.startswith("tiny, far, toy, 30% noise: flare (add_relu) has macro_f1 50.0, ")


def test_a_sentence_compares_the_seeds_that_its_rows_share(tmp_path):
    scores = {"lora0": 0.6, "flare0": 0.7, "flare1": 0.9}
    for name, score in scores.items():
        finished(tmp_path / name, f"method={name[:-1]}", f"seed={name[-1]}", score=score)
    (sentence,) = make_report([str(tmp_path)])[0].sections[0].sentences
    assert "has macro_f1 70.0, 10.0 points above lora (60.0)." in sentence
    assert sentence.endswith(
        "Seeds that all of these have: 0. One seed: differences of a few points mean nothing."
    )


@pytest.mark.parametrize(
    ("words", "reads"),
    [
        (["mt=gold", "method=lora"], True),
        (["mt=[toy,gold]", "method=flare"], True),
        (["mt=toy", "method=flare"], False),
    ],
)
def test_a_run_that_reads_the_benchmarks_own_translations_is_an_upper_bound(words, reads, tmp_path):
    finished(tmp_path / "run", *words)
    assert (GOLD in make_report([str(tmp_path)])[0].notes) == reads


def test_methods_are_ranked_over_tasks_that_differ_in_their_options(tmp_path):
    """One task has a learning rate for each method, the other one the shipped rate for both."""
    for task, rates in (("toy_sentiment", ("2e-3", "1e-3")), ("toy_nli", ("1e-3", "1e-3"))):
        for method, rate, score in zip(("lora", "flare"), rates, (0.5, 0.6), strict=True):
            words = [f"task={task}", f"method={method}", f"transfer.lr={rate}"]
            finished(tmp_path / f"{task}{method}", *words, score=score)
    report, _ = make_report([str(tmp_path)])
    (ranking,) = report.rankings
    assert ranking.ranks == {"flare (add_relu)": (1, 1, 1), "lora": (2, 2, 2)}
