"""Checkpoints are named by hub id and commit, and nothing of one machine is left."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from omegaconf import OmegaConf

from flare_exp.artifacts import file_sha256
from flare_exp.config import validation
from flare_exp.errors import UserError
from flare_exp.experiment.checkpoints import MT
from flare_exp.experiment.translating import TextTranslator, UnknownText, translator_problem
from flare_exp.export import portable
from flare_exp.export.portable import Origin
from flare_exp.translation.machine import MachineTranslator

COMMIT, OTHER = "a" * 40, "b" * 40


def config(*words, **paths):
    (job,), problems = validation.validate(words, multirun=False)
    assert not problems
    cfg = OmegaConf.to_object(job)
    for key, path in paths.items():
        getattr(cfg, key).path = str(path)
    return cfg


def traced(backbone="", translation=None):
    made = {"translation of x": {"checkpoint": translation}} if translation else {}
    return {"artefacts": {"backbone": {"digest": backbone}}, "translations": made}


def test_a_hub_checkpoint_has_the_commit_that_the_run_has_read():
    cfg = config("model=xlmr_base", "task=nusax", "mt=nllb_600m")
    facts = traced(f"{cfg.model.path}@{OTHER}", f"{cfg.mt.path}@{COMMIT}")
    base, translation = portable.origins(cfg, facts, None, None)
    assert base == Origin("xlmr_base", "FacebookAI/xlm-roberta-base", OTHER)
    assert translation == Origin("nllb_600m", cfg.mt.path, COMMIT)
    shared = portable.portable(cfg, base, translation)
    assert (shared.model.revision, shared.mt.revision) == (OTHER, COMMIT)


def test_a_folder_has_to_be_named(tmp_path):
    """The translation model only where it is a part of the model."""
    cfg = config("method=flare_mt", "mt=toy_nllb", model=tmp_path, mt=tmp_path / "mt")
    with pytest.raises(UserError) as found:
        portable.origins(cfg, traced(), None, None)
    assert "give base=<hub id> or base=<hub id>@<commit>; mt_base: the run" in str(found.value)
    given = (f"me/base@{COMMIT}", f"me/mt@{OTHER}")
    base, translation = portable.origins(cfg, traced(), *given)
    assert (base.hub_id, base.commit, base.given) == ("me/base", COMMIT, True)
    assert (translation.hub_id, translation.commit) == ("me/mt", OTHER)
    student = config("method=distil", "method.of=[flare_mt]", "mt=toy_nllb", mt=tmp_path / "mt")
    assert portable.origins(student, traced(), None, None)[1] == Origin("toy_nllb")
    cfg = config("mt=toy_nllb", mt=tmp_path / "mt")
    assert portable.origins(cfg, traced(), None, None) == (Origin("tiny"), Origin("toy_nllb"))


@pytest.mark.parametrize("words", [(), ("model=xlmr_base", "task=nusax")])
def test_a_name_is_refused_where_the_run_read_no_folder(words):
    with pytest.raises(UserError, match=r"base=me/base: the run read \S+, and no folder"):
        portable.origins(config(*words), traced(), "me/base", None)


def test_a_folder_of_another_directory_is_no_hub_id():
    """Nor where it would be left out: the translation model of other methods."""
    cfg = config("mt=toy_nllb", model="my/base", mt="my/mt")
    with pytest.raises(UserError, match=r"^model\.path=my/base: the run read this folder, and it"):
        portable.origins(cfg, traced("0a1b"), None, None)
    cfg = config("mt=toy_nllb", mt="my/mt")
    assert portable.origins(cfg, traced(translation="0a1b"), None, None)[1] == Origin("toy_nllb")
    exported = config("model.revision=" + COMMIT, model="my/base")
    assert portable.origins(exported, traced("0a1b"), None, None)[0].hub_id == "my/base"


def test_a_folder_of_the_hubs_cache_names_itself(tmp_path):
    folder = tmp_path / "models--me--base" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    base, _ = portable.origins(config(model=folder), traced(), None, None)
    assert base == Origin("tiny", "me/base", COMMIT)


def test_the_weights_are_compared_with_those_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def there(sha256):
        files = [SimpleNamespace(lfs=SimpleNamespace(sha256=sha256)), SimpleNamespace(lfs=None)]
        info = SimpleNamespace(siblings=files)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
        return portable.other_weights(tmp_path, Origin("x", "me/base", COMMIT))

    assert there(file_sha256(tmp_path / "model.safetensors")) == []
    assert there("0" * 64) == ["model.safetensors"]
    monkeypatch.undo()  # without network
    assert portable.other_weights(tmp_path, Origin("x", "me/base", COMMIT)) is None


def test_a_portable_configuration_has_no_path_and_no_argument_of_a_program(tmp_path):
    command = f"{tmp_path}/bin/translate --key secret {{from}} {{to}}"
    cfg = config("trainer=ddp_cpu", "logger=wandb")
    cfg.mt.name, cfg.mt.command, cfg.logger.entity = "command", command, "team"
    cfg.task.data_dir = str(tmp_path)
    shared = portable.portable(cfg, Origin("tiny"), Origin("command"))
    text = OmegaConf.to_yaml(OmegaConf.structured(shared))
    assert shared.mt.command == "translate"
    assert not [
        word for word in (str(tmp_path), "secret", "team", str(Path.home())) if word in text
    ]
    assert shared.trainer.devices == 1


def test_a_translation_model_that_is_left_out_translates_no_new_text(tmp_path):
    cfg = config("mt=custom", f"mt.path={tmp_path}", "task=nusax", "task.lang=jav")
    assert translator_problem(cfg) is None
    shared = portable.portable(cfg, Origin("tiny"), Origin("custom"))
    translator = MachineTranslator(SimpleNamespace(), MT(shared, None), None)
    run = SimpleNamespace(cfg=shared, task=None, translator=translator)
    with pytest.raises(UnknownText, match=r"mt=custom: .* folder, .* give it as mt\.path"):
        TextTranslator(run).check(["en"])
    assert translator_problem(config("mt=toy_nllb")) is None


def test_a_path_is_found_but_not_a_word_that_ends_like_one(tmp_path):
    (tmp_path / "a.md").write_text("see owner/home/me2 and x/home/me")
    (tmp_path / "b.json").write_text('{"at": "/home/me/data"}')
    (tmp_path / "tokenizer.json").write_text('{"vocab": {"/home/me": 7}}')
    (line,) = portable.leaks(tmp_path, {"/home/me/", "/"})
    assert line == "b.json has the path /home/me of this machine in it"
    assert list(portable.leaks(tmp_path, {"/"})) == []


def test_the_texts_of_a_student_stay_here(tmp_path):
    texts = tmp_path / "more.jsonl"
    texts.write_text('{"text": "a"}\n')
    cfg = config("method=distil", f"distil.texts={texts}")
    assert portable.portable(cfg, Origin("tiny"), Origin("toy")).distil.texts is None
