"""Flag what is suspicious about a translation."""

from __future__ import annotations

import re

from flare_exp.translation.segmentation import Translated

REPEATED = re.compile(r"(.{1,80}?)\1{2,}", re.DOTALL)


def flags(source: str, translation: Translated) -> dict[str, bool]:
    """Signs of a bad translation; each is False for a good one, and now and then for a bad one.

    truncated: it came to no end. empty: nothing is left of the source. repetitive: it says something five times or more in a
    row, and at least twice more than the source does. copy: it is the source, but for case and white space.
    """
    text = translation.text
    return {
        "truncated": translation.truncated,
        "empty": bool(source.strip()) and not text.strip(),
        "repetitive": _repeats(text) > max(4, _repeats(source) + 1),
        "copy": bool(text.strip()) and _bare(text) == _bare(source),
    }


def _repeats(text: str) -> int:
    """How often the most repeated run of at most 80 characters, letters among them, comes in a row; 0 when below three."""
    found = [match for match in REPEATED.finditer(text + " ") if any(c.isalpha() for c in match[1])]
    return max((len(match[0]) // len(match[1]) for match in found), default=0)


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()
