"""Files of texts: what is read, and one message for what is wrong with them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flare_exp.data.rows import Reader, Row
from flare_exp.errors import UserError

PAIR = ("premise", "hypothesis")


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_the_formats_are_read_in_their_order(tmp_path):
    expected = [Row(("a, b", "c\nd"), None, 1), Row(("e", "f"), ("g", "h"), 2)]
    records = [
        {"id": 1, "premise": "a, b", "hypothesis": "c\nd", "gold": 5},
        {
            "hypothesis": "f",
            "id": 2,
            "premise": "e",
            "source_premise": "g",
            "source_hypothesis": "h",
        },
    ]
    records[1] |= {"source_premise": "g", "source_hypothesis": "h"}
    (tmp_path / "a.jsonl").write_text(lines(*records).replace("\n", "\n\n"))
    table = pa.Table.from_pylist([{**dict.fromkeys(records[1]), **r} for r in records])
    pq.write_table(table, tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        reader = Reader(tmp_path / name, PAIR)
        assert reader.check() == 2
        assert list(reader) == expected
        assert (reader.id_type, reader.has_sources) == (int, True)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_sources_that_are_not_read_may_be_anything(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    rows = [{"premise": "a", "hypothesis": "b", "source_premise": 3}]
    if ending == "jsonl":
        path.write_text(json.dumps(rows[0]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    reader = Reader(path, PAIR, sources=())
    assert reader.check() == 1
    assert reader.has_sources, "so that it can be said that they are left out"
    assert list(reader) == [Row(("a", "b"))]


@pytest.mark.parametrize(("ending", "between"), [(".csv", ","), (".tsv", "\t")])
def test_tables_are_read(tmp_path, ending, between):
    path = tmp_path / f"a{ending}"
    rows = [("text", "source"), (f'"a{between}""b""\nc"', ""), ("d", "e")]
    path.write_text("\n".join(map(between.join, rows)) + "\n", encoding="utf-8-sig")
    assert list(Reader(path, ("text",))) == [
        Row((f'a{between}"b"\nc',)),
        Row(("d",), ("e",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b"", "there is no row in it"),
        ("a.jsonl", b"{}\n", "line 1: has no text; it has "),
        ("a.jsonl", b'{"text": "a"\n', "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'["a"]\n', "line 1 is no object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: text: half a surrogate pair"),
        ("a.jsonl", lines({"text": "a"}, {"text": 5}).encode(), "line 2: text: 5 is not text"),
        ("a.jsonl", lines(*[{"text": " "}] * 9).encode(), ": every one of 9 rows: text: is empty"),
        (
            "a.jsonl",
            lines({"text": "a"}, *[{"text": i} for i in range(9)], {"text": 0}).encode(),
            "line 2, line 11: text: 0 is not text; line 3: text: 1 is not text; line 4: text: 2 is "
            "not text; line 5: text: 3 is not text; line 6: text: 4 is not text; 4 more rows are",
        ),
        ("a.csv", b"id,txt\n1,a\n2,b\n", "rows: has no text; it has id, txt; did you mean txt?"),
        (
            "a.jsonl",
            lines({"text": "a"}, *[{}] * 7).encode(),
            "line 2, line 3, line 4, line 5, line 6 and 2 more: has no text; it has ",
        ),
        ("a.jsonl", lines({"text": "a", "id": 1}, {"text": "b"}).encode(), "line 2: id: 'None'"),
        ("a.jsonl", lines({"text": "a", "id": 2**63}).encode(), "whole number of 64 bits"),
        ("a.jsonl", b'{"text": "a", "id": "\\ud800"}\n', "line 1: id: half a surrogate pair"),
        ("a.csv", b"text,text\na,b\n", "several columns have the name 'text'"),
        ("a.csv", b"text\na,b\n", "line 2 has 2 columns, the first line has 1"),
        ("a.csv", b'text\n"a\n', "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_in_one_message(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as failure:
        Reader(tmp_path / name, ("text",)).check()
    (line,) = str(failure.value).splitlines()
    assert line.startswith(f"file={tmp_path / name}: ")
    assert problem in line


def test_columns_of_a_parquet_file_that_are_not_needed_are_not_read(tmp_path):
    path = tmp_path / "a.parquet"
    after_9999 = pa.array([2**62], pa.timestamp("ms"))  # no datetime of Python
    pq.write_table(pa.table({"text": ["a"], "when": after_9999}), path)
    assert Reader(path, ("text",)).check() == 1
    assert list(Reader(path, ("text",))) == [Row(("a",))]
    with pytest.raises(UserError, match=r"row 0 \(from 0\): has no texts; it has text, when; did"):
        Reader(path, ("texts",)).check()
    with pytest.raises(UserError, match=r"cannot be read \("):
        Reader(path, ("when",)).check()
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(UserError, match="several columns have the name 'text'"):
        Reader(path, ("text",)).check()


def test_a_source_is_whole_and_there_where_nothing_translates(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"premise": "a", "hypothesis": "b"}
    path.write_text(lines({**row, "source_premise": "c"}, row))
    with pytest.raises(UserError, match=r"line 1: has no source_hypothesis$"):
        Reader(path, PAIR).check()
    path.write_text(lines(row))
    with pytest.raises(UserError, match=r"no source_premise and no source_hypothesis \(mt=gold\)"):
        Reader(path, PAIR).check("mt=gold")
    assert Reader(path, PAIR).check() == 1


def test_ids_that_nobody_reads_may_be_of_any_type(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "id": 1}\n{"text": "b", "id": "x"}\n{"text": "c"}\n')
    assert Reader(path, ["text"], ids=False).check() == 3
    with pytest.raises(UserError, match="'x' is of another type than that of the first row"):
        Reader(path, ["text"]).check()


def test_a_table_may_begin_with_empty_lines(tmp_path):
    (tmp_path / "a.csv").write_text("\n\ntext\na b\n")
    reader = Reader(tmp_path / "a.csv", ["text"])
    assert (reader.check(), [row.texts for row in reader]) == (1, [("a b",)])
