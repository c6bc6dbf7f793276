"""Runs with a tiny NLLB that is trained here: FLARE MT, cached sources, kills, two processes, full
disks.
"""

import json
import signal

import processes
import pyarrow.parquet as pq
import pytest
from runs import command, launch, result, with_finished
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("mt_pipeline"),
]  # one worker: they share a run

# a translator that has seen little: its words are wrong, its form is real
SMALL = [
    "mt=toy_nllb",
    "mt.pretrain.steps=30",
    "mt.pretrain.pairs=300",
    "mt.pretrain.hidden_size=48",
    "mt.max_length=32",
    "mt.shard=16",
]


def provenance(out):
    return json.loads((out / "provenance.json").read_text())


def translated(cache):
    """Every finished translation's parquet, by digest."""
    return {
        p.parent.name: p.read_bytes()
        for p in cache.glob("translation/*/translations.parquet")
        if p.parent.name[0] != "."
    }


@pytest.fixture(scope="module")
def mt_run(cache_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "flare_mt"
    done = launch(cache_dir, out, *SMALL, "method=flare_mt")
    assert done.returncode == 0, done.stderr
    return out, done


def test_flare_mt_leaves_everything_and_asks_for_no_test_translation(mt_run):
    out, done = mt_run
    measured, facts = result(out), provenance(out)
    assert (measured["method"], measured["fusion"], measured["mt"]) == (
        "flare_mt",
        "add_relu",
        "toy_nllb",
    )
    assert list(facts["translations"]) == [
        f"translation of toy_sentiment/en/{role} into far" for role in ("train", "validation")
    ]
    weights = load_file(out / "adapter/adapter_model.safetensors")
    (name,) = (k for k in weights if k.endswith("flare_source.weight"))
    assert weights[name].shape == (32, 48), (
        "from the width of the translator to that of the backbone"
    )
    rows = pq.read_table(out / "predictions.parquet").to_pylist()
    assert all(row["source"] == row["target"] for row in rows), (
        "the encoder reads the target text itself"
    )
    for info in facts["translations"].values():
        assert info["by"] == "machine"
        assert 0 <= info["chrf++"] < 100
        assert set(info) >= {"truncated", "empty", "repetitive", "copy", "bleu", "chrf++_signature"}
    assert "source texts" in done.stdout + done.stderr
    assert "chrF++" in done.stdout


@pytest.mark.parametrize("method", ["flare_mt", "flare"])
def test_i11_source_cache_on_and_off_train_the_same_adapter(mt_run, cache_dir, tmp_path, method):
    found = {}
    for where in ("off", "memory", "disk"):
        # a cache of its own for what is trained, so that it is trained again
        cache = tmp_path / where
        for kind in ("backbone", "mt", "translation", "translation_shard", "finetune"):
            with_finished(kind, cache_dir, cache)
        done = launch(
            cache, tmp_path / f"{where}-out", *SMALL, f"method={method}", f"source.cache={where}"
        )
        assert done.returncode == 0, done.stderr
        assert ("source texts" in done.stdout + done.stderr) == (where != "off")
        found[where] = (
            load_file(tmp_path / f"{where}-out" / "adapter/adapter_model.safetensors"),
            result(tmp_path / f"{where}-out"),
        )
        assert bool(list((tmp_path / where).glob("states/*/states.bin"))) == (where == "disk")
    for weights, measured in found.values():
        assert measured["test"] == found["off"][1]["test"]
        for name, tensor in weights.items():
            assert (tensor - found["off"][0][name]).abs().max() < 1e-3, name


def test_killed_while_translating_and_started_again_gives_the_same_bytes(
    mt_run, cache_dir, tmp_path
):
    """kill -9 after some shards; what was finished is not made again."""
    cache, again = tmp_path / "cache", tmp_path / "out"
    for kind in ("backbone", "mt"):
        with_finished(kind, cache_dir, cache)
    for shards in (1, 3, 5):
        process = processes.Run(command(cache, f"output_dir={again}", *SMALL, "method=lora"))
        while (
            process.alive(0.002)
            and len(list(cache.glob("translation_shard/*/manifest.json"))) < shards
        ):
            pass
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (again / "metrics.json").exists()
    made = {
        p: p.stat().st_mtime_ns
        for p in cache.glob("translation_shard/*/texts.parquet")
        if p.parent.name[0] != "."
    }
    assert made
    done = launch(cache, again, *SMALL, "method=lora")
    assert done.returncode == 0, done.stderr
    assert all(p.stat().st_mtime_ns == when for p, when in made.items()), (
        "a finished shard was made again"
    )
    whole, parts = translated(cache_dir), translated(cache)
    assert parts
    assert all(whole[digest] == content for digest, content in parts.items())


def test_two_processes_translate_once(mt_run, cache_dir, tmp_path):
    cache = with_finished("backbone", cache_dir, tmp_path / "cache")
    runs = [
        processes.Run(
            command(cache, f"output_dir={tmp_path / str(i)}", *SMALL, "method=lora"), merged=True
        )
        for i in range(2)
    ]
    texts = [process.communicate()[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], texts
    assert result(tmp_path / "0")["test"] == result(tmp_path / "1")["test"]
    shared = [provenance(tmp_path / str(i))["artefacts"] for i in range(2)]
    for name in (n for n in shared[0] if n.startswith("translation")):
        assert sorted(artifacts[name]["reused"] for artifacts in shared) == [False, True], name
    assert any("waiting for" in text for text in texts)


def test_a_disk_that_fills_up_is_said_and_nothing_half_written_is_used(mt_run, cache_dir, tmp_path):
    """A limit on file sizes stands in for the full disk."""
    import shutil

    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache, ignore=shutil.ignore_patterns("translation*", "transfer"))
    words = command(cache, f"output_dir={tmp_path / 'out'}", *SMALL, "method=lora")
    # the run folder's configuration, or a translation, is too large
    for kilobytes, said in (
        (2, "no more can be written to"),
        (4, "cannot write the artifact translation"),
    ):
        process = processes.Run(words, largest_file=1024 * kilobytes)
        _, errors = process.communicate()
        assert process.returncode == 2
        assert said in errors
        assert "Traceback" not in errors
        assert not translated(cache)
    done = launch(cache, tmp_path / "out", *SMALL, "method=lora")
    assert done.returncode == 0, done.stderr
    assert all(
        translated(cache_dir)[digest] == content for digest, content in translated(cache).items()
    )


def test_an_mt_checkpoint_on_disk_translates_questions_and_answers(mt_run, cache_dir, tmp_path):
    """mt=custom, with marks; answers that the tiny translator loses leave the training set."""
    (checkpoint,) = (p for p in (cache_dir / "mt").iterdir() if p.is_dir())
    done = launch(
        cache_dir,
        tmp_path,
        "mt=custom",
        f"mt.path={checkpoint}",
        "task=toy_qa",
        "mt.max_length=32",
        "method=lora",
    )
    if done.returncode == 2:
        assert "no training example kept its answer in translation" in done.stderr
    else:
        assert "answers carried over" in done.stdout


def test_ctranslate2_converts_once_and_translates(mt_run, cache_dir, tmp_path):
    pytest.importorskip("ctranslate2")
    options = ["method=lora", "mt.backend=ctranslate2", "mt.quantization=float32"]
    for number in (1, 2):
        done = launch(cache_dir, tmp_path / str(number), *SMALL, *options, f"seed={number}")
        assert done.returncode == 0, done.stderr
    assert len([p for p in (cache_dir / "ctranslate2").iterdir() if p.is_dir()]) == 1
    infos = list(provenance(tmp_path / "1")["translations"].values())
    assert {(info["backend"], info["quantization"]) for info in infos} == {
        ("ctranslate2", "float32")
    }
    # the same words as transformers, greedily and in 32 bits
    whole = list(provenance(mt_run[0])["translations"].values())
    assert [info["chrf++"] for info in infos] == pytest.approx(
        [info["chrf++"] for info in whole], abs=0.5
    )
