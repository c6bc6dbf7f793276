"""Rows of several languages, drawn by a temperature."""

import itertools
from collections import Counter

import pytest

from flare_exp.data.sampling import (
    LengthBucketedBatchSampler,
    RankShardBatchSampler,
    ResumableDataLoader,
)
from flare_exp.data.temperature import TemperatureBatchSampler, shares

SIZES = {"large": 900, "small": 90, "tiny": 10}
LANGS = [lang for lang, size in SIZES.items() for _ in range(size)]
LENGTHS = [(7 * row) % 50 + 1 for row in range(len(LANGS))]


def sampler(temperature=5.0, seed=1, batch_size=32):
    return TemperatureBatchSampler(LENGTHS, batch_size, seed, LANGS, temperature)


def of_epoch(epoch, temperature=5.0):
    made = sampler(temperature)
    made.set_epoch(epoch)
    return list(made)


def rows_of(batches):
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1, {"large": 0.9, "small": 0.09, "tiny": 0.01}),
        (2, {"large": 30 / 42.649, "small": 9.487 / 42.649, "tiny": 3.162 / 42.649}),
        (1e6, {"large": 1 / 3, "small": 1 / 3, "tiny": 1 / 3}),
        (1e-6, {"large": 1, "small": 0, "tiny": 0}),
    ],
)
def test_the_share_of_a_language_is_its_rows_to_the_power_of_one_over_the_temperature(
    temperature, expected
):
    assert shares(SIZES, temperature) == pytest.approx(expected, abs=1e-4)
    drawn = Counter(
        LANGS[row] for epoch in range(20) for row in rows_of(of_epoch(epoch, temperature))
    )
    found = {lang: drawn[lang] / drawn.total() for lang in SIZES}
    # 20,000 draws: three standard deviations are 0.011 at most
    assert found == pytest.approx(expected, abs=0.011)


def test_an_epoch_follows_from_seed_and_epoch_and_is_as_long_as_the_data():
    first = list(sampler())
    assert first == list(sampler())
    assert len(first) == len(sampler()) == len(list(LengthBucketedBatchSampler(LENGTHS, 32, 1)))
    assert len(rows_of(first)) == len(LANGS)
    assert list(sampler(seed=2)) != first != of_epoch(1)


def test_all_rows_of_a_language_are_read_before_one_is_read_again():
    counts = Counter(rows_of(sampler(temperature=1e6)))
    for lang in SIZES:
        times = [counts[row] for row, own in enumerate(LANGS) if own == lang]
        assert max(times) - min(times) <= 1, lang
    assert max(counts.values()) > 30, "the smallest language is read again and again"


def test_two_processes_read_the_batches_of_one_and_training_resumes_within_an_epoch():
    terms = [1] * len(LANGS)

    def batches(rank=0, size=1):
        return RankShardBatchSampler(sampler(batch_size=10), terms, rank, size)

    whole = [[row for row, _ in part] for part in batches()]
    halves = [[[row for row, _ in part] for part in batches(rank, 2)] for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert sorted(batch) == sorted(row for part in parts for row in part)

    class Rows(list):
        """A dataset whose items are the rows that are read."""

        def __getitem__(self, read):
            return read[0]

    def read():
        made = ResumableDataLoader(
            Rows(LANGS), batch_sampler=batches(), collate_fn=lambda items: items
        )
        made.order.set_epoch(3)
        return made

    expected, begun = list(read()), read()
    for _ in zip(range(4), begun, strict=False):
        pass
    state = begun.state_dict()
    resumed = read()
    resumed.load_state_dict(state)
    assert list(resumed) == expected[state["taken"] :]
    assert 4 <= state["taken"] < len(expected)
