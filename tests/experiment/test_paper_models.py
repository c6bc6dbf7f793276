"""The paper's models on the paper's tasks, as a user types them: with tiny checkpoints and files in
the benchmarks' columns.
"""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from random_models import random_backbone
from runs import last_of_each
from safetensors.torch import load_file
from small_checkpoints import untied
from tables import write_rows

from flare_exp.config import constraints, validation
from flare_exp.experiment.building import save_model
from flare_exp.experiment.runs import run_job
from flare_exp.flare import adapter
from flare_exp.models import backbones
from flare_exp.tasks import ToyNLI, ToyQA, ToySentiment
from flare_exp.tasks.metrics import answers
from flare_exp.toy.pretrain import pretrain

SIZE = {
    "documents": 400,
    "steps": 15,
    "batch_size": 8,
    "lr": 2e-3,
    "vocab_size": 320,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "target_share": 0.2,
    "world_seed": 0,
}
ARCHITECTURE = {
    "xlmr_base": "xlm-roberta",
    "xlmr_large": "xlm-roberta",
    "mt5_xl": "mt5",
    "llama3": "llama",
    "llama31": "llama",
    "gemma2": "gemma2",
}
PAPER = list(ARCHITECTURE)
TASKS = {"xnli": "accuracy", "tydiqa": "exact_match", "nusax": "macro_f1"}


@pytest.mark.parametrize("model", PAPER)
@pytest.mark.parametrize("task", TASKS)
def test_every_model_and_task_composes_and_passes_the_check(model, task):
    jobs, problems = validation.validate(
        [f"model={model}", f"task={task}", "fusion=add_relu"], False
    )
    assert problems == []
    job = jobs[0]
    assert job.model.name == model
    assert "/" in job.model.path
    # the paper's recipe
    epochs = 3 if task == "xnli" else 10
    assert (job.adapter.r, job.adapter.alpha, job.data.batch_size, job.transfer.lr) == (
        8,
        16,
        32,
        2e-5,
    )
    assert (job.finetune.epochs, job.transfer.epochs) == (epochs, epochs)
    large = model in ("llama3", "llama31", "gemma2")
    assert (job.model.quantize, job.adapter.targets) == (
        ("nf4", "all_linear") if large else (None, "qv")
    )
    assert job.optim._target_.endswith("AdamW8bit") == large
    assert (job.data.max_length, job.task.select) == (
        (768, "last") if task == "tydiqa" else (128, "best")
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """architecture -> a checkpoint on disk"""
    root = tmp_path_factory.mktemp("checkpoints")
    for architecture in set(ARCHITECTURE.values()):
        (root / architecture).mkdir()
        pretrain(root / architecture, architecture=architecture, **SIZE)
    return root


def spans(example):
    return {
        "text": [a.text for a in example.answers],
        "answer_start": [a.start for a in example.answers],
    }


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """The toy tasks written as the benchmarks' files: English and, for sw and ace, the far
    language.
    """
    root = tmp_path_factory.mktemp("benchmarks")

    nli, senti, qa = ToyNLI(limit=40), ToySentiment(limit=40), ToyQA(limit=40)
    for split in ("train", "validation", "test"):
        for own, theirs in (("en", "en"), ("far", "sw")):
            rows = [
                {"premise": e.texts[0], "hypothesis": e.texts[1], "label": e.label}
                for e in nli.load(own, split)
            ]
            write_rows(root / f"xnli/{theirs}/{split}.parquet", rows)
        for own, theirs in (("en", "eng"), ("far", "ace")):
            rows = [
                {"id": e.key, "text": e.texts[0], "label": e.label} for e in senti.load(own, split)
            ]
            write_rows(root / f"nusax/{theirs}/{split}.parquet", rows)
        english, far = qa.load("en", split), qa.load("far", split)
        for own, examples, others, other in (
            ("en", english, far, "sw"),
            ("sw", far, english, "en"),
        ):
            rows = [
                {
                    "id": f"{own}-{e.key}",
                    "context": e.texts[0],
                    "question": e.texts[1],
                    "answers": spans(e),
                    "context_translated": o.texts[0],
                    "question_translated": o.texts[1],
                    "answers_translated": spans(o),
                }
                for e, o in zip(examples, others, strict=True)
            ]
            write_rows(
                root / f"tydiqa/{own}/{split}.parquet",
                [{k: v for k, v in r.items() if "translated" not in k} for r in rows],
            )
            write_rows(root / f"tydiqa/mt_{own}-{other}/{split}.parquet", rows)
    return root


def run(tmp_path, *overrides):
    """The result of a run of 16 examples and one epoch, and its provenance."""
    small = [
        "task.limit=16",
        "trainer=cpu",
        "trainer.max_epochs=1",
        "data.batch_size=8",
        "trainer.enable_progress_bar=false",
    ]
    rates = ["finetune.lr=1e-3", "transfer.lr=1e-3"]
    places = [f"output_dir={tmp_path / 'out'}", f"cache_dir={tmp_path / 'cache'}"]
    jobs, problems = validation.validate(last_of_each([*small, *rates, *places, *overrides]), False)
    assert problems == []
    measured = run_job(jobs[0], tmp_path / "out")
    return measured, json.loads((tmp_path / "out" / "provenance.json").read_text())


def paper(model, task, checkpoints, benchmarks, stride=32):
    mt = (
        "mt=file" if task == "tydiqa" else "mt=gold"
    )  # the default, NLLB 3.3B, cannot be had offline
    windows = (
        [f"task.doc_stride={stride}"] if task == "tydiqa" else []
    )  # the tiny models read 128 tokens
    return [
        f"model={model}",
        f"model.path={checkpoints / ARCHITECTURE[model]}",
        f"task={task}",
        mt,
        f"task.data_dir={benchmarks / task}",
        "decode.max_new_tokens=5",
        *windows,
    ]


# every task with one model of each family; another model of a family differs in size
FAMILY_RUNS = [
    *((model, task) for model in ("xlmr_base", "mt5_xl", "llama3", "gemma2") for task in TASKS),
    ("xlmr_large", "tydiqa"),
    ("llama31", "tydiqa"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "task"), FAMILY_RUNS)
def test_trains_and_tests(model, task, checkpoints, benchmarks, tmp_path):
    measured, provenance = run(
        tmp_path, *paper(model, task, checkpoints, benchmarks), "fusion=add_relu"
    )
    assert (measured["model"], measured["task"], measured["fusion"]) == (model, task, "add_relu")
    for block in ("test", "english", "zero_shot"):
        assert 0 <= measured[block][TASKS[task]] <= 1
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert len(rows) == 16
    assert all(row["source"] and row["source"] != row["target"] for row in rows)
    # every adapted layer learned something: 4-bit weights must not stop the gradient
    from safetensors.torch import load_file

    for folder in ("english", "adapter"):
        weights = load_file(tmp_path / "out" / folder / "adapter_model.safetensors")
        ups = {k: v for k, v in weights.items() if "lora_B" in k}
        assert ups
        assert all(v.abs().max() > 0 for v in ups.values())
    assert provenance["parameters"]["trainable"] < provenance["parameters"]["total"]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_as_in_the_paper(beams, cache, checkpoints, benchmarks, tmp_path):
    """decode=generate for classification: what is no label is wrong, and counted."""
    measured, provenance = run(
        tmp_path,
        *paper("llama31", "xnli", checkpoints, benchmarks),
        "decode=generate",
        "decode.max_new_tokens=3",
        f"decode.beams={beams}",
        f"decode.cache={cache}",
        "trainer.max_epochs=1",
    )
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    labels = {"entailment", "neutral", "contradiction"}
    assert provenance["test"]["unparsable"] == sum(row["prediction"] not in labels for row in rows)
    assert measured["test"]["accuracy"] == pytest.approx(
        sum(r["prediction"] == r["gold"] for r in rows) / len(rows)
    )


@pytest.mark.slow
def test_an_answer_that_is_cut_off_is_counted_and_its_prediction_is_scored(
    checkpoints, benchmarks, tmp_path, capsys
):
    measured, provenance = run(
        tmp_path,
        *paper("xlmr_base", "tydiqa", checkpoints, benchmarks, "null"),
        "data.max_length=60",
        "method=lora",
    )
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert len(rows) == 16
    assert 0 < provenance["test"]["cut_off"] < 16
    assert all(row["prediction"] for row in rows)
    assert (
        answers([r["prediction"] for r in rows], [r["gold"] for r in rows]).items()
        <= measured["test"].items()
    )
    assert (
        f"{provenance['test']['cut_off']} of 16 gold answers are beyond what the model reads"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_long_contexts_are_read_in_windows(checkpoints, benchmarks, tmp_path):
    """Nothing is cut, no example is lost, and cached sources are those of the windows."""
    measured = []
    for cache in ("off", "memory"):
        one, provenance = run(
            tmp_path / cache,
            *paper("xlmr_base", "tydiqa", checkpoints, benchmarks, 20),
            "task.window=90",
            f"source.cache={cache}",
        )
        measured.append({k: v for k, v in one.items() if k not in ("seconds", "source")})
        assert provenance["test"]["cut_off"] == 0
        assert provenance["training"]["transfer"]["cut_off"] == {"train": 0}
        rows = pq.read_table(tmp_path / cache / "out" / "predictions.parquet").to_pylist()
        assert len(rows) == 16
        assert all(row["prediction"] in row["target"] for row in rows)
    assert measured[0] == measured[1]


@pytest.mark.slow
def test_translated_questions_are_scored_against_the_original_answers(
    checkpoints, tmp_path, capsys
):
    """translate_test: a predicted English answer is translated back, by itself, by the model that
    translated the question.
    """
    small = ["mt=toy_nllb", "mt.pretrain.steps=60", "mt.pretrain.pairs=600", "mt.max_length=32"]
    embedded = [
        "model=custom",
        f"model.path={checkpoints / 'xlm-roberta'}",
        "task=toy_qa",
        "method=translate_test",
    ]
    measured, _ = run(tmp_path, *embedded, *small)
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    originals = ToyQA(limit=16).load("far", "test")
    assert [r["gold"] for r in rows] == [[a.text for a in e.answers] for e in originals]
    assert all(r["english_prediction"] in r["target"] for r in rows), (
        "it is a span of the English translation"
    )
    shards = [
        pq.read_table(path).to_pylist()
        for path in (tmp_path / "cache").glob("translation_shard/*/texts.parquet")
    ]
    (back,) = (
        found
        for found in shards
        if rows[0]["english_prediction"] in {row["original"] for row in found}
    )
    carried = {row["original"]: row["translation"] for row in back}
    assert [r["prediction"] for r in rows] == [carried[r["english_prediction"]] for r in rows]
    assert (
        answers([r["prediction"] for r in rows], [r["gold"] for r in rows]).items()
        <= measured["test"].items()
    )
    assert "translated back into far by mt=toy_nllb" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_what_is_saved_are_the_weights_that_are_given(tmp_path, tuning):
    """Those of the best epoch, say, where the model has the last one's."""
    backbone = random_backbone(("xlm-roberta", "label"))
    model = (
        adapter.add_adapter(backbone, r=4, alpha=8, fusion="gated")
        if tuning == "lora"
        else backbone.model.requires_grad_()
    )
    given = {name: torch.rand_like(p) for name, p in model.named_parameters() if p.requires_grad}
    save_model(model, given, tmp_path)
    saved = load_file(next(tmp_path.glob("*.safetensors")))
    assert len(saved) == len(given)
    for name, tensor in given.items():
        assert torch.equal(saved[re.sub(r"\.(modules_to_save\.)?default(?=\.)", "", name)], tensor)


@pytest.mark.slow
def test_an_encoder_decoder_can_be_asked_by_a_prompt(checkpoints, benchmarks, tmp_path):
    """The encoder fuses, the decoder is adapted without fusion."""
    measured, _ = run(
        tmp_path,
        *paper("mt5_xl", "tydiqa", checkpoints, benchmarks),
        "task.form=generative",
        "method=flare",
    )
    stacks = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())[
        "stacks"
    ]
    assert list(stacks) == ["encoder"]
    assert 0 <= measured["test"]["f1"] <= 1


def test_a_form_that_a_family_lacks_is_a_users_error(checkpoints, benchmarks, tmp_path):
    from flare_exp.errors import UserError

    with pytest.raises(UserError, match=r"task\.form=head: .* choose task\.form=generative"):
        run(tmp_path, *paper("llama31", "xnli", checkpoints, benchmarks), "task.form=head")
    with pytest.raises(UserError, match=r"task\.form=generative: .* choose task\.form=head"):
        run(
            tmp_path / "x",
            *paper("xlmr_base", "xnli", checkpoints, benchmarks),
            "task.form=generative",
        )
    with pytest.raises(UserError, match="soft labels are learned by a classification head"):
        run(tmp_path / "y", *paper("llama31", "xnli", checkpoints, benchmarks), "method=distil")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["decode=generate"], "decode=generate: tiny answers toy_sentiment by a head"),
        (
            ["model=tiny_decoder", "fusion=cross_attn", "fusion.query=source"],
            "fusion.query=source with tiny_decoder: each position would read",
        ),
    ],
)
def test_what_an_embedded_model_cannot_do_is_refused_before_it_is_built(tmp_path, options, message):
    from flare_exp.errors import UserError

    with pytest.raises(UserError, match=message):
        run(tmp_path, *options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mt5"])
def test_four_bit_weights_keep_their_gradient_after_an_evaluation(
    architecture, checkpoints, tmp_path
):
    """bitsandbytes repacks weights in passes without gradient, unless it is told not to."""
    from flare_exp.flare import adapter
    from flare_exp.flare.source_encoders import BackboneSourceEncoder

    precision = backbones.Precision("bfloat16", "nf4")
    also = ["embeddings", "lm_head"] if architecture == "llama" else []  # which are kept in 16 bits
    path = untied(checkpoints / architecture, tmp_path) if also else checkpoints / architecture
    backbone = backbones.load(str(path), "prompt", precision=precision)
    model = adapter.add_adapter(
        backbone, r=2, alpha=4, fusion="add_relu", targets="all_linear", also_train=also
    )
    ids = torch.randint(4, 100, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = {"decoder_input_ids": ids} if architecture == "mt5" else {}
    source = BackboneSourceEncoder(model)
    source.encode(None)
    with torch.no_grad():
        model.eval()(**batch, **more)
    model.train()
    source.encode(batch)
    model(**batch, **more).logits.float().square().sum().backward()
    ups = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(g is not None and g.abs().max() > 0 for g in ups)
    whole = {n: p.grad for n, p in model.named_parameters() if "modules_to_save" in n}
    assert len(whole) == len(also)
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in whole.values())
    counts = backbones.parameter_counts(model)
    exact = backbones.parameter_counts(backbones.load(str(path), "prompt").model)
    assert counts["total"] - counts["trainable"] == exact["total"]


def test_attention_that_a_family_lacks_is_refused(checkpoints):
    from flare_exp.errors import UserError

    assert (
        backbones.load(
            str(checkpoints / "llama"), "prompt", attention="eager"
        ).model.config._attn_implementation
        == "eager"
    )
    with pytest.raises(UserError, match=r"model\.attention=sdpa: for .* choose one of eager"):
        backbones.load(str(checkpoints / "gemma2"), "prompt", attention="sdpa")


def test_without_bitsandbytes_the_error_names_the_fix(monkeypatch):
    monkeypatch.setattr(constraints.importlib.util, "find_spec", lambda name: None)
    (problem,) = validation.validate(["model=llama31", "task=xnli"], False)[1]
    assert "pip install bitsandbytes" in problem
    assert "model.quantize=null" in problem
    assert (
        validation.validate(
            [
                "model=llama31",
                "task=xnli",
                "model.quantize=null",
                "optim._target_=torch.optim.AdamW",
            ],
            False,
        )[1]
        == []
    )


def test_llama_gets_a_pad_token_without_a_new_embedding(checkpoints):
    path = Path(checkpoints / "llama")
    assert "pad_token" not in json.loads((path / "tokenizer_config.json").read_text())
    tokenizer = backbones.load_tokenizer(str(path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == json.loads((path / "config.json").read_text())["vocab_size"]
