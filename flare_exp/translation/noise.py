"""Translation errors of a known rate: words of a text are dropped, swapped, replaced, or words are added, by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from flare_exp.languages import LANGUAGES
from flare_exp.tasks import Answer, Example

ERRORS = ("drop", "swap", "replace", "hallucinate")

Word = tuple[str, "int | None"]  # a word and the number it had before; None: it was not there


def corrupt_examples(
    examples: Sequence[Example],
    lang: str,
    rate: float,
    errors: Sequence[str],
    seed: int,
    context: int | None = None,
) -> list[Example]:
    """`examples`, texts in `lang`, each word wrong with probability `rate` (characters in languages without spaces).

    New words are drawn from the examples' own. `context` is the number of the text that holds the answers: they follow
    their words; one whose words are torn apart is lost.
    """
    glue = "" if lang in LANGUAGES and not LANGUAGES[lang].spaced else " "
    cut = str.split if glue else list
    vocabulary = sorted({word for e in examples for text in e.texts for word in cut(text)})
    made = []
    for example in examples:
        texts, answers = [], example.answers
        for i, text in enumerate(example.texts):
            words = corrupted(
                cut(text), rate, vocabulary, f"{seed}|{lang}|{example.id}|{i}", errors
            )
            texts.append(glue.join(word for word, _ in words))
            if i == context:
                follow = follow_words if glue else follow_characters
                answers = tuple(kept for answer in answers if (kept := follow(answer, text, words)))
        made.append(replace(example, texts=tuple(texts), answers=answers))
    return made


def corrupt(
    text: str, rate: float, vocabulary: Sequence[str], seed: str, errors: Sequence[str] = ERRORS[:3]
) -> str:
    """`text` with corrupted words."""
    return " ".join(word for word, _ in corrupted(text.split(), rate, vocabulary, seed, errors))


def corrupted(
    words: Sequence[str],
    rate: float,
    vocabulary: Sequence[str],
    seed: str,
    errors: Sequence[str] = ERRORS[:3],
) -> list[Word]:
    """`words`, each with probability `rate` dropped, swapped with the next one, replaced by a word of `vocabulary` or
    followed by one (`errors`, evenly). The same seed gives the same result; the last word left is never dropped."""
    rng = random.Random(seed)
    kept: list[Word] = []
    rest: list[Word] = [(word, i) for i, word in enumerate(words)]
    while rest:
        word = rest.pop(0)
        if rng.random() < rate:
            error = rng.choice(errors)
            if error == "replace":
                word = (rng.choice(vocabulary), None)
            elif error == "hallucinate":
                kept.append(word)
                word = (rng.choice(vocabulary), None)
            elif error == "swap" and rest:
                word, rest[0] = rest[0], word
            elif error == "drop" and (kept or rest):
                continue
        kept.append(word)
    return kept


def follow_words(answer: Answer, text: str, words: Sequence[Word]) -> Answer | None:
    """Where `answer`, a span of `text`, is after corruption to `words`; None when its words are no longer all there, side by
    side and in order."""
    if answer.start < 0 or not answer.text.strip():
        return None
    start = answer.start + len(answer.text) - len(answer.text.lstrip())
    before, inside = text[:start].split(), answer.text.split()
    # an answer may start inside a word: what stands before it there moves along
    cut = len(before[-1]) if before and not text[start - 1].isspace() else 0
    first = len(before) - bool(cut)
    if (at := place(first, len(inside), words)) is None:
        return None
    return Answer(" ".join(inside), sum(len(word) + 1 for word, _ in words[:at]) + cut)


def follow_characters(answer: Answer, text: str, characters: Sequence[Word]) -> Answer | None:
    """`follow_words`, where every character is a word."""
    if (
        answer.start < 0
        or not answer.text
        or (at := place(answer.start, len(answer.text), characters)) is None
    ):
        return None
    return Answer(answer.text, sum(len(word) for word, _ in characters[:at]))


def place(first: int, count: int, words: Sequence[Word]) -> int | None:
    """Where the words numbered `first` .. `first + count - 1` stand together in order; None: nowhere."""
    numbers = [number for _, number in words]
    at = numbers.index(first) if first in numbers else len(numbers)
    return at if numbers[at : at + count] == list(range(first, first + count)) else None
