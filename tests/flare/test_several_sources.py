"""Several sources of one text: combined position by position, or read one after the other."""

import math

import pytest
import torch
from random_models import random_backbone, rows, token_batch
from test_invariants import fused, said, side

from flare_exp.config import schema
from flare_exp.flare.fusion import FUSIONS, combine_sources
from flare_exp.flare.source_states import COMBINE, SourceStates

KINDS = [("xlm-roberta", "label"), ("llama", "prompt")]


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request):
    return request.param


@pytest.fixture
def target(kind):
    return token_batch([7, 4, 6], 1, None, side(kind))


@pytest.fixture
def sources(kind):
    """Two sources of the same width for each text."""
    return [token_batch([5, 9, 3], 2, 9, side(kind)), token_batch([8, 2, 6], 3, 9, side(kind))]


def stacked(sources):
    return {name: torch.stack([source[name] for source in sources]) for name in sources[0]}


@pytest.mark.parametrize("how", COMBINE)
def test_sources_are_weighted_per_position(how):
    """By hand: three sources, of which some lack the position."""
    random = torch.Generator().manual_seed(0)
    sources = torch.randn(3, 1, 2, 4, generator=random, dtype=torch.float64)
    target = torch.randn(1, 2, 4, generator=random, dtype=torch.float64)
    masks = torch.tensor([[[True, False]], [[False, False]], [[True, False]]])
    found, mask = combine_sources(sources, masks, target, how)
    assert mask.tolist() == [[True, False]]
    scores = [float(sources[k, 0, 0] @ target[0, 0]) / math.sqrt(4) for k in (0, 2)]
    first = 0.5 if how == "mean" else 1 / (1 + math.exp(scores[1] - scores[0]))
    expected = first * sources[0, 0, 0] + (1 - first) * sources[2, 0, 0]
    torch.testing.assert_close(found[0, 0], expected)
    assert torch.isfinite(found).all()


def test_an_unknown_way_is_refused():
    assert schema.keys()["source.combine"].metadata["choices"] == COMBINE
    with pytest.raises(ValueError, match="source_combine='sum' is none of attention, mean"):
        SourceStates(combine="sum")


@pytest.mark.parametrize("name", FUSIONS)
def test_the_same_source_twice_and_a_lost_one_equal_one_source(kind, target, sources, name):
    for how in COMBINE:
        model, stream = fused(lambda: random_backbone(kind), name, source_combine=how)
        one = said(model, stream, target, sources[0])
        torch.testing.assert_close(
            said(model, stream, target, stacked([sources[0]] * 2)), one, rtol=1e-4, atol=1e-5
        )
        lost = {**sources[1], "attention_mask": torch.zeros_like(sources[1]["attention_mask"])}
        torch.testing.assert_close(
            said(model, stream, target, stacked([sources[0], lost])), one, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["add_relu", "cross_attn"])
def test_every_source_counts_for_its_own_text_alone(kind, target, sources, name):
    model, stream = fused(lambda: random_backbone(kind), name)
    both = said(model, stream, target, stacked(sources))
    assert not torch.allclose(both, said(model, stream, target, sources[0]))
    changed = [sources[0], rows(sources[1], 2, 1, 0)]
    found = said(model, stream, target, stacked(changed))
    torch.testing.assert_close(found[1], both[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], both[0])


def test_computed_states_are_fused_as_texts_are(kind, target, sources):
    model, stream = fused(lambda: random_backbone(kind))
    expected = said(model, stream, target, stacked(sources))
    states = {
        "states": torch.stack([stream.compute(source) for source in sources]),
        "attention_mask": torch.stack([source["attention_mask"] for source in sources]),
    }
    torch.testing.assert_close(said(model, stream, target, states), expected, rtol=1e-4, atol=1e-5)


def test_candidate_answers_share_the_sources_of_their_prompt():
    """Rows of the target follow one another, two of them for each text."""
    kind = ("llama", "prompt")
    target = token_batch([7, 4, 6], 1, None, side(kind))
    given = stacked([token_batch([5, 9, 3], seed, 9, side(kind)) for seed in (2, 3)])
    model, stream = fused(lambda: random_backbone(kind))
    expected = said(model, stream, target, given)
    repeated = {name: x.repeat_interleave(2, 0) for name, x in target.items()}
    found = said(model, stream, repeated, given)
    for first in (0, 1):
        torch.testing.assert_close(found[first::2], expected, rtol=1e-4, atol=1e-5)
