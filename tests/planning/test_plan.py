"""Plans: what is built, shared and missing; estimates against real runs and real tensors."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from planned import SIZES, jobs
from tables import write_rows

from flare_exp.cli import plan
from flare_exp.cli.main import main
from flare_exp.config import validation
from flare_exp.errors import UserError
from flare_exp.experiment import fitting, pipeline, provenance, results, runs
from flare_exp.models import backbones, families
from flare_exp.planning import (
    architectures,
    arithmetic,
    costs,
    counting,
    estimates,
    plans,
    preview,
    shapes,
    walk,
)
from flare_exp.toy.pretrain import pretrain

SMALL = [
    "model.pretrain.steps=20",
    "model.pretrain.documents=2000",
    "task.limit=96",
    "finetune.epochs=1",
    "transfer.epochs=1",
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
]


def test_a_mistake_exits_with_2_and_nothing_is_estimated(capsys):
    assert main(["plan", "methd=lora", "seed=-1"]) == 2
    told = capsys.readouterr().err
    assert "methd: there is no such option; did you mean method?" in told
    assert "seed=-1: must be 0 or more" in told


@pytest.mark.slow
def test_a_grid_builds_what_its_jobs_share_once(tmp_path):
    grid = jobs(
        *SMALL,
        f"cache_dir={tmp_path / 'cache'}",
        "method=lora,flare,zero_shot",
        "seed=0,1",
        multirun=True,
        scratch=tmp_path,
    )
    owners = [job.owners for job in grid]
    assert [o["backbone"] for o in owners] == [None, 0, 0, 0, 0, 0]
    assert [o["finetune"] for o in owners] == [None, None, 0, 1, 0, 1]
    assert [o.get("transfer", "none") for o in owners] == [None, None, None, None, "none", "none"]
    # the source of flare's test is a translation that lora does not need; zero-shot is scored with
    # every method
    assert [sum(job.made[n].kind == "translation" for n in job.todo) for job in grid] == [
        2,
        0,
        1,
        0,
        0,
        0,
    ]
    assert [o["test"] for o in owners] == [None, None, None, None, 0, 1]
    assert not (tmp_path / "cache").exists()  # looking leaves nothing
    fused = jobs(
        *SMALL,
        f"cache_dir={tmp_path / 'cache'}",
        "method=lora,flare",
        "fusion=add,mul",
        multirun=True,
        scratch=tmp_path,
    )
    assert [job.number for job in fused] == [
        2,
        3,
    ]  # as in the grid itself, lora does not combine with a fusion


# peak memory of a process that has only imported what a run does; then it becomes that run
LIBRARIES_THEN_RUN = """
import runpy
from flare_exp.cli import plan
from flare_exp.config import validation
from flare_exp.planning import plans
plans.quietly(plan._typed(validation.validate([], False)[0][0]))
from flare_exp.experiment import pipeline, provenance
print(provenance.peak_memory(), flush=True)
runpy.run_module("flare_exp", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_the_probe_is_within_30_percent_of_a_real_run_and_then_everything_is_built(
    tmp_path, capsys
):
    # so large that what is measured is the increase over the libraries' own memory
    small = [o for o in SMALL if not o.startswith(("task.limit", "model.pretrain.steps"))]
    overrides = [
        *small,
        "model.pretrain.steps=2",
        "model.pretrain.hidden_size=64",
        "task.limit=128",
        "data.batch_size=128",
        # the peak is that of a step of training: what is only read may be little
        "task.validation_split='validation[:24]'",
        "task.test_split='test[:24]'",
        "predict.sources=[given,none]",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    (job,) = jobs(*overrides, scratch=tmp_path)
    plans.price([job], tmp_path)
    assert job.todo == {*job.made}
    words = [*overrides, f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", LIBRARIES_THEN_RUN, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # nor at the end of the interpreter
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())
    base, real = int(done.stdout.split()[0]), facts["peak_memory_bytes"]
    assert real - base > 0.5 * base
    assert job.estimate.memory == pytest.approx(real, rel=0.3)
    assert job.estimate.memory - base == pytest.approx(real - base, rel=0.3)
    assert job.parameters == facts["parameters"]
    assert 0.2 < job.seconds / facts["seconds"]["total"] < 5  # the machine is not ours alone
    adapter = sum(f.stat().st_size for f in (tmp_path / "run" / "adapter").iterdir())
    assert 0.5 < job.estimate.disk["transfer"] / adapter < 2
    # every key that the plan asks for is one that the run has left
    assert main(["plan", *overrides]) == 0
    shown = capsys.readouterr().out
    assert "predict.sources=[given,none]" in shown
    assert f"with 0 artifacts to build, 0 shared, {len(job.made)} built" in shown
    assert f"{facts['parameters']['trainable']:,}" in shown


def three_blocks(folder: Path, architecture: str) -> list[str]:
    """Make a tiny model of three blocks below `folder`; returns its arguments on a command line."""
    torch.manual_seed(0)
    pretrain(
        folder / "model",
        architecture=architecture,
        world_seed=0,
        documents=500,
        steps=1,
        batch_size=4,
        lr=1e-3,
        vocab_size=600,
        hidden_size=64,
        layers=3,
        heads=4,
        target_share=0.05,
    )
    return [
        "model=custom",
        f"model.path={folder / 'model'}",
        "task.limit=64",
        "trainer=cpu",
        f"cache_dir={folder / 'cache'}",
    ]


@pytest.mark.slow
def test_a_grid_over_fusions_plans_all_members_of_an_ensemble(tmp_path, capsys):
    """What a grid leaves out is a cell that was asked for, not a member without a fusion."""
    words = [*SMALL, f"cache_dir={tmp_path / 'cache'}", "fusion=add,mul"]
    given = ["method=ensemble", "method.of=[lora,flare]"]
    found = jobs(*words, *given, scratch=tmp_path, multirun=True)
    assert [job.cfg.method.name for job in found] == ["lora", "flare"] * 2
    assert main(["plan", "-m", *words, "method=lora"]) == 0
    said = "cells left out: 2, which combine fusion=... or source=robust with"
    assert capsys.readouterr().out.strip().startswith(said)


def test_the_texts_that_teachers_label_are_priced_and_their_jobs_explained(tmp_path):
    """Measured where the weights are here, and counted where they are not."""
    labels = {"labels flare", "labels translate_test"}
    method = ["method=distil", "method.of=[flare,translate_test]"]
    found = jobs(*three_blocks(tmp_path, "xlm-roberta"), *method, scratch=tmp_path)
    assert plan.notes(found) == [
        "job 0, 1: there for method=distil, which learns from what its teachers predict"
    ]
    student = found[-1]
    assert labels <= student.todo
    measured = estimates.estimate(student.cfg, tmp_path, labels)
    assert min(measured.seconds[name] for name in labels) > 0
    assert measured.parameters == {}, "the teachers are trained elsewhere"
    words = ["model=xlmr_base", "task=nusax", "task.lang=jav", f"cache_dir={tmp_path / 'none'}"]
    counted = jobs(*words, *method, scratch=tmp_path)[-1]
    cost = estimates.estimate(counted.cfg, tmp_path, {*labels, "transfer"}).seconds
    # a teacher with a source reads twice as many texts, and a step of training takes three passes
    assert cost["labels translate_test"] < cost["labels flare"] < cost["transfer"]


def test_the_tasks_of_a_grid_have_english_models_of_their_own(tmp_path):
    words = [*three_blocks(tmp_path, "xlm-roberta"), "method=lora"]
    for task in ("toy_sentiment", "toy_qa"):  # their heads have other shapes
        stages = stages_of([*words, f"task={task}"], tmp_path)
        ((name, *_),) = walk.iter_stage_models(stages, {"transfer"})
        assert name == "transfer"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["xlm-roberta", "llama", "mt5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_arithmetic_counts_the_tensors_that_a_real_step_has(
    architecture, checkpointing, tmp_path, monkeypatch
):
    given = [
        *three_blocks(tmp_path, architecture),
        f"model.gradient_checkpointing={str(checkpointing).lower()}",
    ]
    (cfg,) = (plan._typed(c) for c in validation.validate(given, False)[0])
    stages = preview.preview(plans.settled(cfg), tmp_path)
    ((_, model, source, data, _),) = walk.iter_stage_models(stages, {"transfer"})
    module = fitting.make_module(stages.run, model.train(), source)
    batch, _ = counting._batch(stages.run, data, cfg.data.batch_size)
    for side in ("target", "source"):
        batch[side]["attention_mask"][0, :3] = 0  # without padding some attention has no mask
    with counting.Counter({p.untyped_storage()._cdata for p in model.parameters()}) as counter:
        counting._sum(
            module(batch, batch["answer"]) if "answer" in batch else module(batch)
        ).backward()
    kept = sum(
        p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters()
    )  # and two moments
    monkeypatch.setattr(shapes, "weights_here", lambda *_: False)
    sketch = preview.preview(plans.settled(cfg), tmp_path)
    ((_, model, source, data, _),) = walk.iter_stage_models(sketch, {"transfer"})
    assert counting.Work(sketch.run, model, source, data).step == pytest.approx(
        kept + max(counter.peaks.values()), rel=0.1
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny decoder; its arguments on a command line."""
    folder = tmp_path_factory.mktemp("llama")
    return three_blocks(folder, "llama")


def stages_of(given: list[str], folder: Path) -> preview.DryRun:
    (cfg,) = (plan._typed(c) for c in validation.validate(given, False)[0])
    return preview.preview(plans.settled(cfg), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        ["task=toy_nli"],
        ["task=toy_nli", "data.micro_batch_size=4"],
        ["task=toy_qa", "decode=generate", "decode.beams=2"],
    ],
    ids=["scored", "scored in parts", "written"],
)
def test_arithmetic_counts_the_tensors_that_a_real_prediction_has(
    llama, given, tmp_path, monkeypatch
):
    given = [*llama, *given, *(["decode.max_new_tokens=20"] if "task=toy_qa" in given else [])]
    stages = stages_of(given, tmp_path)
    ((_, model, source, data, _),) = walk.iter_stage_models(stages, {"transfer"})
    module = fitting.make_module(stages.run, model.eval(), source)
    batch, _ = counting._batch(
        stages.run,
        data,
        stages.run.cfg.data.micro_batch_size or stages.run.cfg.data.batch_size,
    )
    batch["index"] = torch.arange(len(batch["target"]["input_ids"]))
    # whose EOS no model writes, so that the longest answer is
    module.tokenizer = SimpleNamespace(
        pad_token_id=0, eos_token_id=-1, batch_decode=lambda ids, **_: map(str, ids.tolist())
    )
    with (
        counting.Counter({p.untyped_storage()._cdata for p in model.parameters()}) as counter,
        torch.no_grad(),
    ):
        module.predict(batch)
    kept = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(shapes, "weights_here", lambda *_: False)
    sketch = stages_of(given, tmp_path)
    ((_, model, source, data, _),) = walk.iter_stage_models(sketch, {"transfer"})
    assert counting.Work(sketch.run, model, source, data).testing == pytest.approx(
        kept + max(counter.peaks.values()), rel=0.15
    )


def test_fewer_rows_in_a_pass_need_less_memory(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "weights_here", lambda *_: False)
    found = []
    for rows in (32, 4):
        stages = stages_of([*llama, "task=toy_nli", f"data.micro_batch_size={rows}"], tmp_path)
        ((_, model, source, data, _),) = walk.iter_stage_models(stages, {"transfer"})
        found.append(counting.Work(stages.run, model, source, data))
    assert found[1].step < 0.5 * found[0].step
    assert found[1].testing < 0.5 * found[0].testing


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("40GiB", 40 * 2**30),
        ("1.5TB", 1.5e12),
        ("512MB", 512e6),
        ("80", 0),
        ("80gb", 0),
        ("0GB", 0),
        ("-1GB", 0),
        ("GB", 0),
    ],
)
def test_sizes(text, size):
    assert plan.bytes_of(text) == size


def test_a_wrong_size_is_told_with_the_other_mistakes(capsys):
    assert main(["plan", "memory=much", "seed=-1"]) == 2
    told = capsys.readouterr().err
    assert "2 problems" in told
    assert "memory=much: must be a size above 0 like 80GB or 40GiB" in told


@pytest.fixture
def five_bytes_a_row(monkeypatch):
    """Estimates of 10 bytes, and 5 for each row of a pass; the rows that were asked for."""
    asked = []

    def estimated(job, scratch):
        asked.append(job.cfg.data.micro_batch_size or job.cfg.data.batch_size)
        counts = {stage: {"trainable": 1, "total": 1} for stage in ("finetune", "transfer")}
        return costs.Estimate([], parameters=counts, memory=10 + 5 * asked[-1])

    monkeypatch.setattr(plans, "_estimated", estimated)
    return asked


@pytest.mark.parametrize(
    ("limit", "rows", "device", "expected"),
    [
        (100, 32, "cpu", 16),
        (170, 32, "cpu", 32),
        (130, 24, "cpu", 24),
        (110, 24, "gpu", 16),  # a tenth is left
        (14, 32, "cpu", 0),
        (15, 1, "cpu", 1),
    ],
)
def test_the_largest_micro_batch_that_fits(limit, rows, device, expected, five_bytes_a_row):
    (cfg,) = (
        plan._typed(c)
        for c in validation.validate([f"data.batch_size={rows}", f"trainer={device}"], False)[0]
    )
    jobs = [plans.Job(n, [], replace(cfg, seed=n), {}, {"transfer": None}) for n in range(2)]
    found = plans.fitting(jobs, limit, Path())
    assert found == {n: (expected, 10 + 5 * max(1, expected)) for n in range(2)}
    assert len(five_bytes_a_row) == len({*five_bytes_a_row}), "nothing is estimated twice"


@pytest.mark.parametrize(
    ("limit", "code", "told"),
    [
        ("0.1kB", 0, "\ndata.micro_batch_size=16 fits 0.1kB (90 B)"),
        ("0.01kB", 1, "\nnot even data.micro_batch_size=1 fits 0.01kB (15 B)"),
    ],
)
def test_plan_says_which_micro_batch_fits(llama, five_bytes_a_row, limit, code, told, capsys):
    assert main(["plan", f"memory={limit}", *llama, "task=toy_nli", "method=zero_shot"]) == code
    assert told in capsys.readouterr().out


@pytest.mark.slow
def test_the_missions_own_command_fits_an_80_gb_gpu(tmp_path):
    """As it is written in the README, with every row as long as it may be."""
    for model in ("llama3", "llama31", "gemma2"):
        (cfg,) = (
            plan._typed(c) for c in validation.validate([f"model={model}", "task=tydiqa"], False)[0]
        )
        assert cfg.model.gradient_checkpointing
        assert cfg.data.micro_batch_size == 8
    (job,) = jobs(
        "model=llama31",
        "task=tydiqa",
        "trainer=gpu",
        f"cache_dir={tmp_path / 'cache'}",
        scratch=tmp_path,
    )
    stages = preview.preview(job.cfg, tmp_path)
    ((_, model, source, data, _),) = walk.iter_stage_models(stages, {"transfer"})
    # as the plan counts it: two shallow models give what all 32 layers do (below, exactly)
    shallow = functools.partial(arithmetic._of_depth, stages, "transfer")
    assert counting.Work(stages.run, model, source, data, shallow).training < 0.5 * 80e9


def test_llama_has_its_published_size_and_lora_its_closed_formula(tmp_path):
    (job,) = jobs(
        "model=llama31",
        "task=toy_nli",
        "method=lora",
        f"cache_dir={tmp_path / 'cache'}",
        scratch=tmp_path,
    )
    assert plan.column(job, "model") == "download"
    assert sum(job.download.values()) == pytest.approx(16.06e9, rel=0.01)
    assert (
        job.cfg.trainer.precision == "bf16-mixed"
    )  # a model that is not here is planned for a GPU
    stages = preview.preview(job.cfg, tmp_path)
    english, adapted = (
        backbones.parameter_counts(m)
        for _, m, *_ in walk.iter_stage_models(stages, {"finetune", "transfer"})
    )
    d, kv, ffn, rank, layers = 4096, 1024, 14336, 8, 32
    lora = layers * rank * (2 * (d + d) + 2 * (d + kv) + 3 * (d + ffn))
    assert english["trainable"] == adapted["trainable"] == lora == 20_971_520
    assert english["total"] - lora == pytest.approx(8.03e9, rel=1e-3)
    assert (
        adapted["total"] - english["total"] == lora
    )  # beside 4-bit weights the English adapter stays
    # packed weights: 16 bits for embeddings and norms, a little more than 4 for the rest
    linear = layers * (2 * d * d + 2 * d * kv + 3 * d * ffn)
    expected = 2 * (english["total"] - lora - linear) + 4 * lora + linear * (0.5 + 1 / 64)
    model = stages.run.models.add_adapter(stages.run.models.fresh_backbone())
    assert counting._weights(stages.run, model) == pytest.approx(
        expected + 2 * d * ffn, rel=0.01
    )  # one is unpacked


def test_named_models_have_their_published_sizes():
    from transformers import AutoModel

    published = {
        "FacebookAI/xlm-roberta-base": 0.278,
        "FacebookAI/xlm-roberta-large": 0.56,
        "google/mt5-xl": 3.74,
        "google/gemma-2-9b": 9.24,
        "facebook/nllb-200-distilled-600M": 0.615,
        "facebook/nllb-200-3.3B": 3.345,
    }
    for name, billions in published.items():
        with torch.device("meta"):
            model = AutoModel.from_config(shapes.config_of(name))
        counted = model.num_parameters() + (
            250112 * 2048 if "mt5" in name else 0
        )  # its output matrix is another one
        assert counted / 1e9 == pytest.approx(billions, rel=0.01), name


def test_every_hub_model_of_the_configuration_is_known():
    for group, names in (
        ("model", ("xlmr_base", "xlmr_large", "mt5_xl", "llama3", "llama31", "gemma2")),
        ("mt", ("nllb_600m", "nllb_1b3", "nllb_1b3_distilled", "nllb_3b3")),
    ):
        for name in names:
            (cfg,) = validation.validate(
                [f"{group}={name}", "task=xnli"]
                if group == "model"
                else ["task=xnli", f"mt={name}"],
                False,
            )[0]
            assert getattr(cfg, group).path in architectures.ARCHITECTURES


def test_peak_memory_is_not_inherited():
    own = bytearray(300 * 10**6)
    code = "from flare_exp.experiment import provenance; print(provenance.peak_memory())"
    child = int(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    assert child < len(own) < provenance.peak_memory()


@pytest.mark.parametrize(("model", "task"), [("xlmr_base", "nusax"), ("xlmr_base", "tydiqa")])
def test_without_model_and_data_published_sizes_are_planned_with(model, task, tmp_path):
    (job,) = jobs(
        f"model={model}", f"task={task}", f"cache_dir={tmp_path / 'cache'}", scratch=tmp_path
    )
    found = estimates.estimate(job.cfg, tmp_path, job.todo)
    assert {*found.seconds} == job.todo
    assert all(taken > 0 for taken in found.seconds.values())
    assert found.memory > 4 * found.total  # 32-bit weights and more
    assert any("published ones" in note for note in found.notes)
    assert any("mt=nllb_3b3 are not there yet" in note for note in found.notes)


def test_translations_in_files_are_planned_with_where_the_benchmark_is_not_here(tmp_path):
    given = ["model=xlmr_base", "task=nusax", "task.lang=jav", "mt=file", f"mt.path={tmp_path}"]
    given += ["method=lora", f"cache_dir={tmp_path / 'cache'}"]
    folder = tmp_path / "mt_eng-jav"
    folder.mkdir()
    write_rows(folder / "train.parquet", [{"text": "good", "text_translated": "apik"}])
    with pytest.raises(UserError, match=r"there is no .*validation\.parquet"):
        jobs(*given, scratch=tmp_path)
    (folder / "validation.parquet").write_bytes((folder / "train.parquet").read_bytes())
    (job,) = jobs(*given, scratch=tmp_path)
    assert {"transfer", "test"} <= job.todo


def test_a_further_translation_system_is_planned_and_priced(tmp_path):
    given = ["model=xlmr_base", "task=nusax", f"cache_dir={tmp_path / 'cache'}"]
    (one,), (two,) = (
        jobs(*given, f"source.systems=[{names}]", scratch=tmp_path) for names in ("", "nllb_600m")
    )
    assert two.made["transfer"].digest == one.made["transfer"].digest
    more = sum(two.download.values()) - sum(one.download.values())
    assert more / 4e9 == pytest.approx(0.615, rel=0.01)
    own, all_ = ({n for n in j.todo if j.made[n].kind == "translation"} for j in (one, two))
    (added,) = all_ - own
    found = estimates.estimate(two.cfg, tmp_path, two.todo)
    assert 0 < found.seconds[added] < min(found.seconds[name] for name in own)
    assert any("mt=nllb_3b3 and mt=nllb_600m are not there yet" in note for note in found.notes)


# a small model of every family, as if its checkpoint were on the hub
_GROUPED = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "bert": SIZES,
    "xlm-roberta": SIZES | {"max_position_embeddings": 514},
    "mt5": {
        "vocab_size": 100,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
    },
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), _GROUPED),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_can_be_planned_and_one_with_every_task_and_method(
    family, tmp_path, monkeypatch, capsys
):
    # a name of its own: what was counted for another family with the same weights is not found
    path = f"org/{family}"
    monkeypatch.setitem(
        architectures.ARCHITECTURES, path, {"model_type": family, **FAMILIES[family]}
    )
    model = ["model=custom", f"model.path={path}", f"cache_dir={tmp_path / 'cache'}"]
    every = family == "xlm-roberta"  # what follows from the method alone is planned once
    # one text or two: the families take turns
    label = ["nusax", "xnli"][list(families.FAMILIES).index(family) % 2]
    grids = [(f"{label},tydiqa", "nllb_600m", "flare")]
    if family in ("bert", "llama", "mt5"):  # a head, prompts, two stacks: once for each
        grids += [(label, "nllb_600m", "flare_mt"), ("toy_qa", "toy", "flare")]
    if every:
        grids = [
            ("nusax,xnli,tydiqa", "nllb_600m", "zero_shot,translate_test,lora,flare,flare_mt"),
            ("toy_sentiment,toy_nli,toy_qa", "toy", "lora,zero_shot,translate_test,flare"),
        ]
    for benchmarks, translation, methods in grids:
        grid = jobs(
            *model,
            f"task={benchmarks}",
            f"mt={translation}",
            f"method={methods}",
            "task.limit=40",
            multirun=True,
            scratch=tmp_path,
        )
        plans.price(grid, tmp_path)
        plan.show(grid, 0)
        assert all(0 < job.parameters["trainable"] < job.parameters["total"] for job in grid)
        for job in grid:
            assert {n for n in job.todo if job.made[n].kind != "translation"} <= {
                *(job.estimate.seconds if job.estimate else ())
            }
            # translated text is other text, though it is not there yet
            assert job.owners["test"] is None or job.cfg.method.name == "zero_shot"
    assert (capsys.readouterr().out.count("shared with") > 10) == every


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("xlm-roberta", ["task=nusax"]),
        ("llama", ["task=tydiqa", "data.micro_batch_size=4", "model.gradient_checkpointing=true"]),
        # a block's gradients are larger than what it saves
        (
            "xlm-roberta",
            ["task=nusax", "data.micro_batch_size=1", "data.max_length=8", "adapter.r=16"],
        ),
        pytest.param("mt5", ["task=xnli"], marks=pytest.mark.slow),
        pytest.param(
            "gemma2",
            ["task=xnli", "method=flare_mt", "trainer.precision=bf16-mixed"],
            marks=pytest.mark.slow,
        ),
        pytest.param("gemma3_text", ["task=nusax"], marks=pytest.mark.slow),
    ],
)
def test_a_deep_model_is_counted_by_two_shallow_ones(family, given, tmp_path, monkeypatch):
    own = {**FAMILIES[family], **{name: 8 for name in FAMILIES[family] if name.endswith("_layers")}}
    monkeypatch.setitem(architectures.ARCHITECTURES, "org/deep", {"model_type": family, **own})
    given = ["model=custom", "model.path=org/deep", *given, f"cache_dir={tmp_path / 'cache'}"]
    (cfg,) = (plan._typed(c) for c in validation.validate(given, False)[0])
    stages = preview.preview(plans.settled(cfg), tmp_path)
    counted = []

    def build(depth):
        counted.append(depth)
        return arithmetic._of_depth(stages, "transfer", depth)

    ((_, model, source, data, _),) = walk.iter_stage_models(stages, {"transfer"})
    shallow = counting.Work(stages.run, model, source, data, build)
    assert counted == ([] if "adapter.r=16" in given or family == "gemma3_text" else [3, 4])
    assert vars(shallow) == vars(counting.Work(stages.run, model, source, data))


def test_jobs_that_differ_have_numbers_of_their_own(tmp_path, monkeypatch):
    deep = {**FAMILIES["xlm-roberta"], "num_hidden_layers": 8}
    monkeypatch.setitem(
        architectures.ARCHITECTURES, "org/deep", {"model_type": "xlm-roberta", **deep}
    )
    model = ["model=custom", "model.path=org/deep", "task=nusax", f"cache_dir={tmp_path / 'cache'}"]
    grid = jobs(*model, "method=lora,flare", "adapter.r=4,8", multirun=True, scratch=tmp_path)
    plans.price(grid, tmp_path)
    assert len({(job.estimate.seconds["transfer"], job.estimate.memory) for job in grid}) == len(
        grid
    )
    monkeypatch.setattr(counting, "_WORK", {})  # as if the last one were planned alone
    alone = estimates.estimate(grid[-1].cfg, tmp_path, grid[-1].todo)
    assert (alone.seconds, alone.memory) == (grid[-1].estimate.seconds, grid[-1].estimate.memory)


def test_jobs_that_cost_the_same_are_counted_once(tmp_path, monkeypatch):
    monkeypatch.setitem(
        architectures.ARCHITECTURES,
        "org/small",
        {"model_type": "xlm-roberta", **FAMILIES["xlm-roberta"]},
    )
    counted = []
    estimate = estimates.estimate
    monkeypatch.setattr(
        estimates, "estimate", lambda *given: counted.append(given) or estimate(*given)
    )
    grid = jobs(
        "model=custom",
        "model.path=org/small",
        "task=xnli",
        "method=lora,flare",
        "task.lang=sw,ur,ar",
        "seed=0,1,2",
        f"cache_dir={tmp_path / 'cache'}",
        multirun=True,
        scratch=tmp_path,
    )
    plans.price(grid, tmp_path)
    # lora with English training, with its translations, and without either; flare in the same way
    # has the translated test only
    assert len(counted) <= 6
    for job in grid:
        assert job.estimate.seconds.keys() >= job.todo
    alone = estimate(grid[-1].cfg, tmp_path, grid[-1].todo)
    assert alone.seconds == pytest.approx(grid[-1].estimate.seconds)


def test_few_rows_stand_for_all_that_were_published(tmp_path, monkeypatch):
    found = []
    for few in (preview.FEW, 3000):
        monkeypatch.setattr(preview, "FEW", few)
        (job,) = jobs(
            "model=xlmr_base",
            "task=tydiqa",
            "method=flare",
            f"cache_dir={tmp_path / 'cache'}",
            scratch=tmp_path,
        )
        found.append(estimates.estimate(job.cfg, tmp_path, job.todo))
    few, many = found
    assert list(few.seconds.values()) == pytest.approx(list(many.seconds.values()), rel=0.01)
    assert few.memory == many.memory


def test_an_unknown_checkpoint_is_a_mistake(tmp_path, capsys):
    assert main(["plan", "model=custom", "model.path=nobody/nothing", f"cache_dir={tmp_path}"]) == 2
    assert "nobody/nothing: its config.json is not here" in capsys.readouterr().err


@pytest.fixture
def peaks(tmp_path, monkeypatch):
    """(bytes that each job of a process allocates) -> the peak that each job's provenance gives."""

    def run(*sizes: int) -> list[int | None]:
        found = []

        def job(cfg, folder):
            block = torch.ones(sizes[int(folder.name)], dtype=torch.uint8)
            pieces = [
                bytes(500) for _ in range(block.nbytes // 5000)
            ]  # the allocator keeps small pieces
            found.append(provenance.provenance()["peak_memory_bytes"])
            del block, pieces
            return {}

        monkeypatch.setattr(pipeline, "run", job)
        monkeypatch.setattr("flare_exp.experiment.notes.notes", lambda *_: [])
        monkeypatch.setattr(results, "print_table", lambda *_: None)
        monkeypatch.setattr(provenance, "PEAK", provenance.PeakMemory())
        for number in range(len(sizes)):
            runs.run_job(validation.validate([], False)[0][0], tmp_path / str(number))
        return found

    return run


def test_peak_memory_of_a_job_is_its_own(peaks):
    small, large, after = peaks(1, 4 * 10**8, 1)
    assert large - small > 3.9 * 10**8
    assert after - small < 10**8


def test_peak_memory_that_includes_earlier_jobs_is_not_given(peaks, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "CLEAR_REFS", tmp_path / "no" / "such" / "file")
    first, second = peaks(1, 1)
    assert first > 10**7, "the first job's peak is that of the process"
    assert second is None
