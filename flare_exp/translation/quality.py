"""Flag suspicious translations."""

from __future__ import annotations

import re
import unicodedata

from flare_exp.translation.segmentation import Translation

REPEATED = re.compile(r"(.{1,80}?)\1{2,}", re.DOTALL)
WORD = re.compile(r"[^\W\d_]{2,}")
LETTERS = 10  # fewer letters say nothing about a script
WORDS = 10  # fewer different words say nothing about a language
SHARED = 0.8  # share of the translation's different words that are the source's

# script of a FLORES-200 code -> words of which one is in the Unicode name of each of its letters
SCRIPTS = {
    "Arab": ("ARABIC",),
    "Armn": ("ARMENIAN",),
    "Beng": ("BENGALI",),
    "Cyrl": ("CYRILLIC",),
    "Deva": ("DEVANAGARI",),
    "Ethi": ("ETHIOPIC",),
    "Geor": ("GEORGIAN",),
    "Grek": ("GREEK",),
    "Gujr": ("GUJARATI",),
    "Guru": ("GURMUKHI",),
    "Hang": ("HANGUL",),
    "Hans": ("CJK",),
    "Hant": ("CJK",),
    "Hebr": ("HEBREW",),
    "Jpan": ("HIRAGANA", "KATAKANA", "CJK"),
    "Khmr": ("KHMER",),
    "Knda": ("KANNADA",),
    "Laoo": ("LAO",),
    "Latn": ("LATIN",),
    "Mlym": ("MALAYALAM",),
    "Mymr": ("MYANMAR",),
    "Nkoo": ("NKO",),
    "Orya": ("ORIYA",),
    "Sinh": ("SINHALA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Tfng": ("TIFINAGH",),
    "Thai": ("THAI",),
    "Tibt": ("TIBETAN",),
}
# languages that FLORES-200's authors write in another script than their code says
OTHER_SCRIPTS = {"sat_Beng": ("BENGALI", "CHIKI")}


def flags(source: str, translation: Translation, language: str) -> dict[str, bool]:
    """Return the signs of a bad translation.

    Each flag is False for a good translation; a bad one may have none either.

    Args:
        source: the text.
        translation: its translation.
        language: FLORES-200 code of the language that it should be in.

    Returns:
        truncated: the translation did not come to an end. empty: nothing is left of the source.
            repetitive: a run of characters comes five times or more in a row, and at least two more
            times than in the source. copy: the translation is the source, except for case and white
            space. wrong_script: it has at least ten letters, and more than half of them are of
            other scripts than the language's. wrong_language: it has at least ten different words,
            and at least 80 % of them are words of the source, so that it still is in the source's
            language; other languages are not recognized, and where two languages share most of
            their words a good translation may be flagged.
    """
    text = translation.text
    return {
        "truncated": translation.truncated,
        "empty": bool(source.strip()) and not text.strip(),
        "repetitive": _repeats(text) > max(4, _repeats(source) + 1),
        "copy": bool(text.strip()) and _bare(text) == _bare(source),
        "wrong_script": _foreign(text, language),
        "wrong_language": _untranslated(source, text),
    }


def _repeats(text: str) -> int:
    """Return how often the most repeated run of characters comes in a row; 0 if below three.

    A run has at most 80 characters and at least one letter.
    """
    found = [match for match in REPEATED.finditer(text + " ") if any(c.isalpha() for c in match[1])]
    return max((len(match[0]) // len(match[1]) for match in found), default=0)


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()


def _foreign(text: str, language: str) -> bool:
    """Return True if most letters of a text are of other scripts than the language's.

    Modifier letters (category Lm), such as the Japanese long vowel mark, do not count: several
    scripts have them.
    """
    names = scripts_of_language(language)
    letters = [c for c in text if unicodedata.category(c) in ("Lu", "Ll", "Lt", "Lo")]
    if not names or len(letters) < LETTERS:
        return False
    own = sum(is_of(c, names) for c in letters)
    return 2 * own < len(letters)


def scripts_of_language(language: str) -> tuple[str, ...]:
    """Return the words for the scripts of a language (FLORES-200 code), or none if unknown."""
    return OTHER_SCRIPTS.get(language) or SCRIPTS.get(language.rpartition("_")[2], ())


def is_of(letter: str, scripts: tuple[str, ...]) -> bool:
    """Return whether a letter's Unicode name has one of the words for some scripts."""
    return not {*scripts}.isdisjoint(unicodedata.name(letter, "").replace("-", " ").split())


def _untranslated(source: str, text: str) -> bool:
    """Return True if most words of a translation are words of its source."""
    words = {*WORD.findall(text.casefold())}
    shared = words & {*WORD.findall(source.casefold())}
    return len(words) >= WORDS and len(shared) >= SHARED * len(words)
