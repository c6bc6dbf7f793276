"""The invariants of the method, for every encoder family, in float64 (I1-I6, I10, I13; I3 is in test_fusion.py)."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import rows, token_batch
from peft import LoraConfig, TaskType, get_peft_model

from flare_exp import adapter, fusion
from flare_exp.sources import SOURCE_LAYERS, SOURCE_STATES, BackboneSource, align

FUSIONS = list(fusion.FUSIONS)
ALPHA = 12  # alpha / r = 3: no power of two, so that bit-for-bit tests see the order of operations
TARGET = token_batch([7, 4, 6], seed=1)
SOURCE = token_batch([5, 9, 3], seed=2)


def fused(make_model, name="add_relu", trained=True, **options):
    """A FLARE model and its source stream; `trained` gives B (and learned fusions) random values."""
    model, family = make_model()
    torch.manual_seed(3)
    model = adapter.add_adapter(model, family, r=4, alpha=ALPHA, fusion=name, **options).double().eval()
    if trained:
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "flare_fusion" in key:
                torch.nn.init.normal_(parameter, std=0.3)
    return model, BackboneSource(model)


def logits(model, stream, target, source):
    stream.read(source)
    return model(**target).logits


@pytest.mark.parametrize("name", FUSIONS)
def test_i1_at_init_output_equals_backbone(make_model, name):
    expected = make_model()[0](**TARGET).logits
    model, stream = fused(make_model, name, trained=False)
    assert torch.equal(logits(model, stream, TARGET, SOURCE), expected)
    # and the test is not blind: with B != 0 it differs
    model, stream = fused(make_model, name)
    assert not torch.allclose(logits(model, stream, TARGET, SOURCE), expected)


def test_i2_add_without_source_equals_peft_lora_bit_for_bit(make_model):
    flare, stream = fused(make_model, "add")
    model, family = make_model()
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=ALPHA, target_modules=list(family.fused))
    config.modules_to_save = list(family.head)
    lora = get_peft_model(model, config).double().eval()
    weights = {k: v for k, v in flare.state_dict().items() if "lora_" in k}
    _, unexpected = lora.load_state_dict(weights, strict=False)
    assert not unexpected
    assert len(weights) == 2 * 2 * 3  # A and B of query and value in three blocks
    assert torch.equal(logits(flare, stream, TARGET, None), lora(**TARGET).logits)
    assert not torch.allclose(logits(flare, stream, TARGET, SOURCE), lora(**TARGET).logits)


def test_i3_whole_layer_equals_the_papers_equation(make_model):
    """h = W0 v^T + (a/r) B phi(A v^S, A v^T) for every fused projection, with v^S one layer ahead."""
    model, stream = fused(make_model, "add_relu")
    seen = {}
    projections = {n: m for n, m in model.named_modules() if hasattr(m, "flare_fusion")}
    for name, module in projections.items():
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
    # the English pass, by the backbone itself with PEFT switched off
    with model.disable_adapter():
        states = model.get_base_model().base_model(**SOURCE, output_hidden_states=True).hidden_states
    stream.read(SOURCE)
    model(**TARGET)
    assert len(projections) == 6
    width = TARGET["input_ids"].shape[1]
    for name, (v_target, h) in seen.items():
        layer, module = int(name.split(".layer.")[1].split(".")[0]), projections[name]
        v_source, mask = align(states[layer + 1], SOURCE["attention_mask"].bool(), width)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        phi = torch.where(mask[..., None], (v_source @ a.T).relu(), 0) + (v_target @ a.T).relu()
        expected = v_target @ module.base_layer.weight.T + module.base_layer.bias + (ALPHA / 4) * phi @ b.T
        torch.testing.assert_close(h, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FUSIONS)
def test_i4_source_pass_builds_no_graph_and_gradients_are_right(make_model, name):
    model, stream = fused(make_model, name)
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(True)  # even then
    stream.read(SOURCE)
    assert not any(stream.states.of(("encoder", block), None)[0].requires_grad for block in range(3))
    model.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    weight = next(p for k, p in model.named_parameters() if "lora_A" in k)
    direction = torch.randn_like(weight)

    def loss():
        return model(**TARGET).logits.square().sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    step = 1e-6
    with torch.no_grad():
        weight += step * direction
        up = loss()
        weight -= 2 * step * direction
        down = loss()
        weight += step * direction
    torch.testing.assert_close((gradient * direction).sum(), (up - down) / (2 * step), rtol=1e-5, atol=1e-6)
    assert gradient.abs().max() > 0


def test_i4_source_pass_is_the_backbone_without_adapter_and_without_dropout(make_model):
    model, stream = fused(make_model, "add", source_state="block_output")
    with model.disable_adapter():
        expected = model.get_base_model().base_model(**SOURCE, output_hidden_states=True).hidden_states
    model.train()
    stream.read(SOURCE)
    assert model.training
    assert all(m.training for m in model.modules()), "the source pass must put every module back into train mode"
    for block in range(3):
        assert torch.equal(stream.states.of(("encoder", block), None)[0], expected[block + 1])


@pytest.mark.parametrize("name", FUSIONS)
def test_i5_padding_and_batch_composition_never_change_logits(make_model, name):
    model, stream = fused(make_model, name)
    whole = logits(model, stream, TARGET, SOURCE)
    wide = logits(model, stream, token_batch([7, 4, 6], 1, width=12), token_batch([5, 9, 3], 2, width=14))
    torch.testing.assert_close(wide, whole, rtol=1e-10, atol=1e-10)
    for row in range(3):
        target, source = ({k: v[[row], : int(s["attention_mask"][row].sum())] for k, v in s.items()} for s in (TARGET, SOURCE))
        torch.testing.assert_close(logits(model, stream, target, source), whole[[row]], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FUSIONS)
def test_i5_a_row_without_source_equals_no_source(make_model, name):
    model, stream = fused(make_model, name)
    source = {k: v.clone() for k, v in SOURCE.items()}
    source["attention_mask"][1] = 0
    mixed = logits(model, stream, TARGET, source)
    assert torch.isfinite(mixed).all()
    torch.testing.assert_close(mixed[[1]], logits(model, stream, rows(TARGET, 1), None))


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("source_layer", SOURCE_LAYERS)
@pytest.mark.parametrize("source_state", SOURCE_STATES)
def test_i6_source_changes_output_and_swapping_changes_both(make_model, name, source_layer, source_state):
    model, stream = fused(make_model, name, source_layer=source_layer, source_state=source_state)
    own = logits(model, stream, TARGET, SOURCE)
    assert not torch.allclose(own, logits(model, stream, TARGET, None))
    swapped = logits(model, stream, TARGET, rows(SOURCE, 1, 0, 2))
    assert not torch.allclose(swapped[0], own[0])
    assert not torch.allclose(swapped[1], own[1])
    torch.testing.assert_close(swapped[2], own[2])


def test_ahead_is_the_next_layers_same(make_model):
    _, ahead = fused(make_model, source_layer="ahead")
    _, same = fused(make_model, source_layer="same")
    ahead.read(SOURCE)
    same.read(SOURCE)
    for block in range(2):
        assert torch.equal(ahead.states.of(("encoder", block), None)[0], same.states.of(("encoder", block + 1), None)[0])
        assert not torch.equal(ahead.states.of(("encoder", block), None)[0], same.states.of(("encoder", block), None)[0])


def test_all_linear_adapts_more_and_fuses_the_same(make_model):
    model, stream = fused(make_model, "add", targets="all_linear")
    adapted = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert len(adapted) == 3 * 6
    assert sum(hasattr(m, "flare_fusion") for m in model.modules()) == 3 * 2
    with model.disable_adapter():
        expected = model.get_base_model().base_model(**SOURCE).last_hidden_state
    stream.read(SOURCE)  # plain LoRA layers stand aside in the source pass as well
    assert torch.equal(stream.states.of(("encoder", 2), None)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["add_relu", "gated", "cross_attn"])
def test_i10_saved_and_loaded_in_a_fresh_process_gives_the_same_logits(make_model, tmp_path, name):
    model, stream = fused(make_model, name)
    for key, parameter in model.named_parameters():
        if "modules_to_save" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    make_model()[0].save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    torch.save({"target": TARGET, "source": SOURCE}, tmp_path / "batch.pt")
    script = """
import sys, json, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
import flare_exp.adapter
from flare_exp.sources import BackboneSource
folder = sys.argv[1]
base = AutoModelForSequenceClassification.from_pretrained(folder + "/base", dtype=torch.float64)
model = PeftModel.from_pretrained(base, folder + "/adapter", adapter_name="renamed").double().eval()
batch = torch.load(folder + "/batch.pt", weights_only=True)
BackboneSource(model).read(batch["source"])
print(json.dumps(model(**batch["target"]).logits.tolist()))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    fresh = torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)
    # peft stores adapters in the dtype they have, here float64
    torch.testing.assert_close(fresh, logits(model, stream, TARGET, SOURCE), rtol=1e-12, atol=1e-12)


def test_merging_a_fusion_adapter_is_refused_and_plain_lora_merges_exactly(make_model):
    model, _ = fused(make_model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    plain, family = make_model()
    plain = adapter.add_adapter(plain, family, r=4, alpha=ALPHA).double().eval()
    for key, parameter in plain.named_parameters():
        if "lora_B" in key or "modules_to_save" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = plain(**TARGET).logits
    torch.testing.assert_close(plain.merge_and_unload()(**TARGET).logits, expected, rtol=1e-10, atol=1e-10)


def test_elementwise_fusions_add_no_parameters_over_lora(make_model):
    from flare_exp.backbones import parameter_counts

    model, family = make_model()
    lora = parameter_counts(adapter.add_adapter(model, family, r=4, alpha=ALPHA))
    for name in FUSIONS:
        extra = parameter_counts(fused(make_model, name)[0])["trainable"] - lora["trainable"]
        assert extra == {"gated": 6 * (2 * 16 + 4), "cross_attn": 6 * 3 * (16 + 4)}.get(name, 0)


def test_only_adapter_and_head_train(make_model):
    model, _ = fused(make_model, "gated")
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in k or "flare_fusion" in k or "modules_to_save" in k for k in trained)
    assert any("flare_fusion" in k for k in trained)


def test_align():
    states, mask = torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[True, True, False]])
    longer, longer_mask = align(states, mask, 5)
    assert longer.tolist()[0][:3] == states.tolist()[0]
    assert longer_mask.tolist() == [[True, True, False, False, False]]
    assert align(states, mask, 2)[0].tolist() == [[[0, 1], [2, 3]]]
    left, left_mask = align(states, torch.tensor([[False, True, True]]), 5, "left")
    assert left.tolist()[0][2:] == states.tolist()[0]
    assert left_mask.tolist() == [[False, False, False, True, True]]
    assert align(states, mask, 2, "left")[0].tolist() == [[[2, 3], [4, 5]]]
