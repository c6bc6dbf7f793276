"""Bootstrap, Holm and ranks against values that were computed by hand, or by other code."""

import numpy as np
import pytest

from flare_exp.report import statistics
from flare_exp.tasks import metrics


def test_holm_against_hand_computed_values():
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, then 1 * 0.04, which is not below its predecessor
    adjusted = statistics.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(statistics.holm(np.array([0.7, 0.6])), [1.0, 1.0])
    np.testing.assert_allclose(statistics.holm(np.array([0.04])), [0.04])


def test_interval_and_p_value_against_hand_computed_values():
    draws = np.array([[3.0], [-1.0], [1.0], [2.0]])
    found = statistics.paired_bootstrap(np.array([1.5]), draws)
    assert found.mean == 1.5
    assert found.p == pytest.approx(2 * (1 + 1) / 5)  # one of four is at most zero
    assert (found.low, found.high) == (pytest.approx(-0.85), pytest.approx(2.925))
    # no draw below zero: the p-value stays above zero
    assert statistics.paired_bootstrap(np.array([1.5]), draws + 2).p == pytest.approx(2 / 5)
    # equal methods; differences that are only rounding errors
    assert statistics.paired_bootstrap(np.zeros(1), 0 * draws + 1e-16).p == 1


def test_draws_of_examples_have_the_distribution_of_two_examples():
    """Of two examples, one is drawn twice with probability 1/4 each."""
    counts = np.concatenate(list(statistics.example_counts(2, resamples=20_000)))
    assert counts.shape == (20_000, 2)
    assert set(counts.sum(axis=1)) == {2}
    shares = [np.mean(counts[:, 0] == drawn) for drawn in (0, 1, 2)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.015)


def test_draws_come_in_chunks_and_are_reproducible(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 35)
    chunks = list(statistics.example_counts(10, resamples=7))
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    again = list(statistics.example_counts(10, resamples=7))
    assert all(np.array_equal(one, other) for one, other in zip(chunks, again, strict=True))


def test_seeds_are_resampled_too():
    """Seeds that differ by 1 and -1 on every draw: their mean is -1, 0 or 1 with 1/4, 1/2, 1/4."""
    draws = np.tile([1.0, -1.0], (20_000, 1))
    found = statistics.paired_bootstrap(np.array([1.0, -1.0]), draws)
    assert (found.mean, found.low, found.high, found.p) == (0, -1, 1, 1)
    # 1/4 of the means are 0, the others above
    found = statistics.paired_bootstrap(np.array([2.0, 0.0]), draws + 1)
    assert found.p == pytest.approx(2 * 0.25, abs=0.02)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # a: 1 hit, 1 predicted, 2 gold: 2/3; b: 1 hit, 2 predicted, 2 gold: 1/2
        ([1, 1, 1, 1], (2 / 3 + 1 / 2) / 2),
        ([2, 0, 2, 0], 1.0),
        # gold b alone, predicted something that is no class: b has 0, a does not occur
        ([0, 0, 0, 4], 0.0),
        # gold and predicted a alone: b does not occur
        ([4, 0, 0, 0], 1.0),
    ],
)
def test_macro_f1_of_a_resample_against_hand_computed_values(counts, expected):
    metric = statistics.macro_f1_metric(np.array([0, 0, 1, 1]), np.array([0, 1, 1, -1]))
    assert metric(np.array([counts], dtype=float))[0] == pytest.approx(expected)


def test_macro_f1_of_resamples_is_that_of_the_tasks():
    random, labels = np.random.default_rng(0), ("x", "y", "z")
    gold, guess = random.integers(3, size=40), random.integers(-1, 3, size=40)
    metric = statistics.macro_f1_metric(gold, guess)
    for _ in range(5):
        drawn = random.integers(40, size=40)
        counts = np.bincount(drawn, minlength=40).astype(float)
        texts = ["junk" if g < 0 else labels[g] for g in guess[drawn]]
        expected = metrics.classification(texts, [labels[g] for g in gold[drawn]], labels)
        assert metric(counts[None])[0] == pytest.approx(expected["macro_f1"], abs=1e-6)


def test_average_ranks_against_hand_computed_values():
    scores = np.array([[0.8, 0.6], [0.8, 0.5], [0.4, 0.9]])
    np.testing.assert_array_equal(statistics.ranks(scores), [[1.5, 2], [1.5, 3], [3, 1]])
    means, ends = statistics.average_ranks(scores)
    np.testing.assert_allclose(means, [1.75, 2.25, 2.0])
    # two cells: either twice with probability 1/4 each, so the ends are the ranks themselves
    np.testing.assert_allclose(ends, [[1.5, 2], [1.5, 3], [1, 3]])


def test_the_bootstrap_of_a_mean_agrees_with_the_normal_theory():
    """400 differences of standard deviation 1: the interval is 1.96 / 20 to either side."""
    differences = np.random.default_rng(3).normal(size=400)
    differences = (differences - differences.mean()) / differences.std() + 0.1
    metric = statistics.mean_metric(differences)
    draws = np.concatenate([metric(counts) for counts in statistics.example_counts(400)])
    found = statistics.paired_bootstrap(np.array([0.1]), draws[:, None])
    assert found.low == pytest.approx(0.1 - 1.96 / 20, abs=0.004)
    assert found.high == pytest.approx(0.1 + 1.96 / 20, abs=0.004)
    assert found.p == pytest.approx(2 * 0.02275, abs=0.01)  # 0.1 is two standard errors
