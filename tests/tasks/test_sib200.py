"""SIB-200's files: rows are paired by id, classes are named."""

import pytest
from tables import write_rows

from flare_exp.config import validation
from flare_exp.errors import UserError
from flare_exp.languages import FLORES, language
from flare_exp.tasks import SIB200
from flare_exp.translation.lookup import ParallelTranslator


def test_rows_are_paired_by_id_and_classes_are_read_by_name(tmp_path):
    rows = [
        {"index_id": 90 + i, "category": name, "text": name} for i, name in enumerate(SIB200.labels)
    ]
    write_rows(tmp_path / "jav_Latn/test.parquet", rows)
    write_rows(
        tmp_path / "eng_Latn/test.parquet",
        [{**r, "text": r["text"].upper()} for r in reversed(rows)],
    )
    task = SIB200(data_dir=str(tmp_path))
    target = task.load("jav_Latn", "test")
    assert [e.label for e in target] == list(range(7))
    english = ParallelTranslator(task).translate(target, "eng_Latn")
    assert [e.texts[0] for e in english] == [name.upper() for name in SIB200.labels]


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ("sport", r"row 1 \(from 0\), column category: 'sport' is none of science/technology, "),
        (None, r"row 1 \(from 0\), column category: null instead of the name of a class"),
    ],
)
def test_an_unknown_class_is_named_with_its_row(tmp_path, category, message):
    rows = [
        {"index_id": i, "category": name, "text": "x"}
        for i, name in enumerate(["travel", category])
    ]
    write_rows(tmp_path / "jav_Latn/test.parquet", rows)
    with pytest.raises(UserError, match=message):
        SIB200(data_dir=str(tmp_path)).load("jav_Latn", "test")


def test_every_language_is_its_own_flores_code_and_scripts_say_whether_words_have_spaces():
    assert len(FLORES) == len(set(FLORES)) == 205
    assert {language(code).flores for code in FLORES} == set(FLORES)
    assert [language(c).spaced for c in ("tha_Thai", "zho_Hant", "jpn_Jpan", "kor_Hang")] == [
        False
    ] * 3 + [True]


def test_santali_has_the_name_of_the_hubs_configuration():
    assert ("sat_Olck" in SIB200.languages, "sat_Beng" in SIB200.languages) == (True, False)
    assert (len(SIB200.languages), language("sat_Olck").flores) == (204, "sat_Beng")


@pytest.mark.shared
def test_the_real_files_are_read_and_paired(shared_data):
    task = SIB200(data_dir=str(shared_data / "sib200"))
    for lang in ("jav_Latn", "swh_Latn", "spa_Latn"):
        for role, size in SIB200.sizes.items():
            target = task.load(lang, role)
            english = ParallelTranslator(task).translate(target, "eng_Latn")
            assert len(target) == len(english) == size
            assert [e.label for e in english] == [e.label for e in target]


def test_of_many_languages_a_message_lists_some_and_the_one_that_was_meant():
    (problem,) = validation.validate(["task=sib200", "task.lang=jav"], False)[1]
    assert problem.endswith(
        "aka_Latn, als_Latn, amh_Ethi, ... (204 in all); did you mean jav_Latn?"
    )
