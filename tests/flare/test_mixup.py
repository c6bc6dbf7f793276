"""X-Mixup: its equations against NumPy, and what a mixing block does in a model."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from random_models import dtype_of, outputs, random_backbone, token_batch
from test_invariants import DECODERS, batches, forced, generate, rows, tolerance
from torch import nn

from flare_exp.flare import adapter, mixup
from flare_exp.flare.mixup import (
    DEPTHS,
    Mixing,
    block_at,
    kl_consistency,
    state_consistency,
)
from flare_exp.flare.source_encoders import MixupSourceEncoder

B, T, S, D, R = 3, 5, 4, 6, 2
LENGTHS = {"target": [5, 3, 4], "source": [2, 4, 0]}  # the last row has no source


def mask_of(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@pytest.fixture
def mixing():
    torch.manual_seed(0)
    made = Mixing(D, R, most=0.7).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


@pytest.fixture
def states():
    torch.manual_seed(1)
    made = [torch.randn(B, n, D, dtype=torch.float64, requires_grad=True) for n in (T, S)]
    return (*made, mask_of(LENGTHS["target"], T), mask_of(LENGTHS["source"], S))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(mixing, target, source):
    """The mixture of one row without padding, and lambda."""
    w = {name: p.detach().numpy() for name, p in mixing.named_parameters()}

    def projected(x, name):
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return normal + normal @ w[f"{name}.down.weight"].T @ w[f"{name}.up.weight"].T

    scores = projected(target, "query") @ projected(source, "key").T / np.sqrt(target.shape[-1])
    ways = softmax(scores), softmax(scores.T)
    entropy = sum(-(p * np.log(p)).sum(-1).mean() for p in ways)
    share = mixing.most / (
        1 + np.exp(-(w["ratio.weight"].item() * entropy + w["ratio.bias"].item()))
    )
    return (1 - share) * target + share * ways[0] @ source, share


def test_mixing_is_that_of_the_equations_and_padding_has_no_part(mixing, states):
    mixed, shares = mixing(*states)
    target, source = (x.detach().numpy() for x in states[:2])
    for row, (t, s) in enumerate(zip(*LENGTHS.values(), strict=True)):
        wanted, share = oracle(mixing, target[row, :t], source[row, :s]) if s else (target[row], 0)
        np.testing.assert_allclose(mixed[row, : len(wanted)].detach(), wanted, rtol=1e-9)
        np.testing.assert_allclose(shares[row].item(), share, rtol=1e-9)
        assert torch.equal(mixed[row, t:], states[0][row, t:])


def test_gradients_are_right_and_finite_beside_rows_without_a_source(mixing, states):
    target, source, *masks = states
    assert torch.autograd.gradcheck(lambda t, s: mixing(t, s, *masks), (target, source))
    mixing(*states)[0].square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in mixing.parameters())
    assert source.grad[0, :2].any()
    assert not source.grad[0, 2:].any()
    assert not source.grad[2].any()


def test_a_new_mixing_attends_to_the_most_alike_and_wrong_shapes_are_refused(states):
    target, _, mask, _ = states
    mixed, share = Mixing(D, R).double()(10 * target, 10 * target, mask, mask)
    assert ((share > 0.25) & (share < 0.5)).all(), "lambda_0 / 2 .. lambda_0, as entropies are > 0"
    assert mixed.shape == target.shape
    with pytest.raises(ValueError, match=r"\[B, T\] and \[B, S\] are needed"):
        Mixing(D, R)(target, target, mask, mask[:, 1:])


def test_losses_are_those_of_the_equations(states):
    target, source, *masks = states
    one, other = torch.randn(2, B, 4, dtype=torch.float64)
    one, other = one.requires_grad_(), other.requires_grad_()
    p, q = (softmax(x.detach().numpy()) for x in (one, other))
    found = kl_consistency(one, other)
    np.testing.assert_allclose(found.detach(), (p * np.log(p / q)).sum(-1), rtol=1e-9)
    found.sum().backward()
    assert one.grad is None
    assert other.grad.any()
    t, s = target.detach().numpy(), source.detach().numpy()
    for pool, reduce in (("first", lambda x: x[0]), ("mean", lambda x: x.mean(0))):
        loss = state_consistency(source, target, masks[1], masks[0], pool)
        wanted = [
            np.square(reduce(s[i, :m]) - reduce(t[i, :n])).mean() if m else 0
            for i, (n, m) in enumerate(zip(*LENGTHS.values(), strict=True))
        ]
        np.testing.assert_allclose(loss.detach(), wanted, rtol=1e-9)
    loss.sum().backward()
    assert source.grad is None
    assert target.grad[0].any()
    with pytest.raises(ValueError, match="neither 'first' nor 'mean'"):
        state_consistency(source, target, masks[1], masks[0], "last")


def test_blocks_are_chosen_by_depth():
    assert [block_at(DEPTHS[kind], 24) for kind in ("label", "span")] == [0, 15]
    assert [block_at(depth, 3) for depth in (0, 0.5, 1)] == [0, 2, 2]
    with pytest.raises(ValueError, match=r"depth=2 is not in 0\.\.1"):
        block_at(2, 3)


def test_states_of_other_kinds_are_refused():
    backbone = random_backbone(("bert", "label"))
    options = {"fusion": "x_mixup", "fusion_options": {"depths": [0], "rank": 2}}
    with pytest.raises(ValueError, match="x_mixup needs source_state='block_output'"):
        adapter.add_adapter(backbone, r=4, alpha=8, **options)


# --- in models -----------------------------------------------------------------------------------


def mixed_model(kind, fusion="x_mixup", depths=(0.4,), backbone=None):
    """A model of three blocks, of which the second mixes, and its source encoder."""
    backbone = backbone or random_backbone(kind)
    options = {"fusion_options": {"depths": list(depths), "rank": 2}} if fusion else {}
    if fusion:
        options["source_state"] = "block_output"
    torch.manual_seed(3)
    model = adapter.add_adapter(backbone, r=4, alpha=12, fusion=fusion, **options)
    model = model.to(dtype_of(kind)).eval()
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    for name, parameter in model.named_parameters():
        if ".flare_mixup." in name:
            nn.init.normal_(parameter, std=0.3)
    return model, MixupSourceEncoder(model) if fusion else None


def said(model, stream, target, source):
    stream.encode(source)
    return outputs(model, target)


def test_without_a_source_it_is_lora_and_with_one_its_block_mixes(kind):
    target, source = batches(kind)
    model, stream = mixed_model(kind)
    lora, _ = mixed_model(kind, fusion=None)
    plain = outputs(lora, target)
    assert torch.equal(said(model, stream, target, None), plain)
    fused = said(model, stream, target, source)
    assert not torch.allclose(fused, plain)
    # the source's final states are those of the model without adapter
    final, mask = stream.states.source()
    assert mask.equal(source["attention_mask"].bool())
    assert not final.requires_grad
    assert stream.states.target.shape[:2] == target["input_ids"].shape or kind[0] == "mt5"
    assert (stream.states.logits is not None) == (kind[1] == "label")
    # padding and the other rows have no influence; a row without a source is plain
    wider = batches(kind, target_width=10, source_width=12)
    again = said(model, stream, *wider)
    if again.ndim == 3 and again.shape[1] == 10:
        kept = slice(-7, None) if kind in DECODERS else slice(7)
        again = again[:, kept]
    torch.testing.assert_close(again, fused, **tolerance(kind))
    alone = said(model, stream, rows(target, 1), rows(source, 1))
    if alone.ndim == 3 and kind[0] != "mt5":
        alone = nn.functional.pad(alone, (0, 0, 0, fused.shape[1] - alone.shape[1]))
    torch.testing.assert_close(alone[0], fused[1], **tolerance(kind))
    some = {**source, "attention_mask": source["attention_mask"] * torch.tensor([[1], [0], [1]])}
    part = said(model, stream, target, some)
    torch.testing.assert_close(part[1], plain[1], **tolerance(kind))
    torch.testing.assert_close(part[0], fused[0], **tolerance(kind))


@pytest.mark.parametrize("kind", [("llama", "prompt"), ("mt5", "prompt")])
def test_the_last_block_mixes_the_sources_own_output_of_that_block(kind):
    """Not the final state, which is normalized: the target's output is not."""
    model, stream = mixed_model(kind, depths=(1.0,))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)  # the target pass is the source pass, up to the mixing
    read = []
    handles = [
        part.register_forward_hook(lambda _, args, output: read.append(args[:2]))
        for part in model.modules()
        if isinstance(part, mixup.Mixing)
    ]
    batch = token_batch([6, 6], 1, side="left" if kind[0] == "llama" else "right")
    said(model, stream, batch, batch)
    ((target, source),) = read
    assert torch.allclose(target, source)
    assert len(handles) == 1


def test_gradients_reach_the_mixing_with_and_without_checkpointing():
    kind = ("xlm-roberta", "label")
    target, source = batches(kind)
    found = []
    for checkpointing in (False, True):
        backbone = random_backbone(kind)
        if checkpointing:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        model, stream = mixed_model(kind, backbone=backbone)
        model.train()
        logits = said(model, stream, target, source)
        states = stream.states
        extra = kl_consistency(states.logits, logits) + state_consistency(
            states.source()[0], states.target, states.source()[1], states.target_mask, "first"
        )
        extra.sum().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert sum(".flare_mixup." in name for name in trained) == 6
        # the head's first layer reads the states, which the losses compare below it as well
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        found.append({name: p.grad for name, p in trained.items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "kind", [("xlm-roberta", "label"), ("mt5", "span"), ("llama", "prompt")], ids="-".join
)
def test_it_is_saved_and_loaded_with_the_adapter(kind, tmp_path):
    target, source = batches(kind)
    model, stream = mixed_model(kind, depths=(0.0, 0.7))
    expected = said(model, stream, target, source)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    own = adapter.load_adapter(random_backbone(kind), str(tmp_path)).to(dtype_of(kind)).eval()
    pefts = PeftModel.from_pretrained(
        random_backbone(kind).model, str(tmp_path), adapter_name="renamed"
    )
    for again in (own, pefts.to(dtype_of(kind)).eval()):
        torch.testing.assert_close(
            said(again, MixupSourceEncoder(again), target, source), expected, **tolerance(kind)
        )
    with pytest.raises(ValueError, match="a fusion adapter cannot be merged"):
        own.merge_and_unload()


@pytest.mark.parametrize("kind", [("llama", "prompt"), ("mt5", "prompt")], ids="-".join)
def test_generation_mixes_the_prompt_once(kind):
    target, source = batches(kind)
    model, stream = mixed_model(kind)
    done = generate(model, stream, target, source)
    plain = generate(model, stream, target, None)
    assert not torch.allclose(done.logits[0], plain.logits[0])
    if kind in DECODERS:  # every step equals the pass over the prompt and what was written
        written = done.sequences[:, target["input_ids"].shape[1] :]
        full = forced(model, stream, target, source, written).to(done.logits[0].dtype)
        torch.testing.assert_close(torch.stack(done.logits, 1), full, rtol=1e-4, atol=1e-4)
