"""A generated world with FLARE's problem in miniature: English reviews whose sentiment needs composition, and two
constructed target languages with their own lexicon, suffix morphology and word order.

A review is a tree (clauses, negation, contrast, distractors); a language is a renderer of trees. So every sentence is
known in every language exactly, and a translation can be corrupted by a known amount (flare_exp.translation).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from flare_exp.tiny import lexicon as lx

LABELS = ("negative", "neutral", "positive")
SPLITS = {"train": 2000, "validation": 400, "test": 1000}

Frame = Literal["plain", "expected", "but", "although", "reported"]
CONTRASTS: list[Frame] = ["but", "although", "reported"]


@dataclass(frozen=True)
class State:
    """`the soup was (not) (very) good (and tasty)`; `degree` in WEAKENERS turns the polarity round; all `qualities`
    have one polarity."""

    topic: str
    qualities: tuple[str, ...]
    degree: str | None
    negated: bool
    polarity: int


@dataclass(frozen=True)
class Act:
    """`i (did not) love (and praise) the soup`."""

    verbs: tuple[str, ...]
    topic: str
    negated: bool
    polarity: int


Clause = State | Act


@dataclass(frozen=True)
class Review:
    """`frame` says how the clauses combine: plain (main), expected (main is what did not come true: neutral),
    but / although / reported (main decides, `other` distracts). `setting` is (time, place, person) or None."""

    frame: Frame
    main: Clause
    other: Clause | None
    person: str | None
    setting: tuple[str, str, str] | None

    @property
    def label(self) -> int:
        return 1 if self.frame == "expected" else 1 + self.main.polarity


class Sampler:
    """Draws reviews; words are Zipf-distributed within their category, labels are balanced.

    `negation`, `contrast` and `setting` are the shares of negated clauses, of polar reviews with two clauses, and of
    reviews with a time, place and person; `chain` is the chance that one more quality or verb is coordinated, up to
    `longest`.
    """

    def __init__(self, rng: random.Random, negation=0.3, contrast=0.35, setting=0.2, chain=0.2, longest=3):
        self.rng, self.negation, self.contrast, self.setting = rng, negation, contrast, setting
        self.chain, self.longest = chain, longest

    def word(self, words: list[str]) -> str:
        return self.rng.choices(words, [1 / (rank + 3) for rank in range(len(words))])[0]

    def words(self, words: list[str]) -> tuple[str, ...]:
        """One or more different words."""
        chosen = [self.word(words)]
        while len(chosen) < self.longest and self.rng.random() < self.chain:
            chosen.append(self.word(words))
        return tuple(dict.fromkeys(chosen))

    def clause(self, polarity: int) -> Clause:
        """A clause whose polarity after negation and degree is `polarity`."""
        negated = self.rng.random() < self.negation
        topic = self.word(lx.TOPICS)
        if self.rng.random() < 0.3:
            inner = -polarity if negated else polarity
            return Act(self.words({1: lx.LIKES, -1: lx.DISLIKES, 0: lx.ACTS}[inner]), topic, negated, polarity)
        degree = None
        if self.rng.random() < 0.4:
            weak = not negated and self.rng.random() < 0.4
            degree = self.word(lx.WEAKENERS if weak else lx.STRENGTH)
        turned = negated or degree in lx.WEAKENERS
        inner = -polarity if turned else polarity
        qualities = self.words({1: lx.POSITIVE, -1: lx.NEGATIVE, 0: lx.NEUTRAL}[inner])
        return State(topic, qualities, degree, negated, polarity)

    def review(self, label: int) -> Review:
        """A review with this label (index into LABELS)."""
        rng, polarity = self.rng, label - 1
        setting = None
        if rng.random() < self.setting:
            setting = (self.word(lx.TIMES), self.word(lx.PLACES), self.word(lx.PEOPLE))
        if polarity == 0:
            frame: Frame = "expected" if rng.random() < 0.4 else "plain"
            main = self.clause(rng.choice([-1, 1]) if frame == "expected" else 0)
            return Review(frame, main, None, None, setting)
        frame = rng.choice(CONTRASTS) if rng.random() < self.contrast else "plain"
        main, other = self.clause(polarity), None
        if frame != "plain":
            other = self.clause(-polarity if rng.random() < 0.75 else polarity)
        return Review(frame, main, other, self.word(lx.PEOPLE) if frame == "reported" else None, setting)

    def stream(self) -> Iterator[Review]:
        while True:
            yield self.review(self.rng.randrange(3))


def coordinated(words: Sequence[str], conjunction: str) -> list[str]:
    """`a , b and c`."""
    commas = [token for word in words[:-1] for token in (word, ",")][:-1]
    return [*commas, conjunction, words[-1]] if len(words) > 1 else list(words)


class English:
    """Subject verb object, free negation, subordinators first."""

    def clause(self, c: Clause) -> list[str]:
        if isinstance(c, Act):
            return ["i", *(["did", "not"] if c.negated else []), *coordinated(c.verbs, "and"), "the", c.topic]
        no, degree = ["not"] if c.negated else [], [c.degree] if c.degree else []
        return ["the", c.topic, "was", *no, *degree, *coordinated(c.qualities, "and")]

    def render(self, r: Review) -> list[str]:
        words = []
        if r.setting:
            time, place, person = r.setting
            words = ["on", time, "we", "were", "at", "the", place, "with", "my", person, ","]
        main = self.clause(r.main)
        if r.frame == "expected":
            return [*words, "i", "expected", "that", *main]
        if r.other is None:
            return words + main
        other = self.clause(r.other)
        if r.frame == "but":
            return [*words, *other, "but", *main]
        if r.frame == "although":
            return [*words, "although", *other, ",", *main]
        return [*words, "my", str(r.person), "said", "that", *other, "but", "i", "think", "that", *main]


class Near:
    """Subject verb object; a third of the words are cognates; qualities follow and agree with the noun's class;
    negation follows what it negates; definite nouns take a suffix."""

    def __init__(self, stems: dict[str, str]):
        self.stems = stems

    def noun(self, word: str) -> str:
        stem = self.stems[word]
        return stem + ("en" if stem[-1] in "bdgklmnprst" else "t")

    def quality(self, word: str, noun: str) -> str:
        return self.stems[word] + ("a" if self.stems[noun][-1] in "bdgklmnprst" else "o")

    def clause(self, c: Clause) -> list[str]:
        s, no = self.stems, [self.stems["not"]] if c.negated else []
        if isinstance(c, Act):
            return [s["i"], *coordinated([s[verb] + "er" for verb in c.verbs], s["and"]), *no, self.noun(c.topic)]
        qualities = coordinated([self.quality(q, c.topic) for q in c.qualities], s["and"])
        return [self.noun(c.topic), s["was"], *qualities, *([s[c.degree]] if c.degree else []), *no]

    def render(self, r: Review) -> list[str]:
        s, words = self.stems, []
        if r.setting:
            time, place, person = r.setting
            words = [
                s["with"],
                s["my"],
                self.noun(person),
                s["we"],
                s["were"],
                s["at"],
                self.noun(place),
                s["on"],
                s[time],
                ",",
            ]
        main = self.clause(r.main)
        if r.frame == "expected":
            return [*words, s["i"], s["expected"] + "er", s["that"], *main]
        if r.other is None:
            return words + main
        other = self.clause(r.other)
        if r.frame == "but":
            return [*words, *other, s["but"], *main]
        if r.frame == "although":
            return [*words, *main, s["although"], *other]
        return [*words, s["my"], self.noun(str(r.person)), s["said"], s["that"], *other, s["but"], s["i"], s["think"] + "er",
                s["that"], *main]  # fmt: skip


class Far:
    """Subject object verb with vowel harmony; no copula; negation, person and 'although' are suffixes of the predicate,
    case is a suffix of the noun, coordination one of all but the last; the main clause comes before what it is
    contrasted with."""

    def __init__(self, stems: dict[str, str]):
        self.stems = stems

    def suffixed(self, stem: str, *suffixes: str) -> str:
        """Suffixes written with A take the vowel class of the stem's last vowel."""
        for suffix in suffixes:
            last = next(v for v in reversed(stem) if v in "aeiouyöü")
            stem += suffix.replace("A", "o" if last in "aou" else "ü")
        return stem

    def clause(self, c: Clause, *endings: str) -> list[str]:
        *linked, last = [self.stems[word] for word in (c.verbs if isinstance(c, Act) else c.qualities)]
        tail = [*(["mAz"] if c.negated else []), "Aq" if isinstance(c, Act) else "dA", *endings]
        predicate = [*(self.suffixed(stem, "fA") for stem in linked), self.suffixed(last, *tail)]
        if isinstance(c, Act):
            return [self.suffixed(self.stems[c.topic], "vA"), *predicate]
        return [self.stems[c.topic], *([self.stems[c.degree]] if c.degree else []), *predicate]

    def render(self, r: Review) -> list[str]:
        s, words = self.stems, []
        if r.setting:
            time, place, person = r.setting
            words = [
                self.suffixed(s[time], "n"),
                self.suffixed(s[person], "mA", "lA"),
                self.suffixed(s[place], "zAk"),
                s["were"],
            ]
        if r.frame == "expected":
            return [*self.clause(r.main, "xA"), self.suffixed(s["expected"], "Aq"), *words]
        main = self.clause(r.main)
        if r.other is None:
            return words + main
        if r.frame == "but":
            return [*words, *main, s["but"], *self.clause(r.other)]
        if r.frame == "although":
            return [*words, *main, *self.clause(r.other, "rAq")]
        return [*words, *main, self.suffixed(s["think"], "Aq"), s["but"], self.suffixed(s[str(r.person)], "mA"),
                *self.clause(r.other, "xA"), self.suffixed(s["said"], "dA")]  # fmt: skip


class World:
    """Reviews, their renderings in `en`, `near` and `far`, and text for pre-training; everything follows from `seed`."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    @cached_property
    def words(self) -> list[str]:
        """The English word types."""
        parts = [lx.POSITIVE, lx.NEGATIVE, lx.NEUTRAL, lx.LIKES, lx.DISLIKES, lx.ACTS, lx.TOPICS, lx.PEOPLE, lx.PLACES,
                 lx.TIMES, lx.STRENGTH, lx.WEAKENERS, *lx.EXCLAMATIONS, lx.FUNCTION]  # fmt: skip
        return [word for part in parts for word in part]

    @cached_property
    def grammars(self) -> dict[str, English | Near | Far]:
        near = self._stems(
            "near", ["b", "d", "g", "k", "l", "m", "n", "p", "r", "s", "t", "st", "kr", "fl"], "aeiou", cognates=1 / 3
        )
        far = self._stems("far", ["q", "z", "x", "v", "j", "ts", "h", "y", "zh", "qr", "n", "l"], "aeiouöü", cognates=0)
        return {"en": English(), "near": Near(near), "far": Far(far)}

    def _stems(self, name: str, onsets: list[str], vowels: str, cognates: float) -> dict[str, str]:
        rng = random.Random(f"{self.seed}-{name}")
        taken, stems = set(self.words), {",": ","}
        shift = str.maketrans("aeioubdgvcy", "eiaouptkfki")
        for word in self.words:
            if word == ",":
                continue
            stem = word.translate(shift).rstrip("aeiou") if rng.random() < cognates and len(word) > 3 else ""
            while not stem or stem in taken:
                stem = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(rng.choice([1, 2, 2, 3])))
                stem += rng.choice(onsets)[0] if rng.random() < 0.5 else ""
            taken.add(stem)
            stems[word] = stem
        return stems

    def render(self, review: Review, lang: str) -> str:
        """The review's sentence in `en`, `near` or `far`."""
        return " ".join(self.grammars[lang].render(review))

    def reviews(self, split: str) -> list[Review]:
        """The reviews of a split; no review, and so no English sentence, is in two splits."""
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[str, list[Review]]:
        stream = Sampler(random.Random(f"{self.seed}-tasks")).stream()
        seen: dict[Review, None] = {}
        while len(seen) < sum(SPLITS.values()):
            seen[next(stream)] = None
        reviews = iter(seen)
        return {split: [next(reviews) for _ in range(size)] for split, size in SPLITS.items()}

    def corpus(self, size: int, target_share: float = 0.05) -> list[str]:
        """Pre-training text: `size` documents of one sentence, with longer enumerations than the tasks have and often
        begun by an exclamation; `target_share` of them in the target languages, half each; never parallel."""
        rng = random.Random(f"{self.seed}-corpus")
        sampler = Sampler(rng, negation=0.1, contrast=0.2, setting=0.1, chain=0.85, longest=8)  # plainer
        documents = []
        for _ in range(size):
            lang = rng.choice(["near", "far"]) if rng.random() < target_share else "en"
            label = rng.randrange(3)
            text = self.render(sampler.review(label), lang)
            if rng.random() < 0.7:
                cry = sampler.word(lx.EXCLAMATIONS[label])
                text = f"{cry if lang == 'en' else self.grammars[lang].stems[cry]} ; {text}"  # type: ignore[union-attr]
            documents.append(text)
        return documents
