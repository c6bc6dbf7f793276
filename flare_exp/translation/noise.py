"""Add translation errors at a given rate: drop, swap, replace or insert words, by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from flare_exp.languages import is_spaced
from flare_exp.tasks import Answer, Example

ERRORS = ("drop", "swap", "replace", "hallucinate")

Word = tuple[str, "int | None"]  # a word and its number before corruption; None for a new word


def corrupt_examples(
    examples: Sequence[Example],
    lang: str,
    rate: float | Sequence[float],
    errors: Sequence[str],
    seed: int | str,
    context: int | None = None,
) -> list[Example]:
    """Return `examples` with texts in `lang`, each word corrupted with probability `rate`.

    `rate` is one number for all examples, or one for each.

    In languages without spaces, each character counts as a word. New words are drawn from the
    examples' own. `context` is the number of the text that holds the answers: an answer moves with
    its words, and is lost if its words no longer stand together.
    """
    glue = " " if is_spaced(lang) else ""
    cut = str.split if glue else list
    vocabulary = sorted({word for e in examples for text in e.texts for word in cut(text)})
    rates = rate if isinstance(rate, Sequence) else [rate] * len(examples)
    made = []
    for example, own in zip(examples, rates, strict=True):
        texts, answers = [], example.answers
        for i, text in enumerate(example.texts):
            words = corrupted(cut(text), own, vocabulary, f"{seed}|{lang}|{example.id}|{i}", errors)
            texts.append(glue.join(word for word, _ in words))
            if i == context:
                follow = follow_words if glue else follow_characters
                answers = tuple(kept for answer in answers if (kept := follow(answer, text, words)))
        made.append(replace(example, texts=tuple(texts), answers=answers))
    return made


def corrupted(
    words: Sequence[str],
    rate: float,
    vocabulary: Sequence[str],
    seed: str,
    errors: Sequence[str] = ERRORS[:3],
) -> list[Word]:
    """Return `words`, each corrupted with probability `rate`.

    A corrupted word is dropped, swapped with the next one, replaced by a word of `vocabulary` or
    followed by one; all `errors` are equally likely. The same seed gives the same result. The last
    word left is never dropped.
    """
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
    """Return `answer`, a span of `text`, at its place after corruption to `words`.

    Returns:
        the moved answer; None if its words are no longer all there, side by side and in order.
    """
    if answer.start < 0 or not answer.text.strip():
        return None
    start = answer.start + len(answer.text) - len(answer.text.lstrip())
    before, inside = text[:start].split(), answer.text.split()
    # an answer may start inside a word: the start of that word moves with it
    cut = len(before[-1]) if before and not text[start - 1].isspace() else 0
    first = len(before) - bool(cut)
    if (at := place(first, len(inside), words)) is None:
        return None
    return Answer(" ".join(inside), sum(len(word) + 1 for word, _ in words[:at]) + cut)


def follow_characters(answer: Answer, text: str, characters: Sequence[Word]) -> Answer | None:
    """Move an answer as `follow_words` does, where every character is a word."""
    if (
        answer.start < 0
        or not answer.text
        or (at := place(answer.start, len(answer.text), characters)) is None
    ):
        return None
    return Answer(answer.text, sum(len(word) for word, _ in characters[:at]))


def place(first: int, count: int, words: Sequence[Word]) -> int | None:
    """Return the index where words `first` to `first + count - 1` stand in order, or None."""
    numbers = [number for _, number in words]
    at = numbers.index(first) if first in numbers else len(numbers)
    return at if numbers[at : at + count] == list(range(first, first + count)) else None
