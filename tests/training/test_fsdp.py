"""Weights in parts, one for each process (FSDP2), against one process that has them all: gradients,
generation, whole runs.
"""

import json
import signal
import time
from types import SimpleNamespace

import processes
import pytest
import torch
from random_models import random_backbone, random_encoder, token_batch
from test_parallel import (
    BACKBONES_BY_TYPE,
    STEPS,
    assert_several_leave_what_one_leaves,
    batch_of,
    command,
    gradients,
    in_two_processes,
    module_of,
    parts_of,
    weights,
    without_dropout,
)
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from flare_exp.experiment import launch
from flare_exp.flare import adapter
from flare_exp.flare.source_encoders import BackboneSourceEncoder
from flare_exp.models import families
from flare_exp.training.generation import AnswerDecoding, GenerationModule

pytestmark = pytest.mark.xdist_group("fsdp")  # one worker: they share what two processes found
ON_CPU = ["trainer.accelerator=cpu"]


def sharded(module):
    """A LightningModule, as the strategy has it shard itself."""
    module._device_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    module.configure_model()
    return module


def checkpointed():
    module = module_of("prompt")
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    return module


def half():
    """A backbone in bfloat16 below an adapter in 32 bits."""
    module = module_of("label")
    module.model.to(torch.bfloat16)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return module


# name -> (task_type, a module of it)
CASES = {
    "label": ("label", lambda: module_of("label")),
    "span": ("span", lambda: module_of("span")),
    "prompt": ("prompt", lambda: module_of("prompt")),
    "encoder_decoder": ("label", lambda: module_of("label", ("mt5", "label"))),
    "flare_mt": ("label", lambda: module_of("label", encoder=random_encoder())),
    "gradient_checkpointing": ("prompt", checkpointed),
    "bfloat16": ("label", half),
}


def steps_of(name):
    """Steps of a case: how many micro-batches there are is of interest for each type of task."""
    return STEPS if name in BACKBONES_BY_TYPE else STEPS[:3]


def loss_from_output(name, module, batch):
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
        return module.loss(batch)


def one_process(folder, rank):
    """Of every case the gradients of one step on this process's shares of batches of five rows and
    of one, read at once or in micro-batches, whose gradients are reduced every time.
    """
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2
    )
    left = {}
    for name, (task_type, make) in CASES.items():
        found = []
        for rows, passes in steps_of(name):
            module, loss = sharded(make()), 0
            for batch in parts_of(task_type, rows, rank, 2, passes):
                part = loss_from_output(name, module, batch) / passes
                part.backward()
                loss = loss + part.detach()
            dist.all_reduce(loss)
            found.append((loss / 2, {n: g.full_tensor() for n, g in gradients(module).items()}))
        module.eval()
        with torch.no_grad():  # what is gathered for a forward is given up after it
            loss_from_output(name, module, batch_of(task_type, [0]))
        blocks = {id(p) for block in families.blocks(module.model) for p in block.parameters()}
        held = [p for p in module.parameters() if id(p) in blocks]
        assert all(isinstance(p, DTensor) for p in held)
        left[name] = found, [sum(p.to_local().numel() for p in held), sum(p.numel() for p in held)]
    answers = {
        name: written(sharded(writer(d, ends_apart(d))), [rank]) for name, d in DECODINGS.items()
    }
    torch.save((left, answers), folder / f"{rank}.pt")
    del module
    launch.destroy_process_groups()


DECODINGS = {"greedy": {}, "beams": {"beams": 2}, "static": {"cache": "static"}}
TOKENS = 8


def writer(decoding, eos):
    """A decoder with a FLARE adapter that writes freely, up to the token `eos`."""
    backbone = random_backbone(("llama", "prompt"))
    torch.manual_seed(3)
    model = adapter.add_adapter(backbone, r=4, alpha=8, fusion="add_relu").double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = SimpleNamespace(pad_token_id=1, eos_token_id=eos)
    tokenizer.batch_decode = lambda ids, **_: map(str, ids.tolist())
    settings = AnswerDecoding((), max_new_tokens=TOKENS, **decoding)
    return GenerationModule(
        model, tokenizer, lambda text: [5], settings, source=BackboneSourceEncoder(model)
    )


def written(module, rows):
    """Tokens of each row's answer, without what follows EOS."""
    side = {"side": "left"}
    target, source = token_batch([7, 4], 1, **side), token_batch([5, 9], 2, **side)
    batch = {
        "target": {k: v[rows] for k, v in target.items()},
        "source": {k: v[rows] for k, v in source.items()},
    }
    found = [json.loads(text) for text in module.generate(batch)]
    eos = module.tokenizer.eos_token_id
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in found]


def ends_apart(decoding):
    """A token that ends the two rows' answers at different steps."""
    return next(
        eos
        for eos in range(4, 40)
        if len({len(row) for row in written(writer(decoding, eos), [0, 1])}) == 2
    )


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(one_process, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_i9_two_processes_have_the_gradients_of_one(left, name):
    tight = {"rtol": 1e-10, "atol": 1e-10} if name != "bfloat16" else {"rtol": 0.02, "atol": 0.02}
    shares = [process[0][name][1] for process in left]
    assert sum(own for own, _ in shares) == shares[0][1]  # no weight is held twice
    assert max(own for own, _ in shares) < 0.6 * shares[0][1]
    for found, _ in left:
        for (rows, _), (loss, grads) in zip(steps_of(name), found[name][0], strict=True):
            module = CASES[name][1]()
            expected = loss_from_output(name, module, batch_of(CASES[name][0], list(range(rows))))
            expected.backward()
            torch.testing.assert_close(loss, expected.detach(), **tight)
            for part, gradient in gradients(module).items():
                torch.testing.assert_close(
                    grads[part], gradient, **tight, msg=lambda m, n=part: f"{n}: {m}"
                )
            assert any(g.abs().max() > 1e-3 for g in grads.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODINGS)
def test_what_is_written_does_not_depend_on_when_the_other_process_ends(left, name):
    expected = written(writer(DECODINGS[name], ends_apart(DECODINGS[name])), [0, 1])
    assert min(map(len, expected)) < TOKENS
    assert [row for _, answers in left for row in answers[name]] == expected


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Architecture -> a tiny checkpoint without dropout."""
    return {
        name: without_dropout(tmp_path_factory.mktemp(name), name)
        for name in ("xlm-roberta", "llama")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        (
            "xlm-roberta",
            [
                "data.batch_size=15",
                "trainer.gradient_clip_val=0.01",
                "source.cache=memory",
                "task.select=last",
                "data.micro_batch_size=3",
            ],
        ),
        (
            "xlm-roberta",
            ["data.batch_size=31", "finetune.tuning=full", "model.gradient_checkpointing=true"],
        ),
        (
            "llama",
            [
                "data.batch_size=7",
                "decode=generate",
                "decode.max_new_tokens=8",
                "fusion=gated",
                "trainer.max_epochs=1",
            ],
        ),
    ],
    ids=["label", "full", "generate"],
)
def test_two_processes_leave_what_one_leaves(checkpoints, tmp_path, architecture, overrides):
    where = ["model=custom", f"model.path={checkpoints[architecture]}", "method=flare"]
    own = [o for o in overrides if "micro" in o]
    shared = [o for o in overrides if o not in own]
    assert_several_leave_what_one_leaves(tmp_path, "fsdp", [*ON_CPU, *own], *where, *shared)


@pytest.mark.slow
def test_stopped_and_killed_runs_go_on_to_the_same_end(checkpoints, tmp_path):
    def start(folder, *more):
        words = command(
            folder / "cache",
            folder / "out",
            "trainer=fsdp",
            *ON_CPU,
            "trainer.precision=64-true",
            "model=custom",
            f"model.path={checkpoints['xlm-roberta']}",
            "method=zero_shot",
            "finetune.epochs=4",
            "data.batch_size=4",
            *more,
        )
        return processes.Run(words, merged=True)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said, _ = (process := start(whole)).communicate(timeout=300)
    assert process.returncode == 0, said
    for ending in (signal.SIGUSR1, signal.SIGKILL):
        process, since = start(parts, "trainer.checkpoint_minutes=1e-4"), time.time()
        while process.poll() is None and not any(
            s.stat().st_mtime > since + 1 for s in parts.glob("cache/finetune/.*/state.ckpt")
        ):
            time.sleep(0.05)
        process.send_signal(ending)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == (128 + ending if ending == signal.SIGUSR1 else -ending), said
    said, _ = (process := start(parts)).communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("finetune: goes on after") == 1
    for name, tensor in weights(whole / "out").items():
        assert torch.equal(weights(parts / "out")[name], tensor), name
    assert (parts / "out" / "predictions.parquet").read_bytes() == (
        whole / "out" / "predictions.parquet"
    ).read_bytes()
