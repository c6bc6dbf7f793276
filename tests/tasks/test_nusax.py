"""Slices of splits, and NusaX's files: what is read, what is refused."""

import pytest
from tables import write_rows

from flare_exp.errors import UserError
from flare_exp.tasks import NusaX, Slice, fingerprint
from flare_exp.translation.lookup import ParallelTranslator


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train", Slice("train")),
        ("validation[:20]", Slice("validation", 0, 20)),
        ("test[5:]", Slice("test", 5)),
        ("a[2:4]", Slice("a", 2, 4)),
    ],
)
def test_slices(text, expected):
    assert Slice.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["train[", "train[5]", "train[-3:]", "train[:10%]", "train[4:4]", ""]
)
def test_wrong_slices(text):
    with pytest.raises(ValueError, match=r"is not a split|is empty"):
        Slice.parse(text)


def test_slices_overlap():
    assert Slice.parse("a[:10]").overlaps(Slice.parse("a[9:]"))
    assert not Slice.parse("a[:10]").overlaps(Slice.parse("a[10:]"))
    assert not Slice.parse("a").overlaps(Slice.parse("b"))


def test_nusax_pairs_rows_by_id_not_by_position(tmp_path):
    rows = [{"id": str(i), "text": f"t{i}", "lang": "x", "label": i % 3} for i in range(5)]
    write_rows(tmp_path / "ace/test.parquet", rows)
    write_rows(
        tmp_path / "eng/test.parquet", [{**r, "text": r["text"].upper()} for r in reversed(rows)]
    )
    task = NusaX(data_dir=str(tmp_path))
    ace = task.load("ace", "test")
    english = ParallelTranslator(task).translate(ace, "eng")
    assert [e.texts[0] for e in english] == ["T0", "T1", "T2", "T3", "T4"]
    assert [e.id for e in ace][2] == "nusax/ace/test/2"
    assert fingerprint(ace) != fingerprint(english)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": "1", "text": text, "label": 0} for text in "ab"],
            r"ace.test\.parquet: rows 0 and 1 \(from 0\) have the id 1",
        ),
        ([{"id": "1", "text": "a", "label": 3}], r"row 0 \(from 0\), column label: 3 is none of 0"),
        ([{"id": "1", "text": "a"}], r"lacks the column\(s\) label"),
    ],
)
def test_nusax_refuses_wrong_files(tmp_path, rows, message):
    write_rows(tmp_path / "ace/test.parquet", rows)
    with pytest.raises(UserError, match=message):
        NusaX(data_dir=str(tmp_path)).load("ace", "test")


def test_missing_counterpart_and_damaged_file_are_named(tmp_path):
    write_rows(tmp_path / "ace/test.parquet", [{"id": "1", "text": "a", "label": 0}])
    write_rows(tmp_path / "eng/test.parquet", [{"id": "2", "text": "b", "label": 0}])
    task = NusaX(data_dir=str(tmp_path))
    with pytest.raises(UserError, match="1 examples have no translation into eng"):
        ParallelTranslator(task).translate(task.load("ace", "test"), "eng")
    (tmp_path / "ace" / "test.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"ace.test\.parquet is not a readable parquet file"):
        task.load("ace", "test")


@pytest.mark.shared
def test_real_nusax(shared_data):
    task = NusaX(data_dir=str(shared_data / "nusax"))
    assert [len(task.load("ace", role)) for role in ("train", "validation", "test")] == [
        500,
        100,
        400,
    ]
    for lang in ("ace", "jav"):
        english = task.load("eng", "train")
        translated = ParallelTranslator(task).translate(english, lang)
        assert [(e.key, e.label) for e in english] == [(t.key, t.label) for t in translated]
        own = {e.key: e for e in task.load(lang, "train")}
        assert all(own[t.key].texts == t.texts and own[t.key].label == t.label for t in translated)
