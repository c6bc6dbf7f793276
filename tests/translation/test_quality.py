"""Signs of a bad translation."""

# ruff: noqa: RUF001 (letters that look like Latin ones)
import pytest

from flare_exp.languages import FLORES
from flare_exp.translation.quality import SCRIPTS, flags
from flare_exp.translation.segmentation import Translation

# good texts; a letter of another script in them does no harm
GOOD = {
    "jpn_Jpan": "東京タワーは、ロンドンのTVとは違う。コーヒーを々",
    "kor_Hang": "나는 어제 서울에서 친구를 만났다 (漢字)",
    "zho_Hans": "我昨天在北京见到了我的朋友 NATO",
    "zho_Hant": "我昨天在臺北見到了我的朋友",
    "srp_Cyrl": "Ђорђе је јуче срео пријатеља у Београду",
    "arb_Arab": "التقيت صديقي أمس في القاهرة",
    "hin_Deva": "मैं कल दिल्ली में अपने दोस्त से मिला",
    "tha_Thai": "เมื่อวานฉันพบเพื่อนที่กรุงเทพ",
    "tel_Telu": "నేను నిన్న హైదరాబాద్‌లో నా స్నేహితుడిని కలిశాను",
    "amh_Ethi": "ትናንት በአዲስ አበባ ጓደኛዬን አገኘሁ",
    "kat_Geor": "გუშინ თბილისში მეგობარს შევხვდი",
    "sat_Beng": "ᱤᱧ ᱦᱚᱞᱟ ᱜᱟᱛᱮ ᱥᱟᱶ ᱧᱟᱯᱟᱢ ᱮᱱᱟᱧ",
    "vie_Latn": "Hôm qua tôi gặp bạn ở Hà Nội (Москва)",
    "yor_Latn": "Mo rí ọ̀rẹ́ mi ní Ìbàdàn lánàá",
}
ENGLISH = "I met an old friend of mine in the city yesterday and we talked for hours"


def found(source, text, language="spa_Latn"):
    return {
        flag for flag, given in flags(source, Translation(text, False), language).items() if given
    }


@pytest.mark.parametrize("language", GOOD)
def test_only_another_script_is_a_wrong_script(language):
    assert found(ENGLISH, GOOD[language], language) == set()
    own = language.partition("_")[2]
    wrong = {other for other in GOOD if "wrong_script" in found(ENGLISH, GOOD[language], other)}
    same = {"Hans": "zho", "Hant": "zho", "Latn": "Latn"}.get(own, language)
    assert wrong == {other for other in GOOD if same not in other} - (
        {"jpn_Jpan"} if same == "zho" else set()
    )


def test_every_script_is_known():
    assert {code.partition("_")[2] for code in FLORES} == {*SCRIPTS}


@pytest.mark.parametrize("text", ["Москва", "12 345 678 901 234", "\U0001f600" * 20, ""])
def test_few_letters_say_nothing_about_the_script(text):
    assert "wrong_script" not in found("x", text)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (ENGLISH, {"copy", "wrong_language"}),
        (ENGLISH.replace("I met", "Yo conocí"), {"wrong_language"}),
        ("Ayer me encontré en la ciudad con un viejo amigo y hablamos durante horas", set()),
        ("I met an old friend", set()),  # too short to tell
        (" ".join(["the city"] * 4) + " of mine and an old friend", set()),  # eight words
    ],
)
def test_a_translation_of_the_source_s_words_is_in_its_language(text, wrong):
    assert found(ENGLISH, text) == wrong
