"""Map a benchmark's language codes to the FLORES-200 codes of NLLB (arXiv 2207.04672)."""

from __future__ import annotations

from dataclasses import dataclass

from flare_exp.errors import UserError


@dataclass(frozen=True)
class Language:
    """A language as NLLB names it.

    Args:
        flores: FLORES-200 code.
        proxy: whether NLLB lacks the language, so that `flores` is a related one, as in the paper's
            released code.
        spaced: whether spaces separate its words.
    """

    flores: str
    proxy: bool = False
    spaced: bool = True


LANGUAGES = {
    # the generated world; these codes exist in its own translation model only
    "near": Language("nea_Latn"),
    "far": Language("far_Latn"),
    # XNLI and TyDiQA
    "en": Language("eng_Latn"),
    "ar": Language("arb_Arab"),
    "bg": Language("bul_Cyrl"),
    "bn": Language("ben_Beng"),
    "de": Language("deu_Latn"),
    "el": Language("ell_Grek"),
    "es": Language("spa_Latn"),
    "fi": Language("fin_Latn"),
    "fr": Language("fra_Latn"),
    "hi": Language("hin_Deva"),
    "id": Language("ind_Latn"),
    "ko": Language("kor_Hang"),
    "ru": Language("rus_Cyrl"),
    "sw": Language("swh_Latn"),
    "te": Language("tel_Telu"),
    "th": Language("tha_Thai", spaced=False),
    "tr": Language("tur_Latn"),
    "ur": Language("urd_Arab"),
    "vi": Language("vie_Latn"),
    "zh": Language("zho_Hans", spaced=False),
    # NusaX
    "eng": Language("eng_Latn"),
    "ace": Language("ace_Latn"),
    "ban": Language("ban_Latn"),
    "bbc": Language("ind_Latn", proxy=True),
    "bjn": Language("bjn_Latn"),
    "bug": Language("bug_Latn"),
    "ind": Language("ind_Latn"),
    "jav": Language("jav_Latn"),
    "mad": Language("ind_Latn", proxy=True),
    "min": Language("min_Latn"),
    "nij": Language("ind_Latn", proxy=True),
    "sun": Language("sun_Latn"),
}


def language(code: str) -> Language:
    """Return the row of a benchmark's language code.

    Raises:
        UserError: the table has no such code.
    """
    if code not in LANGUAGES:
        raise UserError(
            f"no FLORES-200 code is known for the language {code!r}; add its row to "
            "flare_exp/languages.py"
        )
    return LANGUAGES[code]
