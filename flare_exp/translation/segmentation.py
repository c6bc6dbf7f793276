"""Split long texts into sentences that a translation model can read, and join them again.

Nothing heavy is imported here: a command line is checked with `translation.command`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# scripts without white space between sentences
UNSPACED = {
    "Hans",
    "Hant",
    "Jpan",
    "Thai",
    "Laoo",
    "Khmr",
    "Mymr",
    "Tibt",
}

Span = tuple[int, int]


@dataclass(frozen=True)
class Translation:
    """A text's translation. `truncated`: a segment reached its limit without coming to an end."""

    text: str
    truncated: bool


Protect = Callable[[str], Span | None]


# Ends of sentences with the white space after them; optional after marks of scripts without it.
SENTENCE_END = re.compile(r"[.!?…؟۔।॥።]+[\"'”’»)\]]*\s+|[。！？｡]+[”’」』）]*\s*|\n\s*")  # noqa: RUF001
WORD_END = re.compile(r"\s+")


def segments(
    text: str, fits: Callable[[str], bool], keep: Span | None = None
) -> list[tuple[str, str]]:
    """Split `text` into segments that fit, each with the white space after it.

    A segment has as many whole sentences as fit; if not even one fits, as many words; else as many
    characters.

    Args:
        text: the text to split.
        fits: returns True if a segment is short enough; any shorter text should fit too.
        keep: range of characters that is not split, unless it does not fit by itself.

    Returns:
        (segment, separator) pairs; their concatenation is `text`.
    """
    if fits(text):
        return [(text, "")]
    first, last = keep if keep and fits(text[slice(*keep)]) else (0, 0)
    every = range(1, len(text))
    cuts = (
        [match.end() for match in SENTENCE_END.finditer(text)],
        [match.end() for match in WORD_END.finditer(text)],
        # not between a letter and its combining marks
        [i for i in every if not unicodedata.category(text[i]).startswith("M")],
    )
    levels = [[i for i in level if not first < i < last] for level in cuts]
    found, start = [], 0
    while start < len(text):
        stop = _farthest(text, start, [*levels, every], fits)
        segment = text[start:stop].rstrip()
        found.append((segment, text[start + len(segment) : stop]))
        start = stop
    return found


def _farthest(
    text: str, start: int, levels: Sequence[Sequence[int]], fits: Callable[[str], bool]
) -> int:
    """Return the last place to cut at which `text` fits from `start` on.

    The first level of cuts that has such a place decides.
    """
    for level in levels:
        cuts = [cut for cut in level if cut > start] + [len(text)]

        def good(number: int, cuts: Sequence[int] = cuts) -> bool:
            return number < len(cuts) and fits(text[start : cuts[number]].rstrip())

        if not good(0):
            continue
        # doubling steps, then halving them: the texts to measure stay short
        low, step = 0, 1
        while good(low + step):
            low, step = low + step, 2 * step
        while step > 1:
            step //= 2
            if good(low + step):
                low += step
        return cuts[low]
    return start + 1  # not even one character fits: it is used as it is


def joined(parts: Sequence[tuple[Translation, str]], target: str) -> Translation:
    """Join the translations of a text's segments with their separators.

    Where the source has no white space between sentences, a space is added if `target` needs one.
    """
    space = "" if target.rpartition("_")[2] in UNSPACED else " "
    text = (
        "".join(part.text + (separator or space) for part, separator in parts[:-1])
        + parts[-1][0].text
    )
    return Translation(text, any(part.truncated for part, _ in parts))


def report_finished(
    parts: Mapping[str, Iterable[str]],
    counts: Counter[str],
    progress: Callable[[int], None] | None,
) -> Callable[[Iterable[str]], None]:
    """Return a function that takes translated pieces and reports finished texts to `progress`.

    Args:
        parts: text -> its pieces; those of white space alone need no translation.
        counts: text -> how often it counts.
        progress: called with the number of texts finished since its last call.
    """
    users, left = defaultdict(list), {}
    for text, pieces in parts.items():
        missing = {piece for piece in pieces if piece.strip()}
        left[text] = len(missing)
        for piece in missing:
            users[piece].append(text)

    def report(done: Iterable[str]) -> None:
        complete = 0
        for text in (text for piece in done for text in users[piece]):
            left[text] -= 1
            complete += 0 if left[text] else counts[text]
        if complete and progress:
            progress(complete)

    if progress and (blank := sum(counts[text] for text, missing in left.items() if not missing)):
        progress(blank)
    return report
