"""Predictions of a loaded run: the run's own again, new texts as a stream, other translators."""

import itertools

import pytest
import torch
from finished_runs import SMALL_MT
from omegaconf import OmegaConf
from pyarrow.parquet import read_table

import flare_exp
from flare_exp.config import validation
from flare_exp.data.rows import Row
from flare_exp.errors import UserError
from flare_exp.experiment import predicting
from flare_exp.experiment.overriding import overridden
from flare_exp.experiment.translating import UnknownText
from flare_exp.serving.output import Output
from flare_exp.serving.prediction import predict_rows, write_test_predictions

SIMILAR = ("method=ensemble", "method.of=[lora,flare]", "method.weights=similarity")
ENSEMBLE = ("method=ensemble", "method.of=[translate_test,full,input_fusion]")
PASSES = ("predict.sources=[given,none]", "source.dropout=0.5")
TWO_SOURCES = ("source.langs=[en,near]",)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serving")]


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        # rows of two examples in a batch, English answers that are translated back
        (
            "xlm-roberta",
            ("task=toy_qa", "method=translate_test", *SMALL_MT, "task.window=20"),
        ),
        # windows of source and target, in several passes per batch
        ("xlm-roberta", ("task=toy_qa", "task.window=20", "task.doc_stride=4")),
        ("xlm-roberta", ("task=toy_nli", "method=x_mixup", "data.micro_batch_size=3")),
        ("xlm-roberta", ("method=input_fusion", "trainer.precision=64-true")),
        ("llama", ("trainer.precision=bf16-mixed", "mt.noise=0.5")),
        # weights of validation; members with an adapter, with a model, and with neither
        ("xlm-roberta", ENSEMBLE),
        ("xlm-roberta", SIMILAR),
        ("llama", ("task=toy_nli", *PASSES)),
        ("xlm-roberta", TWO_SOURCES),
    ],
    ids=[
        "translated-back",
        "windows",
        "two-texts",
        "joint",
        "prompt",
        "ensemble",
        "similarity",
        "passes",
        "two-sources",
    ],
)
def test_the_runs_own_test_set_again_is_its_file_byte_for_byte(
    architecture, overrides, finished_run, tmp_path
):
    folder = finished_run(*overrides, architecture=architecture)
    run, seen = flare_exp.load(folder), []
    out = tmp_path / "again.parquet"
    with Output(out, "test", run.run.cfg.data.batch_size) as output:
        write_test_predictions(run, output, seen.append)
    assert out.read_bytes() == (folder / "predictions.parquet").read_bytes()
    assert seen == [4, 4, 2]
    tests = run.test_set()
    assert list(run.test_predictions(tests, 5)) == list(run.test_predictions(tests))[5:]


def test_each_example_has_its_own_likelihoods_in_several_passes(finished_run):
    """The last batch has two rows, and four passes: two of them read a copy, which is nobody's."""
    folder = finished_run("task=toy_nli", architecture="llama")
    first = flare_exp.load(folder, "data.micro_batch_size=1").first
    dataset = first.test_set()
    shares = [torch.tensor(one).softmax(0).tolist() for one in first.likelihoods(dataset)]
    stored = read_table(folder / "predictions.parquet").to_pydict()["probabilities"]
    assert len(shares) == len(stored) == 10
    for found, expected in zip(shares, stored, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("overrides", [ENSEMBLE, SIMILAR, PASSES, TWO_SOURCES], ids=str)
def test_the_texts_of_the_test_set_as_new_texts_are_answered_alike(overrides, finished_run):
    """Given the sources that the run has read."""
    folder = finished_run(*overrides, "mt=gold")
    run = flare_exp.load(folder)
    stored = read_table(folder / "predictions.parquet").to_pydict()
    texts, *sources = (
        [example.texts[0] for example in run.task.load(lang, "test")]
        for lang in ("far", *run.sources.langs)
    )
    found = list(run.stream(texts, zip(*sources, strict=True)))
    assert [result.prediction for result in found] == stored["prediction"]
    for result, probabilities in zip(found, stored["probabilities"], strict=True):
        assert list(result.probabilities.values()) == pytest.approx(probabilities, abs=1e-6)


def test_an_answer_that_translation_leaves_as_it_is_has_its_english_too(finished_run, monkeypatch):
    run = flare_exp.load(finished_run("task=toy_qa", "method=translate_test", *SMALL_MT))
    monkeypatch.setattr(run.translator, "into_target", list)
    (found,) = run.stream([("context", "question")], [("context", "question")])
    assert found.english_prediction == found.prediction


def test_a_text_without_a_source_is_answered_by_the_members_that_read_none(finished_run):
    """By similarity, its source has the weight 0; sources of two languages are given for each."""
    run = flare_exp.load(finished_run(*SIMILAR))
    lora = flare_exp.load(finished_run("method=lora"))
    run.run.cfg.source.empty, run.run.cfg.source.ablate_in = True, "test"
    (mean,), (alone,) = run.stream(["hello"]), lora.stream(["hello"])
    assert mean.probabilities == alone.probabilities
    assert mean.source is None


def test_sources_in_two_languages_are_given_together(finished_run, toy_texts):
    run = flare_exp.load(finished_run(*TWO_SOURCES))
    assert run.sources.columns == ("source_en", "source_near")
    english, near = (run.task.read(lang, "test")[0].texts[0] for lang in ("en", "near"))
    given, made = run.stream([toy_texts[0]] * 2, [(english, near), None])
    assert given.probabilities == made.probabilities
    (row,) = predict_rows(run, [Row((toy_texts[0],), (english, "other"))])
    assert (row["source_en"], row["source_near"]) == (english, "other")
    assert row["probabilities"] != given.probabilities, "both are read"
    with pytest.raises(UserError, match=r"sources\[0\]: give en and near as text, not 'x'"):
        run.predict(["x"], ["x"])
    translated = flare_exp.load(run.folder, *SMALL_MT)
    (found,) = translated.stream(["what no world knows"])
    assert len(found.source) == 2


def test_other_test_data_are_not_taken_for_the_runs_own(flare_folder, tmp_path):
    run = flare_exp.load(flare_folder)
    run.run.cfg.mt.noise, run.run.cfg.mt.seed = 0.9, 7
    with (
        Output(tmp_path / "again.csv", "test", 4) as output,
        pytest.raises(UserError, match="are not those that the run read"),
    ):
        write_test_predictions(run, output, lambda _: None)


def test_other_passes_read_the_runs_own_test_set(flare_folder, tmp_path):
    run = flare_exp.load(flare_folder, "predict.sources=[given,none]")
    with Output(tmp_path / "again.parquet", "test", 4) as output:
        write_test_predictions(run, output, lambda _: None)
    stored = read_table(flare_folder / "predictions.parquet").to_pydict()
    made = read_table(tmp_path / "again.parquet").to_pydict()
    assert made["source"] == stored["source"]
    assert made["probabilities"] != stored["probabilities"]


def test_a_stream_reads_no_more_than_a_chunk_ahead(loaded_run, toy_texts, monkeypatch):
    monkeypatch.setattr(predicting, "CHUNK", 8)
    taken = itertools.count()
    endless = (toy_texts[next(taken) % len(toy_texts)] for _ in itertools.count())
    found = loaded_run.stream(endless)
    first = [next(found) for _ in range(9)]
    assert next(taken) == 16
    whole = list(loaded_run.stream(toy_texts[:9]))
    assert first[:8] == whole[:8], "the ninth is in another batch, which rounds in another way"
    assert [result.prediction for result in whole] == loaded_run.predict(tuple(toy_texts[:9]))


def test_sources_that_are_not_given_are_translated(loaded_run, toy_texts):
    english = loaded_run.task.read("en", "test")[1].texts
    mixed = list(loaded_run.stream(toy_texts[:2], ["another text", None]))
    assert [result.source for result in mixed] == [("another text",), english]
    given = list(loaded_run.stream(toy_texts[:2], ["another text", english[0]]))
    assert given == mixed
    other = list(loaded_run.stream(toy_texts[:2]))
    assert other[0].probabilities != mixed[0].probabilities, "the source is read"
    assert mixed[0].probability == max(mixed[0].probabilities.values())
    assert loaded_run.predict(toy_texts[0]) == loaded_run.predict(toy_texts[:1])


@pytest.mark.parametrize(
    ("texts", "sources", "problem"),
    [
        (["x"], None, "mt=toy knows the generated texts alone, and 'x' is none of toy_sentiment"),
        (["x"], ["y", "z"], "2 for 1 texts"),
        (iter(["x"]), iter(["y", "z"]), "there are more than texts"),
        (iter(["x", "y"]), iter(["y"]), "there are only 1"),
        ([("x", "y")], ["z"], r"texts\[0\]: give text as text"),
        (["x"], [5], r"sources\[0\]: give text as text, not 5"),
    ],
)
def test_texts_that_cannot_be_predicted_are_named(loaded_run, texts, sources, problem):
    with pytest.raises(UserError, match=problem):
        loaded_run.predict(texts, sources)


def test_another_translator_than_the_runs(finished_run, flare_folder, toy_texts):
    """A model of the same generated world, which translates any text."""
    run = flare_exp.load(flare_folder, *SMALL_MT, "data.batch_size=2")
    found = list(run.stream(["what no world knows", toy_texts[0]]))
    assert all(isinstance(result.source[0], str) for result in found)
    engine = run.run.mt.engine
    run.predict("what no world knows")
    assert run.run.mt.engine is engine, "it is loaded once"
    gold = finished_run("mt=gold", "method=translate_test")
    assert flare_exp.load(gold).predict(["x"], ["y"])[0] in run.task.labels
    with pytest.raises(UserError, match="mt=gold: the run's translations were looked up"):
        flare_exp.load(gold).predict(["x"])
    with pytest.raises(UnknownText):
        flare_exp.load(gold, "mt=toy").predict(["x"])


def test_a_method_that_reads_no_source_takes_none(flare_folder):
    run = flare_exp.load(flare_folder)
    run.run.cfg.source.empty = True
    with pytest.raises(UserError, match="flare reads no source: leave them out"):
        run.predict(["x"], ["y"])
    run.run.cfg.source.empty, run.run.cfg.source.systems = False, ["gold"]
    with pytest.raises(
        UserError, match=r"source\.systems=\[gold\]: new texts are translated by mt"
    ):
        run.check_new_texts()
    run.run.cfg.source.systems, run.run.cfg.source.shuffle = [], True
    with pytest.raises(UserError, match=r"source\.shuffle=true: the run paired each text"):
        run.predict(["x"], ["y"])
    run.run.cfg.method.name, run.run.cfg.method.of = "distil", ["flare"]
    run.check_new_texts()  # the student reads no source, whatever its teachers read


def test_options_that_the_model_depends_on_cannot_be_changed(loaded_run):
    cfg = loaded_run.run.cfg
    with pytest.raises(UserError) as failure:
        overridden(cfg, ["seed=5", "mt=nllb", "data.batch_size=0", "mt.path=x"])
    said = str(failure.value)
    assert said.startswith("seed=5: the run has this option already; choose one of mt, mt.*,")
    assert "mt=nllb: choose one of" in said
    made = overridden(cfg, ["cache_dir=/elsewhere", "offline=true", "mt.noise=0.5"])
    assert (made.cache_dir, made.offline, made.mt.noise) == ("/elsewhere", True, 0.5)
    assert (made.mt.name, made.seed) == (cfg.mt.name, cfg.seed)
    assert cfg.offline is False


SPLITS = ("task.train_split='train[:2]'", "task.validation_split='train[2:]'")


def test_a_language_is_chosen_where_the_data_have_other_splits(tmp_path):
    """Those that the run has read; of an unseen language, test data are enough."""
    rows = "".join(f"{i},text {i},{'ab'[i % 2]}\n" for i in range(4))
    for name in ("en", "b", "d"):
        (tmp_path / f"{name}_train.csv").write_text(f"id,text,label\n{rows}")
    rows = rows.replace("text", "other text").replace("\n", "\n1", 3).replace("0,", "9,", 1)
    for name in ("en", "b", "c", "d"):
        (tmp_path / f"{name}_test.csv").write_text(f"id,text,label\n{rows}")
    files = "\n".join(
        f"  {lang}: {{train: {lang}_train.csv, test: {lang}_test.csv}}" for lang in ("en", "b", "d")
    )
    spec = tmp_path / "data.yaml"
    spec.write_text(
        f"files:\n{files}\n  c: {{test: c_test.csv}}\nid: id\ntext: text\nlabel: label\n"
        "labels: [a, b]\nparallel: true\n"
    )
    words = ["task=custom", f"task.spec={spec}", "task.lang=[b,d]", "task.unseen=[c]", "mt=gold"]
    (job,), problems = validation.validate([*words, *SPLITS], multirun=False)
    assert not problems
    cfg = OmegaConf.to_object(job)
    for lang in ("d", "c"):
        made = overridden(cfg, [f"task.lang={lang}"]).task
        assert (made.lang, made.unseen, made.train_split) == (lang, [], "train[:2]")
    with pytest.raises(UserError, match=r"task\.lang is given twice"):
        overridden(cfg, ["task.lang=c", "task.lang=d"])
    moved = tmp_path / "moved.yaml"
    moved.write_text(spec.read_text())
    assert overridden(cfg, ["task.lang=b", f"task.spec={moved}"]).task.spec == str(moved)
    with pytest.raises(UserError, match=r"task\.lang=x: choose one of b, d, c"):
        overridden(cfg, ["task.lang=x"])


def test_the_test_set_of_one_of_several_languages_is_its_part_of_the_file(finished_run, tmp_path):
    folder = finished_run("task.lang=near", "task.unseen=[far]")
    run = flare_exp.load(folder, "task.lang=far")
    with Output(tmp_path / "again.parquet", "test", 4) as output:
        write_test_predictions(run, output, lambda _: None)
    stored = read_table(folder / "predictions.parquet").to_pylist()
    expected = [row for row in stored if "/far/" in row["id"]]
    assert read_table(tmp_path / "again.parquet").to_pylist() == expected
    assert len(expected) == 10 < len(stored)


def test_without_a_translator_a_text_without_a_source_fails_alone(finished_run):
    run = flare_exp.load(finished_run("mt=gold"))
    with pytest.raises(UnknownText, match="mt=gold: the run's translations were looked up"):
        run.predict(["a text"])
    assert run.predict(["a text"], ["a source"])
