"""The fusion functions against independent references (I3), masks, shapes and errors."""

import math

import pytest
import torch

from flare_exp.flare import fusion

B, T, R = 2, 5, 4
NAMES = list(fusion.FUSIONS)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    source, target = (
        torch.randn(B, T, R, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    return source, target, mask


def randomised(name: str, **options) -> fusion.Fusion:
    torch.manual_seed(1)
    phi = fusion.build(name, R, **options).double()
    for parameter in phi.parameters():
        torch.nn.init.normal_(parameter)
    return phi


def reference(name: str, phi, source, target, mask):
    """Every function written out element by element, with plain numbers."""
    relu, sigmoid = (lambda x: max(x, 0.0)), (lambda x: 1 / (1 + math.exp(-x)))
    w = {k: v.tolist() for k, v in phi.state_dict().items()}

    def linear(p, x):
        rows = zip(w[f"{p}.weight"], w[f"{p}.bias"], strict=True)
        return [sum(a * b for a, b in zip(row, x, strict=True)) + c for row, c in rows]

    out = []
    for s_rows, t_rows, m_rows in zip(source.tolist(), target.tolist(), mask.tolist(), strict=True):
        example = []
        for s, t, m in zip(s_rows, t_rows, m_rows, strict=True):
            if name == "add":
                y = [a + b for a, b in zip(s, t, strict=True)] if m else t
            elif name == "mul":
                y = [a * b for a, b in zip(s, t, strict=True)] if m else t
            elif name == "add_relu":
                y = (
                    [relu(a) + relu(b) for a, b in zip(s, t, strict=True)]
                    if m
                    else [relu(b) for b in t]
                )
            elif name == "mul_relu":
                y = (
                    [relu(a) * relu(b) for a, b in zip(s, t, strict=True)]
                    if m
                    else [relu(b) for b in t]
                )
            elif name == "gated":
                gates = [sigmoid(x) for x in linear("gate", s + t)]
                y = [g * a + (1 - g) * b for g, a, b in zip(gates, s, t, strict=True)] if m else t
            elif name == "cross_attn":
                keys = [linear("key", x) for x, real in zip(s_rows, m_rows, strict=True) if real]
                values = [
                    linear("value", x) for x, real in zip(s_rows, m_rows, strict=True) if real
                ]
                query = linear("query", t)
                scores = [
                    math.exp(sum(a * b for a, b in zip(query, k, strict=True)) / math.sqrt(R))
                    for k in keys
                ]
                y = [
                    sum(p * v[c] for p, v in zip(scores, values, strict=True)) / sum(scores)
                    for c in range(R)
                ]
            else:
                raise AssertionError(f"write {name}'s formula here")
            example.append(y)
        out.append(example)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_equals_reference(name, tensors):
    phi = randomised(name)
    torch.testing.assert_close(
        phi(*tensors), reference(name, phi, *tensors), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_never_fused(name, tensors):
    source, target, mask = tensors
    phi = randomised(name)
    changed = torch.where(mask[..., None], source, torch.full_like(source, 7.0))
    assert torch.equal(phi(source, target, mask), phi(changed, target, mask))


@pytest.mark.parametrize("name", NAMES)
def test_no_source_falls_back_to_target(name, tensors):
    source, target, mask = tensors
    expected = target.relu() if name.endswith("relu") else target
    assert torch.equal(randomised(name)(source, target, torch.zeros_like(mask)), expected)


def test_cross_attention_takes_any_lengths_and_heads():
    source, target = torch.randn(B, 3, R), torch.randn(B, T, R)
    for heads in (1, 2, 4):
        assert fusion.build("cross_attn", R, heads=heads)(
            source, target, torch.ones(B, 3, dtype=torch.bool)
        ).shape == (
            B,
            T,
            R,
        )


def test_cross_attention_released_direction(tensors):
    source, target, mask = tensors
    phi = randomised("cross_attn", query="source")
    flipped = reference("cross_attn", phi, target, source, torch.ones_like(mask))
    torch.testing.assert_close(
        phi(source, target, mask), torch.where(mask[..., None], flipped, target)
    )


def test_cross_attention_gradient_is_finite_without_source(tensors):
    source, target, mask = tensors
    phi, target = randomised("cross_attn"), target.clone().requires_grad_()
    phi(source, target, torch.zeros_like(mask)).sum().backward()
    grads = [target.grad, *(p.grad for p in phi.parameters())]
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "cross_attn"])
def test_elementwise_refuses_other_lengths(name):
    with pytest.raises(ValueError, match="S=3 but T=5"):
        fusion.build(name, R)(
            torch.zeros(B, 3, R), torch.zeros(B, T, R), torch.ones(B, 3, dtype=torch.bool)
        )


@pytest.mark.parametrize("name", NAMES)
def test_extra_parameters(name):
    expected = {"cross_attn": 3 * (R * R + R), "gated": 2 * R * R + R}.get(name, 0)
    assert sum(p.numel() for p in fusion.build(name, R).parameters()) == expected


def test_gated_starts_near_plain_lora(tensors):
    source, target, mask = tensors
    gate = 1 / (1 + math.exp(4))
    expected = torch.where(mask[..., None], gate * source + (1 - gate) * target, target)
    torch.testing.assert_close(fusion.build("gated", R).double()(source, target, mask), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plus", {}, "unknown fusion 'plus'"),
        ("add", {"heads": 2}, "does not take these options"),
        ("cross_attn", {"heads": 3}, "must divide the rank"),
        ("cross_attn", {"query": "both"}, "neither 'target' nor 'source'"),
    ],
)
def test_build_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        fusion.build(name, R, **options)


def test_shapes_must_fit():
    with pytest.raises(ValueError, match="batch sizes and ranks must agree"):
        fusion.build("add", R)(
            torch.zeros(B, T, R), torch.zeros(B, T, R + 1), torch.ones(B, T, dtype=torch.bool)
        )
