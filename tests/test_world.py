"""The generated world: deterministic, compositional, with two languages that are really others."""

from flare_exp.tiny.world import LABELS, SPLITS, World
from flare_exp.translation import corrupt


def test_deterministic_by_seed():
    first, again, other = World(0), World(0), World(1)
    for split in SPLITS:
        for lang in ("en", "near", "far"):
            texts = [[w.render(r, lang) for r in w.reviews(split)] for w in (first, again, other)]
            assert texts[0] == texts[1] != texts[2]
    assert first.corpus(50) == again.corpus(50) != other.corpus(50)


def test_sizes_balance_and_no_overlap():
    world = World()
    assert len(set(world.words)) == len(world.words) > 300
    seen = [r for split in SPLITS for r in world.reviews(split)]
    assert len(set(seen)) == len(seen) == sum(SPLITS.values())
    for split in SPLITS:
        labels = [r.label for r in world.reviews(split)]
        assert all(labels.count(i) > 0.28 * len(labels) for i in range(len(LABELS)))


def test_lexica_are_disjoint_and_word_order_differs():
    world = World()
    near, far = world.grammars["near"].stems, world.grammars["far"].stems
    assert not (set(near.values()) | set(far.values())) - {","} & set(world.words)
    assert len(set(far.values())) == len(far) == len(world.words)
    shared = sum(a == b for a, b in zip(near.values(), far.values(), strict=True))
    assert shared == 1  # the comma


def test_sentiment_needs_composition():
    """The same words in another structure have another label: a bag of words cannot solve the task."""
    from flare_exp.tiny.world import Review, State

    world = World()
    good, bad = State("soup", ("good",), None, False, 1), State("waiter", ("rude",), None, False, -1)
    a, b = Review("but", good, bad, None, None), Review("but", bad, good, None, None)
    for lang in ("en", "near", "far"):
        assert sorted(world.render(a, lang).split()) == sorted(world.render(b, lang).split())
    assert (a.label, b.label) == (2, 0)
    assert Review("expected", good, None, None, None).label == 1
    negated = State("soup", ("good",), None, True, -1)
    assert world.render(Review("plain", negated, None, None, None), "en") == "the soup was not good"


def test_corpus_under_represents_the_targets():
    world = World()
    english = set(world.words) | {";"}
    documents = world.corpus(4000, 0.05)
    foreign = sum(not set(d.split()) <= english for d in documents)
    assert 0.035 < foreign / len(documents) < 0.065


def test_corruption_has_the_chosen_rate_and_is_reproducible():
    text, vocabulary = " ".join(f"w{i}" for i in range(2000)), ["zz"]
    noisy = corrupt(text, 0.1, vocabulary, "s")
    assert noisy == corrupt(text, 0.1, vocabulary, "s") != corrupt(text, 0.1, vocabulary, "t")
    words = noisy.split()
    replaced, dropped = words.count("zz"), 2000 - len(words)
    assert 40 < replaced < 100
    assert 40 < dropped < 100
    assert corrupt(text, 0.0, vocabulary, "s") == text
    assert corrupt("one", 1.0, vocabulary, "s")
