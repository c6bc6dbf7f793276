"""Turn meanings into sentences, by the grammars of English and of the target languages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from flare_exp.toy.meaning import Act, Asked, Clause, Review, Setting, Slot


def coordinated(words: Sequence[str], conjunction: str) -> list[str]:
    """Return the words of an enumeration: `a , b and c`."""
    commas = [token for word in words[:-1] for token in (word, ",")][:-1]
    return [*commas, conjunction, words[-1]] if len(words) > 1 else list(words)


class Grammar(ABC):
    """A language: it renders trees as sentences.

    Args:
        stems: English word -> stem of the language.
    """

    we_were: tuple[str, ...] = ("we", "were")  # the words between the phrases of a setting

    def __init__(self, stems: dict[str, str]):
        self.stems = stems

    @abstractmethod
    def clause(self, c: Clause) -> list[str]:
        """Return the words of a clause."""
        ...

    @abstractmethod
    def slot(self, kind: Slot, word: str) -> list[str]:
        """Return the phrase of a time, place or person; its last word names it."""

    @abstractmethod
    def thought(self, c: Clause) -> list[str]:
        """Return the words of `i think that (clause)`."""

    @abstractmethod
    def speaker(self, person: str) -> list[str]:
        """Return the words of `my (person)` as a speaker; the last word names the person."""

    @abstractmethod
    def said(self, person: str, c: Clause) -> list[str]:
        """Return the words of `my (person) said that (clause)`."""

    @abstractmethod
    def setting(self, s: Setting) -> list[str]:
        """Return the words of a setting: its time, place and person."""
        ...

    @abstractmethod
    def question(self, asked: Asked, given: list[str]) -> list[str]:
        """Return the words of `when were we (given)` or `who said that`."""

    @abstractmethod
    def render(self, r: Review) -> list[str]:
        """Return the words of a review."""
        ...

    def again(self, s: Setting, given: Slot, asked: Slot) -> list[str]:
        """Return the words of two slots of a setting: `on monday we were at the station`."""
        first, second = (self.slot(slot, getattr(s, slot)) for slot in (given, asked))
        return [*first, *(self.stems[word] for word in self.we_were), *second]

    def opinion(self, r: Review) -> list[str]:
        """Return the words of the main clause, with its holder in the frames thought and said."""
        if r.frame == "said":
            return self.said(str(r.person), r.main)
        return self.thought(r.main) if r.frame == "thought" else self.clause(r.main)


class English(Grammar):
    """English: subject verb object, free negation, subordinators first."""

    def thought(self, c: Clause) -> list[str]:
        """Return the words of `i think that (clause)`."""
        return [*self.words("i think that"), *self.clause(c)]

    def speaker(self, person: str) -> list[str]:
        """Return the words of `my (person)` as a speaker; the last word names the person."""
        return self.words(f"my {person}")

    def said(self, person: str, c: Clause) -> list[str]:
        """Return the words of `my (person) said that (clause)`."""
        return [*self.speaker(person), *self.words("said that"), *self.clause(c)]

    def slot(self, kind: Slot, word: str) -> list[str]:
        """Return the phrase of a time, place or person; its last word names it."""
        return self.words(
            f"{ {'time': 'on', 'place': 'at the', 'person': 'with my'}[kind] } {word}"
        )

    def setting(self, s: Setting) -> list[str]:
        """Return the words of a setting: its time, place and person."""
        return [
            *self.slot("time", s.time),
            *self.words("we were"),
            *self.slot("place", s.place),
            *self.slot("person", s.person),
        ]

    def question(self, asked: Asked, given: list[str]) -> list[str]:
        """Return the words of `when were we (given)` or `who said that`."""
        if asked == "speaker":
            return self.words("who said that")
        asking = {"time": "when", "place": "where", "person": "with whom"}[asked]
        return [*self.words(f"{asking} were we"), *given]

    def clause(self, c: Clause) -> list[str]:
        """Return the words of a clause."""
        s = self.stems
        if isinstance(c, Act):
            no = self.words("did not") if c.negated else []
            verbs = coordinated([s[verb] for verb in c.verbs], s["and"])
            return [s["i"], *no, *verbs, *self.words(f"the {c.topic}")]
        no, degree = [s["not"]] if c.negated else [], [s[c.degree]] if c.degree else []
        qualities = coordinated([s[quality] for quality in c.qualities], s["and"])
        return [*self.words(f"the {c.topic} was"), *no, *degree, *qualities]

    def render(self, r: Review) -> list[str]:
        """Return the words of a review."""
        s, words = self.stems, [*self.setting(r.setting), ","] if r.setting else []
        main = self.opinion(r)
        if r.frame == "expected":
            return [*words, *self.words("i expected that"), *main]
        if r.other is None:
            return words + main
        other = self.clause(r.other)
        if r.frame == "but":
            return [*words, *other, s["but"], *main]
        if r.frame == "although":
            return [*words, s["although"], *other, ",", *main]
        return [*words, *self.said(str(r.person), r.other), s["but"], *self.thought(r.main)]

    def words(self, english: str) -> list[str]:
        """Return the language's words for English words."""
        return [self.stems[word] for word in english.split()]


class Near(Grammar):
    """The near language: subject verb object, and a third of the words are cognates.

    Qualities follow the noun and agree with its class. Negation follows what it negates. Definite
    nouns take a suffix.
    """

    def noun(self, word: str) -> str:
        """Return a definite noun; the suffix depends on the noun's class."""
        stem = self.stems[word]
        return stem + ("en" if stem[-1] in "bdgklmnprst" else "t")

    def quality(self, word: str, noun: str) -> str:
        """Return a quality with the suffix of the noun's class."""
        return self.stems[word] + ("a" if self.stems[noun][-1] in "bdgklmnprst" else "o")

    def clause(self, c: Clause) -> list[str]:
        """Return the words of a clause."""
        s, no = self.stems, [self.stems["not"]] if c.negated else []
        if isinstance(c, Act):
            return [
                s["i"],
                *coordinated([s[verb] + "er" for verb in c.verbs], s["and"]),
                *no,
                self.noun(c.topic),
            ]
        qualities = coordinated([self.quality(q, c.topic) for q in c.qualities], s["and"])
        return [self.noun(c.topic), s["was"], *qualities, *([s[c.degree]] if c.degree else []), *no]

    def thought(self, c: Clause) -> list[str]:
        """Return the words of `i think that (clause)`."""
        s = self.stems
        return [s["i"], s["think"] + "er", s["that"], *self.clause(c)]

    def speaker(self, person: str) -> list[str]:
        """Return the words of `my (person)` as a speaker; the last word names the person."""
        return [self.stems["my"], self.noun(person)]

    def said(self, person: str, c: Clause) -> list[str]:
        """Return the words of `my (person) said that (clause)`."""
        return [*self.speaker(person), self.stems["said"], self.stems["that"], *self.clause(c)]

    def slot(self, kind: Slot, word: str) -> list[str]:
        """Return the phrase of a time, place or person; its last word names it."""
        s = self.stems
        if kind == "time":
            return [s["on"], s[word]]
        return [*([s["at"]] if kind == "place" else [s["with"], s["my"]]), self.noun(word)]

    def setting(self, s: Setting) -> list[str]:
        """Return the words of a setting: its time, place and person."""
        person, place, time = (
            self.slot("person", s.person),
            self.slot("place", s.place),
            self.slot("time", s.time),
        )
        return [*person, self.stems["we"], self.stems["were"], *place, *time]

    def question(self, asked: Asked, given: list[str]) -> list[str]:
        """Return the words of `when were we (given)` or `who said that`."""
        s = self.stems
        if asked == "speaker":
            return [s["who"], s["said"], s["that"]]
        word = {"time": [s["when"]], "place": [s["where"]], "person": [s["with"], s["whom"]]}[asked]
        return [*word, s["we"], s["were"], *given]

    def render(self, r: Review) -> list[str]:
        """Return the words of a review."""
        s, words = self.stems, [*self.setting(r.setting), ","] if r.setting else []
        main = self.opinion(r)
        if r.frame == "expected":
            return [*words, s["i"], s["expected"] + "er", s["that"], *main]
        if r.other is None:
            return words + main
        other = self.clause(r.other)
        if r.frame == "but":
            return [*words, *other, s["but"], *main]
        if r.frame == "although":
            return [*words, *main, s["although"], *other]
        return [*words, *self.said(str(r.person), r.other), s["but"], *self.thought(r.main)]


class Far(Grammar):
    """The far language: subject object verb, vowel harmony and no copula.

    Negation, person and 'although' are suffixes of the predicate, and case is a suffix of the noun.
    Coordination is a suffix of all predicates but the last. The main clause comes before the clause
    that contrasts with it.
    """

    we_were = ("were",)

    def suffixed(self, stem: str, *suffixes: str) -> str:
        """Return a stem with suffixes; an A in a suffix harmonizes with the vowel before it."""
        for suffix in suffixes:
            last = next(v for v in reversed(stem) if v in "aeiouyöü")
            stem += suffix.replace("A", "o" if last in "aou" else "ü")
        return stem

    def clause(self, c: Clause, *endings: str) -> list[str]:
        """Return the words of a clause; `endings` are further suffixes of its predicate."""
        *linked, last = [
            self.stems[word] for word in (c.verbs if isinstance(c, Act) else c.qualities)
        ]
        tail = [*(["mAz"] if c.negated else []), "Aq" if isinstance(c, Act) else "dA", *endings]
        predicate = [*(self.suffixed(stem, "fA") for stem in linked), self.suffixed(last, *tail)]
        if isinstance(c, Act):
            return [self.suffixed(self.stems[c.topic], "vA"), *predicate]
        return [self.stems[c.topic], *([self.stems[c.degree]] if c.degree else []), *predicate]

    def thought(self, c: Clause) -> list[str]:
        """Return the words of `i think that (clause)`."""
        return [*self.clause(c), self.suffixed(self.stems["think"], "Aq")]

    def speaker(self, person: str) -> list[str]:
        """Return the words of `my (person)` as a speaker; the last word names the person."""
        return [self.suffixed(self.stems[person], "mA")]

    def said(self, person: str, c: Clause) -> list[str]:
        """Return the words of `my (person) said that (clause)`."""
        return [
            *self.speaker(person),
            *self.clause(c, "xA"),
            self.suffixed(self.stems["said"], "dA"),
        ]

    def slot(self, kind: Slot, word: str) -> list[str]:
        """Return the phrase of a time, place or person; its last word names it."""
        case = {"time": ["n"], "place": ["zAk"], "person": ["mA", "lA"]}[kind]
        return [self.suffixed(self.stems[word], *case)]

    def setting(self, s: Setting) -> list[str]:
        """Return the words of a setting: its time, place and person."""
        return [
            *self.slot("time", s.time),
            *self.slot("person", s.person),
            *self.slot("place", s.place),
            self.stems["were"],
        ]

    def question(self, asked: Asked, given: list[str]) -> list[str]:
        """Return the words of `when were we (given)` or `who said that`."""
        if asked == "speaker":
            return [self.stems["who"], self.suffixed(self.stems["said"], "dA")]
        word, case = {"time": ("when", "n"), "place": ("where", "zAk"), "person": ("whom", "lA")}[
            asked
        ]
        return [*given, self.suffixed(self.stems[word], case), self.stems["were"]]

    def render(self, r: Review) -> list[str]:
        """Return the words of a review."""
        s, words = self.stems, self.setting(r.setting) if r.setting else []
        if r.frame == "expected":
            return [*self.clause(r.main, "xA"), self.suffixed(s["expected"], "Aq"), *words]
        main = self.opinion(r)
        if r.other is None:
            return words + main
        if r.frame == "but":
            return [*words, *main, s["but"], *self.clause(r.other)]
        if r.frame == "although":
            return [*words, *main, *self.clause(r.other, "rAq")]
        return [*words, *self.thought(r.main), s["but"], *self.said(str(r.person), r.other)]
