"""The stages in one process, with a tiny model: what they keep, give up and share in memory."""

import functools
import itertools
import json
import math
import re
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from pyarrow.parquet import read_table
from runs import last_of_each
from safetensors.torch import load_file
from small_checkpoints import tiny_checkpoint, untied

import flare_exp
from flare_exp.artifacts import Artifact, ArtifactStore
from flare_exp.config import validation
from flare_exp.config.methods import METHODS, members_of
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Prediction
from flare_exp.errors import UserError
from flare_exp.experiment import checkpoints, fitting, notes, pipeline, results
from flare_exp.experiment.analysis import analyze
from flare_exp.experiment.stages.ensemble import Member, _weights
from flare_exp.experiment.stages.finetune import finetune
from flare_exp.experiment.stages.similarity import embed
from flare_exp.experiment.stages.testing import evaluate
from flare_exp.experiment.stages.transfer import distillation
from flare_exp.experiment.stages.transfer import transfer as run_transfer
from flare_exp.experiment.stages.translation import translate
from flare_exp.flare.source_states import SourceStates
from flare_exp.languages import LANGUAGES, Language
from flare_exp.report.making import make_report
from flare_exp.tasks import Example
from flare_exp.training import distributed
from flare_exp.training.divergence import NotFinite
from flare_exp.training.tracking import Tracker
from flare_exp.utils.files import write_parquet

pytestmark = pytest.mark.slow

TINY = [
    "model=custom",
    "task.limit=8",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=1",
    "data.batch_size=4",
    "trainer.enable_progress_bar=false",
]
LAST = "task.select=last"
TINY_MT = [
    "mt=toy_nllb",
    "mt.pretrain.steps=2",
    "mt.pretrain.pairs=50",
    "mt.pretrain.hidden_size=16",
    "mt.max_length=16",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    folder.mkdir()
    return tiny_checkpoint(folder)


def run_of(checkpoint, folder, *overrides, cache="cache"):
    given = [
        *TINY,
        f"model.path={checkpoint}",
        f"cache_dir={folder / cache}",
        f"output_dir={folder}",
        *overrides,
    ]
    (composed,), problems = validation.validate(last_of_each(given), False)
    assert problems == []
    cfg = pipeline.resolve_hardware(OmegaConf.to_object(composed))
    store = ArtifactStore(cfg.cache_dir, distributed.SINGLE_PROCESS)
    tracker = Tracker(folder / "run", {}, None)
    backbone = checkpoints.prepare_backbone(cfg, store)
    return pipeline.make_context(cfg, store, pipeline.load_task(cfg), backbone, tracker)


@pytest.fixture
def make_run(checkpoint, tmp_path):
    def make(*overrides, cache="cache", path=checkpoint):
        return run_of(path, tmp_path, *overrides, cache=cache)

    return make


def transfer(run, method="flare"):
    return run_transfer(run, finetune(run), METHODS[method])


@pytest.fixture
def read_states(monkeypatch):
    """What fused layers read as v^S, and its mask, in the order of reading."""
    found, states_for = [], SourceStates.states_for

    def noted(self, *args):
        states = states_for(self, *args)
        if states is not None and len(args) == 2:
            found.append(states)
        return states

    monkeypatch.setattr(SourceStates, "states_for", noted)
    return found


@pytest.mark.parametrize(
    ("precision", "dtype", "rounding"),
    [
        ("64-true", torch.float64, 1e-12),
        ("32-true", torch.float32, 1e-5),
        ("bf16-mixed", torch.bfloat16, 0.02),
    ],
)
def test_cached_states_are_those_of_a_live_pass(make_run, read_states, precision, dtype, rounding):
    """In the same precision; other batches round in another order."""
    found = []
    for cache in ("off", "memory", "disk"):
        run = make_run(f"trainer.precision={precision}", f"source.cache={cache}", cache=cache)
        english = finetune(run)
        read_states.clear()
        run_transfer(run, english, METHODS["flare"])
        found.append(read_states[:4])  # of the first step: two projections of two blocks
    expected, *others = found
    assert len(expected) == 4
    for kept in others:
        for (live, mask), (cached, same) in zip(expected, kept, strict=True):
            assert torch.equal(mask, same)
            assert live.dtype == cached.dtype == dtype
            torch.testing.assert_close(cached[mask], live[mask], rtol=rounding, atol=rounding)


def test_wrong_words_are_made_anew_where_a_language_has_no_spaces(make_run, monkeypatch):
    """A user's description of the data may say so after the first run."""

    def kept():
        run = make_run("mt=gold", "mt.noise=0.5")
        translate(run, run.task.load("en", "validation")[:4], "far")
        return [artifact.digest for artifact in run.translations.values()]

    before = kept()
    assert kept() == before
    monkeypatch.setitem(LANGUAGES, "far", Language("zho_Hans", spaced=False))
    assert kept() != before


def test_fusion_functions_share_one_cache_of_source_states(make_run, tmp_path):
    def kept(*overrides):
        transfer(make_run("source.cache=disk", *overrides))
        return len(list((tmp_path / "cache" / "states").glob("*/states.bin")))

    assert kept("fusion=add") == 2, "training and validation"
    assert kept("fusion=gated") == 2
    assert kept("fusion=add", "adapter.r=4") == 4, "another English model"
    assert kept("fusion=add", "fusion.source_layer=same") == 6
    assert kept("fusion=add", "fusion.source_state=block_output") == 8
    assert kept("fusion=add", "source.dtype=float16") == 10


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_a_training_whose_sources_are_all_lost_is_one_without_sources(make_run, cache):
    """Also through a learned fusion, and with adapters that drop some of their input."""
    options = ["fusion=gated", "adapter.dropout=0.5", "trainer.limit_train_batches=2"]
    dropped, empty, plain = (
        transfer(make_run(*options, f"source.cache={cache}", *own))
        for own in (["source.dropout=1"], ["source.empty=true", "source.ablate_in=train"], [])
    )
    dropped, empty, plain = (
        load_file(a.path / "adapter" / "adapter_model.safetensors") for a in (dropped, empty, plain)
    )
    assert all(torch.equal(dropped[name], empty[name]) for name in plain)
    assert not all(torch.equal(dropped[name], plain[name]) for name in plain)


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_source_states_are_given_up_after_a_stage(make_run, read_states, cache):
    run, held = make_run(f"source.cache={cache}"), []
    source = run.source
    run.source = lambda model: held.append(source(model)) or held[-1]  # as a module that lives on
    english = finetune(run)
    adapted = run_transfer(run, english, METHODS["flare"])
    assert read_states
    evaluate(run, adapted, "paired", english)
    assert len(held) == 2
    gone = [weakref.ref(states) for states, _ in read_states]
    read_states.clear()
    assert not any(ref() is not None for ref in gone)
    assert all(run.data("paired").dataset(role).cache is None for role in ("train", "validation"))


@pytest.mark.parametrize("method", ["flare", "flare_mt"])
def test_a_translation_model_is_given_up_when_its_work_is_done(make_run, monkeypatch, method):
    run, alive, loaded = make_run(*TINY_MT, f"method={method}"), {}, []
    mode, fit = METHODS[method].mode, fitting.fit

    for name in ("engine", "encoder"):
        load = getattr(checkpoints.MT, name).func

        def noted(self, load=load, name=name):
            made = load(self)
            loaded.append((name, weakref.ref(made)))
            return made

        prop = functools.cached_property(noted)
        prop.__set_name__(checkpoints.MT, name)
        monkeypatch.setattr(checkpoints.MT, name, prop)

    def watched(*args):
        alive[args[1]] = [name for name, ref in loaded if ref() is not None]
        return fit(*args)

    monkeypatch.setattr(fitting, "fit", watched)
    english = finetune(run)
    adapted = run_transfer(run, english, METHODS[method])
    assert {name for name, _ in loaded} == (
        {"engine"} if method == "flare" else {"engine", "encoder"}
    )
    assert alive["transfer"] == []
    evaluate(run, adapted, mode, english)
    assert loaded[-1][0] == ("engine" if method == "flare" else "encoder"), (
        "loaded again for the test"
    )


def test_trained_embeddings_of_a_bfloat16_decoder_go_through_the_stages(make_run, tmp_path):
    (tmp_path / "tied").mkdir()
    path = untied(tiny_checkpoint(tmp_path / "tied", "llama"), tmp_path / "untied")
    chosen = [
        "model.dtype=bfloat16",
        "adapter.also_train=[embeddings,lm_head]",
        "finetune.lr=1e-3",
        "transfer.lr=1e-3",
    ]
    run = make_run(*chosen, path=path)
    english = finetune(run)
    adapted = run_transfer(run, english, METHODS["flare"])
    evaluate(run, adapted, "paired", english)
    before = load_file(path / "model.safetensors")
    for artifact in (english, adapted):
        weights = load_file(artifact.path / "adapter" / "adapter_model.safetensors")
        now = weights["base_model.model.model.embed_tokens.weight"]
        assert now.dtype == torch.float32
        assert 0 < (now - before["model.embed_tokens.weight"]).abs().max() < 0.1
        before = {"model.embed_tokens.weight": now}  # the transfer begins with the English ones
        assert "base_model.model.lm_head.weight" in weights


def test_full_trains_every_weight_and_its_model_is_the_one_that_is_tested(make_run):
    run = make_run("method=full", "transfer.lr=1e-3", "finetune.tuning=lora")
    made = pipeline.run_stages(run, members_of(run.cfg.method))
    before = load_file(run.backbone.path / "model.safetensors")
    after = load_file(made["transfer"].path / "model" / "model.safetensors")
    counts = made["transfer"].info["parameters"]
    assert counts["trainable"] == counts["total"]
    unchanged = {k for k in before if k in after and torch.equal(before[k], after[k])}
    # positions beyond the longest text have no gradient, but weight decay
    assert unchanged <= {"roberta.embeddings.token_type_embeddings.weight"}
    assert made["test"].digest != made["zero_shot"].digest


def test_a_language_that_the_tokenizer_does_not_know_is_refused_before_training(
    make_run, monkeypatch
):
    run = make_run("data.max_length=16")
    read = run.task.read

    def in_another_script(lang, split):
        rows = read(lang, split)
        if lang == run.task.english:
            return rows
        return [replace(e, texts=("是的 不是",)) for e in rows]

    monkeypatch.setattr(run.task, "read", in_another_script)
    monkeypatch.setattr(fitting, "fit", lambda *args: pytest.fail("it is trained"))
    with pytest.raises(UserError, match=r"/test \(target\): .* unknown to the tokenizer"):
        pipeline.run_stages(run, members_of(run.cfg.method))


def test_trainings_on_other_parts_of_the_same_rows_are_other_trainings(make_run):
    """Where training data end and validation data begin, and whether there are any."""
    found = [
        finetune(make_run(f"task.train_split='{train}'", f"task.validation_split={held}", LAST))
        for train, held in (
            ("train[:4]", "'train[4:8]'"),
            ("train[:2]", "'train[2:8]'"),
            ("train[:8]", "null"),
        )
    ]
    assert len({artifact.digest for artifact in found}) == 3


def test_translations_of_two_parts_of_a_split_are_both_noted(make_run):
    parts = ["task.train_split='train[8:16]'", "task.validation_split='train[:8]'"]
    run = make_run("method=lora", *parts)
    made = pipeline.run_stages(run, members_of(run.cfg.method))
    names = [f"translation of toy_sentiment/en/train{part} into far" for part in ("", " from 0")]
    assert set(names) <= set(made)
    assert [made[name].info["examples"] for name in names] == [8, 8]
    assert made[names[0]].digest != made[names[1]].digest


def test_an_ensemble_is_the_weighted_mean_of_its_members_probabilities(make_run):
    """Against the members' own predictions, and weights found by trying all of them by hand."""
    methods = ["lora", "translate_test"]
    given = ["method=ensemble", "mt.noise=0.5", "task.limit=40", "finetune.lr=1e-2"]
    run = make_run(*given)
    made = pipeline.run_stages(run, members_of(run.cfg.method))
    for name in methods:
        alone = make_run(*given[1:], f"method={name}")
        assert pipeline.run_stages(alone, members_of(alone.cfg.method))["test"].digest == (
            made[f"test {name}"].digest
        ), "the members are the runs of these methods"

    def probabilities(kind):
        tables = [
            read_table(made[f"{kind} {name}"].path / "predictions.parquet") for name in methods
        ]
        assert all(table["id"] == tables[0]["id"] for table in tables)
        found = [torch.tensor(t["probabilities"].to_pylist(), dtype=torch.float64) for t in tables]
        assert all(torch.allclose(p.sum(1), torch.ones(len(p)).double()) for p in found)
        return found, tables[0]["gold"].to_pylist()

    labels, (own, other), gold = run.task.labels, *probabilities("validation")

    def score(weight, own, other, gold):
        said = [labels[i] for i in (weight * own + (1 - weight) * other).argmax(1)]
        return said, macro_f1(gold, said)

    scores = {w / 10: score(w / 10, own, other, gold)[1] for w in range(11)}
    best = min((w for w in scores if scores[w] == max(scores.values())), key=lambda w: abs(w - 0.5))
    weights = made["test"].info["weights"]
    assert weights == pytest.approx({"lora": best, "translate_test": 1 - best})
    (own, other), gold = probabilities("test")
    said, expected = score(best, own, other, gold)
    table = read_table(made["test"].path / "predictions.parquet")
    assert table["prediction"].to_pylist() == said
    assert made["test"].info["metrics"]["macro_f1"] == pytest.approx(expected)
    equal = make_run(*given, "method.weights=equal")
    found = pipeline.run_stages(equal, members_of(equal.cfg.method))
    assert not any(name.startswith("validation") for name in found)
    assert found["test"].info["weights"] == {"lora": 0.5, "translate_test": 0.5}


def test_a_student_learns_from_its_teachers_labels_of_all_training_texts(make_run, tmp_path):
    """Two texts have no label: one comes with its English text, the other is translated."""
    texts = tmp_path / "texts.jsonl"
    rows = [{"text": "mo la", "source": "good film"}, {"text": "si mo"}]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["method=distil", "method.of=[lora,flare]", f"distil.texts={texts}", *TINY_MT]
    run = make_run(*given, "distil.lr=1e-2")
    made = pipeline.run_stages(run, members_of(run.cfg.method))
    for name in ("lora", "flare"):
        alone = make_run(f"method={name}", *TINY_MT)
        assert pipeline.run_stages(alone, members_of(alone.cfg.method))["transfer"].digest == (
            made[f"transfer {name}"].digest
        ), "a teacher is the run of its method"
    tables = {
        name: read_table(made[name].path / "soft_labels.parquet").to_pydict()
        for name in ("labels lora", "labels flare", "labels")
    }
    student = run.data(PairingMode.TARGET, distils=True).dataset("train")
    ids = [pair.target.id for pair in student.pairs]
    assert ids[-2:] == [f"toy_sentiment/far/unlabeled/{row}" for row in range(2)]
    assert student.terms == [1] * 8 + [0, 0]
    assert all(table["id"] == ids for table in tables.values())
    own, other, mean = (torch.tensor(t["probabilities"]) for t in tables.values())
    torch.testing.assert_close(mean, (own + other) / 2)
    read = run.data(PairingMode.PAIRED, distils=True).dataset("train").pairs[-2:]
    assert read[0].source.texts == ("good film",)
    assert read[1].source.texts not in (("si mo",), ("",))
    assert made["labels flare"].info["unlabeled"] == 2
    assert made["transfer"].digest != made["transfer lora"].digest
    facts = {name: made[name].info for name in ("finetune", "transfer lora", "transfer")}
    assert results.trained_parameters(facts) == made["transfer"].info["parameters"]
    tested = read_table(made["test"].path / "predictions.parquet")
    assert {*tested["source"].to_pylist()} == {None}
    found, expected = students_loss(run, made)
    assert found == pytest.approx(expected, rel=1e-4)


def students_loss(run, made):
    """The student's loss of three texts, of which one has no label, and the same by hand."""
    data = run.data(PairingMode.TARGET, distils=True)
    model = run.models.add_adapter(run.models.english_model(made["finetune"])).eval()
    module = fitting.make_module(run, model, None, added=distillation(run, made["labels"]))
    dataset, rows = data.dataset("train"), (0, 9, 3)
    batch = data.loader(dataset, [[*rows]]).collate_fn([dataset[row] for row in rows])
    found = module.loss(batch).item()
    logits = model(**batch["target"]).logits.double().log_softmax(1)
    labels = [dataset.pairs[row].target.label for row in (0, 3)]
    cross = -(logits[0, labels[0]] + logits[2, labels[1]]) / 2
    soft = read_table(made["labels"].path / "soft_labels.parquet")["probabilities"].to_pylist()
    t = run.cfg.distil.temperature
    softened = [torch.tensor(soft[row]).double().log().div(t).softmax(0) for row in rows]
    student = (logits / t).log_softmax(1)
    kl = sum((p * (p.log() - q)).sum() for p, q in zip(softened, student, strict=True)) / 3
    return found, (cross + t**2 * kl).item()


def test_sources_in_several_languages_are_fused_together(make_run):
    """States that are kept train the same adapter as texts; English alone is what there was."""
    assert transfer(make_run("source.langs=[en]")).digest == transfer(make_run()).digest
    given = ["source.langs=[en,near]", "mt=gold", "trainer.limit_train_batches=null"]
    found = {}
    for cache in ("off", "memory"):
        run = make_run(*given, f"source.cache={cache}", cache=cache)
        made = pipeline.run_stages(run, members_of(run.cfg.method))
        found[cache] = load_file(made["transfer"].path / "adapter" / "adapter_model.safetensors")
        assert {"translation of toy_sentiment/far/test into near"} <= {*made}
    for name, weights in found["off"].items():
        torch.testing.assert_close(found["memory"][name], weights, msg=name)
    data = run.data(PairingMode.PAIRED)
    for role in ("train", "test"):
        pair = data.dataset(role).pairs[3]
        texts = [run.task.load(lang, role)[3].texts for lang in ("en", "near")]
        assert [pair.source.texts, *(s.texts for s in pair.more)] == texts
    assert next(iter(data.test_dataloader()))["source"]["attention_mask"].shape[:2] == (2, 4)
    assert data.trainer is None, "what was trained is given up, though the data are kept"


def test_no_test_text_is_translated_into_a_language_that_no_source_has(make_run):
    run = make_run("source.langs=[near]", "mt=gold")
    data = run.data(PairingMode.PAIRED)
    assert data.dataset("test").pairs[3].source.texts == run.task.load("near", "test")[3].texts
    assert [*run.translations] == ["translation of toy_sentiment/far/test into near"]


def test_translations_by_several_systems_are_fused_in_tests_alone(make_run):
    """The same translations twice are one source."""
    found = {}
    for names in ("", "gold", "toy"):
        options = ["mt.noise_in=train", "transfer.lr=0.1", "trainer.limit_train_batches=null"]
        run = make_run("mt=toy", f"source.systems=[{names}]", *options)
        made = pipeline.run_stages(run, members_of(run.cfg.method))
        table = read_table(made["test"].path / "predictions.parquet").to_pydict()
        found[names] = made["transfer"].digest, torch.tensor(table["probabilities"])
    (trained, one), (again, same), (noisy, other) = found.values()
    assert trained == again == noisy
    torch.testing.assert_close(same, one, rtol=0, atol=1e-6)
    assert not torch.allclose(other, one, rtol=0, atol=1e-5)
    name = "translation of toy_sentiment/far/test into en"
    assert made[f"{name} by toy"].info["chrf++"] < 100
    assert "chrf++" not in made[name].info, "without wrong words it is the human one"
    assert {"en", "en by toy"} <= {*pipeline.chrf_of(run.translations)}
    data = run.data(PairingMode.PAIRED)
    assert all(pair.more == () for pair in data.dataset("train").pairs)
    assert [len(pair.more) for pair in data.dataset("test").pairs] == [1] * 8


def test_the_weights_of_every_translation_system_are_given_up(make_run):
    run = make_run("source.systems=[gold]")
    for part in (run, *run.systems):
        part.mt.__dict__["engine"] = "weights"
    run.release_models()
    assert not any("engine" in part.mt.__dict__ for part in (run, *run.systems))


def test_a_student_that_diverges_is_told_its_own_option(make_run):
    longer = ["trainer.limit_train_batches=null", "trainer.max_epochs=3"]
    run = make_run("method=distil", "method.of=[lora]", "distil.lr=1e30", LAST, *longer)
    with pytest.raises(NotFinite, match=r"distil\.lr=1e\+30 is too high"):
        pipeline.run_stages(run, members_of(run.cfg.method))


def test_a_student_of_several_languages_has_a_teacher_that_reads_english(make_run):
    given = ["method=distil", "method.of=[lora,translate_test]", "task.lang=[near,far]"]
    made, teachers = stages_of(make_run(*given)), ("lora", "translate_test")
    tables = [read_table(made[f"labels {name}"].path / "soft_labels.parquet") for name in teachers]
    assert tables[0]["id"].to_pylist() == tables[1]["id"].to_pylist()
    assert len(tables[0]) == 16
    assert {"test near", "test far"} <= set(made)


def test_an_ensemble_weighs_each_source_by_its_similarity(make_run):
    """By hand from similarities and the members' predictions; without a source, it is LoRA."""
    given = ["method=ensemble", "method.of=[lora,flare]", "method.weights=similarity"]
    run = make_run(*given, "mt.noise=0.5", "mt.noise_in=test")
    made = pipeline.run_stages(run, members_of(run.cfg.method))
    tables = {
        name: read_table(made[name].path / f"{file}.parquet").to_pydict()
        for name, file in {
            "test": "predictions",
            "test lora": "predictions",
            "test flare": "predictions",
            "similarity of test": "similarities",
            "similarity of validation": "similarities",
        }.items()
    }
    validation = tables["similarity of validation"]
    own, other = (sum(validation[name]) / 8 for name in ("own", "other"))
    wins = [a > b for a in validation["own"] for b in validation["other"]]
    facts = made["similarity of validation"].info
    assert facts["separation"] == pytest.approx(sum(wins) / len(wins), abs=1e-6)
    assert tables["similarity of test"]["id"] == tables["test"]["id"]
    slope = 2 * math.log(0.95 / 0.05) / (own - other)
    for i, alike in enumerate(tables["similarity of test"]["own"]):
        trust = 1 / (1 + math.exp(-slope * (alike - (own + other) / 2)))
        lora, flare, mixed = (
            tables[name]["probabilities"][i] for name in ("test lora", "test flare", "test")
        )
        expected = [(1 - trust) * p + trust * q for p, q in zip(lora, flare, strict=True)]
        assert mixed == pytest.approx(expected, abs=1e-4)  # the facts have six digits
        assert 0 < trust < 1
    empty = make_run(*given, "source.empty=true", "source.ablate_in=test")
    found = pipeline.run_stages(empty, members_of(empty.cfg.method))
    assert found["test"].info["weights"] == {"lora": 1.0, "flare": 0.0}
    assert found["test"].info["metrics"] == found["test lora"].info["metrics"]


def test_a_text_is_embedded_alike_in_every_batch(make_run):
    run = make_run()
    items = run.data(PairingMode.PAIRED).dataset("test").target
    encoder = run.models.load(str(run.backbone.path)).model.base_model.eval()
    one, all_ = (embed(encoder, items, run.preprocessor, size) for size in (1, 8))
    torch.testing.assert_close(one, all_)
    with torch.no_grad():
        tokens = torch.tensor([items[3]["inputs"]["input_ids"]])
        mean = encoder(tokens).last_hidden_state[0].mean(0)
    torch.testing.assert_close(one[3], mean / mean.norm())


def test_two_passes_are_the_mean_of_a_pass_with_the_source_and_one_without(make_run):
    both, given, none = (
        pipeline.run_stages(run, members_of(run.cfg.method))
        for run in (
            make_run("predict.sources=[given,none]"),
            make_run(),
            make_run("source.empty=true", "source.ablate_in=test"),
        )
    )
    assert both["transfer"].digest == given["transfer"].digest == none["transfer"].digest
    assert both["test given"].digest == given["test"].digest
    assert both["test none"].digest == none["test"].digest
    p, p_given, p_none = (
        torch.tensor(read_table(a.path / "predictions.parquet")["probabilities"].to_pylist())
        for a in (both["test"], given["test"], none["test"])
    )
    torch.testing.assert_close(p, (p_given + p_none) / 2)
    assert not torch.equal(p_given, p_none)


def macro_f1(gold, said):
    classes = sorted({*gold, *said})
    hits = {c: sum(g == s == c for g, s in zip(gold, said, strict=True)) for c in classes}
    return sum(2 * hits[c] / (gold.count(c) + said.count(c)) for c in classes) / 3


def test_wrong_words_can_be_in_the_test_sources_alone(make_run):
    """The same adapter is then tested with sources of every quality."""
    clean, noisy, both = (
        pipeline.run_stages(run, members_of(run.cfg.method))
        for run in (
            make_run("mt.noise=0"),
            make_run("mt.noise=0.5", "mt.noise_in=test"),
            make_run("mt.noise=0.5"),
        )
    )
    assert noisy["transfer"].digest == clean["transfer"].digest != both["transfer"].digest
    assert noisy["test"].digest != clean["test"].digest
    train = make_run("mt.noise=0.5", "mt.noise_in=train")
    found = pipeline.run_stages(train, members_of(train.cfg.method))
    assert found["transfer"].digest == both["transfer"].digest


@pytest.mark.parametrize(("where", "noisy"), [("train", True), ("test", False)])
def test_wrong_words_in_unlabeled_texts_are_in_training_data(make_run, where, noisy):
    """They are translated into English, as test data are."""
    copies = SimpleNamespace(
        identity=lambda *_: {"by": "copy"}, flagged=lambda examples, _: [(e, {}) for e in examples]
    )
    run = replace(make_run("mt.noise=1", f"mt.noise_in={where}"), translator=copies)
    texts = [Example("toy_sentiment/far/unlabeled/0", "unlabeled/0", ("me kujo lano",))]
    (made,) = run.translate(run, texts, "en")
    assert (made.texts != texts[0].texts) == noisy


# --- several languages ----------------------------------------------------------------------------

together = pytest.mark.xdist_group("languages")  # one worker: they share a run
LEARNING = ["method=flare", "task.limit=24", "finetune.lr=1e-2", "transfer.lr=1e-2"]


@pytest.fixture(scope="module")
def two_languages(checkpoint, tmp_path_factory):
    """A run with one adapter for two languages, its folder, and its metrics.json."""
    folder = tmp_path_factory.mktemp("languages")
    run = run_of(checkpoint, folder, *LEARNING, "task.lang=[near,far]", "task.temperature=3")
    out = folder / "out"
    out.mkdir()
    (out / "config.yaml").write_text(OmegaConf.to_yaml(run.cfg))
    return run, out, pipeline.run(run.cfg, out)


def stages_of(run):
    return pipeline.run_stages(run, members_of(run.cfg.method))


def rows_of(folder):
    return read_table(folder / "predictions.parquet").to_pylist()


def by_language(rows):
    """Language -> gold labels and predictions, in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(row["id"].split("/")[1], []).append((row["gold"], row["prediction"]))
    return {
        lang: [list(column) for column in zip(*own, strict=True)] for lang, own in found.items()
    }


def test_a_list_of_one_language_is_that_language(make_run):
    alone, listed = (make_run(f"task.lang={lang}", "task.limit=12") for lang in ("near", "[near]"))
    assert listed.cfg == alone.cfg
    made, again = stages_of(alone), stages_of(listed)
    assert {name: a.digest for name, a in again.items()} == {
        name: a.digest for name, a in made.items()
    }
    assert all(a.reused for a in again.values())


@together
def test_one_adapter_is_tested_on_each_language_and_scored_by_the_mean(two_languages):
    """Against the predictions, by hand."""
    _, out, measured = two_languages
    rows, own = rows_of(out), measured["languages"]
    assert [row["id"] for row in rows] == [
        f"toy_sentiment/{lang}/test/{i}" for lang in ("near", "far") for i in range(24)
    ]
    assert measured["lang"] == [*own] == ["near", "far"]
    for lang, (gold, said) in by_language(rows).items():
        assert own[lang]["unseen"] is False
        hits = sum(a == b for a, b in zip(gold, said, strict=True))
        assert own[lang]["test"]["accuracy"] == pytest.approx(hits / 24, abs=1e-6)
        assert own[lang]["test"]["macro_f1"] == pytest.approx(macro_f1(gold, said), abs=1e-6)
    for block, metric in itertools.product(("test", "zero_shot"), ("accuracy", "macro_f1")):
        mean = (own["near"][block][metric] + own["far"][block][metric]) / 2
        assert measured[block][metric] == pytest.approx(mean, abs=1e-6)


@together
def test_it_is_trained_on_both_languages_and_their_mean_selects_the_epoch(
    two_languages, checkpoint
):
    run, out, _ = two_languages
    made, mode = stages_of(run), METHODS["flare"].mode
    assert made["transfer"].reused
    train = run.data(mode).dataset("train").pairs
    assert Counter(pair.target.lang for pair in train) == {"near": 24, "far": 24}
    assert len({pair.target.id for pair in train}) == 48
    near, far = ([p.target.texts for p in train if p.target.lang == x] for x in ("near", "far"))
    assert near != far
    # predictions that are right in one language, and always the same in the other
    pairs = run.data(mode).dataset("validation").pairs
    gold = [run.task.gold(pair.target)[0] for pair in pairs]
    said = gold[:24] + [gold[0]] * 24
    score = fitting._validation_score(run, run.data(mode))
    found = score({row: Prediction(text) for row, text in enumerate(said)})["macro_f1"]
    mean = (1 + macro_f1(gold[24:], said[24:])) / 2
    assert found == pytest.approx(mean, abs=1e-5) != pytest.approx(macro_f1(gold, said), abs=1e-3)
    # the zero-shot test of a language is that of a run with this language alone
    single, other = (
        stages_of(run_of(checkpoint, out.parent, *LEARNING, *given))
        for given in (["task.lang=far", "method=zero_shot"], ["task.lang=[near,far]"])
    )
    assert single["zero_shot"].digest == made["zero_shot far"].digest
    assert other["transfer"].digest != made["transfer"].digest, "another temperature"


@together
def test_table_and_page_have_each_language_and_the_mean(two_languages, capsys):
    _, out, measured = two_languages
    results.print_table(measured, [], out)
    assert re.findall("flare .add_relu. +│ (.*?) test", capsys.readouterr().out) == [
        "near",
        "far",
        "mean of near+far",
    ]
    page = (out / "README.md").read_text()
    assert "# flare (add_relu) on toy_sentiment, near+far\n" in page
    assert "| **flare (add_relu)**, on far (24 examples) | " in page
    assert f'flare_exp.load("{out}", "task.lang=near")' in page
    assert f"serve run={out} task.lang=near\n" in page
    mean = f"{100 * measured['zero_shot']['accuracy']:.1f}"
    assert f"| zero-shot, on mean of near+far | {mean} " in page


@together
def test_a_model_of_two_languages_is_loaded_and_analyzed(two_languages):
    _, out, _ = two_languages
    with pytest.raises(UserError, match=r"give the one of the texts: task.lang=near \(or far\)"):
        flare_exp.load(out)
    with pytest.raises(UserError, match=r"task.lang=fra: choose one of near, half, far"):
        flare_exp.load(out, "task.lang=fra")
    loaded = flare_exp.load(out, "task.lang=far")
    far = [row for row in rows_of(out) if "/far/" in row["id"]]
    said = loaded.predict([row["target"] for row in far], [row["source"] for row in far])
    assert said == [row["prediction"] for row in far]
    with pytest.raises(UserError, match="the run has several languages; choose one: --lang near"):
        analyze(out)
    assert analyze(out, 3, False, "far").run["lang"] == "far"


@together
def test_a_report_has_a_row_for_each_language_and_for_the_mean(two_languages):
    _, out, measured = two_languages
    report, problems = make_report([str(out)])
    assert not problems
    label = "flare (add_relu, trained on near+far)"
    (section,) = report.sections
    assert [(cell.lang, cell.label) for cell in section.cells] == [("far", label), ("near", label)]
    (table,) = [table for table in section.tables if table.name == "toy_sentiment-runs"]
    places = [column.name for column in table.columns]
    lang, score = places.index("lang"), places.index("macro_f1")
    assert {row[lang].text: row[score].text for row in table.rows} == {
        name: f"{100 * scores['test']['macro_f1']:.1f}"
        for name, scores in {**measured["languages"], "mean of near+far": measured}.items()
    }


def test_an_unseen_language_is_tested_and_never_trained_on(make_run, tmp_path):
    given = ["method=flare", "task.lang=near"]
    run, out = make_run(*given, "task.unseen=[far]"), tmp_path / "out"
    out.mkdir()
    measured = pipeline.run(run.cfg, out)
    alone = stages_of(make_run(*given))
    made = stages_of(run)
    assert made["transfer"].digest == alone["transfer"].digest
    assert made["test near"].digest == alone["test"].digest
    assert {name.rpartition(" ")[2] for name in made if name.startswith("translation")} == {
        "near",
        "en",
    }
    assert {lang: own["unseen"] for lang, own in measured["languages"].items()} == {
        "near": False,
        "far": True,
    }
    assert measured["lang"] == "near"
    for block, name in (("test", "test near"), ("zero_shot", "zero_shot near")):
        assert measured[block] == made[name].info["metrics"], "the unseen one is not in the mean"
    assert "on far (unseen) (8 examples)" in (out / "README.md").read_text()


def test_an_ensemble_of_several_languages_has_the_same_weights_in_each(make_run, tmp_path):
    """Chosen by the mean of the languages' validation scores, by hand; also in an unseen one."""
    given = ["task.limit=24", "finetune.lr=1e-2", "mt.noise=0.5", "task.lang=[near,far]"]
    run, out = make_run("method=ensemble", *given, "task.unseen=[half]"), tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text(OmegaConf.to_yaml(run.cfg))
    measured = pipeline.run(run.cfg, out)
    made = stages_of(run)
    alone = stages_of(make_run("method=lora", *given))
    assert made["test lora near"].digest == alone["test near"].digest
    scores = {}
    for tenths in range(11):
        scores[tenths] = 0
        for lang in ("near", "far"):
            lora, english = (
                read_table(made[f"validation {name} {lang}"].path / "predictions.parquet")
                for name in ("lora", "translate_test")
            )
            own, other = (torch.tensor(t["probabilities"].to_pylist()) for t in (lora, english))
            mixed = (tenths * own.double() + (10 - tenths) * other).argmax(1)
            said = [run.task.labels[i] for i in mixed]
            scores[tenths] += round(macro_f1(lora["gold"].to_pylist(), said), 6) / 2
    top = max(scores.values())
    best = min((w for w in scores if scores[w] > top - 1e-6), key=lambda w: abs(w - 5))
    weights = {"lora": best / 10, "translate_test": 1 - best / 10}
    facts = json.loads((out / "provenance.json").read_text())
    assert [*facts["test"]["languages"]] == [*measured["languages"]] == ["near", "far", "half"]
    for lang, own in facts["test"]["languages"].items():
        assert own["weights"] == pytest.approx(weights)
        assert own["metrics"] == measured["languages"][lang]["test"]
    assert facts["test"]["examples"] == len(rows_of(out)) == 72
    said = [note for note in notes.notes(run.cfg, out) if note.startswith("weights of")]
    assert len(said) == 1, "the same in every language: said once"
    half = [row for row in rows_of(out) if "/half/" in row["id"]]
    english = [
        pair.target.texts[0] for pair in run.data(PairingMode.TRANSLATED, lang="half").pairs("test")
    ]
    loaded = flare_exp.load(out, "task.lang=half")
    assert loaded.predict([row["target"] for row in half], english) == [
        row["prediction"] for row in half
    ]


def test_the_weights_have_the_best_mean_over_languages(make_run, tmp_path):
    """The first member is right on half of one language, and wrong on all of the other."""
    task = make_run("method=ensemble").task
    gold = [task.labels.index(task.gold(e)[0]) for e in task.load(task.english, "validation")]

    def predicted(name, rights):
        rows = [
            {"id": str(i), "gold": str(g), "probabilities": _distribution(g, right)}
            for i, (g, right) in enumerate(zip(gold, rights, strict=True))
        ]
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "predictions.parquet", rows)
        return Artifact(tmp_path / name, "test", name, {}, 0.0, True)

    both = [i % 2 == 0 for i in range(len(gold))]  # examples on which the two agree
    members = {
        "first": {"near": [True for _ in both], "far": [False for _ in both]},
        "second": {"near": both, "far": [True for _ in both]},
    }
    made = {
        name: Member(
            None,
            {lang: predicted(f"{name} {lang}", rights) for lang, rights in own.items()},
            {},
            False,
        )
        for name, own in members.items()
    }
    weights = _weights(SimpleNamespace(task=task), made, None, [])
    assert weights[:, 0].tolist() == [0.4, 0.6], "the first language alone: [0.6, 0.4]"


def _distribution(label, right):
    """Probabilities of three labels, of which `label`, or the next one, has the most."""
    found = [0.1, 0.1, 0.1]
    found[label if right else (label + 1) % 3] = 0.8
    return found


def test_an_ensemble_by_similarity_compares_each_languages_test_texts(make_run):
    given = ["method=ensemble", "method.of=[lora,flare]", "method.weights=similarity"]
    made = stages_of(make_run(*given, "task.lang=near", "task.unseen=[far]"))
    alone = stages_of(make_run(*given, "task.lang=near"))
    for name in ("similarity of test", "test"):
        assert made[f"{name} near"].digest == alone[name].digest
    near, far = (made[f"similarity of test {lang}"].info["own"] for lang in ("near", "far"))
    assert near != far
    weights = [made[f"test {lang}"].info["weights"] for lang in ("near", "far")]
    assert weights[0] != weights[1]


def test_flare_mt_tells_the_encoder_the_language_of_each_row(make_run):
    run = make_run(*TINY_MT, "method=flare_mt", "task.lang=[near,far]")
    mode, codes = METHODS["flare_mt"].mode, {"near": "nea_Latn", "far": "far_Latn"}

    def first_tokens(data, role):
        dataset = data.dataset(role)
        return Counter(
            (dataset.pairs[number].target.lang, item["inputs"]["input_ids"][0])
            for number, item in zip(dataset.examples, dataset.source, strict=True)
        )

    ids = {lang: run.mt.tokenizer.convert_tokens_to_ids(code) for lang, code in codes.items()}
    assert ids["near"] != ids["far"]
    tests = {lang: run.data(mode, lang=lang) for lang in codes}  # they share the tokenizer
    assert first_tokens(run.data(mode), "train") == {(lang, ids[lang]): 8 for lang in codes}
    for lang, data in tests.items():
        assert first_tokens(data, "test") == {(lang, ids[lang]): 8}
