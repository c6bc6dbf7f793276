"""Files of results: their formats, and what a killed process has left of them."""

import csv
import json

import pyarrow.parquet as pq
import pytest

from flare_exp.errors import UserError
from flare_exp.serving.output import Output

ROWS = [
    {"id": i, "text": f'"quoted", {i}\nÜ', "prediction": "yes", "probabilities": {"yes": 0.1 + i}}
    for i in range(10)
]
COLUMNS = {"id": int, "text": str, "prediction": str, "probability_yes": float}


def written(path, rows=ROWS, columns=COLUMNS):
    with Output(path, "a", 4) as output:
        output.append(rows[output.done :])
        output.finish(columns=columns)
    return path


def test_the_formats_hold_the_same_rows(tmp_path):
    flat = [
        {"id": r["id"], "text": r["text"], "prediction": "yes", "probability_yes": 0.1 + r["id"]}
        for r in ROWS
    ]
    lines = written(tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert pq.read_table(written(tmp_path / "a.parquet")).to_pylist() == flat
    for ending, delimiter in ((".csv", ","), (".tsv", "\t")):
        with written(tmp_path / f"a{ending}").open(newline="") as file:
            found = list(csv.DictReader(file, delimiter=delimiter))
        assert found == [{name: str(value) for name, value in row.items()} for row in flat]
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".parquet", ".csv", ".tsv"}


def test_a_file_that_was_cut_anywhere_goes_on_after_its_last_whole_batch(tmp_path):
    whole = written(tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "a.jsonl"
    with Output(path, "a", 4) as output:
        output.append(ROWS)
    part = (tmp_path / "a.jsonl.part").read_bytes()
    for size in range(0, len(part), 37):
        (tmp_path / "a.jsonl.part").write_bytes(part[:size])
        with Output(path, "a", 4) as output:
            lines = part[:size].count(b"\n") - 1
            assert output.done == max(0, lines // 4 * 4)
            output.append(ROWS[output.done :])
            output.finish()
        assert path.read_bytes() == whole


def test_what_belongs_to_something_else_is_kept(tmp_path):
    path = tmp_path / "a.csv"
    with Output(path, "a", 4) as output:
        output.append(ROWS)
    before = (tmp_path / "a.csv.part").read_bytes()
    with pytest.raises(UserError, match=r"a\.csv\.part beside it is the beginning of another"):
        Output(path, "b", 4).__enter__()
    assert not (tmp_path / "a.csv.part.lock").exists()
    assert (tmp_path / "a.csv.part").read_bytes() == before
    with (
        Output(path, "a", 4),
        pytest.raises(UserError, match="another process is writing it"),
    ):
        Output(path, "a", 4).__enter__()
