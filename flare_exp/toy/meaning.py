"""Represent what a sentence of the generated world says: a tree that every language of it can express."""

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
    """`on monday we were at the station with my friend`."""

    time: str
    place: str
    person: str


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
    but / although / reported (main decides, `other` distracts), thought / said (who holds it)."""

    frame: Frame
    main: Clause
    other: Clause | None
    person: str | None
    setting: Setting | None

    @property
    def label(self) -> int:
        return 1 if self.frame == "expected" else 1 + self.main.polarity


@dataclass(frozen=True)
class Inference:
    """Two opinions on one topic, the second a blunt good or bad. Of one holder they agree (entailment) or not
    (contradiction); what somebody said and what i think have nothing to do with each other (neutral)."""

    premise: Review
    hypothesis: Review

    @property
    def label(self) -> int:
        one, two = self.premise, self.hypothesis
        return 1 if one.frame != two.frame else 1 - one.main.polarity * two.main.polarity


@dataclass(frozen=True)
class Inquiry:
    """A story, in either order: where we were with whom, and what somebody else said; a question asks for one of the two
    people (person, speaker), the time or the place. It names the `given` slot of the setting unless it asks who spoke."""

    setting: Setting
    opinion: Review
    opinion_first: bool
    asked: Asked
    given: Slot
