"""Translation by a model: languages, marks, shards that are kept, damage and interruption.

Without a real model.
"""

import json
import re
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from flare_exp import languages
from flare_exp.artifacts import ArtifactStore
from flare_exp.errors import UserError
from flare_exp.experiment.stages.translation import quality
from flare_exp.tasks import TASKS, Answer, Example, NusaX, ToyNLI, ToyQA, ToySentiment, TyDiQA
from flare_exp.translation import engines
from flare_exp.translation.base import FLAGS
from flare_exp.translation.lookup import ParallelTranslator
from flare_exp.translation.machine import MachineTranslator
from flare_exp.translation.noise import ERRORS, corrupt_examples, corrupted


class Reverser:
    """A 'model': words in reverse order and upper case, marks kept.

    Counts what it is asked for, stops when it is told to.
    """

    def __init__(self, stop_after=None):
        self.asked, self.protected, self.stop_after = [], [], stop_after

    def translate(self, texts, source, target, progress=None, protect=None):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((list(texts), source, target))
        self.protected.append(protect and [text for text in texts if protect(text)])
        if progress:
            progress(len(texts))
        # a marked span is one word
        return [
            engines.Translation(
                " ".join(reversed(re.findall(r'"[^"]*"|\S+', t))).upper(), "long" in t
            )
            for t in texts
        ]


def maker(task, folder, engine, shard=4, check=lambda *codes: None, x=1, **options):
    model = SimpleNamespace(
        identity={"by": "machine", "x": x},
        check=check,
        code=lambda lang: languages.language(lang).flores,
        uncertain=False,
        engine=engine,
    )
    return MachineTranslator(task, model, ArtifactStore(folder), shard=shard, **options)


# --- languages -----------------------------------------------------------------------------------


def test_every_language_of_every_benchmark_has_a_code():
    for task in TASKS.values():
        for lang in (task.english, *task.languages):
            assert re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", languages.language(lang).flores)
        assert languages.language(task.english).flores == "eng_Latn"
    proxies = {code for code, row in languages.LANGUAGES.items() if row.proxy}
    assert proxies == {"bbc", "mad", "nij"}
    assert {languages.LANGUAGES[code].flores for code in proxies} == {"ind_Latn"}
    named = {c: row for c, row in languages.LANGUAGES.items() if c not in languages.FLORES}
    exact = [row.flores for row in named.values() if not row.proxy]
    assert len(set(exact)) == len(exact) - 2, "only English and Indonesian have two names"
    assert {*exact} - {"nea_Latn", "hal_Latn", "far_Latn"} <= {*languages.FLORES}


def test_an_unknown_language_is_an_error():
    with pytest.raises(UserError, match=r"language 'xx'; add its row to flare_exp/languages\.py"):
        languages.language("xx")


def test_a_proxy_is_logged(tmp_path, caplog):
    task = NusaX()
    example = Example("nusax/eng/train/0", "0", ("a b",), 0)
    identity = maker(task, tmp_path, Reverser()).identity([example], "bbc")
    assert (identity["from"], identity["to"]) == ("eng_Latn", "ind_Latn")
    assert "does not know bbc: ind_Latn stands in" in caplog.text


# --- examples ------------------------------------------------------------------------------------


def test_classification_translates_every_different_text_once(tmp_path):
    task, engine = ToyNLI(limit=20), Reverser()
    examples = [*task.load("en", "train"), *task.load("en", "train")]
    made = maker(task, tmp_path, engine).translate(examples, "far")
    assert [m.texts for m in made] == [
        tuple(" ".join(reversed(t.split())).upper() for t in e.texts) for e in examples
    ]
    assert [(m.id, m.label) for m in made] == [(e.id, e.label) for e in examples]
    asked = [text for texts, *_ in engine.asked for text in texts]
    assert len(asked) == len(set(asked)) == len({t for e in examples for t in e.texts})
    assert {call[1:] for call in engine.asked} == {("eng_Latn", "far_Latn")}


def test_answers_are_marked_into_the_target_language_only(tmp_path):
    task, engine = ToyQA(limit=6), Reverser()
    examples = task.load("en", "train")
    made = maker(task, tmp_path, engine).translate(examples, "far")
    for e, m in zip(examples, made, strict=True):
        (answer,) = m.answers
        assert answer.text == e.answers[0].text.upper()
        assert m.texts[0].startswith(answer.text, answer.start)
        assert '"' not in m.texts[0]
    marked = [text for texts, *_ in engine.asked for text in texts if '"' in text]
    assert len(marked) == 6
    assert [text for texts in engine.protected for text in texts] == marked, "never split"
    engine.asked.clear(), engine.protected.clear()
    tested = maker(task, tmp_path, engine).translate(task.load("far", "test"), "en")
    assert not any('"' in text for texts, *_ in engine.asked for text in texts), (
        "the test source must not show the answer"
    )
    assert all(m.answers == () for m in tested)
    assert set(engine.protected) == {None}, "test texts are translated alike, whatever the marker"
    engine.asked.clear()
    maker(task, tmp_path, engine, marker="tags").translate(task.load("far", "test"), "en")
    assert not engine.asked


def test_answers_of_test_data_are_not_marked_in_any_language(tmp_path):
    """Not even where their sources are in a language other than English (`source.langs`)."""
    task, engine = ToyQA(limit=6), Reverser()
    examples = task.load("far", "test")
    translator = maker(task, tmp_path, engine)
    for lang in ("en", "near"):
        assert all(made.answers == () for made in translator.translate(examples, lang))
        assert translator.identity(examples, lang)["marker"] is None
    assert '"' not in "".join(text for texts, *_ in engine.asked for text in texts)


def test_a_model_translates_texts_by_themselves(tmp_path):
    engine = Reverser()
    machine = maker(ToyQA(), tmp_path, engine)
    assert machine.texts(["on monday", "", "rome", "on monday"], "en", "far") == [
        "MONDAY ON",
        "",
        "ROME",
        "MONDAY ON",
    ]
    ((asked, *languages),) = engine.asked
    assert asked == ["on monday", "", "rome"], "answers alone, each once"
    assert languages == ["eng_Latn", "far_Latn"]


def test_answers_that_are_lost_or_were_never_there_are_none(tmp_path):
    class Loser(Reverser):
        def translate(self, texts, *more, **options):
            return [engines.Translation(t.replace('"', "", 1), False) for t in texts]

    found = Example(
        "tydiqa/en/train/0", "0", ("the nile is long", "what"), answers=(Answer("nile", 4),)
    )
    absent = Example(
        "tydiqa/en/train/1", "1", ('the "nile" is long', "what"), answers=(Answer("congo", -1),)
    )
    lost, never = maker(TyDiQA(), tmp_path, Loser()).translate([found, absent], "sw")
    assert lost.answers == never.answers == ()
    assert lost.texts[0] == "the nile is long", "no mark of ours is left"
    assert maker(TyDiQA(), tmp_path / "b", Reverser()).translate([absent], "sw")[0].answers == (), (
        "its own quotes mark nothing"
    )


def test_flags_of_all_texts_of_an_example(tmp_path):
    rows = maker(ToyNLI(), tmp_path, Reverser()).flagged(
        [
            Example("toy_nli/en/train/0", "0", ("a long one", "b c"), 0),
            Example("toy_nli/en/train/1", "1", ("x", "y z"), 0),
        ],
        "far",
    )
    assert [flags["truncated"] for _, flags in rows] == [True, False]
    assert [flags["copy"] for _, flags in rows] == [False, True]  # one word reversed is itself
    assert set(rows[0][1]) == {*FLAGS}


def test_a_manifest_says_what_was_lost_and_how_good_the_rest_is():
    task = ToyQA(limit=30)
    english = task.load("en", "train")
    human = ParallelTranslator(task).translate(english, "far")
    made = [
        (replace(e, answers=()) if i < 3 else e, dict.fromkeys(FLAGS, i == 5))
        for i, e in enumerate(human)
    ]
    made[7] = (
        replace(human[7], texts=("x y z", human[7].texts[1]), answers=(Answer("y", 2),)),
        dict.fromkeys(FLAGS, False),
    )
    facts = quality(task, english, made, "far")
    assert facts["answers"] == {"of": 30, "kept": 27, "exact": 26}
    assert [facts[flag] for flag in FLAGS] == [1] * len(FLAGS)
    assert 90 < facts["chrf++"] < 100
    assert facts["chrf++_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:2")
    assert "chrf++" not in quality(task, english, [(e, {}) for e in human], "far"), (
        "human translations are the measure"
    )
    assert "answers" not in quality(
        task, task.load("far", "test"), [(e, {}) for e in task.load("far", "test")], "en"
    )


# --- shards --------------------------------------------------------------------------------------


def shards(folder):
    return sorted(p for p in (folder / "translation_shard").iterdir() if p.is_dir())


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_an_interrupted_translation_goes_on_after_its_last_finished_shard(tmp_path, stop_after):
    task = ToySentiment(limit=22)
    examples = task.load("en", "train")
    whole = maker(task, tmp_path / "whole", Reverser()).translate(examples, "far")
    first, second = Reverser(stop_after), Reverser()
    with suppress(KeyboardInterrupt):
        maker(task, tmp_path / "parts", first).translate(examples, "far")
    assert len(first.asked) == stop_after
    assert maker(task, tmp_path / "parts", second).translate(examples, "far") == whole
    assert len(second.asked) == 6 - stop_after
    assert [p.name for p in shards(tmp_path / "parts")] == [
        p.name for p in shards(tmp_path / "whole")
    ]
    for a, b in zip(shards(tmp_path / "parts"), shards(tmp_path / "whole"), strict=True):
        assert (a / "texts.parquet").read_bytes() == (b / "texts.parquet").read_bytes()


def test_a_damaged_shard_is_named_and_made_again(tmp_path, caplog):
    task, engine = ToySentiment(limit=10), Reverser()
    examples = task.load("en", "train")
    made = maker(task, tmp_path, engine).translate(examples, "far")
    victim = shards(tmp_path)[1] / "texts.parquet"
    victim.write_bytes(victim.read_bytes()[:-3] + b"xyz")
    engine.asked.clear()
    assert maker(task, tmp_path, engine).translate(examples, "far") == made
    assert len(engine.asked) == 1
    assert f"damaged artifact {victim.parent}: texts.parquet is not what was written" in caplog.text


def test_what_a_shard_depends_on(tmp_path):
    task, engine = ToySentiment(limit=4), Reverser()
    examples = task.load("en", "train")
    maker(task, tmp_path, engine).translate(examples, "far")
    maker(task, tmp_path, engine).translate(examples, "near")
    maker(task, tmp_path, engine, x=2).translate(examples, "far")
    assert len(engine.asked) == 3
    facts = json.loads((shards(tmp_path)[0] / "manifest.json").read_text())
    assert facts["info"]["texts"] == 4
    assert pq.read_table(shards(tmp_path)[0] / "texts.parquet").column_names[:2] == [
        "original",
        "translation",
    ]


def test_a_checkpoint_that_cannot_be_had_is_told_before_translating(tmp_path):
    def refuse(*codes):
        raise UserError("mt.path=x: no")

    with pytest.raises(UserError, match=r"mt\.path=x: no"):
        maker(ToySentiment(), tmp_path, Reverser(), check=refuse).identity(
            [Example("toy_sentiment/en/train/0", "0", ("a",), 0)], "far"
        )


# --- noise ---------------------------------------------------------------------------------------


def test_every_kind_of_error_does_what_it_says():
    words = [f"w{i}" for i in range(400)]
    made = {kind: corrupted(words, 0.3, ["x"], "s", [kind]) for kind in ERRORS}
    kept = {
        kind: [number for _, number in found if number is not None] for kind, found in made.items()
    }
    assert kept["drop"] == sorted(kept["drop"])
    assert 200 < len(made["drop"]) < 340
    assert corrupted(["a", "b"], 1.0, ["x"], "s", ["drop"]) == [("b", 1)], "one word is left"
    assert sorted(kept["swap"]) == list(range(400)) != kept["swap"]
    assert len(made["replace"]) == 400
    assert 60 < sum(word == "x" for word, _ in made["replace"]) < 180
    assert kept["hallucinate"] == list(range(400)), "nothing is lost, words are added"
    assert 460 < len(made["hallucinate"]) < 580


def test_noise_keeps_answers_exact_in_languages_without_spaces():
    example = Example(
        "tydiqa/en/train/0",
        "0",
        ("曼谷是泰国的首都和最大城市", "哪里"),
        answers=(Answer("泰国", 3),),
    )
    found = set()
    for seed in range(60):
        (made,) = corrupt_examples([example], "zh", 0.1, ERRORS, seed, 0)
        found.add(bool(made.answers))
        assert " " not in made.texts[0]
        for answer in made.answers:
            assert made.texts[0].startswith(answer.text, answer.start)
            assert answer.text == "泰国"
    assert found == {True, False}
