"""A run folder whose files are damaged: noticed, named, and made again."""

import json
import os
import shutil

import pyarrow.parquet as pq
import pytest
from small_checkpoints import tiny_checkpoint

import flare_exp
from flare_exp.cli.main import main
from flare_exp.errors import UserError
from flare_exp.experiment import checksums, run_state
from flare_exp.experiment.checksums import CHECKSUMS, damage, seal, seal_of
from flare_exp.report import runs as report


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    """A finished run folder of small files."""
    for name in (
        "adapter/adapter_model.safetensors",
        "curves/transfer.csv",
        *checksums.FILES,
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}))
    (tmp_path / CHECKSUMS).write_text(json.dumps(seal(tmp_path)))
    return tmp_path


def test_every_result_is_covered_and_what_is_for_people_may_be_edited(folder):
    assert damage(folder) == []
    (folder / "README.md").write_text("edited")
    assert damage(folder) == []
    for name in ("adapter/adapter_model.safetensors", "curves/transfer.csv", *checksums.FILES):
        before = (folder / name).read_bytes()
        flip(folder / name)
        assert damage(folder) == damage(folder, trusted=0) == [f"{name} is not what was written"]
        assert damage(folder, only=["other"]) == []
        (folder / name).write_bytes(before[:5])
        assert damage(folder) == [f"{name} has 5 bytes instead of {len(before)}"]
        (folder / name).unlink()
        assert damage(folder) == [f"{name} is missing"]
        (folder / name).write_bytes(before)
        assert damage(folder) == []  # the time alone says nothing


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"metrics.json": 1}', '{"metrics.json": {"sha256": "x"}}', "\x00"]
)
def test_checksums_that_are_damaged_themselves(folder, content):
    (folder / CHECKSUMS).write_text(content)
    assert damage(folder) == [f"{CHECKSUMS} is unreadable"]


def test_a_large_file_is_read_again_only_when_it_was_touched(folder):
    path, size = folder / "adapter/adapter_model.safetensors", 0
    found = path.stat()
    size = found.st_size
    flip(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert damage(folder, trusted=size) == []
    assert damage(folder, trusted=size + 1) == [
        "adapter/adapter_model.safetensors is not what was written"
    ]
    os.utime(path, ns=(1, 1))
    assert damage(folder, trusted=size) == [
        "adapter/adapter_model.safetensors is not what was written"
    ]
    assert set(seal_of(path)) == {"sha256", "bytes", "mtime_ns"}


def test_a_folder_without_checksums_must_at_least_be_readable(folder):
    (folder / CHECKSUMS).unlink()
    assert damage(folder) == []
    (folder / "metrics.json").write_text('{"task": "toy')
    (folder / "provenance.json").unlink()
    assert damage(folder) == [
        "metrics.json is missing or unreadable",
        "provenance.json is missing or unreadable",
    ]
    assert run_state.read(folder).state == "failed"
    with pytest.raises(ValueError, match=r"damaged: metrics\.json is missing or unreadable"):
        report.read(folder)


@pytest.mark.slow
def test_a_damaged_run_is_made_again_by_the_same_command_and_never_shown(tmp_path, capsys):
    out = tmp_path / "out"
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    words = [
        "model=custom",
        f"model.path={checkpoint}",
        "task.limit=30",
        "trainer=cpu",
        "trainer.enable_progress_bar=false",
        "finetune.epochs=1",
        "transfer.epochs=1",
        "method=lora",
        f"cache_dir={tmp_path / 'cache'}",
        f"output_dir={out}",
    ]
    assert main(words) == 0
    assert set(json.loads((out / CHECKSUMS).read_text())) == {
        p.relative_to(out).as_posix()
        for p in out.rglob("*")
        if p.is_file()
        and p.name not in ("README.md", "curves.png", "flare_exp.log", "states.jsonl", CHECKSUMS)
        and ".hydra" not in p.parts
    }
    whole = {
        name: (out / name).read_bytes()
        for name in ("adapter/adapter_model.safetensors", "predictions.parquet")
    }
    measured = json.loads((out / "metrics.json").read_text())
    capsys.readouterr()

    def truncate():
        (out / "metrics.json").write_text((out / "metrics.json").read_text()[:40])

    def spoil():
        flip(out / "adapter/adapter_model.safetensors")
        flip(out / "predictions.parquet")
        (out / "provenance.json").unlink()

    spoils = {
        truncate: ["metrics.json has 40 bytes instead of"],
        spoil: [
            "provenance.json is missing",
            "predictions.parquet is not",
            "adapter/adapter_model.safetensors is not",
        ],
    }
    for make, named in spoils.items():
        make()
        assert run_state.read(out).state == "failed"
        assert named[0] in run_state.read(out).reason
        with pytest.raises(
            UserError, match=f"is damaged: {named[0]}.*; the run's own command makes it again"
        ):
            flare_exp.load(out)
        assert main(words) == 0
        said = "".join(capsys.readouterr())
        assert all(name in said for name in [f"output_dir={out} is damaged", *named])
        assert "Traceback" not in said
        again = json.loads((out / "metrics.json").read_text())
        assert {k: v for k, v in again.items() if k != "seconds"} == {
            k: v for k, v in measured.items() if k != "seconds"
        }
        assert {name: (out / name).read_bytes() for name in whole} == whole
        assert damage(out) == []
        assert run_state.read(out).state == "done"
    assert pq.read_table(out / "predictions.parquet").num_rows == 30
    assert not list((tmp_path / "cache").glob("*/.*"))
    # what cannot be made again, since it says which run this is
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1", 1))
    assert main(words) == 2
    assert (
        "its config.yaml is not what was written, so it cannot be told which run it holds"
        in capsys.readouterr().err
    )
    shutil.rmtree(out)
