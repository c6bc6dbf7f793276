"""The whole way through on a debug-sized world: results, reuse, resume, determinism, kills, damaged
files, loggers.
"""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import processes
import pyarrow.parquet as pq
import pytest
from page import PAGES
from runs import command, launch, result, with_finished

import flare_exp
import flare_exp.cli.main
from flare_exp.errors import UserError
from flare_exp.models import backbones
from flare_exp.tasks import metrics

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pipeline")]  # one worker: they share runs


@pytest.fixture(scope="module")
def flare_run(cache_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "flare"
    done = launch(cache_dir, out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_run_folder_holds_everything(flare_run, cache_dir):
    out, done = flare_run
    measured = result(out)
    assert {
        k: measured[k] for k in ("task", "lang", "model", "method", "fusion", "mt", "seed")
    } == {
        "task": "toy_sentiment",
        "lang": "far",
        "model": "tiny",
        "method": "flare",
        "fusion": "add_relu",
        "mt": "toy",
        "seed": 0,
    }
    for block in ("test", "english", "zero_shot"):
        assert set(measured[block]) == {"accuracy", "macro_f1"}
        assert all(0 <= v <= 1 for v in measured[block].values())
    assert set(measured["seconds"]) == {
        "backbone",
        "finetune",
        "translate",
        "transfer",
        "test",
        "total",
    }
    for name in (
        "config.yaml",
        "provenance.json",
        "flare_exp.log",
        "adapter/adapter_model.safetensors",
        "english/adapter_config.json",
        "curves/transfer.csv",
        "curves.png",
        "README.md",
    ):
        assert (out / name).exists(), name
    assert json.loads((out / "adapter/adapter_config.json").read_text())["peft_type"] == "FLARE"
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["parameters"]["trainable"] < provenance["parameters"]["total"]
    assert provenance["data"]["far/test"]["examples"] == 64
    assert provenance["packages"]["torch"]
    manifests = [
        json.loads(path.read_text())["key"]["code"]
        for path in cache_dir.glob("transfer/*/manifest.json")
    ]
    assert provenance["artefacts"]["transfer"]["code"] in manifests
    assert provenance["peak_memory_bytes"] > 10**8
    assert "zero-shot" in done.stdout
    assert "flare (add_relu)" in done.stdout
    assert "Traceback" not in done.stderr


def test_predictions_are_complete_and_give_the_metrics(flare_run):
    out, _ = flare_run
    table = pq.read_table(out / "predictions.parquet").to_pylist()
    assert [r["id"] for r in table] == [f"toy_sentiment/far/test/{i}" for i in range(64)]
    assert set(table[0]) == {"id", "gold", "prediction", "probabilities", "target", "source"}
    labels = ["negative", "neutral", "positive"]
    gold, guess = ([labels.index(r[k]) for r in table] for k in ("gold", "prediction"))
    assert result(out)["test"]["accuracy"] == pytest.approx(
        sum(a == b for a, b in zip(gold, guess, strict=True)) / 64
    )
    # macro F1, written out
    f1 = []
    for c in range(3):
        hits = sum(a == b == c for a, b in zip(gold, guess, strict=True))
        f1.append(2 * hits / max(1, gold.count(c) + guess.count(c)))
    assert result(out)["test"]["macro_f1"] == pytest.approx(sum(f1) / 3, abs=1e-6)
    assert (
        metrics.classification([r["prediction"] for r in table], [r["gold"] for r in table], labels)
        == result(out)["test"]
    )


def test_a_run_folders_models_load_with_peft_and_repeat_the_predictions(flare_run, cache_dir):
    import torch
    from peft import PeftModel

    from flare_exp.flare import peft_method
    from flare_exp.flare.source_encoders import BackboneSourceEncoder
    from flare_exp.models import backbones

    assert peft_method.FlarePeftType.FLARE  # importing it registers the method with peft
    out, _ = flare_run
    backbone = json.loads((out / "provenance.json").read_text())["artefacts"]["backbone"]["digest"]
    checkpoint = str(cache_dir / "backbone" / backbone)
    tokenizer = backbones.load_tokenizer(checkpoint)
    model = backbones.load(checkpoint, "label", num_labels=3).model
    model = PeftModel.from_pretrained(model, str(out / "english")).merge_and_unload()
    model = PeftModel.from_pretrained(model, str(out / "adapter")).eval()
    table = pq.read_table(out / "predictions.parquet").to_pylist()
    BackboneSourceEncoder(model).encode(
        dict(tokenizer([r["source"] for r in table], padding=True, return_tensors="pt"))
    )
    with torch.no_grad():
        logits = model(
            **tokenizer([r["target"] for r in table], padding=True, return_tensors="pt")
        ).logits
    labels = ["negative", "neutral", "positive"]
    assert [labels[i] for i in logits.argmax(-1).tolist()] == [r["prediction"] for r in table]


def test_analyse_measures_the_states_of_a_run(flare_run, cache_dir, tmp_path, capsys):
    """Against means of single rows, of models that transformers and peft alone have loaded."""
    import torch
    from peft import PeftModel

    from flare_exp.cli.main import main
    from flare_exp.flare.source_encoders import BackboneSourceEncoder

    out, _ = flare_run
    assert main(["analyse", str(out), "--rows", "5", "--out", str(tmp_path / "layers")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "mean activation of the bottleneck after ReLU, 5 examples" in said
    written = {place.name for place in (tmp_path / "layers").iterdir()}
    figures = {f"{name}.{end}" for name in ("activation", "similarity") for end in ("svg", "png")}
    assert written == figures | {"analysis.json"}
    found = json.loads((tmp_path / "layers" / "analysis.json").read_text())
    assert (found["examples"], found["run"]["method"]) == (5, "flare")

    digest = json.loads((out / "provenance.json").read_text())["artefacts"]["backbone"]["digest"]
    checkpoint = str(cache_dir / "backbone" / digest)
    tokenizer = backbones.load_tokenizer(checkpoint)
    below = [backbones.load(checkpoint, "label", num_labels=3).model for _ in range(2)]
    english, flare = (
        PeftModel.from_pretrained(model, str(out / "english")).merge_and_unload().eval()
        for model in below
    )
    flare = PeftModel.from_pretrained(flare, str(out / "adapter")).eval()
    encoder = BackboneSourceEncoder(flare)
    seen = []
    phi = flare.base_model.model.base_model.encoder.layer[1].attention.self.query.flare_fusion
    phi["default"].register_forward_pre_hook(lambda _, args: seen.append(args))

    def states(model, text):
        output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        return [layer[0].mean(0) for layer in output.hidden_states]

    rows, cosines = pq.read_table(out / "predictions.parquet").to_pylist()[:5], {}
    with torch.no_grad():
        for row in rows:
            encoder.encode(dict(tokenizer(row["source"], return_tensors="pt")))
            pair = {"before": states(english, row["target"]), "after": states(flare, row["target"])}
            for name, layers in pair.items():
                for layer, both in enumerate(
                    zip(layers, states(english, row["source"]), strict=True)
                ):
                    cosines.setdefault((name, layer), []).append(
                        float(torch.cosine_similarity(*both, dim=0))
                    )
    for layer, one in enumerate(found["similarities"]):
        for name in ("before", "after"):
            expected = sum(cosines[name, layer]) / 5
            assert one[name]["mean"] == pytest.approx(expected, abs=1e-5)
    assert len(found["similarities"]) == 3
    sources = torch.cat([args[0][args[2]].relu().flatten() for args in seen])
    targets = torch.cat([args[1].relu().flatten() for args in seen])
    (query,) = [
        one for one in found["activations"] if (one["layer"], one["projection"]) == (2, "query")
    ]
    assert query["source"] == pytest.approx(float(sources.mean()), rel=1e-4)
    assert query["target"] == pytest.approx(float(targets.mean()), rel=1e-4)


def is_repeated(out, place):
    """Return whether `predict` makes the same file again, byte for byte."""
    assert flare_exp.cli.main.main(["predict", f"run={out}", "split=test", f"out={place}"]) == 0
    return place.read_bytes() == (out / "predictions.parquet").read_bytes()


def test_a_run_is_loaded_by_its_folder_and_repeats_its_predictions(flare_run, tmp_path):
    out, _ = flare_run
    assert is_repeated(out, tmp_path / "again.parquet")
    with pytest.raises(UserError, match="no finished run"):
        flare_exp.load(tmp_path)


@pytest.mark.parametrize("method", ["full", "input_fusion"])
def test_a_run_without_fusion_is_loaded_too(method, flare_run, cache_dir, tmp_path):
    assert launch(cache_dir, tmp_path / "out", f"method={method}").returncode == 0
    assert is_repeated(tmp_path / "out", tmp_path / "again.parquet")
    page = (tmp_path / "out" / "README.md").read_text()
    assert ("sources=english_texts" in page) == (method == "input_fusion")


def test_an_ensemble_is_loaded_with_its_members(flare_run, cache_dir, tmp_path):
    done = launch(cache_dir, tmp_path, "method=ensemble")
    assert done.returncode == 0
    assert "weights of the members (validation): lora" in done.stdout
    assert not {"adapter", "model"} & {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "adapter_lora").is_dir()
    page = (tmp_path / "README.md").read_text()
    assert "| `adapter_lora/` | the adapter of lora, in PEFT format |" in page
    assert "run.predict(texts, sources=english_texts)" in page
    assert "adapter_lora/adapter_model.safetensors" in (tmp_path / "checksums.json").read_text()
    assert list(flare_exp.load(tmp_path).predictors) == ["lora", "translate_test"]


def test_the_python_snippets_of_the_pages_run(flare_run, cache_dir):
    out, _ = flare_run
    digest = json.loads((out / "provenance.json").read_text())["artefacts"]["backbone"]["digest"]
    checkpoint = cache_dir / "backbone" / digest
    rows = pq.read_table(out / "predictions.parquet").to_pylist()[:4]
    texts, english_texts = ([row[side] for row in rows] for side in ("target", "source"))
    tokenizer = backbones.load_tokenizer(str(checkpoint))
    batches = {
        name: dict(
            tokenizer(
                given, padding="max_length", max_length=40, truncation=True, return_tensors="pt"
            )
        )
        for name, given in (("english_batch", english_texts), ("target_batch", texts))
    }
    known = {"texts": texts, "english_texts": english_texts, **batches}
    snippets = [
        s for page in PAGES for s in re.findall("```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert len(snippets) >= 2
    for snippet in snippets:
        code = snippet.replace("FacebookAI/xlm-roberta-base", str(checkpoint)).replace(
            "outputs/my_run", str(out)
        )
        exec(compile(code, "snippet", "exec"), known)
    assert known["labels"] == [row["prediction"] for row in rows]
    assert known["logits"].shape == (4, 3)


def test_same_command_returns_the_stored_result_and_another_config_is_refused(flare_run, cache_dir):
    out, _ = flare_run
    before = (out / "metrics.json").read_bytes()
    again = launch(cache_dir, out)
    assert again.returncode == 0
    assert "this run is complete" in again.stdout + again.stderr
    assert (out / "metrics.json").read_bytes() == before
    other = launch(cache_dir, out, "seed=5")
    assert other.returncode == 2
    assert "seed (0 there, 5 here)" in other.stderr


def test_other_methods_reuse_english_and_fusion_is_null(flare_run, cache_dir, tmp_path):
    flare, _ = flare_run
    digests = {
        json.loads((flare / "provenance.json").read_text())["artefacts"]["finetune"]["digest"]
    }
    for method in ("zero_shot", "lora", "translate_test"):
        done = launch(cache_dir, tmp_path / method, f"method={method}")
        assert done.returncode == 0, done.stderr
        measured = result(tmp_path / method)
        assert measured["fusion"] is None
        assert measured["english"] == result(flare)["english"]
        assert measured["zero_shot"] == result(flare)["zero_shot"]
        finetune = json.loads((tmp_path / method / "provenance.json").read_text())["artefacts"][
            "finetune"
        ]
        assert finetune["reused"]
        assert "found in the cache: finetune" in done.stdout
        digests.add(finetune["digest"])
        if method == "zero_shot":
            assert measured["test"] == measured["zero_shot"]
    assert len(digests) == 1


def test_i13_same_seed_same_result_other_seed_other_result(flare_run, cache_dir, tmp_path):
    """From an empty cache, so that everything is computed again."""
    flare, _ = flare_run
    for seed, cache in enumerate(
        (tmp_path / "cache", with_finished("backbone", cache_dir, tmp_path / "other"))
    ):
        assert launch(cache, tmp_path / str(seed), f"seed={seed}").returncode == 0

    def adapter(folder):
        return (folder / "adapter/adapter_model.safetensors").read_bytes()

    assert adapter(tmp_path / "0") == adapter(flare)
    assert result(tmp_path / "0")["test"] == result(flare)["test"]
    assert pq.read_table(tmp_path / "0/predictions.parquet") == pq.read_table(
        flare / "predictions.parquet"
    )
    assert adapter(tmp_path / "1") != adapter(flare)
    # another seed trains another way, in the same world on the same backbone
    backbones = [
        json.loads((tmp_path / s / "provenance.json").read_text())["artefacts"]["backbone"][
            "digest"
        ]
        for s in "01"
    ]
    assert backbones[0] == backbones[1]


def test_ablations_train_another_adapter(flare_run, cache_dir, tmp_path):
    flare, _ = flare_run
    digests = [
        json.loads((flare / "provenance.json").read_text())["artefacts"]["transfer"]["digest"]
    ]
    for name in ("shuffle", "empty"):
        assert launch(cache_dir, tmp_path / name, f"source.{name}=true").returncode == 0
        digests.append(
            json.loads((tmp_path / name / "provenance.json").read_text())["artefacts"]["transfer"][
                "digest"
            ]
        )
        sources = pq.read_table(tmp_path / name / "predictions.parquet")["source"].to_pylist()
        original = pq.read_table(flare / "predictions.parquet")["source"].to_pylist()
        assert (
            sources == [None] * 64
            if name == "empty"
            else (sorted(sources) == sorted(original) and sources != original)
        )
    assert len(set(digests)) == 3


def test_killed_in_every_stage_and_started_again(flare_run, tmp_path):
    """kill -9 while a stage builds: the next start reuses the finished stages, and the last one
    ends with the same result.
    """
    flare, _ = flare_run
    cache, out = tmp_path / "cache", tmp_path / "out"
    finished: dict[Path, int] = {}
    for stage in ("backbone", "finetune", "translation", "transfer", "test"):
        process = processes.Run(command(cache, f"output_dir={out}"))
        deadline = time.monotonic() + 120
        while (
            process.alive(0.002)
            and not list((cache / stage).glob(".*"))
            and time.monotonic() < deadline
        ):
            pass
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"it ended before {stage}"
        assert not (out / "metrics.json").exists()
        finished |= {
            p: p.stat().st_mtime_ns
            for p in cache.glob("*/[!.]*/manifest.json")
            if p not in finished
        }
    assert len({p.parent.parent.name for p in finished}) >= 4
    done = launch(cache, out)
    assert done.returncode == 0, done.stderr
    assert result(out)["test"] == result(flare)["test"]
    assert {p: p.stat().st_mtime_ns for p in finished} == finished, (
        "a finished stage was made again"
    )
    artifacts = json.loads((out / "provenance.json").read_text())["artefacts"]
    reused = {f"{a['kind']}/{a['digest']}" for a in artifacts.values() if a["reused"]}
    before = json.loads((out / "provenance.json").read_text())["translations"].values()
    reused |= {f"translation/{info['of']}" for info in before}  # before errors were made
    assert {f"{p.parent.parent.name}/{p.parent.name}" for p in finished} <= reused
    assert not list(cache.glob("*/.*")), "leftovers of the killed runs are gone"


def test_grid_skips_what_cannot_be_and_goes_on_after_a_failure(cache_dir, tmp_path):
    done = launch(cache_dir, tmp_path, "-m", "method=lora,flare", "fusion=add,mul")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped: method=lora") == 1
    folders = sorted(p.parent.name for p in tmp_path.glob("*/metrics.json"))
    assert folders == ["2", "3"]
    assert [result(tmp_path / f)["fusion"] for f in folders] == ["add", "mul"]
    failing = launch(
        cache_dir, tmp_path / "b", "-m", "method=zero_shot", "task.test_split=test,nothing"
    )
    assert failing.returncode == 1
    assert "1 of 2 jobs of the grid failed" in failing.stderr
    assert f"see {tmp_path / 'b' / '1' / 'flare_exp.log'}" in failing.stderr
    assert (tmp_path / "b" / "0" / "metrics.json").exists()


def test_damaged_checkpoint_and_damaged_artefact(cache_dir, flare_run, tmp_path):
    backbone = json.loads((flare_run[0] / "provenance.json").read_text())["artefacts"]["backbone"][
        "digest"
    ]
    shutil.copytree(cache_dir / "backbone" / backbone, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused = launch(cache_dir, tmp_path / "a", "model=custom", f"model.path={tmp_path / 'model'}")
    assert refused.returncode == 2
    assert "its weights could not be read" in refused.stderr
    assert "Traceback" not in refused.stderr
    # the same damage inside the cache is noticed, named and mended
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    for weights in cache.glob("transfer/*/adapter/adapter_model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:5000])
    mended = launch(cache, tmp_path / "b")
    assert mended.returncode == 0, mended.stderr
    assert "damaged artifact" in mended.stdout + mended.stderr
    assert result(tmp_path / "b")["test"] == result(flare_run[0])["test"]


def test_unknown_family_says_which_row_to_add(cache_dir, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    done = launch(cache_dir, tmp_path / "out", "model=custom", f"model.path={tmp_path / 'model'}")
    assert done.returncode == 2
    assert "'gpt2' is not known here; known: bert, xlm-roberta" in done.stderr
    assert "FAMILIES" in done.stderr


def test_after_full_fine_tuning_the_adapter_is_the_same_whether_english_was_trained_or_found(
    tmp_path,
):
    made = []
    for number in ("trained", "found"):
        out, cache = tmp_path / number, tmp_path / "cache"
        done = launch(cache, out, "finetune.tuning=full", "method=lora")
        assert done.returncode == 0, done.stderr
        artifacts = json.loads((out / "provenance.json").read_text())["artefacts"]
        assert artifacts["finetune"]["reused"] == (number == "found")
        assert not artifacts["transfer"]["reused"]
        made.append((out / "adapter/adapter_model.safetensors").read_bytes())
        assert is_repeated(out, out.with_name(f"{out.name}_again.parquet"))
        for kind in ("transfer", "test"):  # all but English and its predecessors is made again
            shutil.rmtree(cache / kind)
    assert made[0] == made[1]
