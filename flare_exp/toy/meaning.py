"""Represent the meaning of a sentence: a tree that every language of the world can express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

LABELS = ("negative", "neutral", "positive")
RELATIONS = ("entailment", "neutral", "contradiction")

Frame = Literal["plain", "expected", "but", "although", "reported", "thought", "said"]
CONTRASTS: list[Frame] = ["but", "although", "reported"]
HOLDERS: list[Frame] = ["thought", "said"]
Slot = Literal["time", "place", "person"]
Asked = Literal[Slot, "speaker"]
SLOTS: list[Slot] = ["time", "place", "person"]


class Setting(NamedTuple):
    """A time, place and person: `on monday we were at the station with my friend`."""

    time: str
    place: str
    person: str


@dataclass(frozen=True)
class State:
    """A description of a topic: `the soup was (not) (very) good (and tasty)`.

    Args:
        topic: the noun.
        qualities: its adjectives, all of one polarity.
        degree: an adverb or None; one in WEAKENERS reverses the polarity.
        negated: whether the clause is negated.
        polarity: -1, 0 or 1, after negation and degree.
    """

    topic: str
    qualities: tuple[str, ...]
    degree: str | None
    negated: bool
    polarity: int


@dataclass(frozen=True)
class Act:
    """An action: `i (did not) love (and praise) the soup`; `polarity` is that after negation."""

    verbs: tuple[str, ...]
    topic: str
    negated: bool
    polarity: int


Clause = State | Act


@dataclass(frozen=True)
class Review:
    """A review of one or two clauses.

    Args:
        frame: how the clauses combine. plain: only `main`. expected: `main` has not come true,
            which is neutral. but, although, reported: `main` decides the label and `other`
            distracts. thought, said: who holds the opinion.
        main: the clause that decides the label.
        other: a second clause or None.
        person: the holder of a reported opinion or None.
        setting: time, place and person, or None.
    """

    frame: Frame
    main: Clause
    other: Clause | None
    person: str | None
    setting: Setting | None

    @property
    def label(self) -> int:
        """Return the index of the label in LABELS."""
        return 1 if self.frame == "expected" else 1 + self.main.polarity


@dataclass(frozen=True)
class Inference:
    """Two opinions on one topic, of which the second is a plain good or bad.

    Opinions of one holder agree (entailment) or disagree (contradiction). Opinions of two holders
    are independent (neutral).
    """

    premise: Review
    hypothesis: Review

    @property
    def label(self) -> int:
        """Return the index of the label in RELATIONS."""
        one, two = self.premise, self.hypothesis
        return 1 if one.frame != two.frame else 1 - one.main.polarity * two.main.polarity


@dataclass(frozen=True)
class Inquiry:
    """A story with a question.

    The story says, in either order, where the writer was with whom, and what somebody else said.
    The question asks for one of the two people (person, speaker), the time or the place. It names
    the `given` slot of the setting unless it asks who spoke.
    """

    setting: Setting
    opinion: Review
    opinion_first: bool
    asked: Asked
    given: Slot
