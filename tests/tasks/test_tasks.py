"""XNLI, TyDiQA and translations from files: what is read, what is refused, and where answers go in
translation.
"""

import json
import logging
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import files_of, write_rows

from flare_exp.artifacts import ArtifactStore, digest_of
from flare_exp.config import schema, validation
from flare_exp.data.classification import ClassificationPreprocessor
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.question_answering import ExtractiveQAPreprocessor
from flare_exp.errors import UserError
from flare_exp.experiment.notes import translation_note
from flare_exp.experiment.stages.translation import quality, translate
from flare_exp.tasks import TASKS, XNLI, Answer, Benchmark, Example, NusaX, Task, TyDiQA, base
from flare_exp.tasks.tydiqa import PREFIXES, locate
from flare_exp.translation.lookup import FileTranslator, ParallelTranslator
from flare_exp.translation.machine import MachineTranslator
from flare_exp.translation.noise import ERRORS, corrupt_examples, corrupted, follow_words


def question(i, lang="english", context="The Nile is long. Nile.", text="Nile", start=4):
    return {
        "id": f"{lang}-{i}",
        "context": context,
        "question": f"q{i}?",
        "answers": {"text": [text], "answer_start": [start]},
    }


@pytest.fixture(scope="session")
def characters():
    """A tokenizer of single characters that knows every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(["[PAD]", "[UNK]", *pre_tokenizers.ByteLevel.alphabet()])}
    made = Tokenizer(models.BPE(letters, [], unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def hub(monkeypatch):
    """(rows) -> the calls to the hub, which answers with these rows."""
    import datasets

    def serve(rows):
        calls = []

        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(rows, Exception):
                raise rows
            return datasets.Dataset.from_list(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_is_whole(task, tmp_path):
    """What a new task needs beside its class (docs/adding_a_task.md)."""
    assert task.prompt.format(**dict.fromkeys(task.fields, "x")), (
        "its prompt is a template over its fields"
    )
    assert task.metric in (("accuracy", "macro_f1") if task.labels else ("exact_match", "f1"))
    assert bool(task.labels) != (task.fields == ("context", "question"))
    assert task.english not in task.languages
    given = [f"task={task.name}", *files_of(task.name, tmp_path)]
    (job,), problems = validation.validate(given, multirun=False)
    assert not problems
    assert job.task.lang in task.languages
    if issubclass(task, Benchmark):
        assert task.sizes, "plan asks for them where the data are not"
        assert job.mt.name != "gold", "an upper bound is never a default"


# --- XNLI ----------------------------------------------------------------------------------------


def nli(i, label=0):
    return {"premise": f"p{i}", "hypothesis": f"h{i}", "label": label}


def test_xnli_pairs_rows_by_number(tmp_path):
    write_rows(tmp_path / "en/test.parquet", [nli(i, i % 3) for i in range(5)])
    write_rows(tmp_path / "sw/test.parquet", [nli(i + 10, i % 3) for i in range(5)])
    task = XNLI(data_dir=str(tmp_path), splits={"test": "test[1:4]"})
    swahili = task.load("sw", "test")
    assert [(e.id, e.key, e.label) for e in swahili] == [
        (f"xnli/sw/test/{i}", str(i), i % 3) for i in (1, 2, 3)
    ]
    assert [e.texts for e in ParallelTranslator(task).translate(swahili, "en")] == [
        (f"p{i}", f"h{i}") for i in (1, 2, 3)
    ]
    assert task.gold(swahili[0]) == ("neutral",)
    prompt = task.prompt.format(**dict(zip(task.fields, swahili[0].texts, strict=True)))
    assert prompt == "Premise: p11\nHypothesis: h11\nLabel:"


def test_xnli_refuses_unlabeled_rows(tmp_path):
    write_rows(tmp_path / "sw/test.parquet", [nli(0), nli(1, -1)])
    with pytest.raises(
        UserError,
        match=r"sw/test\.parquet, row 1 \(from 0\), column label: -1 is none of 0\.\.2 \(entail",
    ):
        XNLI(data_dir=str(tmp_path)).load("sw", "test")


def test_hub_is_asked_for_one_language_at_a_pinned_commit(hub):
    for task, row in ((XNLI(), nli(0)), (NusaX(), {"id": 1, "text": "t", "label": 0, "lang": "x"})):
        calls = hub([row])
        task.load(task.languages[0], "validation")
        assert calls == [
            ((task.hub_id, task.languages[0]), {"split": "validation", "revision": task.revision})
        ]
        assert len(task.revision) == 40


@pytest.mark.parametrize(
    "error",
    [OSError("no\nroute"), ValueError("BuilderConfig 'xx' not found"), ConnectionError("offline")],
)
def test_hub_errors_say_what_to_do(hub, error):
    hub(error)
    with pytest.raises(
        UserError, match=r"facebook/xnli \(sw, test\) could not be loaded: .*\n.*task\.data_dir"
    ):
        XNLI().load("sw", "test")
    hub([{"text": "another data set"}])
    with pytest.raises(UserError, match="could not be loaded"):
        XNLI().load("sw", "test")


# --- TyDiQA --------------------------------------------------------------------------------------


def test_tydiqa_takes_a_language_from_the_hub_before_it_slices(hub):
    rows = [question(i, lang) for i in range(4) for lang in PREFIXES.values()]
    calls = hub(rows)
    task = TyDiQA(splits={"train": "train[1:3]", "validation": None, "test": "validation"}, limit=3)
    assert [e.key for e in task.load("sw", "train")] == ["swahili-1", "swahili-2"]
    assert calls == [
        ((task.hub_id, "secondary_task"), {"split": "train", "revision": task.revision})
    ]
    assert {
        lang: len(task.load(lang, "test")) for lang in (task.english, *task.languages)
    } == dict.fromkeys(PREFIXES, 3)
    assert [e.id for e in task.load("ko", "test")] == [
        f"tydiqa/ko/validation/{i}" for i in range(3)
    ]


def test_tydiqa_folder_carries_the_language(tmp_path):
    write_rows(tmp_path / "sw/train.parquet", [question("x", "any"), question("y", "thing")])
    examples = TyDiQA(data_dir=str(tmp_path)).load("sw", "train")
    assert [e.key for e in examples] == ["any-x", "thing-y"]
    assert examples[0].texts == ("The Nile is long. Nile.", "qx?")
    assert examples[0].answers == (Answer("Nile", 4),)
    assert examples[0].label is None
    write_rows(tmp_path / "sw/train.parquet", [question("x"), question("x")])
    with pytest.raises(
        UserError, match=r"train\.parquet: rows 0 and 1 \(from 0\) have the id english-x"
    ):
        TyDiQA(data_dir=str(tmp_path)).load("sw", "train")


@pytest.mark.parametrize(
    ("context", "text", "start", "place"),
    [
        ("The Nile is long. Nile.", "Nile", 4, 4),
        ("The Nile is long. Nile.", "Nile", 18, 18),
        ("Река Нил длинна", "Нил", len("Река ".encode()), 5),  # bytes
        (
            "éééé Nil, Nil",
            "Nil",
            len("éééé ".encode()),
            5,
        ),  # bytes, though another one is one character off
        ("The Nile is long. Nile.", "Nile", 16, 18),  # off by some: the nearest
        ("The Nile is long. Nile.", "Nile", 999, 18),
        ("The Nile is long. Nile.", "Nile", -1, 4),
        ("The Nile is long.", "Congo", 4, -1),
    ],
)
def test_an_answer_is_put_back_where_its_text_is(context, text, start, place):
    assert locate(context, text, start) == place


def test_a_lost_answer_is_kept_and_counted_once(tmp_path, caplog):
    write_rows(tmp_path / "sw/train.parquet", [question(0), question(1, text="Congo")])
    base.warn_once.cache_clear()
    task = TyDiQA(data_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        task.load("sw", "train")
        examples = task.load("sw", "train")
    assert [e.answers for e in examples] == [(Answer("Nile", 4),), (Answer("Congo", -1),)]
    assert task.gold(examples[1]) == ("Congo",), "still scored"
    assert [r.message.split(":")[0] for r in caplog.records] == ["tydiqa/sw/train"]
    assert "1 of 2 contexts do not hold their answer, e.g. that of english-1" in caplog.text


def test_english_has_a_test_split_of_its_own(tmp_path):
    for lang, split in (("en", "train"), ("en", "validation"), ("sw", "train")):
        write_rows(
            tmp_path / lang / f"{split}.parquet", [question(i, f"{lang}-{split}") for i in range(4)]
        )
    splits = {
        "train": "train[2:]",
        "validation": "train[:2]",
        "test": "train",
        "english_test": "validation",
    }
    task = TyDiQA(data_dir=str(tmp_path), splits=splits)
    assert task.load("en", "test")[0].id == "tydiqa/en/validation/0"
    assert task.load("sw", "test")[0].id == "tydiqa/sw/train/0"
    same = TyDiQA(data_dir=str(tmp_path), splits={**splits, "english_test": None})
    assert same.load("en", "test")[0].id == "tydiqa/en/train/0"
    with pytest.raises(
        UserError, match=r"task\.english_test_split=validation\[9:\] of en holds no example"
    ):
        TyDiQA(data_dir=str(tmp_path), splits={**splits, "english_test": "validation[9:]"}).load(
            "en", "test"
        )


def test_no_context_is_trained_on_and_held_out(tmp_path, caplog):
    """Where validation or the English test is a part of the same split; what is left out is in the
    provenance.
    """
    from flare_exp.experiment import data_checks

    rows = [question(i, f"en{i}") for i in range(8)]
    contexts = [0, 1, 2, 3, 1, 4, 0, 5]
    write_rows(
        tmp_path / "en/train.parquet",
        [
            {**row, "context": f"story {c}", "answers": {"text": ["story"], "answer_start": [0]}}
            for row, c in zip(rows, contexts, strict=True)
        ],
    )
    for lang in ("en", "sw"):
        write_rows(tmp_path / lang / "validation.parquet", rows)
    splits = {"train": "train[2:]", "validation": "train[:2]", "test": "validation"}
    task = TyDiQA(data_dir=str(tmp_path), splits=splits)
    assert [e.id.rpartition("/")[2] for e in task.load("en", "train")] == ["2", "3", "5", "7"]
    assert len(task.load("en", "validation")) == 2
    facts = data_checks.check_data(task, "sw")
    assert (facts["en/train"]["examples"], facts["en/train"]["left_out"]) == (4, 2)
    assert "left_out" not in facts["en/validation"]
    assert "2 training examples ask about a context of validation: left out" in caplog.text
    parts = {"train": "train[:6]", "validation": None, "english_test": "train[6:]"}
    tested = TyDiQA(data_dir=str(tmp_path), splits={**splits, **parts})
    assert [e.id.rpartition("/")[2] for e in tested.load("en", "train")] == list("12345")
    assert "1 training examples ask about a context of the English test: left out" in caplog.text
    parts = {**splits, "train": "train[4:5]", "english_test": "train[6:]"}
    none = TyDiQA(data_dir=str(tmp_path), splits=parts)
    with pytest.raises(
        UserError,
        match=r"task.train_split=train\[4:5\] of en: every example asks "
        "about a context of validation or the English test, so none is left to train on",
    ):
        none.load("en", "train")
    alone = TyDiQA(data_dir=str(tmp_path), splits={**splits, "train": "train", "validation": None})
    assert alone.training_roles == ("train",)
    assert len(alone.load("en", "train")) == 8
    assert list(data_checks.check_data(alone, "sw")) == ["en/train", "en/test", "sw/test"]


# --- answers through corruption ------------------------------------------------------------------


class ParallelQA(Task):
    """Numbered words; the answer is three of them, elsewhere in each language."""

    name, english, languages, fields, metric, parallel = (
        "qa",
        "en",
        ("xx",),
        ("context", "question"),
        "exact_match",
        True,
    )

    def read(self, lang, split):
        made = []
        for i in range(60):
            rng = random.Random(f"{lang}{i}")
            words = [f"{lang}{rng.randrange(99)}" for _ in range(20)]
            at = rng.randrange(17)
            answer = Answer(" ".join(words[at : at + 3]), len(" ".join([*words[:at], ""])))
            made.append(
                Example(
                    f"qa/{lang}/{split}/{i}",
                    str(i),
                    (" ".join(words), f"q{i} ?"),
                    answers=(answer,),
                )
            )
        return made


def test_a_parallel_translation_takes_its_counterparts_answers():
    task = ParallelQA()
    translated = ParallelTranslator(task).translate(task.load("en", "train"), "xx")
    assert [t.answers for t in translated] == [o.answers for o in task.load("xx", "train")]
    assert [t.id for t in translated] == [e.id for e in task.load("en", "train")]


def test_answers_stay_exact_under_noise_or_are_lost():
    task = ParallelQA()
    kept = {}
    for noise in (0.0, 0.05, 0.2, 0.8):
        translated = ParallelTranslator(task).translate(task.load("en", "train"), "xx")
        translated = corrupt_examples(translated, "xx", noise, ERRORS[:3], 0, task.context)
        original = {e.key: e.answers[0].text for e in task.load("xx", "train")}
        for e in translated:
            for a in e.answers:
                assert e.texts[0][a.start : a.start + len(a.text)] == a.text == original[e.key]
        kept[noise] = sum(bool(e.answers) for e in translated)
    assert kept[0.0] == 60 > kept[0.05] > kept[0.2] > kept[0.8]
    assert kept[0.05] == pytest.approx(60 * 0.95**3, abs=8)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([("a", 0), ("b", 1), ("c", 2), ("d", 3)], Answer("b c", 2)),
        ([("b", 1), ("c", 2), ("d", 3)], Answer("b c", 0)),  # something else dropped
        (
            [("long", None), ("b", 1), ("c", 2), ("d", 3)],
            Answer("b c", 5),
        ),  # something else replaced
        ([("a", 0), ("d", 3), ("b", 1), ("c", 2)], Answer("b c", 4)),  # moved as one
        ([("a", 0), ("c", 2), ("b", 1), ("d", 3)], None),  # out of order
        ([("a", 0), ("b", 1), ("d", 3), ("c", 2)], None),  # torn apart
        ([("a", 0), ("b", 1), ("d", 3)], None),  # a word dropped
        ([("a", 0), ("b", 1), ("c", None), ("d", 3)], None),  # a word replaced, be it by itself
    ],
)
def test_run_worker(words, expected):
    assert follow_words(Answer("b c", 2), "a b c d", words) == expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("in 1920s.[8]", Answer("1920s", 3), Answer("1920s", 3)),  # ends inside a word
        (
            "the (Key  set)",
            Answer("Key  set", 5),
            Answer("Key set", 5),
        ),  # starts inside one; single spaces come back
        ("one  two", Answer(" two", 4), Answer("two", 4)),  # starts with a space
        ("one two", Answer("three", -1), None),
    ],
)
def test_follow_answers_that_are_not_whole_words(text, answer, expected):
    words = [(word, i) for i, word in enumerate(text.split())]
    found = follow_words(answer, text, words)
    assert found == expected
    assert found is None or " ".join(text.split()).startswith(found.text, found.start)


def test_corruption_is_the_published_one():
    """docs/results.md rests on these draws."""

    def corrupt(words, *options):
        return " ".join(word for word, _ in corrupted(words, *options))

    words = [f"w{i}" for i in range(60)]
    made = [
        corrupt(words[:n], rate, ["x", "y", "z"], f"{seed}|far|id{n}|0")
        for seed in range(20)
        for n in (1, 2, 5, 60)
        for rate in (0.1, 0.5, 1.0)
    ]
    assert digest_of(made)[:16] == "c57590dea9989d57"
    assert (
        corrupt("one two three four five six seven eight".split(), 0.5, ["x", "y"], "s")
        == "y two three five four six y"
    )
    assert corrupted(["one", "two"], 0.0, [], "s") == [("one", 0), ("two", 1)]


# --- translations from files ---------------------------------------------------------------------


def translated(row, **changes):
    return {
        **row,
        "premise_translated": row["premise"].upper(),
        "hypothesis_translated": row["hypothesis"].upper(),
        **changes,
    }


@pytest.fixture
def xnli(tmp_path):
    rows = [nli(i, i % 3) for i in range(6)]
    write_rows(tmp_path / "sw/test.parquet", rows)
    write_rows(
        tmp_path / "en/test.parquet", [{**r, "premise": f"human {r['premise']}"} for r in rows]
    )
    write_rows(tmp_path / "mt_sw-en/test.parquet", [translated(r) for r in rows])
    return XNLI(data_dir=str(tmp_path), splits={"test": "test[2:5]"})


def test_file_gives_its_rows_by_number(xnli, tmp_path):
    examples = xnli.load("sw", "test")
    made = FileTranslator(xnli, tmp_path).translate(examples, "en")
    assert [m.texts for m in made] == [(f"P{i}", f"H{i}") for i in (2, 3, 4)]
    assert [(m.id, m.label) for m in made] == [(e.id, e.label) for e in examples]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [translated(nli(i)) for i in (0, 1, 3, 2, 4, 5)],
            r"test\.parquet, row 2: premise is not that of xnli/sw/test/2: 'p3'",
        ),
        (
            [translated(nli(i)) for i in range(4)],
            r"test\.parquet ends at row 3; it has no translation of xnli/sw/test/4",
        ),
        (
            [translated(nli(i), hypothesis_translated=None) for i in range(6)],
            r"row 2 \(from 0\), column hypothesis_translated: null instead of text",
        ),
        (
            [nli(i) for i in range(6)],
            r"lacks the column\(s\) premise_translated, hypothesis_translated",
        ),
    ],
)
def test_a_file_that_is_not_of_this_split_is_refused(xnli, tmp_path, rows, message):
    write_rows(tmp_path / "mt_sw-en/test.parquet", rows)
    maker = FileTranslator(xnli, tmp_path)
    for use in (maker.translate, maker.identity):
        with pytest.raises(UserError, match=message):
            use(xnli.load("sw", "test"), "en")


def test_a_missing_direction(xnli, tmp_path, caplog):
    examples = xnli.load("en", "test")
    with pytest.raises(
        UserError,
        match=r"there is no .*mt_en-sw.test\.parquet; give the folder .* mt\.path, "
        r"or mt\.fallback=gold",
    ):
        FileTranslator(xnli, tmp_path).identity(examples, "sw")
    base.warn_once.cache_clear()
    maker = FileTranslator(xnli, tmp_path, ParallelTranslator(xnli))
    with caplog.at_level(logging.WARNING):
        assert maker.identity(examples, "sw") == ParallelTranslator(xnli).identity(examples, "sw")
        assert maker.translate(examples, "sw") == ParallelTranslator(xnli).translate(examples, "sw")
    assert len(caplog.records) == 1
    assert maker.identity(xnli.load("sw", "test"), "en")["by"] == "file", (
        "only the missing direction falls back"
    )
    with pytest.raises(UserError) as raised:
        FileTranslator(TyDiQA(), tmp_path).identity(
            [Example("tydiqa/en/train/0", "0", ("c", "q"))], "sw"
        )
    assert "fallback" not in str(raised.value), "TyDiQA has no human translations"


@pytest.mark.parametrize(
    ("train_split", "by"), [("train", "machine (benchmark)"), ("validation", "human")]
)
def test_translations_that_a_benchmark_made_by_machine_are_not_called_human(
    tmp_path, caplog, train_split, by
):
    """XNLI's training translations are the authors' machine translation, the rest is human."""
    for lang, sign in (("en", ""), ("sw", "kwa ")):
        for split in ("train", "validation", "test"):
            rows = [{**nli(i), "premise": f"{sign}{split} {i}"} for i in range(4)]
            write_rows(tmp_path / lang / f"{split}.parquet", rows)
    task = XNLI(data_dir=str(tmp_path), splits={"train": train_split})
    english = task.load("en", "train")
    gold = ParallelTranslator(task)
    facts = gold.identity(english, "sw")
    assert facts["by"] == by
    assert gold.identity(task.load("en", "test"), "sw")["by"] == "human"
    assert gold.identity(task.read("sw", "train"), "en")["by"] == "human", (
        "the English text is the original"
    )
    made = [(replace(e, texts=("x", "y")), {}) for e in english]
    assert ("chrf++" in quality(task, english, made, "sw")) == (by == "human"), (
        "a machine is no reference"
    )
    base.warn_once.cache_clear()
    FileTranslator(task, tmp_path / "nowhere", gold).translate(english, "sw")
    assert f"the benchmark's own {by.split()[0]} translations stand in" in caplog.text
    note = translation_note("translation of xnli/en/train into sw", {"examples": 4, **facts})
    assert ("the benchmark's own machine translation" in (note or "")) == (by != "human")


def test_a_translator_need_not_say_who_translated():
    assert translation_note("translation", {"examples": 4}) == "translation: 4 examples"


def asked(i, texts, starts, **changes):
    row = {
        **question(i),
        "context_translated": "Mto Nile ni mrefu.",
        "question_translated": "lini?",
    }
    return {**row, "answers_translated": {"text": texts, "answer_start": starts}, **changes}


def test_question_answering_files_carry_the_answers(tmp_path):
    write_rows(tmp_path / "en/train.parquet", [question(i) for i in range(2)])
    file = write_rows(
        tmp_path / "mt_en-sw/train.parquet", [asked(0, ["Nile"], [4]), asked(1, [], [])]
    )
    task = TyDiQA(data_dir=str(tmp_path))
    examples = task.load("en", "train")
    made = FileTranslator(task, tmp_path).translate(examples, "sw")
    assert made[0].texts == ("Mto Nile ni mrefu.", "lini?")
    assert [m.answers for m in made] == [(Answer("Nile", 4),), ()]
    for text, start in (("Nile", 0), ("mrefu.", -6)):  # the second is there, counted from the end
        write_rows(file, [asked(0, [text], [start]), asked(1, [], [])])
        with pytest.raises(
            UserError,
            match=rf"train\.parquet, row 0: context_translated has no '{text}' at {start}",
        ):
            FileTranslator(task, tmp_path).translate(examples, "sw")
    write_rows(
        file,
        [
            {k: v for k, v in asked(i, [], []).items() if k != "answers_translated"}
            for i in range(2)
        ],
    )
    with pytest.raises(UserError, match=r"mt\.path: .* lacks the column\(s\) answers_translated"):
        FileTranslator(task, tmp_path).translate(examples, "sw")


def stage(task, folder, **mt):
    """Make what `translate` reads of a RunContext."""
    from flare_exp.experiment.checkpoints import make_translator

    cfg = SimpleNamespace(mt=schema.MtConfig(**mt))
    parts = {"task": task, "cfg": cfg, "store": ArtifactStore(folder), "translations": {}}
    return SimpleNamespace(**parts, system=None, translator=make_translator(cfg, task, None))


def test_the_stage_keeps_answers_and_follows_the_file_not_its_place(tmp_path):
    for place, answers in (("a", [["Nile"], [4]]), ("b", [["Nile"], [4]]), ("c", [[], []])):
        write_rows(tmp_path / place / "mt_en-sw/train.parquet", [asked(0, *answers)])
    write_rows(tmp_path / "en/train.parquet", [question(0)])
    task = TyDiQA(data_dir=str(tmp_path))
    examples = task.load("en", "train")
    digests = []
    for place in "abc":
        run = stage(task, tmp_path / "cache", name="file", path=str(tmp_path / place))
        made = translate(run, examples, "sw")
        assert made == FileTranslator(task, tmp_path / place).translate(examples, "sw")
        artifact = run.translations["translation of tydiqa/en/train into sw"]
        assert artifact.info["by"] == "file"
        digests.append(artifact.digest)
    assert digests[0] == digests[1] != digests[2]
    table = pq.read_table(artifact.path / "translations.parquet")
    assert table.column_names == ["id", "original", "translation", "answers"]
    assert json.loads((artifact.path / "manifest.json").read_text())


# --- the check before any model ------------------------------------------------------------------


def job(*overrides):
    from omegaconf import OmegaConf

    jobs, problems = validation.validate(list(overrides), False)
    assert problems == []
    return OmegaConf.to_object(jobs[0])


@pytest.fixture
def qa_folder(tmp_path):
    for lang, split in (("en", "train"), ("en", "validation"), ("sw", "validation")):
        write_rows(
            tmp_path / lang / f"{split}.parquet",
            [question(i, f"{lang}{split}") for i in range(402)],
        )
    return tmp_path


def test_translations_are_missed_before_any_model(qa_folder):
    from flare_exp.experiment import data_checks, pipeline
    from flare_exp.experiment.checkpoints import make_translator

    needs = {
        "zero_shot": None,
        "lora": "mt_en-sw",
        "translate_test": "mt_sw-en",
        "flare": "mt_en-sw",
    }
    for method, folder in needs.items():
        cfg = job(
            "task=tydiqa",
            f"task.data_dir={qa_folder}",
            "method=flare",
            "mt=file",
            f"mt.path={qa_folder}",
        )
        task = pipeline.load_task(cfg)

        cfg.method.name = method  # translate_test is refused, for another reason

        if method == "lora":
            cfg.method.name = "distil"  # its teacher reads sources, and the student is tested
            assert "test" not in data_checks.needed_translations(cfg, task)
            cfg.method.name = method

        def check(cfg=cfg, task=task):
            maker = make_translator(cfg, task, None)
            roles = data_checks.needed_translations(cfg, task)
            data_checks.check_translations(maker, task, "sw", roles)

        assert data_checks.check_data(task, "sw")["en/train"]["examples"] == 402
        if folder is None:
            check()
            continue
        with pytest.raises(UserError, match=f"there is no .*{folder}"):
            check()
        cfg.mt.path = None
        with pytest.raises(UserError, match=r"mt=file: set mt\.path=<folder>"):
            check()


def test_a_further_system_is_asked_for_translations_of_tests_alone(qa_folder):
    from flare_exp.config.composition import systems_of
    from flare_exp.experiment import data_checks, pipeline
    from flare_exp.experiment.checkpoints import make_translator

    cfg = job("task=tydiqa", f"task.data_dir={qa_folder}", "mt=nllb_600m", "source.systems=[file]")
    task, (own,) = pipeline.load_task(cfg), systems_of(cfg)
    anything = SimpleNamespace(identity=lambda *_: {}, try_out=lambda *_: None)
    with pytest.raises(UserError, match=r"source\.systems=\[file\]: .*there is no .*mt_sw-en"):
        data_checks.check_every_translation(cfg, task, anything, make_translator(own, task, None))


def test_languages_that_are_only_read_are_checked_too(monkeypatch):
    """FLARE MT's encoder reads an unseen language; sources need not be English."""
    from flare_exp.experiment import data_checks, pipeline

    asked = []

    def identity(examples, lang):
        asked.append((examples[0].lang, lang))
        return {}

    def check(*codes):
        if "nea_Latn" in codes:
            raise UserError("no nea_Latn")

    maker = MachineTranslator(
        None, SimpleNamespace(code=lambda lang: f"{lang[:3]}_Latn", check=check), None
    )
    monkeypatch.setattr(maker, "identity", identity)
    monkeypatch.setattr(maker, "try_out", lambda *_: None)
    cfg = job("task.lang=far", "task.unseen=[near]", "method=flare_mt", "mt=toy_nllb")
    with pytest.raises(UserError, match="no nea_Latn"):
        data_checks.check_every_translation(cfg, pipeline.load_task(cfg), maker)
    assert {*asked} == {("en", "far")}, "no test text is translated"
    asked.clear()
    cfg = job("task.lang=far", "source.langs=[near]", "method=flare", "mt=toy_nllb")
    data_checks.check_every_translation(cfg, pipeline.load_task(cfg), maker)
    assert {*asked} == {("en", "far"), ("en", "near"), ("far", "near")}
    asked.clear()
    cfg.method.name, cfg.method.of = "ensemble", ["flare", "translate_test"]
    data_checks.check_every_translation(cfg, pipeline.load_task(cfg), maker)
    assert ("far", "en") in asked


# --- damaged and doubtful data -------------------------------------------------------------------


def nusax(i, label=0, text="t"):
    return {"id": i, "text": f"{text}{i}", "label": label}


def parallel_folder(folder, shift=0):
    """NusaX in English and Acehnese; the labels of Acehnese are those of English, shifted."""
    for number, (split, size) in enumerate({"train": 9, "validation": 9, "test": 9}.items()):
        for lang, more in (("eng", 0), ("ace", shift)):
            rows = [nusax(10 * number + i, (i + more) % 3, lang) for i in range(size)]
            write_rows(folder / lang / f"{split}.parquet", rows[::-1] if more else rows)
    return NusaX(data_dir=str(folder))


def test_labels_of_translations_that_disagree_are_refused(tmp_path):
    from flare_exp.experiment import data_checks

    task = parallel_folder(tmp_path, shift=1)
    said = (
        r"nusax: 9 of 9 rows have another label in ace than in eng.*: "
        r"test 28 \(negative in ace, positive in eng\), .*test 24 "
    )
    with pytest.raises(UserError, match=said):
        data_checks.check_data(task, "ace")
    for use in (ParallelTranslator(task).translate, ParallelTranslator(task).identity):
        with pytest.raises(UserError, match="9 of 9 rows have another label in eng than in ace"):
            use(task.load("eng", "train"), "ace")
    same = parallel_folder(tmp_path)
    data_checks.check_data(same, "ace")
    ParallelTranslator(same).translate(same.load("eng", "train"), "ace")


def test_doubtful_data_are_read_and_said_with_counts(tmp_path):
    from flare_exp.experiment import data_checks
    from flare_exp.experiment.notes import data_notes

    for number, (split, size) in enumerate({"train": 6, "validation": 1, "test": 4}.items()):
        for lang in ("eng", "ace"):
            rows = [nusax(10 * number + i, 0 if split == "test" else i % 3) for i in range(size)]
            rows = [{**row, "text": f"{lang} {row['text']}"} for row in rows]
            if lang == "ace" or split == "train":
                rows[0]["text"] = " \n"
            write_rows(tmp_path / lang / f"{split}.parquet", rows)
    assert data_notes(data_checks.check_data(NusaX(data_dir=str(tmp_path)), "ace")) == [
        "warning: examples with an empty text: 1 of 6 in eng/train; 1 of 4 in ace/test",
        "warning: a single example, which says nothing: eng/validation",
        "warning: classes without an example: neutral, positive in eng/validation (0 of 1); "
        "neutral, positive in eng/test (0 of 4); neutral, positive in ace/test (0 of 4)",
    ]
    for lang, split in (("en", "train"), ("en", "validation"), ("sw", "validation")):
        rows = [question(i, f"{lang}{split}", context=f"{lang} {split} {i} Nile") for i in range(3)]
        write_rows(
            tmp_path / lang / f"{split}.parquet",
            [*rows[:2], {**rows[2], "answers": {"text": [""], "answer_start": [0]}}],
        )
    splits = {"test": "validation", "validation": "train[:1]", "train": "train[1:]"}
    task = TyDiQA(data_dir=str(tmp_path), splits=splits)
    (said,) = (note for note in data_notes(data_checks.check_data(task, "sw")) if "answer" in note)
    assert said == (
        "warning: examples without an answer: 1 of 2 in en/train; 1 of 3 in en/test; 1 of 3 "
        "in sw/test"
    )
    assert data_notes(data_checks.check_data(TASKS["toy_sentiment"](limit=64), "far")) == []


def test_texts_that_were_trained_on_or_are_english_are_counted(tmp_path):
    from flare_exp.experiment import data_checks
    from flare_exp.experiment.notes import data_notes

    for lang in ("eng", "ace"):
        for number, split in enumerate(("train", "validation", "test")):
            rows = [
                {**nusax(100 * number + i, i % 3), "text": f"{lang} {split} {i}"} for i in range(30)
            ]
            write_rows(tmp_path / lang / f"{split}.parquet", rows)

    def change(lang, split, texts):
        rows = pq.read_table(tmp_path / lang / f"{split}.parquet").to_pylist()
        rows = [{**row, "text": texts.get(i, row["text"])} for i, row in enumerate(rows)]
        write_rows(tmp_path / lang / f"{split}.parquet", rows)

    def said():
        return data_notes(data_checks.check_data(NusaX(data_dir=str(tmp_path)), "ace"))

    assert said() == []
    change("eng", "train", {0: ""})
    change("eng", "test", {0: "eng train 4", 1: "eng train 5"})
    change("ace", "test", {0: "eng test 7"})  # one of 30 may be a name, or a word of both languages
    empty = "warning: examples with an empty text: 1 of 30 in eng/train"
    trained = (
        "warning: texts of the training data, so that the score is too high: 2 of 30 in eng/test"
    )
    assert said() == [empty, trained]
    change("ace", "test", {i: f"eng test {i}" for i in range(2, 12)})
    english = (
        "warning: texts that are the English ones (are the files of the right language?): 11 of "
        "30 in ace/test"
    )
    assert said() == [empty, trained, english]


def test_a_split_without_rows_is_named_by_its_file(tmp_path):
    schema = pa.schema({"id": pa.int64(), "text": pa.string(), "label": pa.int64()})
    (tmp_path / "eng").mkdir()
    pq.write_table(schema.empty_table(), tmp_path / "eng" / "train.parquet")
    with pytest.raises(UserError, match=r"eng/train.parquet has no rows$"):
        NusaX(data_dir=str(tmp_path)).load("eng", "train")
    write_rows(tmp_path / "eng" / "train.parquet", [nusax(i, 0) for i in range(4)])
    with pytest.raises(
        UserError,
        match=r"task\.train_split=train\[9:\] of eng holds no example: the split has 4 rows",
    ):
        NusaX(data_dir=str(tmp_path), splits={"train": "train[9:]"}).load("eng", "train")


BAD_CELLS = [
    ("text", pa.array(["a", None, "c"]), "row 1 (from 0), column text: null instead of text"),
    ("text", pa.array([b"a", b"b", b"c"]), "row 0 (from 0), column text: b'a' instead of text"),
    (
        "text",
        pa.array([b"a", b"\xff", b"c"]).view(pa.string()),
        "row 1 (from 0), column text: text that is not valid UTF-8",
    ),
    ("text", pa.array([1, 2, 3]), "row 0 (from 0), column text: 1 instead of text"),
    ("label", pa.array([0.0, 1.0, 2.0]), "row 0 (from 0), column label: 0.0 instead of an integer"),
    ("label", pa.array([0, None, 2]), "row 1 (from 0), column label: null instead of an integer"),
    ("label", pa.array(["0", "1", "2"]), "row 0 (from 0), column label: '0' instead of an integer"),
    (
        "label",
        pa.array([True, False, True]),
        "row 0 (from 0), column label: True instead of an integer",
    ),
    (
        "label",
        pa.array([0, 1, 3]),
        "row 2 (from 0), column label: 3 is none of 0..2 (negative, neutral, positive)",
    ),
    (
        "id",
        pa.array([1.5, 2.5, 3.5]),
        "row 0 (from 0), column id: 1.5 instead of text or an integer",
    ),
    ("id", pa.array([1, None, 3]), "row 1 (from 0), column id: null instead of text or an integer"),
]


@pytest.mark.parametrize(
    ("column", "cells", "message"), BAD_CELLS, ids=[message for *_, message in BAD_CELLS]
)
def test_a_bad_cell_is_named_with_file_row_and_column(tmp_path, column, cells, message):
    columns = {
        "id": pa.array([1, 2, 3]),
        "text": pa.array(["a", "b", "c"]),
        "label": pa.array([0, 1, 2]),
    }
    (tmp_path / "ace").mkdir()
    pq.write_table(pa.table(columns | {column: cells}), tmp_path / "ace/test.parquet")
    with pytest.raises(UserError) as raised:
        NusaX(data_dir=str(tmp_path)).load("ace", "test")
    assert str(raised.value).startswith(f"task.data_dir: {tmp_path}/ace/test.parquet, {message}")


@pytest.mark.parametrize(
    "answers",
    [
        None,
        {"text": ["Nile"], "answer_start": [4, 5]},
        {"text": ["Nile"], "answer_start": [None]},
        {"text": [None], "answer_start": [4]},
        {"text": ["Nile"], "answer_start": [4.0]},
        {"text": "Nile", "answer_start": 4},
        {"text": ["Nile"], "answer_end": [4]},
        [{"text": "Nile", "answer_start": 4}],
        "Nile",
    ],
)
def test_answers_of_another_form_are_refused(tmp_path, answers):
    write_rows(tmp_path / "sw/train.parquet", [{**question(0), "answers": answers}])
    with pytest.raises(
        UserError,
        match=r"train\.parquet, row 0 \(from 0\), column answers: .* instead of \{text: \[text",
    ):
        TyDiQA(data_dir=str(tmp_path)).load("sw", "train")


ANSWER_CELLS = st.fixed_dictionaries(
    {
        "text": st.one_of(
            st.none(),
            st.text(max_size=5),
            st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=3),
        )
    },
    optional={
        "answer_start": st.one_of(
            st.none(), st.floats(), st.lists(st.one_of(st.none(), st.integers(-9, 99)), max_size=3)
        )
    },
)
CELLS = st.one_of(
    st.none(),
    st.text(max_size=8),
    st.binary(max_size=6),
    st.integers(-3, 2**40),
    st.floats(),
    st.booleans(),
    ANSWER_CELLS,
)


@st.composite
def damage(draw):
    """What is done to one file: cells, a whole column, its rows, its columns or its bytes."""
    kind = draw(st.sampled_from(["cells", "column", "utf8", "rows", "names", "bytes", "cut"]))
    values = draw(st.lists(CELLS, min_size=1, max_size=4)) if kind == "cells" else draw(CELLS)
    return kind, draw(st.integers(0, 10)), draw(st.integers(0, 9)), values


def damaged(table: pa.Table, kind: str, column: int, row: int, values) -> pa.Table:
    name = table.column_names[column % table.num_columns]
    at = table.column_names.index(name)
    cells = table.column(name).to_pylist()
    row %= max(1, len(cells))
    if kind == "cells":
        cells[row : row + len(values)] = values[: len(cells) - row]
    if kind == "column":
        cells = [values] * len(cells)
    if kind in ("cells", "column"):
        try:
            made = pa.array(cells)
        except (
            pa.ArrowException,
            TypeError,
            OverflowError,
            ValueError,
        ):  # parquet has no columns of mixed types
            made = pa.array(
                [None if v is None else str(v).encode("utf-8", "replace").decode() for v in cells]
            )
        return table.set_column(at, name, made)
    if kind == "utf8":
        made = pa.array([b"\xff\xfe" if i == row else b"x" for i in range(len(cells))]).view(
            pa.string()
        )
        return table.set_column(at, name, made)
    if kind == "rows":
        return (
            table.slice(row, row % 3) if row % 2 else pa.concat_tables([table, table.slice(0, row)])
        )
    return table.rename_columns(
        [table.column_names[0] if i == at else n for i, n in enumerate(table.column_names)]
    )


def benchmark_tables(name):
    """(path, rows) of a small benchmark with translations in files, and its target language."""
    task = TASKS[name]
    lang = task.languages[-1]
    for number, split in enumerate(base.ROLES):
        for code, other in ((task.english, lang), (lang, task.english)):
            if name == "tydiqa":
                rows = [
                    question(i, f"{code}{number}", f"{code} The Nile is long {i}.", "Nile", 4)
                    for i in range(5)
                ]
                rows = [
                    {
                        **r,
                        "answers": {"text": ["Nile"], "answer_start": [r["context"].index("Nile")]},
                    }
                    for r in rows
                ]
            elif name == "xnli":
                rows = [{**nli(i, i % 3), "premise": f"{code} p {i}"} for i in range(5)]
            else:
                rows = [nusax(10 * number + i, i % 3, f"{code} t ") for i in range(5)]
            yield f"{code}/{split}.parquet", rows
            if (code == lang) == (split == "test"):
                made = [
                    {f: r[f] for f in task.fields} | {f"{f}_translated": r[f] for f in task.fields}
                    for r in rows
                ]
                spans = [
                    {"answers_translated": r["answers"]} if "answers" in r else {} for r in rows
                ]
                yield (
                    f"mt_{code}-{other}/{split}.parquet",
                    [m | s for m, s in zip(made, spans, strict=True)],
                )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["benchmark", "translations"])
@pytest.mark.parametrize("name", ["nusax", "xnli", "tydiqa"])
def test_200_damaged_tables_end_in_a_message_or_in_success(name, where, tmp_path, characters):
    """Every reading, pairing and encoding of a run, without its models."""
    from flare_exp.experiment import data_checks

    tables = dict(benchmark_tables(name))
    lang = TASKS[name].languages[-1]
    ends = Counter()
    for path, rows in tables.items():
        write_rows(tmp_path / path, rows)
    whole = {path: (tmp_path / path).read_bytes() for path in tables}
    wanted = sorted(path for path in tables if path.startswith("mt_") == (where == "translations"))

    def run():
        task = TASKS[name](data_dir=str(tmp_path))
        maker = (
            FileTranslator(task, tmp_path)
            if where == "translations" or not task.parallel
            else ParallelTranslator(task)
        )
        data_checks.check_data(task, lang)
        data_checks.check_translations(maker, task, lang, [*task.training_roles, "test"])
        preprocessor = (ClassificationPreprocessor if task.labels else ExtractiveQAPreprocessor)(
            task, characters, 64
        )
        for mode in ("english", "paired"):
            data = PairedDataModule(task, lang, preprocessor, maker.translate, mode=mode)
            for role in base.ROLES:
                dataset = data.dataset(role)
                task.score(
                    [task.gold(p.target)[0] if task.gold(p.target) else "" for p in dataset.pairs],
                    [p.target for p in dataset.pairs],
                )

    run()  # undamaged

    @settings(
        max_examples=200,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(wanted), damage())
    def attempt(path, what):
        place = tmp_path / path
        if what[0] in ("bytes", "cut"):
            content, at = bytearray(whole[path]), (what[1] * 97 + what[2] * 31) % len(whole[path])
            place.write_bytes(
                content[:at]
                if what[0] == "cut"
                else content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
            )
        else:
            pq.write_table(damaged(pa.Table.from_pylist(tables[path]), *what), place)
        try:
            run()
            ends["success"] += 1
        except UserError:
            ends["refused"] += 1
        finally:
            place.write_bytes(whole[path])

    attempt()
    assert ends["refused"] > 50
    assert ends["success"] > 5


# --- real data -----------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_xnli(shared_data):
    folder = shared_data / "xnli"
    task = XNLI(
        data_dir=str(folder),
        splits={"train": "validation[:2000]", "validation": "validation[2000:]"},
    )
    assert [len(task.load("en", role)) for role in base.ROLES] == [2000, 490, 5010]
    swahili = task.load("sw", "test")
    made = FileTranslator(task, folder).translate(swahili, "en")
    human = ParallelTranslator(task).translate(swahili, "en")
    assert (
        [e.label for e in made]
        == [e.label for e in human]
        == [e.label for e in task.load("es", "test")]
    )
    assert 0 < sum(m.texts == h.texts for m, h in zip(made, human, strict=True)) < 1000, (
        "machine translation is another text"
    )
    with pytest.raises(UserError, match="mt_en-sw"):
        FileTranslator(task, folder).translate(task.load("en", "train"), "sw")
    fallen = FileTranslator(task, folder, ParallelTranslator(task)).translate(
        task.load("en", "train"), "sw"
    )
    assert fallen == ParallelTranslator(task).translate(task.load("en", "train"), "sw")


@pytest.mark.shared
def test_real_tydiqa(shared_data):
    splits = {
        "train": "train[400:]",
        "validation": "train[:400]",
        "test": "train",
        "english_test": "validation",
    }
    task = TyDiQA(data_dir=str(shared_data / "tydiqa"), splits=splits)
    trained, selected, tested = (task.load("en", role) for role in base.ROLES)
    # 61 of 2,949 rows share a context with the 400 that select, and are left out
    contexts = [
        row["context"] for row in pq.read_table(shared_data / "tydiqa/en/train.parquet").to_pylist()
    ]
    assert sum(context in set(contexts[:400]) for context in contexts[400:]) == 61
    assert [len(rows) for rows in (trained, selected, tested)] == [2949 - 61, 400, 347]
    assert not {e.texts[0] for e in trained} & {e.texts[0] for e in selected}
    swahili = task.load("sw", "test")
    assert len(swahili) == 2745
    raw = pq.read_table(shared_data / "tydiqa/sw/train.parquet").to_pylist()
    assert [e.answers[0].start for e in swahili] == [r["answers"]["answer_start"][0] for r in raw]
    assert all(e.texts[0].startswith(a.text, a.start) for e in swahili for a in e.answers)
    assert set(task.score([e.answers[0].text for e in swahili], swahili).values()) == {1.0}
    assert set(TASKS) >= {"xnli", "tydiqa", "nusax"}
