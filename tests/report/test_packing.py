"""An archive of runs: the same report, nothing of the machine, nothing of the texts."""

import tarfile

import pyarrow.parquet as pq
import pytest
from run_folders import finished, predicted, traced

from flare_exp.cli.main import main
from flare_exp.experiment.checksums import CHECKSUMS, damage, seal
from flare_exp.report import packing
from flare_exp.tasks import metrics
from flare_exp.utils.files import write_json

LABELS = ("negative", "neutral", "positive")


@pytest.fixture
def grid(tmp_path):
    """LoRA and FLARE one seed, and a run without a result."""
    gold = list(LABELS) * 10
    for method, guess in (("lora", ["neutral"] * 30), ("flare", gold)):
        words = [f"method={method}", f"cache_dir={tmp_path}/grid"]
        folder = tmp_path / "grid" / method
        finished(folder, *words, metrics={"test": metrics.classification(guess, gold, LABELS)})
        traced(
            predicted(folder, gold, guess), command=["x", f"cache_dir={tmp_path}/grid", "seed=0"]
        )
        (folder / "curves").mkdir()
        (folder / "curves" / "transfer.csv").write_text("epoch,validation/macro_f1\n0,0.5\n1,0.6\n")
    (tmp_path / "grid" / "begun").mkdir()
    (tmp_path / "grid" / "begun" / "config.yaml").write_text("seed: 0\n")
    return tmp_path / "grid"


def unpacked(archive, place):
    with tarfile.open(archive) as file:
        file.extractall(place, filter="data")
    return place


def test_the_unpacked_runs_give_the_same_report(grid, tmp_path, capsys):
    archive = tmp_path / "runs.tar.xz"
    assert main(["report", str(grid), "--format", "markdown", "--pack", str(archive)]) == 0
    first = capsys.readouterr()
    assert "2 runs" in first.err
    place = unpacked(archive, tmp_path / "elsewhere")
    assert main(["report", str(place), "--format", "markdown"]) == 0
    again = capsys.readouterr().out
    assert "100.0" in again
    lines = [line for line in first.out.splitlines() if "left out: " not in line]
    assert again.strip() == "\n".join(lines).strip()


def test_it_holds_no_path_of_the_machine_and_no_text(grid, tmp_path):
    place = tmp_path / "elsewhere"
    packing.pack([str(grid)], tmp_path / "runs.tar.xz")
    unpacked(tmp_path / "runs.tar.xz", place)
    assert sorted(p.name for p in place.iterdir()) == ["flare", "lora"]
    for path in (p for p in place.rglob("*") if p.is_file()):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert "\ncache_dir: grid\n" in (place / "flare" / "config.yaml").read_text()
    columns = pq.read_table(place / "flare" / "predictions.parquet").column_names
    assert columns == ["id", "gold", "prediction"]
    assert damage(place / "flare") == []
    assert (place / "flare" / "curves" / "transfer.csv").is_file()


def commanded(folder, command):
    """A run whose texts a program has translated."""
    return traced(finished(folder, "mt=command", f"mt.command={command}"))


def test_arguments_of_a_program_are_left_out(tmp_path):
    commanded(tmp_path / "grid" / "0", "sh -c 'echo key-of-a-service' {from} {to}")
    packing.pack([str(tmp_path / "grid")], tmp_path / "runs.tar.xz")
    place = unpacked(tmp_path / "runs.tar.xz", tmp_path / "elsewhere")
    written = (place / "0" / "config.yaml").read_text()
    assert "command: sh\n" in written
    assert "key-of-a-service" not in written


def test_runs_that_would_be_alike_are_not_packed(tmp_path, capsys):
    for name in "ab":
        commanded(tmp_path / "grid" / name, f"sh -c 'echo {name}' {{from}} {{to}}")
    archive = tmp_path / "runs.tar.xz"
    assert main(["report", str(tmp_path / "grid"), "--pack", str(archive)]) == 2
    assert "differ in a path or in the arguments of a program alone" in capsys.readouterr().err
    assert not archive.exists()


def test_the_same_runs_are_the_same_bytes(grid, tmp_path):
    archives = [tmp_path / f"{name}.tar.xz" for name in "ab"]
    for archive in archives:
        packing.pack([str(grid)], archive)
    assert archives[0].read_bytes() == archives[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("runs.zip", "runs.zip: name a file that ends in .tar.xz"),
        ("nowhere/runs.tar.xz", "there is no folder"),
    ],
)
def test_a_wrong_archive_is_one_message(grid, tmp_path, capsys, name, told):
    assert main(["report", str(grid), "--pack", str(tmp_path / name)]) == 2
    assert told in capsys.readouterr().err


def test_a_damaged_run_is_not_packed(grid, tmp_path, capsys):
    packing.pack([str(grid)], tmp_path / "runs.tar.xz")
    place = unpacked(tmp_path / "runs.tar.xz", tmp_path / "elsewhere")
    path = place / "flare" / "predictions.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"flare: predictions.parquet has \d+ bytes instead of"):
        packing.pack([str(place)], tmp_path / "again.tar.xz")
    assert not (tmp_path / "again.tar.xz").exists()


def test_what_is_not_packed_may_be_missing(grid, tmp_path):
    """As where the weights have been deleted for their size."""
    (grid / "flare" / "adapter").mkdir()
    weights = grid / "flare" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"weights")
    write_json(grid / "flare" / CHECKSUMS, seal(grid / "flare"))
    weights.unlink()
    assert packing.pack([str(grid)], tmp_path / "runs.tar.xz") == 2


def test_relative_paths_are_left_out_and_hub_ids_stay(tmp_path):
    given = {"output_dir": "outputs/acme", "task": {"data_dir": "../acme/data", "spec": None}}
    given["model"] = {"path": "FacebookAI/xlm-roberta-base"}
    given["mt"] = {"path": "./acme/nllb"}
    assert packing._without_paths(given) == {
        "output_dir": "acme",
        "task": {"data_dir": "data", "spec": None},
        "model": {"path": "FacebookAI/xlm-roberta-base"},
        "mt": {"path": "nllb"},
    }
