"""How often the report calls two equal methods different: 300 trials of 200 examples each.

Each seed moves the accuracy of a method by a normal amount. Equal methods should have p < 0.05 in
5 % of trials.
"""

import numpy as np

from flare_exp.report import statistics

EXAMPLES, TRIALS, RESAMPLES = 200, 300, 2_000


def trial(seeds, spread, random, counts):
    """One pair of methods -> its p-value, and the differences between them for each seed."""
    ease = random.random(EXAMPLES)
    points, draws = [], []
    for _ in range(seeds):
        shifts = random.normal(0, spread, size=2)
        noise = random.normal(0, 0.3, size=(2, EXAMPLES))
        right, other = (ease + noise < 0.7 + shifts[:, None]).astype(float)
        points.append((right - other).mean())
        draws.append(statistics.mean_metric(right - other)(counts))
    return statistics.paired_bootstrap(np.array(points), np.stack(draws, axis=1)).p, points


def main():
    random = np.random.default_rng(0)
    counts = np.concatenate(list(statistics.example_counts(EXAMPLES, RESAMPLES)))
    print("seeds  sd between seeds (points)  p < 0.05")
    for spread in (0.0, 0.03, 0.1):
        for seeds in (1, 2, 3, 5):
            found = [trial(seeds, spread, random, counts) for _ in range(TRIALS)]
            deviation = 100 * np.std([point for _, points in found for point in points])
            share = np.mean([p < 0.05 for p, _ in found])
            print(f"{seeds:5}  {deviation:25.1f}  {100 * share:6.1f} %")


if __name__ == "__main__":
    main()
