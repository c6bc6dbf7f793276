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


# FLORES-200 with N'Ko, as in NLLB (arXiv 2207.04672, 2309.07445)
FLORES = tuple(
    """
ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn als_Latn amh_Ethi
apc_Arab arb_Arab arb_Latn ars_Arab ary_Arab arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn
azb_Arab azj_Latn bak_Cyrl bam_Latn ban_Latn bel_Cyrl bem_Latn ben_Beng bho_Deva bjn_Arab
bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl cat_Latn ceb_Latn ces_Latn cjk_Latn ckb_Arab
crh_Latn cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn dzo_Tibt ell_Grek eng_Latn epo_Latn
est_Latn eus_Latn ewe_Latn fao_Latn fij_Latn fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn
gaz_Latn gla_Latn gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva
hne_Deva hrv_Latn hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn
jpn_Jpan kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab kas_Deva kat_Geor kaz_Cyrl kbp_Latn
kea_Latn khk_Cyrl khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn kmr_Latn knc_Arab knc_Latn
kon_Latn kor_Hang lao_Laoo lij_Latn lim_Latn lin_Latn lit_Latn lmo_Latn ltg_Latn ltz_Latn
lua_Latn lug_Latn luo_Latn lus_Latn lvs_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Arab
min_Latn mkd_Cyrl mlt_Latn mni_Beng mos_Latn mri_Latn mya_Mymr nld_Latn nno_Latn nob_Latn
npi_Deva nqo_Nkoo nso_Latn nus_Latn nya_Latn oci_Latn ory_Orya pag_Latn pan_Guru pap_Latn
pbt_Arab pes_Arab plt_Latn pol_Latn por_Latn prs_Arab quy_Latn ron_Latn run_Latn rus_Cyrl
sag_Latn san_Deva sat_Beng scn_Latn shn_Mymr sin_Sinh slk_Latn slv_Latn smo_Latn sna_Latn
snd_Arab som_Latn sot_Latn spa_Latn srd_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn
szl_Latn tam_Taml taq_Latn taq_Tfng tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi
tpi_Latn tsn_Latn tso_Latn tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab ukr_Cyrl
umb_Latn urd_Arab uzn_Latn vec_Latn vie_Latn war_Latn wol_Latn xho_Latn ydd_Hebr yor_Latn
yue_Hant zho_Hans zho_Hant zsm_Latn zul_Latn
""".split()
)
# scripts without spaces between words
UNSPACED = ("Hans", "Hant", "Jpan", "Khmr", "Laoo", "Mymr", "Thai", "Tibt")

LANGUAGES = {
    # the generated world; those of near and far exist in its own translation model only
    "near": Language("nea_Latn"),
    "half": Language("hal_Latn"),
    "far": Language("far_Latn"),
    # XNLI, TyDiQA and XQuAD
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
    "ro": Language("ron_Latn"),
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
    # SIB-200, which calls Santali by the script that NLLB's code gets wrong
    "sat_Olck": Language("sat_Beng"),
    **{code: Language(code, spaced=code.split("_")[1] not in UNSPACED) for code in FLORES},
}


def is_spaced(code: str) -> bool:
    """Return whether a language is written with spaces between words; so are unknown ones."""
    return code not in LANGUAGES or LANGUAGES[code].spaced


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
