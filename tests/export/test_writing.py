"""Exported folders of real runs: loaded by others, they give the same logits."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers as hf
from run_folders import finished, predicted, traced
from runs import launch
from safetensors.torch import load_file
from small_checkpoints import COMMIT, put, tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers

import flare_exp
from flare_exp.cli.main import main
from flare_exp.errors import UserError
from flare_exp.experiment.loading import stored_config
from flare_exp.export import writing
from flare_exp.export.loading_code import code_of_lora
from flare_exp.export.portable import Origin
from flare_exp.export.writing import check_has_model, compared, unexported
from flare_exp.report.runs import read as read_run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pipeline")]  # they share its cache

TEXTS = ["ba do kemi", "kemi", "do do ba re lu"]
SOURCES = ["a good film", "bad", "the film is good"]
# of every folder the logits; those of plain LoRAs before flare_exp is imported
OTHERS = """
import re, sys, torch
from safetensors.torch import save_file
texts, sources = {texts}, {sources}
found = {{}}
def known_after(name):
    code = re.search("```python\\n(.*?)```", open(f"{{name}}/README.md").read(), re.DOTALL)[1]
    names = {{}}
    exec(code, names)
    return names
for name in ("plain", "plain_full", "plain_hub"):
    known = known_after(name)
    with torch.no_grad():
        batch = known["tokenizer"](texts, padding=True, return_tensors="pt")
        found[name] = known["model"](**batch).logits
assert "flare_exp" not in sys.modules
for name in ("flare", "hub"):
    run = known_after(name)["run"]
    if run.source:
        run.source.encode(dict(run.tokenizer(sources, padding=True, return_tensors="pt")))
    with torch.no_grad():
        batch = run.tokenizer(texts, padding=True, return_tensors="pt")
        found[name] = run.model(**batch).logits
save_file(found, "logits.safetensors")
"""


def logits(folder: Path) -> torch.Tensor:
    """The logits of a run's own model."""
    run = flare_exp.load(folder)
    if run.source:
        run.source.encode(dict(run.tokenizer(SOURCES, padding=True, return_tensors="pt")))
    with torch.no_grad():
        return run.model(**run.tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def export(*words) -> int:
    return main(["export", *map(str, words)])


@pytest.fixture(scope="module")
def runs(cache_dir, tmp_path_factory) -> dict[str, Path]:
    """FLARE with two seeds; LoRA on English LoRA, on a full English model, on a folder's model."""
    root = tmp_path_factory.mktemp("runs")
    checkpoint = tiny_checkpoint(root / "checkpoint")
    custom = ("method=lora", "model=custom", f"model.path={checkpoint}")
    for name, words in (
        ("grid", ("-m", "seed=0,1")),
        ("lora", ("method=lora",)),
        ("full", ("method=lora", "finetune.tuning=full")),
        ("custom", custom),
    ):
        done = launch(cache_dir, root / name, *words)
        assert done.returncode == 0, done.stderr
    return {"root": root, **{p.name: p for p in root.iterdir()}, "flare": root / "grid" / "0"}


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory) -> Path:
    """The folder of all exports."""
    root = tmp_path_factory.mktemp("exports")
    base = f"base=me/tiny@{COMMIT}"
    both = f"run=[{runs['flare']},{runs['grid'] / '1'}]"
    assert export(both, f"to={root / 'flare'}", "license=apache-2.0") == 0
    for name, run, *more in (
        ("hub", "custom", base),
        ("plain", "lora", "format=lora"),
        ("plain_full", "full", "format=lora"),
        ("plain_hub", "custom", "format=lora", base),
    ):
        assert export(f"run={runs[run]}", f"to={root / name}", *more) == 0
    return root


def test_others_load_an_export_and_get_the_same_logits(runs, exported, cache_dir, tmp_path):
    """By the code of the model cards, in a process that knows the hub's name of the checkpoint."""
    put(tmp_path / "hub", "me/tiny", runs["checkpoint"])
    script = OTHERS.format(texts=TEXTS, sources=SOURCES)
    places = {"HF_HUB_CACHE": str(tmp_path / "hub"), "FLARE_EXP_CACHE": str(cache_dir)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=exported,
        capture_output=True,
        text=True,
        env={**os.environ, **places, "PYTHONPATH": str(Path(flare_exp.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert "LOAD REPORT" not in done.stdout + done.stderr
    found = load_file(exported / "logits.safetensors")
    for name, run in (
        ("flare", "flare"),
        ("hub", "custom"),
        ("plain", "lora"),
        ("plain_full", "full"),
        ("plain_hub", "custom"),
    ):
        torch.testing.assert_close(found[name], logits(runs[run]), rtol=0, atol=1e-5)
    (exported / "logits.safetensors").unlink()


def test_no_file_has_a_path_of_this_machine(runs, exported, cache_dir):
    paths = [runs["root"], cache_dir, exported, Path.home(), Path(sys.prefix)]
    for file in exported.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [path for path in paths if f"{path}/".encode() in content], file


def test_a_plain_lora_has_both_updates_and_the_base_where_nobody_has_it(exported):
    def of(name):
        config = json.loads((exported / name / "adapter_config.json").read_text())
        keys = ("peft_type", "r", "base_model_name_or_path", "revision")
        return [config[key] for key in keys], (exported / name / "base").is_dir()

    assert of("plain") == (["LORA", 16, None, None], True)
    assert of("plain_full") == (["LORA", 8, None, None], True)
    assert of("plain_hub") == (["LORA", 16, "me/tiny", COMMIT], False)


def reading(form, **options):
    """What the code for plain LoRAs needs of reading.json."""
    weights = {"quantize": None, "dtype": "float32"}
    return {
        **{"prompt": None, "fields": ["text"], "order": ["text"], "max_length": 8, "labels": []},
        **{"task_type": form, "weights": weights, "attention": "sdpa", "doc_stride": None},
        **{"padding_side": "left", "truncation_side": "right", **options},
    }


def read_by(lines, **known):
    """Run the lines that follow loading; return the names that are known then."""
    first = next(i for i, line in enumerate(lines) if line.startswith("inputs = "))
    exec("\n".join(["import torch", *lines[first:]]), known)
    return known


ORIGIN = Origin("tiny", "me/base", COMMIT)


def words(*more):
    known = {word: i for i, word in enumerate(["?", *more])}
    made = Tokenizer(models.WordLevel(known, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


class Answering:
    """A model on a device of its own; or it finds an answer by some logits."""

    def __init__(self, logits=None):
        self.device, self.logits = torch.device("meta" if logits is None else "cpu"), logits

    def __call__(self, **inputs):
        return SimpleNamespace(start_logits=self.logits, end_logits=self.logits)

    def generate(self, input_ids, attention_mask, **options):
        assert input_ids.device == self.device
        return torch.zeros(input_ids.shape, dtype=torch.long)


def test_a_prompt_is_read_by_a_tokenizer_without_a_padding_token():
    """Those of Llama on the hub have none. The inputs go to the model's device."""
    lines = code_of_lora(reading("prompt", prompt="{text}:"), "CAUSAL_LM", ORIGIN)
    found = read_by(lines, tokenizer=words("a"), model=Answering())
    assert found["inputs"].input_ids.shape == (1, 2)


def test_the_end_of_a_prompt_is_never_cut_off():
    lines = code_of_lora(
        reading("prompt", prompt="{text} a a ?", max_length=2), "CAUSAL_LM", ORIGIN
    )
    found = read_by(lines, tokenizer=words("a"), model=Answering())
    assert found["inputs"].input_ids.shape == (1, 5)
    assert "# the prompt has to fit in 2 tokens: cut the text in it" in lines


def test_an_answer_is_found_in_the_context_alone(capsys):
    fields = ["question", "context"]
    own = reading("span", fields=fields, order=fields, doc_stride=4, padding_side="right")
    lines = code_of_lora(own, "QUESTION_ANS", ORIGIN)
    tokenizer = words("a", "question", "context")
    tokenizer.pad_token = "?"
    scores = torch.tensor([[9.0, 8.0, 1.0, 2.0]])  # a question a context
    read_by(lines, tokenizer=tokenizer, model=Answering(scores))
    assert capsys.readouterr().out == "context\n"
    assert any("the run reads a long one in several windows" in line for line in lines)


def test_the_code_for_4_bits_leaves_the_head_as_it_is():
    weights = {"quantize": "nf4", "dtype": "bfloat16", "double_quant": True}
    weights |= {"compute_dtype": "bfloat16", "unquantized": ["classifier", "lm_head"]}
    code = code_of_lora(reading("label", weights=weights), "SEQ_CLS", ORIGIN)
    assert "llm_int8_skip_modules=['classifier', 'lm_head'])" in "\n".join(code)


def test_a_repository_with_other_weights_is_refused(tmp_path, monkeypatch):
    """Of the translation model, too."""
    part, given = SimpleNamespace(path=tmp_path), replace(ORIGIN, given=True)
    monkeypatch.setattr(writing, "other_weights", lambda *_: ["model.safetensors"])
    with pytest.raises(UserError, match=r"mt_base=me/base: model\.safetensors of .* is not in it"):
        compared("mt_base", part, given)
    assert compared("mt_base", part, ORIGIN) == []
    monkeypatch.setattr(writing, "other_weights", lambda *_: None)
    assert "mt_base=me/base: not compared" in compared("mt_base", part, given)[0]


def test_the_model_card_is_what_the_hub_reads(runs, exported):
    card = huggingface_hub.ModelCard.load(exported / "flare" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "flare_exp")
    assert card.data.language == ["en"]
    scores = json.loads((runs["flare"] / "metrics.json").read_text())["test"]
    read = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert read == pytest.approx(scores, abs=1e-6)
    facts = json.loads((runs["flare"] / "provenance.json").read_text())
    for split in facts["data"].values():
        assert split["fingerprint"] in card.text
    assert "| 0 (this model) |" in card.text
    assert re.search(r"\| 1 \|.*\n\| mean ± standard deviation \|", card.text)
    other = huggingface_hub.ModelCard.load(exported / "plain_hub" / "README.md").data
    assert (other.base_model, other.library_name, other.license) == ("me/tiny", "peft", "unknown")


@pytest.mark.parametrize(
    ("run", "words", "problem"),
    [
        ("flare", ("format=lora",), "this adapter has fusion add_relu, so its update depends on"),
        ("custom", (), "give base=<hub id> or base=<hub id>@<commit>"),
        ("custom", ("base=me/none",), "base=me/none: the commit of main is not known"),
        ("root", (), "no result"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    run, words, problem, runs, tmp_path, capsys
):
    assert export(f"run={runs[run]}", f"to={tmp_path / 'out'}", *words) == 2
    assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_runs_of_two_cells_and_a_folder_in_use_are_refused(runs, exported, tmp_path, capsys):
    assert export(f"run={runs['flare']},{runs['lora']}", f"to={tmp_path / 'out'}") == 2
    assert "these runs differ in more than the seed" in capsys.readouterr().err
    assert export(f"run={runs['lora']}", f"to={exported / 'flare'}") == 2
    assert "there is something already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "more", "problem"),
    [
        (["method=ensemble", "method.of=[lora,flare]"], (), "is an ensemble of lora, flare"),
        (["method=input_fusion"], ("format=lora",), "reads a text and its translation as one"),
        (["method=full"], ("format=lora",), "method=full has trained all weights"),
    ],
)
def test_methods_without_such_an_adapter_are_refused(words, more, problem, tmp_path, capsys):
    run = traced(predicted(finished(tmp_path / "run", *words), [], []))
    assert export(f"run={run}", f"to={tmp_path / 'out'}", *more) == 2
    assert problem in capsys.readouterr().err


def test_a_run_on_data_of_ones_own_is_exported_as_plain_lora_alone(runs):
    run = read_run(runs["lora"])
    own = replace(run, options={**run.options, "task.spec": "data.yaml"})
    check_has_model(own, "lora")
    with pytest.raises(UserError, match="only format=lora can be exported of task=custom"):
        check_has_model(own, "flare")


def test_a_run_of_several_languages_is_not_exported(runs):
    run = read_run(runs["lora"])
    assert list(unexported(run)) == []
    several = replace(run, metrics={**run.metrics, "languages": {"near": {}, "far": {}}})
    assert "several languages (near, far)" in next(unexported(several))
    systems = replace(run, options={**run.options, "source.systems": ["gold"]})
    assert "give a run with source.systems=[]" in next(unexported(systems))


def test_an_export_reads_sources_in_two_languages_twice_as_its_run_did(finished_run, tmp_path):
    folder = finished_run("source.langs=[en,near]", "predict.sources=[given,none]")
    assert export(f"run={folder}", f"to={tmp_path / 'shared'}", f"base=me/tiny@{COMMIT}") == 0
    page = (tmp_path / "shared" / "README.md").read_text()
    assert "its translations are fused (en, near); read twice, with the source and without" in page
    assert """sources=[('a text, en', 'a text, near')]))  # sources: en, near of each""" in page
    place = f"model.path={stored_config(folder).model.path}"
    own, shared = (flare_exp.load(f, place) for f in (folder, tmp_path / "shared"))
    both = [list(run.stream(["a"], [("b", "c")])) for run in (own, shared)]
    assert both[0] == both[1]


class Hub:
    """What is asked of huggingface_hub.HfApi."""

    def __init__(self, problem=None):
        self.asked, self.problem = [], problem

    def create_repo(self, repository, **options):
        self.asked.append(("create_repo", repository, options))

    def upload_folder(self, **options):
        if self.problem:
            raise self.problem
        self.asked.append(("upload_folder", options["repo_id"], options["folder_path"]))
        return huggingface_hub.CommitInfo(
            commit_url="https://huggingface.co/me/it/commit/1", commit_message="",
            commit_description="", oid="1",
        )  # fmt: skip


def test_an_upload_is_shown_before_it_is_sent(exported, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    words = (f"to={exported / 'flare'}", "push=me/it")
    assert export(*words) == 0
    said = capsys.readouterr().out
    for name in ("README.md", "adapter/adapter_model.safetensors", "english/adapter_config.json"):
        assert name in said
    assert "me/it; private" in said
    assert "a dry run: nothing was sent" in said
    assert hub.asked == []
    assert export(*words, "dry_run=false", "private=false") == 0
    assert "sent: https://huggingface.co/me/it/commit/1" in capsys.readouterr().out
    assert hub.asked == [
        ("create_repo", "me/it", {"private": False, "exist_ok": True}),
        ("upload_folder", "me/it", exported / "flare"),
    ]
    hub.problem = OSError("no network")
    assert export(*words, "dry_run=false") == 2
    assert "push=me/it: the upload failed: no network" in capsys.readouterr().err


def test_a_card_that_was_edited_is_looked_at_again(exported, capsys):
    page = exported / "plain" / "README.md"
    before = page.read_text()
    page.write_text(f"{before}\nsee {Path.home()}/notes\n")
    assert export(f"to={exported / 'plain'}", "push=me/it") == 2
    assert f"README.md has the path {Path.home()}" in capsys.readouterr().err
    page.write_text(before)
    assert export(f"to={exported}", "push=me/it") == 2
    assert "there is no exported run in it" in capsys.readouterr().err
