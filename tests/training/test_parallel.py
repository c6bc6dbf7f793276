"""Several processes against one: gradients of every task type (I9), shares of batches, whole runs,
and failures of a process.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import processes
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from random_models import random_backbone, token_batch
from runs import last_of_each
from safetensors.torch import load_file
from small_checkpoints import tiny_checkpoint
from tables import assert_same_predictions
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler

from flare_exp.artifacts import ArtifactStore
from flare_exp.cli.commandline import normalized
from flare_exp.config import validation
from flare_exp.data.sampling import (
    LengthBucketedBatchSampler,
    RankShardBatchSampler,
    micro_batches_per_batch,
)
from flare_exp.errors import UserError
from flare_exp.experiment import launch, pipeline
from flare_exp.experiment.runs import run_job
from flare_exp.flare import adapter
from flare_exp.flare.source_encoders import BackboneSourceEncoder, MTSourceEncoder
from flare_exp.training import distributed
from flare_exp.training.generation import AnswerDecoding, GenerationModule
from flare_exp.training.heads import ClassificationModule, SpanModule

BACKBONES_BY_TYPE = {
    "label": ("xlm-roberta", "label"),
    "span": ("bert", "span"),
    "prompt": ("llama", "prompt"),
}
ROWS = 5  # odd: the shares are unequal
STEPS = [
    (ROWS, 1),
    (1, 1),
    (ROWS, 2),
    (ROWS, 5),
    (1, 2),
]  # rows of the global batch, micro-batches of each process


def module_of(task_type, kind=None, encoder=None):
    """A FLARE (with an `encoder`: FLARE MT) module in float64 with a random B, the same in every
    process.
    """
    backbone, width = (
        random_backbone(kind or BACKBONES_BY_TYPE[task_type]),
        encoder.config.d_model if encoder else None,
    )
    torch.manual_seed(3)
    model = (
        adapter.add_adapter(backbone, r=4, alpha=8, fusion="gated", source_width=width)
        .double()
        .train()
    )
    for module in model.modules():  # a mask of dropout follows from the process, not from the row
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # mT5's attention
            module.dropout = 0.0
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "flare_fusion" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    source = MTSourceEncoder(model, encoder) if encoder else BackboneSourceEncoder(model)
    if task_type == "label":
        return ClassificationModule(model, ["a", "b", "c"], source=source)
    if task_type == "span":
        return SpanModule(model, source=source)
    return GenerationModule(model, None, lambda text: [5], AnswerDecoding(), source=source)


# loss terms of each row of `batch_of`
TERMS = {"label": [1, 1, 1, 1, 1], "span": [2, 0, 2, 0, 2], "prompt": [1, 4, 2, 3, 2]}


def parts_of(task_type, rows, rank, size, passes=1):
    """A process's micro-batches of the global batch of the first `rows` rows."""
    for part in RankShardBatchSampler(
        BatchSampler(range(rows), ROWS, False), TERMS[task_type], rank, size, passes
    ):
        yield {**batch_of(task_type, [row for row, _ in part]), "whole": part[0][1]}


def batch_of(task_type, index):
    """Rows `index` of one batch (a negative one is a stand-in), with as much to learn in one row as
    in another or not.
    """
    side, chosen = (
        "left" if task_type == "prompt" else "right",
        [i if i >= 0 else ~i for i in index],
    )

    def taken(tensors):
        return {name: x[chosen] for name, x in tensors.items()}

    batch = {
        "index": torch.tensor(index),
        "target": taken(token_batch([7, 4, 6, 5, 7], 1, side=side)),
        "source": taken(token_batch([5, 9, 3, 4, 6], 2, side=side)),
    }
    if task_type == "label":
        return {**batch, "labels": torch.tensor([0, 2, 1, 1, 0])[chosen]}
    if task_type == "span":
        offsets = torch.arange(7)[None, :, None].repeat(len(chosen), 1, 2)
        # rows 1 and 3 lost their answer: one process has two rows that teach, the other none or
        # three
        return {
            **batch,
            "offsets": offsets,
            "span": torch.tensor([[1, 2], [-1, -1], [3, 3], [-1, -1], [2, 5]])[chosen],
        }
    return {**batch, "answer": taken(token_batch([1, 4, 2, 3, 2], 3))}


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


class Loss(torch.nn.Module):
    """What DDP wraps in a Lightning run: the training step."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.loss(batch)


def one_process(task_type, folder, rank):
    """Gradients of one step on this process's shares of batches of five rows and of one, read at
    once or in micro-batches.
    """
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = []
    for rows, passes in STEPS:
        module = module_of(task_type)
        wrapped = DistributedDataParallel(Loss(module))  # must outlive the backward pass
        parts, loss = list(parts_of(task_type, rows, rank, 2, passes)), 0
        for n, batch in enumerate(parts, 1):
            with nullcontext() if n == len(parts) else wrapped.no_sync():  # as Lightning does
                part = wrapped(batch) / passes
                part.backward()
            loss = loss + part.detach()
        dist.all_reduce(loss)
        found.append((loss / 2, gradients(module)))
    texts = distributed.all_gather_dict({rank: f"text {rank}"})
    torch.save((found, texts), folder / f"{rank}.pt")
    del wrapped
    launch.destroy_process_groups()


def in_two_processes(work, *arguments):
    """work(*arguments, rank) in each."""
    workers = [
        processes.CONTEXT.Process(target=work, args=(*arguments, rank), daemon=True)
        for rank in range(2)
    ]
    for process in workers:
        process.start()
    for process in workers:
        process.join(240)
        assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("task_type", BACKBONES_BY_TYPE)
def test_i9_two_processes_have_the_gradients_of_one(task_type, tmp_path):
    in_two_processes(one_process, task_type, tmp_path)
    for rank in range(2):
        found, texts = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert texts == {0: "text 0", 1: "text 1"}
        for (rows, _), (loss, grads) in zip(STEPS, found, strict=True):
            module = module_of(task_type)
            expected = module.loss(batch_of(task_type, list(range(rows))))
            expected.backward()
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
            for name, gradient in gradients(module).items():
                torch.testing.assert_close(
                    grads[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
                )
            assert any(g.abs().max() > 1e-3 for g in grads.values())


@pytest.mark.parametrize(
    ("rows", "batch", "size", "micro"),
    [
        (21, 4, 2, None),
        (21, 4, 3, None),
        (5, 2, 4, None),
        (3, 32, 2, None),
        (21, 8, 1, 3),
        (21, 8, 2, 1),
        (33, 32, 3, 4),
    ],
)
def test_shares_make_up_the_batches_of_one_process(rows, batch, size, micro):
    make, terms = (
        functools.partial(LengthBucketedBatchSampler, [7 * i % 5 for i in range(rows)], batch, 0),
        [i % 3 for i in range(rows)],
    )
    passes = micro_batches_per_batch(batch, micro, size)
    whole, shares = (
        make(),
        [RankShardBatchSampler(make(), terms, rank, size, passes) for rank in range(size)],
    )
    for epoch in range(2):
        for sampler in (whole, *shares):
            sampler.set_epoch(epoch)
        read = [list(share) for share in shares]
        assert (
            {len(own) for own in read} == {len(share) for share in shares} == {passes * len(whole)}
        )
        assert all(own for parts in read for own in parts)
        assert max(len(own) for parts in read for own in parts) <= (micro or batch)
        for n, expected in enumerate(whole):
            parts = [own for every in read for own in every[n * passes : (n + 1) * passes]]
            assert sorted(i for part in parts for i, _ in part if i >= 0) == sorted(expected)
            assert all(~i in expected for part in parts for i, _ in part if i < 0)
            facts = (sum(terms[i] for i in expected), size * passes, len(expected), epoch)
            assert {about for part in parts for _, about in part} == {facts}


def test_one_process_needs_no_group():
    assert distributed.all_gather_dict({1: "a"}) == {1: "a"}
    assert "strategy" not in distributed.SINGLE_PROCESS.trainer_options(None, "32-true")


def test_a_follower_takes_what_the_leader_left(tmp_path):
    def refuse(folder):
        raise AssertionError("only the leader builds")

    made = ArtifactStore(tmp_path, distributed.DistributedContext(0, 2)).get(
        "kind", {"a": 1}, lambda folder: {"x": 1}
    )
    left = ArtifactStore(tmp_path, distributed.DistributedContext(1, 2)).get(
        "kind", {"a": 1}, refuse
    )
    assert (left.path, left.info) == (made.path, made.info)


def test_fewer_gpus_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    cfg = OmegaConf.to_object(validation.validate(["trainer=ddp"], False)[0][0])
    with pytest.raises(UserError, match=r"trainer\.devices=2: torch sees 1 GPU here"):
        pipeline.resolve_hardware(cfg)
    pipeline.resolve_hardware(replace(cfg, trainer=replace(cfg.trainer, devices=1)))


def test_a_run_is_loaded_without_the_optimizer_that_trained_it(monkeypatch):
    monkeypatch.setattr(pipeline, "quantization_problem", lambda: "not here")
    words = ["trainer=cpu", "optim._target_=bitsandbytes.optim.AdamW8bit"]
    cfg = OmegaConf.to_object(validation.validate(words, False)[0][0])
    pipeline.resolve_hardware(cfg)
    with pytest.raises(UserError, match="bitsandbytes cannot be used here"):
        pipeline.hardware_of_training(cfg)
    with pytest.raises(UserError, match="bitsandbytes cannot be used here"):
        pipeline.resolve_hardware(replace(cfg, model=replace(cfg.model, quantize="nf4")))


def test_a_cpu_does_not_train_in_half_precision():
    """Lightning would train in bf16-mixed, and a GPU's run would reuse it as 16-mixed."""
    words = ["trainer=cpu", "trainer.precision=16-mixed"]
    cfg = OmegaConf.to_object(validation.validate(words, False)[0][0])
    with pytest.raises(UserError, match=r"choose trainer\.precision=bf16-mixed"):
        pipeline.hardware_of_training(cfg)
    pipeline.resolve_hardware(cfg)  # a GPU's run may be loaded


# --- whole runs ----------------------------------------------------------------------------------


def command(cache, out, *overrides):
    words = [
        "task.limit=33",
        "finetune.epochs=2",
        "transfer.epochs=2",
        "transfer.lr=1e-3",
        "task.test_split=test[:21]",
        "trainer.enable_progress_bar=false",
        f"cache_dir={cache}",
        f"output_dir={out}",
        *overrides,
    ]
    return [sys.executable, "-m", "flare_exp", *last_of_each(words)]


def without_dropout(folder, architecture="xlm-roberta"):
    """A tiny checkpoint without dropout, whose masks would be others in other processes."""
    return tiny_checkpoint(
        folder,
        architecture,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attention_dropout=0.0,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return without_dropout(tmp_path_factory.mktemp("checkpoint"))


def weights(out):
    return {
        f"{file.parent.name}/{k}": v
        for part in ("english", "adapter")
        for file in (out / part).glob("*.safetensors")
        for k, v in load_file(file).items()
    }


def assert_several_leave_what_one_leaves(folder, trainer, own, *overrides):
    """Runs in this process and with trainer=`trainer` and its `own` overrides, in float64, so that
    Adam does not turn the rounding of a gradient near zero into a step.
    """
    one, several = folder / "cpu", folder / trainer
    alone = command(
        folder / "cache_cpu", one, "trainer=cpu", "trainer.precision=64-true", *overrides
    )
    ((composed,), problems) = validation.validate(normalized(alone[3:]), False)
    assert problems == []
    run_job(composed, one, brief=True)
    options = [f"trainer={trainer}", "trainer.precision=64-true", *own, *overrides]
    done = processes.run(command(folder / "cache", several, *options), timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("English fine-tuning") == 1
    assert (done.stdout + done.stderr).count("transfer: ") == 1
    assert not list(several.glob("process*.log"))
    expected, found = weights(one), weights(several)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert_same_predictions(one / "predictions.parquet", several / "predictions.parquet")
    assert pq.read_table(several / "predictions.parquet").num_rows == 21
    first, second = (json.loads((out / "metrics.json").read_text()) for out in (one, several))
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in second.items() if k != "seconds"
    }
    digests = [
        {
            k: a["digest"]
            for k, a in json.loads((out / "provenance.json").read_text())["artefacts"].items()
        }
        for out in (one, several)
    ]
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["method=flare", "data.batch_size=15", "data.micro_batch_size=3"],
        ["method=flare", "fusion=gated", "task=toy_qa", "data.batch_size=4", "source.cache=disk"],
        ["method=lora", "trainer.devices=3", "data.batch_size=31"],  # the last batch has two rows
        ["method=x_mixup", "data.batch_size=15", "data.micro_batch_size=3"],
        ["method=input_fusion", "task=toy_qa", "data.batch_size=4"],
    ],
    ids=["label", "span", "three", "mixup", "joint"],
)
def test_two_processes_leave_what_one_leaves(checkpoint, tmp_path, overrides):
    own = [o for o in overrides if "devices" in o or "micro" in o]
    shared = [o for o in overrides if o not in own]
    assert_several_leave_what_one_leaves(
        tmp_path, "ddp_cpu", own, "model=custom", f"model.path={checkpoint}", *shared
    )


@pytest.mark.slow
def test_a_grid_of_two_jobs_with_two_processes_each_has_two_folders(checkpoint, tmp_path):
    words = command(
        tmp_path / "cache",
        tmp_path / "grid",
        "-m",
        "trainer=ddp_cpu",
        "seed=0,1",
        "model=custom",
        f"model.path={checkpoint}",
        "method=lora",
        "trainer.max_epochs=1",
    )
    done = processes.run(words, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "grid").iterdir() if p.is_dir()) == ["0", "1"]
    seeds = [
        json.loads((tmp_path / "grid" / job / "metrics.json").read_text())["seed"] for job in "01"
    ]
    assert seeds == [0, 1]
    assert (
        len(list((tmp_path / "cache" / "finetune").glob("[0-9a-f]*/manifest.json"))) == 2
    )  # one for each seed, no more


def children(pid):
    return [
        int(word)
        for word in subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True
        ).stdout.split()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["follower", "leader"])
def test_the_end_of_one_process_is_the_end_of_all(checkpoint, tmp_path, victim):
    cache, out = tmp_path / "cache", tmp_path / "out"
    process = processes.Run(
        command(
            cache,
            out,
            "trainer=ddp_cpu",
            "model=custom",
            f"model.path={checkpoint}",
            "finetune.epochs=3000",
        ),
        merged=True,
    )
    deadline = time.monotonic() + 120
    while (
        not list(cache.glob("finetune/.*/metrics.csv"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    (follower,) = children(process.pid)
    os.kill(follower if victim == "follower" else process.pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    if victim == "follower":
        assert process.returncode == 2
        assert (
            said.count("flare_exp: process 1 of 2 (counted from 0) failed: ended by SIGKILL") == 1
        )
        assert "Traceback" not in said
    else:
        while time.monotonic() < deadline + 60 and os.path.exists(f"/proc/{follower}"):
            time.sleep(0.1)
        assert not os.path.exists(f"/proc/{follower}")
    assert not (out / "metrics.json").exists()
