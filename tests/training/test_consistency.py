"""X-Mixup's consistency losses as part of the training loss."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from flare_exp.data.sampling import GlobalBatch
from flare_exp.flare.mixup import MixupStates
from flare_exp.training.consistency import Consistency


@pytest.fixture
def states():
    """Three rows: two with a source of two and three tokens, one without a source."""
    made, random = MixupStates(source_state="block_output"), torch.Generator().manual_seed(0)
    made.blocks = [("encoder", 1)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    made.set_states([torch.randn(3, 3, 4, generator=random)], mask)
    made.target = torch.randn(3, 2, 4, generator=random)
    made.target_mask = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    made.logits = torch.randn(3, 5, generator=random)
    return made


def test_the_losses_are_weighted_and_averaged_over_the_examples(states):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    batch = {"target": {"input_ids": torch.zeros(3, 2)}, "index": torch.tensor([0, 1, 2])}
    (source, _), target = states.source(), states.target
    divergences = [
        kl_div(log_softmax(logits[i], 0), states.logits[i].softmax(0), reduction="sum")
        for i in range(2)  # the third row has no source
    ]
    first = [((source[i, 0] - target[i, 0]) ** 2).mean() for i in range(2)]
    loss = Consistency(states, kl=0.5, mse=2.0, pool="first").loss
    expected = (0.5 * sum(divergences) + 2.0 * sum(first)) / 3
    torch.testing.assert_close(loss(batch, logits), expected)
    torch.testing.assert_close(loss(batch), 2.0 * sum(first) / 3, msg="a model without labels")
    means = [
        ((source[0, :2].mean(0) - target[0].mean(0)) ** 2).mean(),
        ((source[1].mean(0) - target[1, 0]) ** 2).mean(),
    ]
    mean = Consistency(states, kl=0.5, mse=2.0, pool="mean").loss(batch)
    torch.testing.assert_close(mean, 2.0 * sum(means) / 3)


def test_it_is_a_part_of_the_global_batch_without_padding_rows(states):
    batch = {
        "target": {"input_ids": torch.zeros(3, 2)},
        "index": torch.tensor([0, ~1, 2]),
        "whole": GlobalBatch(terms=8, parts=2, rows=4),
    }
    (source, _), target = states.source(), states.target
    expected = ((source[0, 0] - target[0, 0]) ** 2).mean() * 2 / 4
    found = Consistency(states, kl=1.0, mse=1.0, pool="first").loss(batch)
    torch.testing.assert_close(found, expected)
    states.clear()
    assert Consistency(states, 1.0, 1.0, "first").loss(batch) == 0
