"""Activations and similarities against loops over single rows without padding (float64)."""

import pytest
import torch
from random_models import BUILDERS, outputs, random_backbone, rows, token_batch
from test_invariants import randomise
from torch import nn

from flare_exp.flare import adapter
from flare_exp.flare.measuring import BottleneckRecorder, cosine, fusions_of, hidden_states, means
from flare_exp.flare.source_encoders import BackboneSourceEncoder

KINDS = [("xlm-roberta", "label"), ("mt5", "span"), ("mt5", "prompt"), ("llama", "prompt")]
LENGTHS = [7, 4, 6], [5, 9, 3]


def made(kind, fusion):
    """A FLARE model, its source encoder, and batches of target and source."""
    torch.manual_seed(3)
    model = adapter.add_adapter(random_backbone(kind), r=4, alpha=8, fusion=fusion).double().eval()
    randomise(model)
    side = "left" if kind[0] == "llama" else "right"
    target, source = (token_batch(n, i, side=side) for i, n in enumerate(LENGTHS, start=1))
    return model, BackboneSourceEncoder(model), target, source


def unpadded(batch, row):
    """One row without its padding."""
    one = rows(batch, row)
    kept = one["attention_mask"][0].bool()
    return {name: x[:, kept] for name, x in one.items()}


def inputs_of_fusions(model, encoder, target, source):
    """(block, projection) -> S and T of one row, from the inputs of its LoRA A."""
    seen, hooks = {}, []
    for path, layer in model.named_modules():
        if hasattr(layer, "flare_fusion"):
            down = layer.lora_A["default"]
            hooks.append(
                down.register_forward_hook(
                    lambda module, args, out, path=path: seen.setdefault(path, []).append(out[0])
                )
            )
    encoder.encode(source, target["input_ids"].shape[1])
    with torch.no_grad():
        outputs(model, target)
    for hook in hooks:
        hook.remove()
    return list(seen.values())


@pytest.mark.parametrize("fusion", ["add", "mul_relu", "cross_attn"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_activations_are_means_over_tokens_without_padding(kind, fusion):
    model, encoder, target, source = made(kind, fusion)
    recorder = BottleneckRecorder(model)
    recorder.mask = target["attention_mask"].bool()
    with torch.no_grad(), recorder:
        encoder.encode(source, target["input_ids"].shape[1])
        hidden_states(model, target, kind[1] == "prompt")
    found = recorder.activations()

    names = list(fusions_of(model))
    sums = [[[], []] for _ in names]
    for row in range(3):
        one, other = unpadded(target, row), unpadded(source, row)
        both = inputs_of_fusions(model, encoder, one, other)
        for number, calls in enumerate(both):
            # the target is projected before the source
            t, s = calls[:2]
            if fusion != "cross_attn":  # the positions that are fused
                length = min(len(s), len(t))
                s = s[-length:] if kind[0] == "llama" else s[:length]
            sums[number][0] += s.flatten().tolist()
            sums[number][1] += t.flatten().tolist()

    def f(x):
        return max(x, 0.0) if fusion == "mul_relu" else x

    assert len(found) == 2 * 3 * (2 if kind == ("mt5", "span") else 1)
    assert {(a.stack, a.layer - 1, a.projection) for a in found} == {
        (*block, name) for block, name, _ in names
    }
    for activation, (s, t) in zip(found, sums, strict=True):
        expected = [
            sum(map(f, s)) / len(s),
            sum(map(f, t)) / len(t),
            sum(map(abs, s)) / len(s),
            sum(map(abs, t)) / len(t),
        ]
        said = [activation.source, activation.target, activation.source_size]
        assert [*said, activation.target_size] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    encoder.encode(source, target["input_ids"].shape[1])
    with torch.no_grad():
        hidden_states(model, target, kind[1] == "prompt")
    assert recorder.activations() == found, "nothing is recorded outside `with`"


def test_rows_without_a_source_have_no_activation_of_one():
    model, encoder, target, _ = made(KINDS[0], "add_relu")
    recorder = BottleneckRecorder(model)
    recorder.mask = target["attention_mask"].bool()
    with torch.no_grad(), recorder:
        encoder.encode(None)
        hidden_states(model, target, writes=False)
    assert {(a.source, a.source_size) for a in recorder.activations()} == {(None, None)}
    assert all(a.target > 0 for a in recorder.activations())


@pytest.mark.parametrize("kind", list(BUILDERS), ids="-".join)
def test_means_of_hidden_states_are_those_of_rows_without_padding(kind):
    model = random_backbone(kind).model
    side = "left" if kind[1] == "prompt" and kind[0] != "mt5" else "right"
    batch, writes = token_batch([7, 4, 6], 1, 9, side), kind[1] == "prompt"
    with torch.no_grad():
        whole = hidden_states(model, batch, writes)
        for row in range(3):
            alone = hidden_states(model, unpadded(batch, row), writes)
            assert list(alone) == list(whole)
            for stack, layers in alone.items():
                assert len(layers) == 4, "the embeddings and three blocks"
                found = means(whole[stack], batch["attention_mask"].bool())[row]
                for layer, states in enumerate(layers):
                    expected = sum(states[0]) / len(states[0])
                    torch.testing.assert_close(
                        found[layer], expected.double(), rtol=1e-4, atol=1e-5
                    )


def test_cosines_of_the_same_and_of_other_examples():
    torch.manual_seed(0)
    target, english = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    own, others = [], []
    for i in range(4):
        for j in range(4):
            dot = sum(a * b for a, b in zip(target[i].tolist(), english[j].tolist(), strict=True))
            value = dot / float(target[i].norm() * english[j].norm())
            (own if i == j else others).append(value)
    found = cosine(target, english)
    assert found.mean == pytest.approx(sum(own) / 4)
    deviation = (sum((x - found.mean) ** 2 for x in own) / 3) ** 0.5
    assert found.deviation == pytest.approx(deviation)
    assert found.others == pytest.approx(sum(others) / 12)
    one = cosine(target[:1], english[:1])
    assert (one.mean, one.deviation, one.others) == (pytest.approx(own[0]), 0, None)


def test_a_model_without_fusion_has_no_activations():
    model = adapter.add_adapter(random_backbone(KINDS[0]), r=4, alpha=8)
    assert list(fusions_of(model)) == []
    assert BottleneckRecorder(model).activations() == []
    assert list(fusions_of(nn.Linear(1, 1))) == []
