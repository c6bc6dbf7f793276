"""FLARE MT (PAPER, section 2): the source is a translation model's encoder, through one linear map.

And sources that are computed once (I11). The invariants of test_invariants.py hold for it too.
"""

import logging
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from random_models import (
    BUILDERS,
    ENCODER_WIDTH,
    dtype_of,
    outputs,
    random_backbone,
    random_encoder,
    rows,
)
from test_invariants import (
    ALPHA,
    batches,
    forced,
    fused,
    fused_blocks,
    randomise,
    said,
    side,
    tolerance,
)

from flare_exp.artifacts import ArtifactStore
from flare_exp.data import source_cache
from flare_exp.data.source_cache import SourceStateCache, cached_states, padded_states
from flare_exp.errors import UserError
from flare_exp.flare import adapter
from flare_exp.flare.fusion import FUSIONS
from flare_exp.flare.source_encoders import BackboneSourceEncoder, MTSourceEncoder
from flare_exp.utils import signals


def latent(make_model, name="add_relu", **options):
    """A FLARE MT model and its source."""
    model, _ = fused(make_model, name, source_width=ENCODER_WIDTH, **options)
    return model, MTSourceEncoder(model, random_encoder(next(model.parameters()).dtype))


@pytest.mark.parametrize("name", FUSIONS)
def test_i1_at_init_output_equals_backbone(make_model, kind, name):
    target, source = batches(kind)
    expected = outputs(make_model().model, target)
    model, _ = fused(make_model, name, trained=False, source_width=ENCODER_WIDTH)
    found = said(model, MTSourceEncoder(model, random_encoder(dtype_of(kind))), target, source)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_i3_every_block_fuses_the_mapped_states(make_model, kind):
    """h = W0 v + (alpha / r) B (relu(A S) + relu(A v)) with S = W e + b, e the encoder's last
    hidden state.
    """
    model, stream = latent(make_model)
    target, source = batches(kind, 9, 9)  # as wide as one another: position i meets position i
    seen = {}
    for block, (module, *_) in fused_blocks(model).items():
        module.register_forward_hook(
            lambda m, args, out, block=block: seen.__setitem__(block, (m, args[0], out))
        )
    said(model, stream, target, source)
    assert len(seen) >= 3
    e = random_encoder(dtype_of(kind))(**source).last_hidden_state
    s = e @ stream.map.weight.T + stream.map.bias
    for module, v, h in seen.values():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        base = torch.nn.functional.linear(v, module.base_layer.weight, module.base_layer.bias)
        both = torch.relu(s @ a.T)[:, : v.shape[1]] + torch.relu(v @ a.T)[:, :9]
        phi = torch.where(
            source["attention_mask"].bool()[..., None], both, torch.relu(v @ a.T)[:, :9]
        )
        if v.shape[1] == 9:  # an encoder-decoder's decoder reads something else
            torch.testing.assert_close(h, base + (ALPHA / 4) * phi @ b.T, **tolerance(kind))


@pytest.mark.parametrize("name", ["add_relu", "cross_attn"])
def test_i5_padding_and_batch_composition_never_change_outputs(make_model, kind, name):
    model, stream = latent(make_model, name)
    target, source = batches(kind)
    together = said(model, stream, target, source)
    wide_target, wide_source = batches(kind, 11, 12)
    wide = said(model, stream, wide_target, wide_source)
    for row in range(3):
        alone = said(model, stream, rows(target, row), rows(source, row))[0]
        for found, batch in ((together, target), (wide, wide_target)):
            one = found[row]
            if one.ndim == 2 and one.shape[0] == batch["attention_mask"].shape[1]:
                one = one[batch["attention_mask"][row].bool()]
                compared = alone[target["attention_mask"][row].bool()]
            else:
                compared = alone
            torch.testing.assert_close(one, compared, **tolerance(kind))


def test_i6_source_changes_output_and_swapping_changes_both(make_model, kind):
    model, stream = latent(make_model)
    target, source = batches(kind)
    straight = said(model, stream, target, source)
    swapped = said(model, stream, target, rows(source, 1, 0, 2))
    none = said(model, stream, target, None)
    for row in (0, 1):
        assert not torch.allclose(straight[row], swapped[row])
        assert not torch.allclose(straight[row], none[row])
    torch.testing.assert_close(straight[2], swapped[2], **tolerance(kind))


@pytest.mark.parametrize("name", ["add_relu", "cross_attn"])
@pytest.mark.parametrize(
    "decoder", [kind for kind in BUILDERS if kind in {("llama", "prompt"), ("gemma2", "prompt")}]
)
def test_i7_generation_with_cache_equals_the_full_forward(decoder, name):
    model, stream = latent(lambda: random_backbone(decoder), name)
    target, source = batches(decoder)
    stream.encode(source)
    done = model.generate(
        **target,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    written = done.sequences[:, target["input_ids"].shape[1] :]
    full = forced(model, stream, target, source, written)
    torch.testing.assert_close(
        torch.stack(done.logits, 1).double(), full.double(), rtol=1e-4, atol=1e-4
    )


def test_i8_gradients_reach_the_map_and_not_the_encoder_with_and_without_checkpointing(
    make_model, kind
):
    gradients = []
    for checkpointing in (False, True):
        model, stream = latent(make_model)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(5)
        target, source = batches(kind)
        said(model, stream, target, source).tanh().sum().backward()
        assert stream.map.weight.grad.abs().sum() > 0
        assert all(p.grad is None for p in stream.encoder.parameters())
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-9, atol=1e-11)


def test_the_map_is_the_only_addition_and_is_trained_once(make_model):
    plain, _ = fused(make_model)
    model, stream = latent(make_model)
    maps = [m for n, m in model.named_modules() if n.endswith("flare_source.default")]
    assert maps == [stream.map]
    assert stream.map.weight.requires_grad
    assert stream.map.bias.requires_grad
    count = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (plain, model)]
    assert count[1] - count[0] == (ENCODER_WIDTH + 1) * stream.map.out_features
    with pytest.raises(ValueError, match="source_width is not set"):
        MTSourceEncoder(plain)


def test_i10_the_map_is_saved_and_loaded_under_any_name(make_model, kind, tmp_path):
    model, stream = latent(make_model)
    randomise(model, "modules_to_save", "flare_source")
    target, source = batches(kind)
    expected = said(model, stream, target, source)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = make_model()
    again = adapter.load_adapter(base, str(tmp_path)).to(dtype_of(kind)).eval()
    torch.testing.assert_close(
        said(again, MTSourceEncoder(again, stream.encoder), target, source),
        expected,
        **tolerance(kind),
    )
    other = (
        PeftModel.from_pretrained(make_model().model, tmp_path, adapter_name="other")
        .to(dtype_of(kind))
        .eval()
    )
    torch.testing.assert_close(
        said(other, MTSourceEncoder(other, stream.encoder), target, source),
        expected,
        **tolerance(kind),
    )


# --- sources computed once -----------------------------------------------------------------------


class Ids:
    """A preprocessor whose items are token ids already."""

    def __init__(self, kind):
        self.tokenizer = SimpleNamespace(padding_side=side(kind))

    def pad(self, items):
        width = max(len(item["inputs"]["input_ids"]) for item in items)
        ids, mask = (
            torch.ones(len(items), width, dtype=torch.long),
            torch.zeros(len(items), width, dtype=torch.long),
        )
        for row, item in enumerate(items):
            one = torch.tensor(item["inputs"]["input_ids"])
            place = (
                slice(width - len(one), width)
                if self.tokenizer.padding_side == "left"
                else slice(0, len(one))
            )
            ids[row, place], mask[row, place] = one, 1
        return {"input_ids": ids, "attention_mask": mask}


def as_items(batch):
    pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [{"inputs": {"input_ids": ids[mask].tolist()}} for ids, mask in pairs]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("stream_of", ["mplm", "mt"])
def test_i11_a_cached_source_gives_the_same_losses_and_gradients(
    make_model, kind, stream_of, where, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    model, stream = fused(make_model) if stream_of == "mplm" else latent(make_model)
    target, source = batches(kind)
    store = ArtifactStore(tmp_path) if where == "disk" else None
    four = [*as_items(source), as_items(source)[1]]  # one text twice
    cache = cached_states(
        stream, four, Ids(kind), torch.device("cpu"), torch.float64, store, {"x": 1}
    )
    tokens = sum(len(item["inputs"]["input_ids"]) for item in four[:3])
    assert len(cache) == 4
    assert len(cache.states) == tokens, "every text once"
    assert f"3 source texts, {tokens} tokens" in caplog.text
    assert f"in {where}" in caplog.text or f"on {where}" in caplog.text
    batch = padded_states([cache[i] for i in range(3)], side(kind))
    found = []
    for inputs in (source, batch):
        model.zero_grad()
        loss = said(model, stream, target, inputs).tanh().sum()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for fresh, kept in zip(*found, strict=True):
        torch.testing.assert_close(kept, fresh, **tolerance(kind))
    # without the states it would be another loss
    assert not torch.allclose(said(model, stream, target, None).tanh().sum(), found[0][0])


def test_a_disk_cache_is_read_again_and_not_computed(tmp_path):
    kind = ("xlm-roberta", "label")
    _, stream = latent(lambda: random_backbone(kind))
    items, preprocessor = as_items(batches(kind)[1]), Ids(kind)
    calls, compute = [], stream.compute
    stream.compute = lambda inputs: calls.append(len(inputs["input_ids"])) or compute(inputs)
    device, store = torch.device("cpu"), ArtifactStore(tmp_path)
    first = cached_states(stream, items, preprocessor, device, torch.float16, store, {"x": 1})
    assert sum(calls) == 4  # a probe of the width, and three texts
    maps = Path("/proc/self/maps")  # a writable mapping would count as memory
    assert not maps.is_file() or re.search(r" r--s .*states\.bin", maps.read_text())
    again = cached_states(stream, items, preprocessor, device, torch.float16, store, {"x": 1})
    assert sum(calls) == 5  # the probe
    assert torch.equal(first.states, again.states)
    assert first.states.dtype == torch.float16
    exact = cached_states(stream, items, preprocessor, device, torch.float64, None, {})
    torch.testing.assert_close(first.states.double(), exact.states, rtol=1e-3, atol=1e-3)
    assert not torch.equal(first.states.double(), exact.states)


def test_a_signal_stops_the_reading_of_sources(monkeypatch):
    kind = ("xlm-roberta", "label")
    _, stream = latent(lambda: random_backbone(kind))
    monkeypatch.setattr(signals, "pending_signal", lambda: signal.SIGUSR1)
    items, device = as_items(batches(kind)[1]), torch.device("cpu")
    with pytest.raises(signals.StopRequested, match="while it read the sources once"):
        cached_states(stream, items, Ids(kind), device, torch.float32, None, {})


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("disk", r"source\.cache=disk: needs .* MB, and .* has 0\.0 MB left; .*cache=memory"),
        ("memory", r"source\.cache=memory: needs .* MB, and 0\.0 MB .* free; .*cache=disk"),
    ],
)
def test_a_cache_that_has_no_room_is_refused_before_it_is_filled(
    tmp_path, monkeypatch, where, message
):
    kind = ("xlm-roberta", "label")
    _, stream = latent(lambda: random_backbone(kind))
    monkeypatch.setattr(source_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    monkeypatch.setattr(
        source_cache.psutil, "virtual_memory", lambda: SimpleNamespace(available=10)
    )
    items, device = as_items(batches(kind)[1]), torch.device("cpu")
    store = ArtifactStore(tmp_path) if where == "disk" else None
    with pytest.raises(UserError, match=message):
        cached_states(stream, items, Ids(kind), device, torch.float32, store, {})
    assert not list(tmp_path.rglob("*.bin"))


def test_a_cache_keeps_every_texts_own_states():
    flat = torch.arange(12.0).view(6, 1, 2)
    cache = SourceStateCache(flat, [2, 0, 2], [4, 2, 4])
    assert torch.equal(cache[1], flat[:2])
    assert torch.equal(cache[0], cache[2])
    batch = padded_states([cache[1], cache[0]], "left")
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert torch.equal(batch["states"][0, 2:], flat[:2])
    assert padded_states([flat.bfloat16()], "right")["states"].dtype == torch.bfloat16, (
        "not widened on the way to the device"
    )


def test_states_that_nobody_computed_are_an_error():
    model, _ = latent(lambda: random_backbone(("bert", "label")))
    assert isinstance(BackboneSourceEncoder(model).states.blocks, list)
    with pytest.raises(ValueError, match="there is no encoder"):
        MTSourceEncoder(model).encode(batches(("bert", "label"))[1])
