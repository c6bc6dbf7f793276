"""An answer through translation: stand-ins for translators whose effect is known, and cases written
by hand.
"""

# ruff: noqa: RUF001 (glyphs that look like others are what this is about)
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flare_exp.tasks import Answer, TyDiQA
from flare_exp.translation.projection import MARKERS, find, mark, own_marks_replaced

# what must not be left in a context, and the characters that may change to get there: said again,
# not read from the table
OWN = {
    "quotes": (
        re.compile(r"""["“”„«»「」『』《》〝〞＂]|''|``"""),
        set("\"“”„«»「」『』《》〝〞＂'`"),
    ),
    "brackets": (re.compile(r"[][［］【】]"), set("[]［］【】")),
    "tags": (re.compile(r"[<＜]\s*/?\s*[a-zA-Zа-я]\s*[>＞]"), set("<>＜＞")),
}
# (opening, closing) as translation returns them
VARIANTS = {
    "quotes": [
        '""',
        "“”",
        "„“",
        "„”",
        "””",
        "«»",
        "»«",
        "»»",
        "「」",
        "『』",
        "《》",
        "〝〞",
        "＂＂",
        '“"',
        '"”',
        ("''", "''"),
        ("``", "''"),
    ],
    "brackets": ["[]", "［］", "【】", "〔〕", "［]"],
    "tags": [
        ("<a>", "</a>"),
        ("<A>", "</A>"),
        ("< a >", "< / a >"),
        ("<a >", "</ a>"),
        ("＜a＞", "＜／a＞"),
        ("<а>", "</а>"),
    ],
}
MARKED = {"quotes": '"%s"', "brackets": "[%s]", "tags": "<a>%s</a>"}
WORDS = [
    "Nile",
    "a",
    "Helsingissä",
    "café",
    "cafe\u0301",
    "Москва",
    "а",
    "القاهرة",
    "ঢাকা",
    "서울",
    "北京",
    "กรุงเทพ",
    "తె",
    "👩‍👩‍👧",
    "7'",
]
PIECES = [
    *WORDS,
    *"\"'`“”„«»「」《》[]［］【】()<>/.,!।。؟-",
    "''",
    '""',
    "``",
    "<a>",
    "</a>",
    "< A >",
    "<b>",
    "[12]",
    '7"',
]
SPACES = [" ", " ", " ", "  ", "\n", "\u00a0", "\u3000", "", ""]

kinds = st.sampled_from(sorted(MARKERS))
steady = settings(deadline=None, derandomize=True, max_examples=200)


@st.composite
def asked(draw):
    """A context with marks of every kind and an answer anywhere in it, at words' ends or not,
    perhaps there twice.
    """
    pieces = draw(
        st.lists(st.sampled_from(PIECES) | st.sampled_from(SPACES), min_size=1, max_size=14)
    )
    context = "".join(pieces)
    start = draw(st.sampled_from([0, draw(st.integers(0, len(context)))]))
    stop = draw(st.sampled_from([len(context), draw(st.integers(start, len(context)))]))
    assume(context[start:stop].strip())
    if draw(st.booleans()):
        twin = context[start:stop]
        context, start = draw(
            st.sampled_from([(twin + context, start + len(twin)), (context + twin, start)])
        )
        stop = start + len(twin)
    return context, Answer(context[start:stop], start)


@st.composite
def sentences(draw):
    """Words before an answer of words, the answer, words after it."""
    before, answer, after = (
        draw(st.lists(st.sampled_from(WORDS), min_size=n, max_size=4)) for n in (0, 1, 0)
    )
    return " ".join(before), " ".join(answer), " ".join(after)


def parts(context, answer, kind):
    """Before, answer, after: as `mark` must have written them round its marks."""
    lead = len(answer.text) - len(answer.text.lstrip())
    start, core = answer.start + lead, answer.text.strip()
    text = own_marks_replaced(context, kind)
    return text[:start], text[start : start + len(core)], text[start + len(core) :]


def joined(*pieces):
    return " ".join(p for p in pieces if p)


@steady
@given(asked(), kinds)
def test_own_marks_are_replaced_in_place(drawn, kind):
    context, (marks, changeable) = drawn[0], OWN[kind]
    text = own_marks_replaced(context, kind)
    assert len(text) == len(context)
    assert all(new == old or old in changeable for new, old in zip(text, context, strict=True))
    assert not marks.search(text)
    assert marks.search(context) or text == context


@steady
@given(asked(), kinds)
def test_identity_gives_the_exact_span(drawn, kind):
    context, answer = drawn
    before, core, after = parts(context, answer, kind)
    assert mark(context, answer, kind) == before + MARKED[kind] % core + after
    text, found = find(mark(context, answer, kind), kind)
    assert text == own_marks_replaced(context, kind)
    assert found == Answer(core, len(before))
    assert text.startswith(found.text, found.start)
    # the text that comes out can go in again
    assert find(mark(text, found, kind), kind) == (text, found)


@steady
@given(asked(), kinds, st.data())
def test_other_glyphs_elsewhere_in_the_text(drawn, kind, data):
    """The marks come back in another form and the marked span in another place."""
    before, core, after = parts(*drawn, kind)
    opening, closing = data.draw(st.sampled_from(VARIANTS[kind]))
    new = f"{opening}{core}{closing}"
    # where a single quote of the text stands beside two that are the mark, no reading is right
    ends = [(opening, before[-1:]), (opening, core[:1]), (closing, core[-1:]), (closing, after[:1])]
    if any(len(glyph) == 2 and glyph[0] == end for glyph, end in ends):
        assert find(before + new + after, kind)[1] is None
        return
    assert find(before + new + after, kind) == (before + core + after, Answer(core, len(before)))
    moved = f"{after} | {new} | {before}"
    assert find(moved, kind) == (f"{after} | {core} | {before}", Answer(core, len(after) + 3))


@steady
@given(sentences(), kinds, st.data())
def test_spaces_inside_the_marks_are_no_part_of_the_answer(drawn, kind, data):
    before, core, after = drawn
    opening, closing = data.draw(st.sampled_from(VARIANTS[kind]))
    left, right = (
        data.draw(st.sampled_from(["", " ", "\u00a0", "\u202f", " \n"])) for _ in range(2)
    )
    assume("'" not in closing or "'" not in core + before + after)
    text, found = find(joined(before, opening + left + core + right + closing, after), kind)
    assert text == joined(before, core, after)
    assert found == Answer(core, len(before) + bool(before))
    # no space outside: the one inside keeps the words apart
    crowded, found = find(f"x{opening} {core} {closing}x", kind)
    assert (crowded, found) == (f"x {core} x", Answer(core, 2))


@steady
@given(sentences(), kinds, st.data())
def test_lost_and_doubled_marks_give_no_answer_and_leave_nothing(drawn, kind, data):
    before, core, after = drawn
    opening, closing = data.draw(st.sampled_from(VARIANTS[kind]))
    assume("'" not in closing or "'" not in core + before + after)
    marked = f"{opening}{core}{closing}"
    whole = joined(before, core, after)
    broken = {
        joined(before, f"{opening}{core}", after): whole,
        joined(before, f"{core}{closing}", after): whole,
        joined(before, f"{opening} {core}", after): whole,
        joined(before, core, closing, after): whole,
        joined(before, f"{opening}{closing}", after): joined(before, after),
        joined(before, f"{opening} {closing}", after): joined(before, after),
        joined(before, marked, after, marked): joined(before, core, after, core),
        joined(before, f"{opening}{marked}{closing}", after): whole,
        joined(before, opening, marked, after): whole,
        joined(before, marked, closing, after): whole,
        whole: whole,
    }
    for translated, text in broken.items():
        assert find(translated, kind) == (text, None), translated


@steady
@given(st.text(st.sampled_from("ab .\"'“«」`[]］【</aA> \n"), max_size=14), kinds)
def test_any_text_is_answered_truthfully(translated, kind):
    text, found = find(translated, kind)
    if not OWN[kind][0].search(translated):
        assert (text, found) == (translated, None)
    if found:
        assert text.startswith(found.text, found.start)
        assert found.text == found.text.strip() != ""
        assert len(OWN[kind][0].findall(translated)) == 2
    assert len(text) <= len(translated)
    assert re.sub(r"[^ab.]", "", text) == re.sub(r"[^ab.]", "", OWN[kind][0].sub("", translated))


@pytest.mark.parametrize(
    ("context", "text", "start", "kind", "marked"),
    [
        ("Nairobi is big.", "Nairobi", 0, "quotes", '"Nairobi" is big.'),
        ("It is Nairobi", "Nairobi", 6, "brackets", "It is [Nairobi]"),
        ("Nairobi", "Nairobi", 0, "tags", "<a>Nairobi</a>"),
        ("Nile, Nile, Nile", "Nile", 6, "quotes", 'Nile, "Nile", Nile'),
        ('"A" and "B" or "C"', "B", 9, "quotes", "'A' and '\"B\"' or 'C'"),
        ('the "White" Nile', 'the "White" Nile', 0, "quotes", "\"the 'White' Nile\""),
        ("say “so”, «da», 「好」", "so", 5, "quotes", 'say ‘"so"’, ‹da›, ‘好’'),
        ("''so'' it \"\" was", "it", 7, "quotes", '’’so’’ "it" ’’ was'),
        ("one[1] two[2]", "two", 7, "brackets", "one(1) [two](2)"),
        ("x < y and <a>b</a> <i>", "b", 13, "tags", "x < y and (a)<a>b</a>(/a) (i)"),
        ("Helsingissä", "Helsingi", 0, "quotes", '"Helsingi"ssä'),
        ("กรุงเทพมหานคร", "เทพ", 4, "brackets", "กรุง[เทพ]มหานคร"),
        ("a\nb (c", "\nb (c", 1, "quotes", 'a\n"b (c"'),
        ("7' tall", "7'", 0, "quotes", '"7\'" tall'),
    ],
)
def test_mark(context, text, start, kind, marked):
    assert mark(context, Answer(text, start), kind) == marked


@pytest.mark.parametrize(
    ("translated", "kind", "text", "answer"),
    [
        ("Mto « Nile » ni mrefu", "quotes", "Mto Nile ni mrefu", ("Nile", 4)),
        ("(« Nile »).", "quotes", "(Nile).", ("Nile", 1)),
        ("l'« Afrique », ici", "quotes", "l'Afrique, ici", ("Afrique", 2)),
        ("dans« Afrique »(ici)", "quotes", "dans Afrique (ici)", ("Afrique", 5)),
        ('" x " y', "quotes", "x y", ("x", 0)),
        ('y,\n" x "', "quotes", "y,\nx", ("x", 3)),
        ("我在「北京」工作", "quotes", "我在北京工作", ("北京", 2)),
        ("我在［北京］工作", "brackets", "我在北京工作", ("北京", 2)),
        ("В „Москве“ и Москве", "quotes", "В Москве и Москве", ("Москве", 2)),
        ('"Helsingi"ssä', "quotes", "Helsingissä", ("Helsingi", 0)),
        ('in "Nairobi."', "quotes", "in Nairobi.", ("Nairobi.", 3)),
        ('in "Nairobi".', "quotes", "in Nairobi.", ("Nairobi", 3)),
        ("''7 km'' of 'it'", "quotes", "7 km of 'it'", ("7 km", 0)),
        ("''7''' of it", "quotes", "7 of it", None),
        ("he's ''it", "quotes", "he's it", None),
        ("he '''' it", "quotes", "he it", None),
        ("< a > x < / a > y", "tags", "x y", ("x", 0)),
        ("1 < 2 <A>x</A> > 0", "tags", "1 < 2 x > 0", ("x", 6)),
        ("<а>Мир</а>", "tags", "Мир", ("Мир", 0)),
        ("</a>x<a> y", "tags", "x y", None),
        ("<a>x<a> y", "tags", "x y", None),
        ("<a>x</b> y", "tags", "x y", None),
        ("<a>x</A> y", "tags", "x y", ("x", 0)),
        ("]x[ y", "brackets", "x y", None),
        ("[x】 y", "brackets", "x y", None),
        ("”x“ y", "quotes", "x y", None),
        ("“x“ y", "quotes", "x y", None),
        ("»x“ y", "quotes", "x y", None),
        ("“x„ y", "quotes", "x y", None),
        ("[x] y [z]", "brackets", "x y z", None),
        ('x" "y', "quotes", "x y", None),
        ("[]", "brackets", "", None),
        ("", "quotes", "", None),
        (" no marks  at all\n", "quotes", " no marks  at all\n", None),
    ],
)
def test_find(translated, kind, text, answer):
    assert find(translated, kind) == (text, Answer(*answer) if answer else None)


@pytest.mark.parametrize(
    "answer",
    [
        Answer("b", -1),
        Answer("a", -4),
        Answer("b", 0),
        Answer("c", 2),
        Answer("", 0),
        Answer(" ", 1),
    ],
)
def test_what_is_no_span_cannot_be_marked(answer):
    with pytest.raises(ValueError, match="is no span of the context 'a b'"):
        mark("a b", answer, "quotes")


@pytest.mark.shared
@pytest.mark.parametrize("kind", sorted(MARKERS))
def test_identity_on_tydiqa(shared_data, kind):
    examples = [
        e
        for e in TyDiQA(str(shared_data / "tydiqa")).read("en", "train")
        if e.answers[0].start >= 0
    ]
    assert examples
    for example in examples:
        context, answer = example.texts[0], example.answers[0]
        before, core, after = parts(context, answer, kind)
        assert find(mark(context, answer, kind), kind) == (
            before + core + after,
            Answer(core, len(before)),
        )
