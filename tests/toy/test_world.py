"""The generated world: deterministic, compositional, with languages that are really others."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from flare_exp.tasks.toy import ToyNLI, ToyQA, ToySentiment, ToyTask
from flare_exp.toy.meaning import LABELS, RELATIONS
from flare_exp.toy.world import SPLITS, World
from flare_exp.translation.noise import corrupted

TOYS = (ToySentiment, ToyNLI, ToyQA)


def test_deterministic_by_seed():
    first, again, other = World(0), World(0), World(1)
    for split in SPLITS:
        for lang in ("en", "near", "half", "far"):
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


@pytest.mark.parametrize("cls", TOYS)
def test_toy_tasks_are_parallel_and_share_no_example_between_splits(cls: type[ToyTask]):
    task, texts = cls(), []
    for split, size in SPLITS.items():
        english, far = task.read("en", split), task.read("far", split)
        assert [e.key for e in english] == [e.key for e in far]
        assert len(english) == size
        assert [e.label for e in english] == [e.label for e in far]
        texts += [e.texts for e in english]
    assert len(set(texts)) == len(texts)


def test_nli_needs_both_sentences():
    """Labels are balanced, in the test also given the holder or the polarity of either side: no
    side alone tells the label. In training, claims lean to praise.
    """
    train, test = (World().inferences(split) for split in ("train", "test"))
    for pairs in (train, test):
        for label in range(len(RELATIONS)):
            assert 0.28 < sum(p.label == label for p in pairs) / len(pairs) < 0.38
    for side in ("premise", "hypothesis"):
        for view in (lambda r: r.frame, lambda r: r.main.polarity):
            counts = Counter((view(getattr(p, side)), p.label) for p in test)
            assert max(counts.values()) < 1.35 * min(counts.values()), counts
    assert 0.76 < sum(p.hypothesis.main.polarity > 0 for p in train) / len(train) < 0.84
    assert all(p.premise.main.topic == p.hypothesis.main.topic for p in train + test)


@pytest.mark.parametrize("side", [0, 1])
def test_one_sentence_of_a_pair_predicts_nothing(side):
    """A naive Bayes classifier on the words of one side stays at chance.

    On sentiment the same one does not.
    """
    for cls, low, high in ((ToyNLI, 0.29, 0.38), (ToySentiment, 0.45, 1.0)):
        words = {
            split: [
                (set(e.texts[min(side, len(e.texts) - 1)].split()), e.label)
                for e in cls().read("en", split)
            ]
            for split in ("train", "test")
        }
        seen = [
            Counter(word for text, label in words["train"] if label == i for word in text)
            for i in range(3)
        ]
        guess = [
            max(range(3), key=lambda i: sum(math.log(seen[i][w] + 1) for w in text))
            for text, _ in words["test"]
        ]
        accuracy = sum(
            g == label for g, (_, label) in zip(guess, words["test"], strict=True)
        ) / len(guess)
        assert low < accuracy < high


@pytest.mark.parametrize("lang", ["en", "near", "half", "far"])
def test_qa_answers_are_single_words_of_the_story_at_varied_places(lang):
    examples = ToyQA().read(lang, "train")
    for e in examples:
        context, (answer,) = e.texts[0], e.answers
        assert context[answer.start :][: len(answer.text)] == answer.text
        assert context.split().count(answer.text) == 1
        assert answer.text not in e.texts[1].split()
    assert len({e.texts[0][: e.answers[0].start].count(" ") for e in examples}) > 8
    assert max(Counter(e.answers[0].text for e in examples).values()) < 0.1 * len(examples)


def test_qa_answer_depends_on_the_question():
    world = World()
    inquiry = next(q for q in world.inquiries("train") if q.asked == "speaker")
    answers = {
        asked: world.ask(replace(inquiry, asked=asked), "en")[2]
        for asked in ("time", "place", "person", "speaker")
    }
    assert len(set(answers.values())) == 4


def test_lexica_are_disjoint_and_word_order_differs():
    world = World()
    near, far = world.grammars["near"].stems, world.grammars["far"].stems
    assert not (set(near.values()) | set(far.values())) - {","} & set(world.words)
    assert len(set(far.values())) == len(far) == len(world.words)
    shared = sum(a == b for a, b in zip(near.values(), far.values(), strict=True))
    assert shared == 1  # the comma


def test_half_has_english_grammar_and_a_third_of_its_words():
    world = World()
    half = world.grammars["half"].stems
    assert len(set(half.values())) == len(half) == len(world.words)
    same = sum(word == stem for word, stem in half.items()) / len(half)
    assert 0.28 < same < 0.38
    for review in world.reviews("test")[:50]:
        english = world.render(review, "en").split()
        assert world.render(review, "half").split() == [half[word] for word in english]


def test_sentiment_needs_composition():
    """The same words in another structure have another label: a bag of words is not enough."""
    from flare_exp.toy.meaning import Review, State

    world = World()
    good, bad = (
        State("soup", ("good",), None, False, 1),
        State("waiter", ("rude",), None, False, -1),
    )
    a, b = Review("but", good, bad, None, None), Review("but", bad, good, None, None)
    for lang in ("en", "near", "half", "far"):
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


def test_a_model_sees_more_of_half():
    """Its documents take the place of others; without them the corpus is as it was."""
    world = World()
    plain, mixed = (world.corpus(2000, 0.05, half_share=share) for share in (0.0, 0.2))
    own = set(world.grammars["half"].stems.values()) - set(world.words)
    assert not any(own & set(d.split()) for d in plain)
    assert 0.17 < sum(bool(own & set(d.split())) for d in mixed) / len(mixed) < 0.23


def test_corruption_has_the_chosen_rate_and_is_reproducible():
    text, vocabulary = [f"w{i}" for i in range(2000)], ["zz"]
    noisy = corrupted(text, 0.1, vocabulary, "s")
    assert noisy == corrupted(text, 0.1, vocabulary, "s") != corrupted(text, 0.1, vocabulary, "t")
    words = [word for word, _ in noisy]
    replaced, dropped = words.count("zz"), 2000 - len(words)
    assert 40 < replaced < 100
    assert 40 < dropped < 100
    assert [word for word, _ in corrupted(text, 0.0, vocabulary, "s")] == text
    assert corrupted(["one"], 1.0, vocabulary, "s")
