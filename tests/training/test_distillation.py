"""The loss of a student against its teacher's soft labels."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from flare_exp.data.sampling import GlobalBatch
from flare_exp.training.distillation import Distillation


@pytest.fixture
def teacher():
    """Probabilities of five texts; the last one is certain."""
    made = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    made[4] = torch.tensor([0.0, 1.0, 0.0])
    return made


def divergence(teacher, logits, t):
    """KL(teacher || student) of one text, both softened, by PyTorch's own function."""
    softened = teacher ** (1 / t) / (teacher ** (1 / t)).sum()
    return kl_div(log_softmax(logits / t, 0), softened, reduction="sum")


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_the_divergence_is_weighted_and_averaged_over_the_rows(teacher, t):
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    batch = {"target": {"input_ids": torch.zeros(3, 2)}, "index": torch.tensor([4, 0, 2])}
    found = Distillation(teacher, weight=0.5, temperature=t).loss(batch, logits)
    terms = [divergence(teacher[row], one, t) for row, one in zip([4, 0, 2], logits, strict=True)]
    torch.testing.assert_close(found, 0.5 * t**2 * sum(terms) / 3, rtol=1e-3, atol=1e-4)


def test_it_is_a_part_of_the_global_batch_without_padding_rows(teacher):
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    batch = {
        "target": {"input_ids": torch.zeros(2, 2)},
        "index": torch.tensor([3, ~1]),
        "whole": GlobalBatch(terms=8, parts=2, rows=4),
    }
    found = Distillation(teacher, weight=1.0, temperature=1.0).loss(batch, logits)
    torch.testing.assert_close(found, divergence(teacher[3], logits[0], 1.0) * 2 / 4)


def test_validation_has_no_teacher(teacher):
    batch = {"target": {"input_ids": torch.zeros(1, 2)}, "index": torch.tensor([0])}
    with torch.no_grad():
        assert Distillation(teacher, 1.0, 1.0).loss(batch, torch.zeros(1, 3)) == 0
