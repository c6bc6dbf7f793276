"""Precision of what is trained, and of the English update below it."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from random_models import outputs, random_backbone
from test_invariants import batches, randomise, said

from flare_exp.errors import UserError
from flare_exp.flare import adapter
from flare_exp.flare.source_encoders import BackboneSourceEncoder
from flare_exp.models.backbones import Precision

HEADS = [
    ("bert", "label"),
    ("xlm-roberta", "label"),
    ("xlm-roberta", "span"),
    ("mt5", "label"),
    ("mt5", "span"),
]


def half(kind):
    """A backbone in bfloat16; BERT's has a pooler that is trained, as one that the checkpoint
    lacks.
    """
    backbone = random_backbone(kind)
    head = (*backbone.head, "pooler") if kind == ("bert", "label") else backbone.head
    return replace(backbone, model=backbone.model.to(torch.bfloat16), head=head)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", HEADS, ids="-".join)
def test_a_head_on_a_bfloat16_backbone_moves_with_small_steps(kind, autocast, tmp_path):
    """An update of 2e-5 is below bfloat16's resolution at the usual size of a weight."""
    model = adapter.add_adapter(half(kind), r=4, alpha=8, fusion="add_relu")
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    head = {
        name: p.detach().clone() for name, p in trained(model).items() if "modules_to_save" in name
    }
    assert any("pooler" in name for name in head) == (kind == ("bert", "label"))
    source, (target, english) = BackboneSourceEncoder(model), batches(kind)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=2e-5)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    for _ in range(4):
        with context:
            logits = said(model, source, target, english)
        logits.float().tanh().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert autocast or logits.dtype == torch.float32
    moved = [
        (trained(model)[name] != before).float().mean()
        for name, before in head.items()
        if name.endswith("weight")
    ]
    assert min(moved) > 0.95
    model.eval()
    with context:
        expected = said(model, source, target, english)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = adapter.load_adapter(half(kind), str(tmp_path)).eval()
    with context:
        torch.testing.assert_close(
            said(again, BackboneSourceEncoder(again), target, english), expected, rtol=0, atol=0
        )
    assert not trained(again)


@pytest.mark.parametrize(("saved", "said_to_be"), [("gated", "add"), ("add", "gated")])
def test_weights_that_are_not_the_configurations_are_refused(saved, said_to_be, tmp_path):
    """PEFT leaves out what it does not know, and what is missing stays random."""
    kind = ("llama", "prompt")
    adapter.add_adapter(random_backbone(kind), r=2, alpha=4, fusion=saved).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{saved}"', f'"{said_to_be}"'))
    with pytest.raises(
        ValueError,
        match=r"12 weights are not those of its adapter_config\.json, e\.g\. .*flare_fusion",
    ):
        adapter.load_adapter(random_backbone(kind), str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind", [("xlm-roberta", "label"), ("llama", "prompt"), ("mt5", "span")], ids="-".join
)
def test_the_english_model_keeps_a_small_update(kind, dtype, tmp_path):
    """One of 0.2 % of the weights; bfloat16 weights cannot take it, since they have steps of 0.4 %
    and more.
    """
    target, kept = batches(kind)[0], getattr(torch, dtype)

    def backbone():
        made = random_backbone(kind)
        made.model.to(kept)
        return made

    exact = backbone()
    exact.model.float()
    english = adapter.add_adapter(exact, r=4, alpha=4).eval()
    randomise(english)
    for layer in english.modules():
        if isinstance(layer, LoraLayer):
            update = layer.get_delta_weight("default")
            layer.lora_B["default"].weight.data *= (
                0.002 * layer.base_layer.weight.norm() / update.norm()
            )
    english.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = outputs(english, target)
    with english.disable_adapter():
        change = (expected - outputs(english, target)).norm()

    model = adapter.english_model(
        backbone(), str(tmp_path), merge=Precision(dtype).holds_updates
    ).model
    found = outputs(
        model.float().eval(), target
    )  # the sums in 32 bits: the weights alone are looked at
    assert 0 < change < 0.1 * expected.norm()
    assert (found - expected).norm() < 0.02 * change


# --- what the fusion keeps for the backward ------------------------------------------------------


def kept_for_backward(model, source, target, english):
    """Storage -> bytes of what a forward saves, without weights and without the source states
    themselves.
    """
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = (
            tensor.untyped_storage()
        )  # alive, so that no address comes twice
        return tensor

    source.encode(english)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = outputs(model, target)
    states = [source.states.states_for(block) for block in source.states.blocks] if english else []
    known = [*model.parameters(), *(found[0] for found in states)]
    held = {tensor.untyped_storage().data_ptr() for tensor in known}
    return sum(s.nbytes() for at, s in storages.items() if at not in held), logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("source_state", ["layer_input", "block_output"])
@pytest.mark.parametrize("kind", [("llama", "prompt"), ("xlm-roberta", "label")], ids="-".join)
def test_no_copy_of_the_source_is_kept_for_the_backward(kind, source_state, autocast, dtype):
    """Beside the recorded states themselves a fused layer keeps bottlenecks alone: r of them are
    far less than d.
    """
    backbone = random_backbone(kind)
    backbone.model.to(dtype)
    model = adapter.add_adapter(backbone, r=1, alpha=1, fusion="add", source_state=source_state)
    source, (target, english) = BackboneSourceEncoder(model), batches(kind, 12, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alone, _ = kept_for_backward(model, source, target, None)
        both, _ = kept_for_backward(model, source, target, english)
    rows, length, d = 3, 12, 16
    copy = rows * length * d * (2 if autocast else 4)
    assert both - alone < copy, "less than one copy in all projections of all layers together"


@pytest.mark.parametrize("layer", ["ahead", "same"])
@pytest.mark.parametrize("state", ["layer_input", "block_output"])
@pytest.mark.parametrize(
    "kind", [("llama", "prompt"), ("mt5", "span"), ("mt5", "prompt")], ids="-".join
)
def test_only_states_that_are_read_are_kept(kind, layer, state, monkeypatch):
    model = adapter.add_adapter(
        random_backbone(kind), r=2, alpha=4, fusion="add", source_layer=layer, source_state=state
    )
    source, asked = BackboneSourceEncoder(model), []
    stack = model.get_base_model().base_model
    stack = stack if kind[0] == "llama" else stack.encoder
    stack.register_forward_pre_hook(
        lambda m, a, kw: asked.append(kw["output_hidden_states"]), with_kwargs=True
    )
    source.encode(batches(kind)[1])
    stacks = {
        "llama": ["decoder"],
        "mt5": ["encoder", "decoder"][: 1 if kind[1] == "prompt" else 2],
    }[kind[0]]
    first = int(layer == "ahead")
    assert set(source.states._states) == {(name, i + first) for name in stacks for i in range(3)}
    assert asked == [state == "block_output"]


# --- embeddings and LM head, trained in full -----------------------------------------------------

ALSO = ("embeddings", "lm_head")


def with_embeddings(backbone, fusion="add_relu"):
    model = adapter.add_adapter(backbone, r=4, alpha=8, fusion=fusion, also_train=ALSO)
    torch.manual_seed(3)
    for name, parameter in trained(model).items():
        if "modules_to_save" in name or "lora_B" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_trained_embeddings_are_the_targets_and_the_source_reads_the_frozen_ones(family):
    kind = (family, "prompt")
    target, english = batches(kind)
    plain = (
        adapter.add_adapter(untied(kind), r=4, alpha=8, fusion="add_relu").to(torch.float64).eval()
    )
    model = with_embeddings(untied(kind)).to(torch.float64)
    changed = {
        name.split(".modules_to_save")[0].rpartition(".")[2]
        for name in trained(model)
        if "modules_to_save" in name
    }
    assert changed == {"embed_tokens", "lm_head"}
    states = []
    for one in (plain, model):
        source = BackboneSourceEncoder(one)
        source.encode(english)
        states.append([source.states.states_for(block)[0] for block in source.states.blocks])
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    # the target reads the trained ones: it is what a model with these embeddings says
    source.encode(None)
    own = untied(kind).model
    own.get_input_embeddings().weight.data = (
        model.get_input_embeddings().modules_to_save["default"].weight.data
    )
    own.lm_head.weight.data = model.get_base_model().lm_head.modules_to_save["default"].weight.data
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(outputs(model, target), outputs(own, target), rtol=1e-6, atol=1e-6)


def untied(kind):
    """Gemma ties its embeddings; a checkpoint of its kind may have them apart."""
    backbone = random_backbone(kind)
    backbone.model.lm_head.weight = torch.nn.Parameter(
        backbone.model.lm_head.weight.detach().clone(), requires_grad=False
    )
    backbone.model.config.tie_word_embeddings = False
    return backbone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_embeddings_are_kept_in_32_bits_and_come_back(dtype, tmp_path):
    """Through English training, transfer and loading, merged or beside."""
    kind = ("llama", "prompt")
    target, source = batches(kind)

    def backbone():
        made = random_backbone(kind)
        made.model.to(dtype)
        return made

    english = with_embeddings(backbone(), fusion=None)
    english.save_pretrained(tmp_path / "english", save_embedding_layers=False)

    def start():
        return adapter.english_model(
            backbone(), str(tmp_path / "english"), merge=dtype == torch.float32
        )

    rounding = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    )
    torch.testing.assert_close(
        outputs(start().model.eval(), target), outputs(english, target), **rounding
    )
    model = with_embeddings(start())
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    model.train()
    said(model, BackboneSourceEncoder(model), target, source).float().tanh().sum().backward()
    assert all(p.grad is not None for p in trained(model).values())
    expected = said(model.eval(), BackboneSourceEncoder(model), target, source)
    model.save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False, selected_adapters=["default"]
    )
    again = adapter.load_adapter(start(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(
        said(again, BackboneSourceEncoder(again), target, source), expected, rtol=0, atol=0
    )


def test_embeddings_that_cannot_be_trained_are_refused():
    with pytest.raises(
        UserError,
        match=r"adapter\.also_train=\[embeddings\]: only families with a name for it .*llama",
    ):
        adapter.add_adapter(
            random_backbone(("xlm-roberta", "label")), r=2, alpha=4, also_train=["embeddings"]
        )
    with pytest.raises(
        UserError,
        match=r"adapter\.also_train=\[lm_head\]: this model's embeddings and LM head "
        r"are one weight",
    ):
        adapter.add_adapter(
            random_backbone(("gemma2", "prompt")), r=2, alpha=4, also_train=["lm_head"]
        )
