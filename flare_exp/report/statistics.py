"""Statistics of tables: paired bootstrap, Holm's correction, average ranks.

Pure functions of numpy arrays, which know neither runs nor files. Shape suffixes: B resamples, S
seeds, N test examples, M methods, C cells. Resampling draws from a generator that is seeded, so the
same data give the same interval.

`scipy.stats.bootstrap` resamples one axis. Here seeds and examples are resampled at once, and one
draw of examples is shared by all seeds and by both methods, so the draws are made with numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
ENDS = (0.025, 0.975)  # of intervals: quantiles
SEED = 0
CHUNK = 1_000_000  # counts that are held at once

Array = NDArray[np.floating]
# counts of the drawn examples, (b, N) -> the metric on each draw, (b,)
Metric = Callable[[Array], Array]


@dataclass(frozen=True)
class Difference:
    """The difference between two methods, as fractions.

    Args:
        mean: the difference on the test set, averaged over seeds.
        low: lower end of the interval.
        high: upper end of the interval.
        p: two-sided p-value.
    """

    mean: float
    low: float
    high: float
    p: float


def example_counts(examples: int, resamples: int = RESAMPLES) -> Iterator[Array]:
    """Yield how often each example is drawn, with replacement, in chunks of resamples.

    Args:
        examples: number of test examples, N.
        resamples: number of resamples in all chunks together, B.

    Yields:
        counts of shape (b, N); the b of all chunks add up to B, and each row adds up to N.
    """
    generator = np.random.default_rng(SEED)
    rows = max(1, CHUNK // examples)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = generator.integers(examples, size=(count, examples))
        drawn += np.arange(count)[:, None] * examples  # a row of counts for each resample
        counts = np.bincount(drawn.ravel(), minlength=count * examples)
        yield counts.reshape(count, examples).astype(float)


def mean_metric(scores: Array) -> Metric:
    """Return the metric that is the mean of per-example scores of shape (N,)."""
    values = np.asarray(scores, dtype=float)
    return lambda counts: counts @ values / len(values)


def macro_f1_metric(gold: NDArray[np.integer], predicted: NDArray[np.integer]) -> Metric:
    """Return macro F1 as a function of how often each example is drawn.

    Macro F1 is no mean over examples, so it is computed anew from the counts of every resample:
    F1 = 2 TP / (predicted + gold) for each class. The mean is over the classes that occur in gold
    or predictions of the resample.

    Args:
        gold: class of each example, (N,), from 0.
        predicted: predicted class, (N,); -1 is a prediction that is no class.
    """
    classes = np.union1d(gold, predicted[predicted >= 0])
    is_gold = gold[:, None] == classes
    is_predicted = predicted[:, None] == classes
    # one product gives true positives and denominators of all classes
    table = np.hstack([2 * (is_gold & is_predicted), is_gold.astype(int) + is_predicted])
    weights = table.astype(float)

    def metric(counts: Array) -> Array:
        twice_hits, sizes = np.split(counts @ weights, 2, axis=1)
        present = sizes > 0
        f1 = np.divide(twice_hits, sizes, out=np.zeros_like(sizes), where=present)
        return f1.sum(axis=1) / present.sum(axis=1)

    return metric


def paired_bootstrap(difference: Array, differences_BS: Array) -> Difference:
    """Return mean, percentile interval and p-value of a difference between two methods.

    Both levels are resampled: examples, which `differences_BS` has done already, and seeds, which
    are drawn here with replacement. With one seed only examples vary.

    The p-value is min(1, 2 min((1 + #{d <= 0}) / (B + 1), (1 + #{d >= 0}) / (B + 1))) over the
    resampled differences d. Adding one keeps it above zero (Davison and Hinkley 1997, section 4.2).

    Args:
        difference: method minus baseline on the test set, for each seed, (S,).
        differences_BS: the same on each draw of examples, (B, S).
    """
    resamples, seeds = differences_BS.shape
    drawn = np.random.default_rng(SEED).integers(seeds, size=(resamples, seeds))
    resampled = np.take_along_axis(differences_BS, drawn, axis=1).mean(axis=1)
    low, high = np.quantile(resampled, ENDS)
    # what is closer to zero than rounding errors is zero
    resampled = np.where(np.abs(resampled) < 1e-12, 0.0, resampled)
    below = (1 + np.sum(resampled <= 0)) / (resamples + 1)
    above = (1 + np.sum(resampled >= 0)) / (resamples + 1)
    p = min(1.0, 2 * float(min(below, above)))
    return Difference(float(np.mean(difference)), float(low), float(high), p)


def holm(p_values: Array) -> Array:
    """Return p-values that are adjusted for several comparisons, in the order of the input.

    The i-th smallest of m p-values is multiplied by m - i + 1, is at least its predecessor, and at
    most 1 (Holm 1979, Scandinavian Journal of Statistics 6).
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    scaled = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def ranks(scores_MC: Array) -> Array:
    """Return the rank of each method in each cell, (M, C); 1 is the highest score.

    Methods with equal scores share the mean of the ranks that they take up.
    """
    higher = scores_MC[None] > scores_MC[:, None]
    equal = scores_MC[None] == scores_MC[:, None]
    return 1.0 + higher.sum(axis=1) + (equal.sum(axis=1) - 1) / 2


def average_ranks(scores_MC: Array) -> tuple[Array, Array]:
    """Return the average rank of each method over cells, and its percentile interval.

    Cells are resampled with replacement; the ranks within a cell stay as they are.

    Args:
        scores_MC: score of each method in each cell, without gaps.

    Returns:
        average ranks of shape (M,), and the ends of the intervals, (M, 2).
    """
    found = ranks(scores_MC)
    cells = found.shape[1]
    drawn = np.random.default_rng(SEED).multinomial(cells, np.full(cells, 1 / cells), RESAMPLES)
    resampled = drawn @ found.T / cells
    ends = np.quantile(resampled, ENDS, axis=0)
    return found.mean(axis=1), ends.T
