"""Project labels: an answer span is translated between marks, which are then found and removed.

Marks that a context already has would be mistaken for those of the answer. Before marking, they are
therefore replaced by characters that read the same but are not marks: double quotes become single
ones, square brackets round ones. Each replacement is one for one, so that no offset moves.
Translation changes glyphs and spacing. An answer is returned only if the text holds exactly two
marks and they are a pair; a pair counts in every form that can be read in one way only.
"""

from __future__ import annotations

# ruff: noqa: RUF001 (glyphs that look like others are what this is about)
import re
import unicodedata
from dataclasses import dataclass

from flare_exp.tasks.examples import Answer


@dataclass(frozen=True)
class Marker:
    """One way to mark a span.

    Args:
        opening: the mark before the span.
        closing: the mark after the span.
        mark: matches every mark, opening or closing, in all the forms that translation gives it.
        pair: matches the canonical forms of two marks, one after the other, that belong together.
        stand_ins: replacement, one for one, of mark characters that a context already has.
    """

    opening: str
    closing: str
    mark: re.Pattern[str]
    pair: re.Pattern[str]
    stand_ins: dict[int, int]


MARKERS: dict[str, Marker] = {
    # Which quote opens depends on the language: “a” „a“ „a” ”a” «a» »a« »a».
    # A straight one pairs with any that fits.
    "quotes": Marker(
        '"',
        '"',
        # runs of quotes match as one: of three single quotes, any two could be the mark
        re.compile(r"""["＂“”„«»「」｢｣『』《》〝〞〟]|'{2,}|`{2,}"""),
        re.compile(r"""["“”]["”]|„["“”]|«["»]|"»|»[«»]|「」|『』|《》|〝[〞〟]|``''|''''"""),
        # Two ' side by side are a mark again; `own_marks_replaced` repeats until they are
        # typographic.
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
    """Return the context, at the same length, without anything that `find` takes for a mark."""
    kind = MARKERS[marker]
    while kind.mark.search(context):
        context = kind.mark.sub(lambda match: match[0].translate(kind.stand_ins), context)
    return context


def mark(context: str, answer: Answer, marker: str) -> str:
    """Put marks around `answer` in the context, and replace marks that the context already has.

    White space at the ends of the answer stays outside the marks.

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
    """Return the range of the marked span with its marks, which must not be split for translation.

    Returns:
        (start, end) in characters; None if there is not exactly one span.
    """
    found = list(MARKERS[marker].mark.finditer(text))
    return (found[0].start(), found[1].end()) if len(found) == 2 else None


def find(translated: str, marker: str) -> tuple[str, Answer | None]:
    """Return the text without marks and the answer that stood between them.

    The answer is None if a mark is lost or there is more than one pair. Spaces inside the marks are
    not part of the answer. They are removed where the text outside continues with a space or with
    punctuation, and moved outside where they keep two words apart.
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
    """Return a mark without differences of width, case and spaces."""
    return "".join(unicodedata.normalize("NFKC", mark).casefold().split())


def _clings(neighbor: str, categories: tuple[str, ...]) -> bool:
    """Return True if no space is due between a word and its neighbor.

    That is the case at the text's end, beside a space, and beside punctuation that joins.
    """
    return (
        not neighbor
        or neighbor.isspace()
        or neighbor in "'’/"
        or unicodedata.category(neighbor) in categories
    )


def _without_marks(text: str, kind: Marker) -> str:
    """Remove all marks, and the white space after a mark that also has white space before it."""
    kept, *rest = kind.mark.split(text)
    for piece in rest:
        kept += piece.lstrip() if not kept or kept[-1].isspace() else piece
    return kept.rstrip() if rest and not rest[-1].strip() else kept
