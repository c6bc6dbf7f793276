"""Label projection: an answer span goes through machine translation between marks, which are found again and removed.

A context's own marks would be taken for ours. They are therefore replaced, before marking, by characters that are read the
same way and are no marks, one for one, so that no offset moves: double quotes become single ones, square brackets round.
Translation changes glyphs and spacing; a pair of marks counts in every form that only one reading explains, and nothing
else does: an answer is returned if the text holds exactly two marks and they are a pair.
"""

from __future__ import annotations

# ruff: noqa: RUF001 (glyphs that look like others are what this is about)
import re
import unicodedata
from dataclasses import dataclass

from flare_exp.tasks.base import Answer


@dataclass(frozen=True)
class Marker:
    """One way to mark a span.

    Args:
        opening, closing: what is written round the span.
        mark: matches every mark, opening or closing, in all the forms that translation gives it.
        pair: matches the canonical forms of two marks, one after the other, that belong together.
        stand_ins: what replaces the characters of a mark in a context of its own, one for one.
    """

    opening: str
    closing: str
    mark: re.Pattern[str]
    pair: re.Pattern[str]
    stand_ins: dict[int, int]


MARKERS: dict[str, Marker] = {
    # Which quote opens depends on the language: “a” „a“ „a” ”a” «a» »a« »a». A straight one pairs with any that fits.
    "quotes": Marker(
        '"',
        '"',
        # runs: where three single quotes stand, nobody knows which two are the mark
        re.compile(r"""["＂“”„«»「」｢｣『』《》〝〞〟]|'{2,}|`{2,}"""),
        re.compile(r"""["“”]["”]|„["“”]|«["»]|"»|»[«»]|「」|『』|《》|〝[〞〟]|``''|''''"""),
        # ' beside ' is a mark again; `own_marks_replaced` comes back to it, and then it is typographic
        str.maketrans("\"＂“”„«»「」｢｣『』《》〝〞〟'`", "''‘’‚‹›‘’‘’‘’〈〉‘’’’‘"),
    ),
    "brackets": Marker(
        "[",
        "]",
        re.compile(r"[\[\]［］【】〔〕]"),
        re.compile(r"\[\]|【】|〔〕"),
        str.maketrans("[]［］【】〔〕", "()（）（）（）"),
    ),
    # Any single letter: translation also transliterates it.
    "tags": Marker(
        "<a>",
        "</a>",
        re.compile(r"[<＜]\s*[/／]?\s*[^\W\d_]\s*[>＞]"),
        re.compile(r"<(\w)></\1>"),
        str.maketrans("<>＜＞", "()（）"),
    ),
}


def own_marks_replaced(context: str, marker: str) -> str:
    """The context, as long as it was, without anything that `find` takes for a mark."""
    kind = MARKERS[marker]
    while kind.mark.search(context):
        context = kind.mark.sub(lambda match: match[0].translate(kind.stand_ins), context)
    return context


def mark(context: str, answer: Answer, marker: str) -> str:
    """The context with `answer`, less white space at its ends, between marks; marks of its own are replaced.

    Raises:
        ValueError: the context does not hold the answer at its start, or the answer is blank.
    """
    core = answer.text.strip()
    if not core or answer.start < 0 or not context.startswith(answer.text, answer.start):
        raise ValueError(f"{answer} is no span of the context {context[:60]!r}")
    start = answer.start + answer.text.index(core)
    end = start + len(core)
    text, kind = own_marks_replaced(context, marker), MARKERS[marker]
    return text[:start] + kind.opening + text[start:end] + kind.closing + text[end:]


def marked_range(text: str, marker: str) -> tuple[int, int] | None:
    """Where the marked span is, marks included: what must not be torn apart before translation. None: there is no one span."""
    found = list(MARKERS[marker].mark.finditer(text))
    return (found[0].start(), found[1].end()) if len(found) == 2 else None


def find(translated: str, marker: str) -> tuple[str, Answer | None]:
    """The text without marks, and the answer that stood between them; None: marks are lost or more than one pair.

    Spaces inside the marks are no part of the answer. They vanish where the text outside goes on with a space or with
    punctuation, and move outside where they keep two words apart.
    """
    kind = MARKERS[marker]
    marks = kind.mark.findall(translated)
    if len(marks) != 2 or not kind.pair.fullmatch("".join(map(_canonical, marks))):
        return _without_marks(translated, kind), None
    before, inside, after = kind.mark.split(translated)
    text = inside.strip()
    if not text:
        return _without_marks(translated, kind), None
    if inside[0].isspace() and not _clings(before[-1:], ("Ps", "Pi", "Pd")):
        before += " "
    if inside[-1].isspace() and not _clings(after[:1], ("Pe", "Pf", "Pd", "Po")):
        after = " " + after
    return before + text + after, Answer(text, len(before))


def _canonical(mark: str) -> str:
    """A mark without what does not tell it from others: width, case and spaces."""
    return "".join(unicodedata.normalize("NFKC", mark).casefold().split())


def _clings(neighbour: str, categories: tuple[str, ...]) -> bool:
    """Whether no space is due between a word and its neighbour: the text's end, a space, or punctuation that joins."""
    return (
        not neighbour
        or neighbour.isspace()
        or neighbour in "'’/"
        or unicodedata.category(neighbour) in categories
    )


def _without_marks(text: str, kind: Marker) -> str:
    """All marks removed, and where white space stands on both sides of one, that after it."""
    kept, *rest = kind.mark.split(text)
    for piece in rest:
        kept += piece.lstrip() if not kept or kept[-1].isspace() else piece
    return kept.rstrip() if rest and not rest[-1].strip() else kept
