"""What has to be seen the first time a GPU is at hand: `make test-gpu`, one command, minutes.

Every test that has a meaning on the CPU runs there too, on models of a few thousand parameters.
With FLARE_EXP_GPU_REPORT=<file> what was measured is written there as JSON.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from copying_nllb import SHORT, texts, translate
from random_models import token_batch
from torch import nn

from flare_exp.cli import plan
from flare_exp.config import validation
from flare_exp.experiment import provenance
from flare_exp.flare import adapter
from flare_exp.flare.source_encoders import BackboneSourceEncoder
from flare_exp.flare.source_states import positions
from flare_exp.models import backbones
from flare_exp.planning import costs, plans
from flare_exp.toy.pretrain import pretrain
from flare_exp.translation.engines import CTranslate2Engine, TransformersEngine
from flare_exp.utils import files

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
on_both = pytest.mark.parametrize("device", ["cpu", CUDA])
on_gpu = pytest.mark.parametrize("device", [CUDA])
# one worker has the GPU and builds the translation checkpoint
pytestmark = pytest.mark.xdist_group("mt")


@pytest.fixture(scope="session")
def report() -> Iterator[dict[str, Any]]:
    """What was measured: name of a measurement -> facts."""
    found: dict[str, Any] = {}
    yield found
    if place := os.environ.get("FLARE_EXP_GPU_REPORT"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        files.write_json(Path(place), {**provenance.provenance(), "measured": found})


@contextmanager
def measured(report: dict[str, Any], name: str, device: str, **facts: Any) -> Iterator[None]:
    """Note the seconds and, on a GPU, the peak memory of what is done inside."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    report[f"{name} on {device}"] = {"seconds": time.perf_counter() - start, **facts}


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> dict[str, str]:
    """Device -> folder of a random model of Llama's shape: tiny for the CPU, 0.3 billion parameters
    for a GPU.
    """
    sizes = {"cpu": (32, 2, 40)}
    if torch.cuda.is_available():
        sizes["cuda"] = (1024, 16, 32000)
    folders = {}
    for device, (width, layers, vocabulary) in sizes.items():
        settings = hf.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=3 * width,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(f"llama_{device}")
        hf.LlamaForCausalLM(settings).save_pretrained(folder)
        folders[device] = str(folder)
    return folders


def batches(device: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A target and a source batch of unequal lengths."""
    found = token_batch([7, 4, 6], 1, side="left"), token_batch([5, 9, 3], 2, side="left")
    target, source = ({name: x.to(device) for name, x in batch.items()} for batch in found)
    return target, source


def fused(folder: str, device: str, quantize: str | None = None, **options: Any):
    """A model with a fusion adapter on all linear layers, in train mode, and its source."""
    precision = backbones.Precision("bfloat16" if quantize else "float32", quantize)
    backbone = backbones.load(folder, "prompt", precision=precision, device=device)
    torch.manual_seed(1)
    model = adapter.add_adapter(
        backbone, r=8, alpha=16, fusion="add_relu", targets="all_linear", **options
    )
    return model.to(device).train(), BackboneSourceEncoder(model)


def randomise(model: nn.Module) -> None:
    """Give B values, so that the source shows at the output."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def loss_from_output(model: nn.Module, source: BackboneSourceEncoder, device: str) -> torch.Tensor:
    """Mean negative log-likelihood of the target's next tokens, read with its source."""
    target, english = batches(device)
    source.encode(english)
    mask = target["attention_mask"]
    logits = model(**target, position_ids=positions(mask), use_cache=False).logits[:, :-1].float()
    labels = target["input_ids"][:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def bf16(device: str):
    return torch.autocast(device, torch.bfloat16)


@on_both
@pytest.mark.parametrize("weights", ["float32", "nf4"])
def test_bf16_training_steps_lower_the_loss(llama, report, weights, device):
    """Precision bf16-mixed, with weights of 32 bits and of 4.

    8-bit AdamW, whose moments are 8-bit where a tensor is large.
    """
    from bitsandbytes.optim import AdamW8bit

    model, source = fused(llama[device], device, "nf4" if weights == "nf4" else None)
    parameters = trained(model)
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = AdamW8bit(parameters, lr=1e-2)
    losses = []
    with measured(report, f"8 steps, {weights}", device, **backbones.parameter_counts(model)):
        for _ in range(8):
            with bf16(device):
                losses.append(loss := loss_from_output(model, source, device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = [loss.item() for loss in losses]
    assert all(map(torch.isfinite, losses)), found
    assert found[-1] < 0.95 * found[0], found


@on_both
def test_8_bit_adamw_follows_adamw(device):
    """bitsandbytes keeps the moments of tensors of 4,096 elements and more in 8 bits."""
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    goal, found = torch.randn(64, 128, device=device), {}
    for kind in (AdamW8bit, torch.optim.AdamW):
        weight = nn.Parameter(torch.zeros_like(goal))
        optimizer = kind([weight], lr=0.1, weight_decay=0.0)
        for _ in range(30):
            (weight - goal).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[kind] = float((weight - goal).square().mean()), optimizer.state[weight]
    assert found[AdamW8bit][1]["state1"].dtype == torch.uint8
    start = float(goal.square().mean())
    assert abs(found[AdamW8bit][0] - found[torch.optim.AdamW][0]) < 0.02 * start
    assert found[AdamW8bit][0] < 0.2 * start


@on_both
def test_checkpointing_with_the_recording_pass_has_the_same_gradients(llama, report, device):
    gradients = []
    for checkpointing in (False, True):
        model, source = fused(llama[device], device)
        randomise(model)
        if checkpointing:
            base = model.get_base_model()
            base.gradient_checkpointing_enable({"use_reentrant": False})
            assert base.is_gradient_checkpointing
        name = f"a step, checkpointing {'on' if checkpointing else 'off'}"
        with measured(report, name, device):
            loss_from_output(model, source, device).backward()
        gradients.append([p.grad for p in trained(model)])
    for own, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-6)
    assert any(g.abs().max() > 0 for g in gradients[0])


@on_both
def test_generation_with_dynamic_and_static_cache_writes_the_same(llama, report, device):
    model, source = fused(llama[device], device)
    randomise(model)
    model.eval()
    target, english = batches(device)
    settings = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "disable_compile": True,
    }
    written = []
    for cache in (None, "static"):
        source.encode(english)
        with torch.no_grad(), measured(report, f"generation, cache {cache or 'dynamic'}", device):
            written.append(model.generate(**target, cache_implementation=cache, **settings))
    assert torch.equal(*written)
    assert written[0].shape == (3, target["input_ids"].shape[1] + 6)


@on_both
@pytest.mark.parametrize("precision", ["float32", "bf16-mixed"])
def test_cached_source_states_are_the_live_ones(llama, precision, device):
    model, source = fused(llama[device], device)
    randomise(model)
    model.eval()
    target, english = batches(device)
    with torch.no_grad(), bf16(device) if precision == "bf16-mixed" else nullcontext():
        source.encode(english)
        live = model(**target).logits
        kept = source.compute(english).cpu().to(device)
        source.encode({"states": kept, "attention_mask": english["attention_mask"]})
        cached = model(**target).logits
        source.encode(None)
        without = model(**target).logits
    assert torch.equal(cached, live)
    assert not torch.allclose(without, live)


@on_both
def test_ctranslate2_and_transformers_translate_alike(
    nllb_folder,
    converted,
    engine,
    report,
    device,
):
    asked = texts(40)
    expected = translate(engine, asked)  # on the CPU, in 32 bits
    if device == "cuda":
        import ctranslate2

        assert ctranslate2.get_cuda_device_count(), "CTranslate2 sees no GPU"
    for kind, folder in (
        (TransformersEngine, nllb_folder),
        (CTranslate2Engine, converted["float32"]),
    ):
        here = kind(folder, decoding=SHORT, device=device)
        with measured(report, f"40 texts, {kind.__name__}", device):
            found = translate(here, asked)
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        assert same > (20 if device == "cuda" else 35), f"{kind.__name__}: {same} of 40 alike"


@on_both
def test_a_group_of_one_process_trains_as_no_group(llama, device):
    """NCCL on GPUs, Gloo on CPUs: loss and gradients through DistributedDataParallel are those
    without it.
    """
    model, source = fused(llama[device], device)
    randomise(model)
    loss_from_output(model, source, device).backward()
    own = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        total = torch.ones((), device=device)
        dist.all_reduce(total)
        assert total == 1
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss_from_output(wrapped, source, device).backward()
        found = [p.grad.clone() for p in trained(model)]
        del wrapped
    finally:
        dist.destroy_process_group()
    for one, other in zip(found, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@on_gpu
def test_a_run_takes_what_plan_says(tmp_path, report, device):
    """Of the CPU, tests/planning/test_plan.py has this."""
    from flare_exp.cli.main import main

    model = tmp_path / "model"
    pretrain(
        model,
        architecture="llama",
        world_seed=0,
        documents=2000,
        steps=1,
        batch_size=8,
        lr=1e-3,
        vocab_size=900,
        hidden_size=1024,
        layers=12,
        heads=8,
        target_share=0.05,
        recall=0.0,
    )
    given = [
        "model=custom",
        f"model.path={model}",
        "model.quantize=nf4",
        "model.dtype=bfloat16",
        "model.gradient_checkpointing=true",
        "adapter.targets=all_linear",
        "task=toy_nli",
        "optim._target_=bitsandbytes.optim.AdamW8bit",
        "trainer=gpu",
        "task.limit=512",
        "trainer.enable_progress_bar=false",
        "trainer.max_epochs=1",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    (composed,), problems = validation.validate(given, multirun=False)
    assert not problems
    (job,) = plans.looked_up([(given, plan._typed(composed))], False, tmp_path)
    plans.price([job], tmp_path)
    assert isinstance(job.estimate, costs.Estimate)
    assert main([*given, f"output_dir={tmp_path / 'run'}"]) == 0
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())
    report["a run beside its plan"] = {
        "peak_bytes": facts["peak_gpu_memory_bytes"],
        "planned_peak_bytes": job.estimate.memory,
        "seconds": facts["seconds"],
        "planned_seconds": job.estimate.seconds,
    }
    assert 0.5 < job.estimate.memory / facts["peak_gpu_memory_bytes"] < 2
