"""Flag suspicious translations."""

from __future__ import annotations

import re

from flare_exp.translation.segmentation import Translation

REPEATED = re.compile(r"(.{1,80}?)\1{2,}", re.DOTALL)


def flags(source: str, translation: Translation) -> dict[str, bool]:
    """Return the signs of a bad translation.

    Each flag is False for a good translation; a bad one may have none either.

    Returns:
        truncated: the translation did not come to an end. empty: nothing is left of the source.
            repetitive: a run of characters comes five times or more in a row, and at least two more
            times than in the source. copy: the translation is the source, except for case and white
            space.
    """
    text = translation.text
    return {
        "truncated": translation.truncated,
        "empty": bool(source.strip()) and not text.strip(),
        "repetitive": _repeats(text) > max(4, _repeats(source) + 1),
        "copy": bool(text.strip()) and _bare(text) == _bare(source),
    }


def _repeats(text: str) -> int:
    """Return how often the most repeated run of characters comes in a row; 0 if below three.

    A run has at most 80 characters and at least one letter.
    """
    found = [match for match in REPEATED.finditer(text + " ") if any(c.isalpha() for c in match[1])]
    return max((len(match[0]) // len(match[1]) for match in found), default=0)


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()
