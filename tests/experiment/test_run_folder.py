"""What a run leaves for people: its page, its picture, and large weights that are linked."""

import json
import os
import re
from contextlib import nullcontext
from types import SimpleNamespace

import processes
import pytest
import run_folders
from omegaconf import OmegaConf
from run_folders import traced
from small_checkpoints import tiny_checkpoint

from flare_exp.artifacts import Artifact
from flare_exp.config import validation
from flare_exp.errors import UserError
from flare_exp.experiment import loading, notes, results, run_state, runs
from flare_exp.experiment.curves import draw_curves
from flare_exp.experiment.overriding import overridden
from flare_exp.experiment.run_page import run_page

MEASURED = {
    "task": "toy_qa",
    "lang": "far",
    "model": "tiny",
    "method": "flare",
    "fusion": "add",
    "mt": "toy",
    "seed": 3,
    "test": {"exact_match": 0.5, "f1": 0.625},
    "english": {"exact_match": 0.9, "f1": 0.95},
    "zero_shot": {"exact_match": 0.1, "f1": 0.2},
    "seconds": {"total": 12.3},
}
FACTS = {
    "test": {"unparsable": 0},
    "parameters": {"trainable": 1200, "total": 34000},
    "commit": {"hash": "0123456789abcdef", "dirty": True},
    "packages": {"flare-exp": "0.1.0"},
    "device": "cpu",
    "data": {"far/test": {"examples": 1000}},
    "command": ["/somewhere/__main__.py", "seed=3", "task.train_split=train[:9]"],
}
CURVES = """epoch,step,train/loss_step,validation/f1,validation/loss
0,9,1.5,,
0,10,,0.5,1.2
1,19,0.9,,
1,20,,0.7,1.0
"""


def test_the_page_says_what_was_run_and_with_what_result(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    page = run_page(MEASURED, FACTS, tmp_path)
    assert page.startswith("# flare (add) on toy_qa, far\n")
    assert "seed 3; 1,200 of 34,000 parameters trained" in page
    assert "0123456789ab with local changes" in page
    assert "| **flare (add)**, on far (1,000 examples) | 50.0 | 62.5 |" in page
    assert "    python -m flare_exp seed=3 'task.train_split=train[:9]'\n" in page
    # paths are those of the command: a folder below where it ran, or any other
    assert f'flare_exp.load("{tmp_path}")' in page
    monkeypatch.chdir(tmp_path.parent)
    near = run_page(MEASURED, FACTS, tmp_path)
    assert (
        f'flare_exp.load("{tmp_path.name}")\n    run.predict(texts, sources=english_texts)' in near
    )
    assert f"    python -m flare_exp serve run={tmp_path.name}\n" in near
    assert "`adapter/`" in page
    assert "`english/`" not in page, "it lists what is there"
    assert "/somewhere" not in page
    several = {**MEASURED, "source": {"langs": ["en", "near"]}}
    call = "run.predict(texts, sources=sources)  # each has what run.sources.parts names"
    assert call in run_page(several, FACTS, tmp_path)
    student = {**several, "method": "distil", "fusion": None, "of": ["flare"]}
    assert "    run.predict(texts)\n" in run_page(student, FACTS, tmp_path)


def test_a_student_reads_no_human_source():
    for method, expected in (("flare", 1), ("distil", 0)):
        (job,), _ = validation.validate(["mt=gold", f"method={method}"], multirun=False)
        said = [*notes._option_notes(OmegaConf.to_object(job), {"metrics": {}})]
        assert sum("upper bound" in note for note in said) == expected, said


def test_curves_are_drawn_from_what_was_logged(tmp_path):
    (tmp_path / "transfer.csv").write_text(CURVES)
    draw_curves(tmp_path, tmp_path / "one.png", "f1", "far")
    (tmp_path / "finetune.csv").write_text(CURVES)
    draw_curves(tmp_path, tmp_path / "two.png", "f1", "far")
    widths = [
        int.from_bytes((tmp_path / name).read_bytes()[16:20], "big")
        for name in ("one.png", "two.png")
    ]
    assert widths[1] == 2 * widths[0], "a column per training"


def test_large_weights_are_linked_and_outlive_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "LINKED_FROM", 10)
    cache, run = tmp_path / "cache", tmp_path / "run"
    cache.mkdir()
    run.mkdir()
    for name, content in (("small", "tiny"), ("large", "x" * 100)):
        (cache / name).write_text(content)
        for _ in range(2):  # a run that was stopped while it left its files leaves them again
            results.link_weights(str(cache / name), str(run / name))
    assert (run / "large").stat().st_ino == (cache / "large").stat().st_ino
    assert (run / "small").stat().st_ino != (cache / "small").stat().st_ino
    (cache / "large").unlink()
    assert (run / "large").read_text() == "x" * 100


def test_a_line_says_how_a_job_of_a_grid_ended():
    assert (
        results.one_line(json.loads(json.dumps(MEASURED)))
        == "flare (add), far, seed 3: exact_match 50.0, f1 62.5 (12 s)"
    )


def test_changed_options_are_checked_with_the_runs_own_ones():
    def cfg(*words):
        return OmegaConf.to_object(validation.validate([*words], False)[0][0])

    generating = cfg("model=tiny_decoder", "decode=generate")
    with pytest.raises(UserError, match="generated labels have no probabilities"):
        overridden(generating, ["predict.sources=[given,none]"])
    quick = cfg("mt=toy_nllb", "mt.backend=ctranslate2")
    assert overridden(quick, ["mt.quantization=int8"]).mt.quantization == "int8"
    moved = cfg("task=nusax", "task.data_dir=/nowhere", "mt=gold")
    assert overridden(moved, ["offline=true"]).offline, "what the run has is not refused"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mt.foo=1", r"mt\.foo: there is no such option"),
        ("mt.codes.de=xx", r"there is no such option; did you mean mt\.codes"),
        ("task.lang=[]", "name one language or more"),
        ("task.lang=[far,xx]", "xx: choose one of"),
        ("task.lang=[far,far]", "far is named 2 times"),
    ],
)
def test_a_mistake_in_a_changed_option_is_one_message(word, message):
    cfg = OmegaConf.to_object(validation.validate([], False)[0][0])
    with pytest.raises(UserError, match=message):
        overridden(cfg, [word])


def test_a_default_folder_is_nobody_elses(tmp_path):
    first = runs.unused(tmp_path / "outputs" / "run")
    assert [runs.unused(first).name for _ in range(2)] == ["run_2", "run_3"]
    lost = tmp_path / "lost"
    lost.symlink_to(tmp_path / "not there")
    assert runs.unused(lost / "run") == lost / "run", "what cannot be made is for the check to say"
    assert not (lost / "run").exists()


def test_a_run_is_not_loaded_with_other_weights(tmp_path):
    for digest in ("a", "b"):
        here = Artifact(tmp_path, "checkpoint", digest, {}, 0.0, True)
        run = SimpleNamespace(backbone=here, cfg=validation.validate([], False)[0][0])
        for kind in ("checkpoint", "hub"):
            traced(tmp_path, artefacts={"backbone": {"kind": kind, "digest": "a"}})
            refused = (digest, kind) == ("b", "checkpoint")
            with pytest.raises(UserError, match="digest b, not a") if refused else nullcontext():
                loading._check_backbone(tmp_path, run)


@pytest.mark.slow
def test_a_stage_has_one_line_of_progress_that_fits(tmp_path):
    """On a terminal of 80 columns: counted from epoch 1, no line wraps."""
    words = [
        "task.limit=64",
        "finetune.epochs=2",
        "trainer=cpu",
        "method=zero_shot",
        "model=custom",
        f"model.path={tiny_checkpoint(tmp_path / 'checkpoint')}",
        f"cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'out'}",
    ]
    env = {
        **os.environ,
        "TERM": "xterm",
        "COLUMNS": "80",
        "FORCE_COLOR": "1",
        "TTY_COMPATIBLE": "1",
    }
    done = processes.run([*processes.PROGRAM, *words], env)
    assert done.returncode == 0, done.stderr
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stdout)
    shown = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("finetune: epoch")]
    assert any(line.startswith("finetune: epoch 2 of 2") for line in shown)
    assert not any("epoch 0" in line for line in shown)
    assert max(map(len, shown)) <= 80
    shown = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("finetune: epoch")]
    assert any(line.startswith("finetune: epoch 2 of 2") for line in shown)
    assert not any("epoch 0" in line for line in shown)
    assert max(map(len, shown)) <= 80


def test_a_run_folder_of_an_earlier_version_is_taken_up_and_loaded(tmp_path):
    job = validation.validate([f"output_dir={tmp_path}", "seed=3"], False)[0][0]
    stored = OmegaConf.to_container(job, resolve=True)
    stored["trainer"]["_target_"] = "lightning.pytorch.Trainer"
    stored["optim"]["_partial_"] = True
    stored["print_config"] = False
    del stored["distil"], stored["source"]["langs"]  # options that were added since
    OmegaConf.save(stored, tmp_path / "config.yaml")
    assert list(runs.check_content(job, tmp_path)) == []
    assert loading.stored_config(tmp_path) == OmegaConf.to_object(job)
    other = validation.validate([f"output_dir={tmp_path}", "seed=3", "source.langs=[near]"], False)
    (problem,) = runs.check_content(other[0][0], tmp_path)
    assert problem.endswith("differs in source.langs ([] there, ['near'] here)")
    stored["optim"]["unknown"] = 1
    OmegaConf.save(stored, tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml cannot be used"):
        loading.stored_config(tmp_path)


def test_a_text_with_an_interpolation_in_it_is_stored_as_it_is(tmp_path):
    command = r"mt.command='sh -c \"cat # \${X}\" sh {from} {to}'"
    words = ["task=sib200", "mt=command", command, f"output_dir={tmp_path}"]
    ((job,), problems) = validation.validate(words, False)
    assert problems == []
    assert "${X}" in job.mt.command
    (tmp_path / "config.yaml").write_text(runs.as_stored(job))
    assert list(runs.check_content(job, tmp_path)) == []
    assert loading.stored_config(tmp_path) == OmegaConf.to_object(job)
    # as earlier versions left it
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(job, resolve=True))
    assert "its config.yaml is unreadable" in next(runs.check_content(job, tmp_path))


def test_the_result_of_another_run_is_not_shown(tmp_path):
    """Also where the command line was checked for another folder, or before that run ended."""
    folder = run_folders.finished(tmp_path / "run", f"output_dir={tmp_path}", "seed=3")
    ((job,), _) = validation.validate([f"output_dir={tmp_path}", "seed=4"], False)
    assert "holds another run, which differs in seed (3 there" in runs.attempt(job, folder)
    (folder / "metrics.json").unlink()
    assert "holds another run, which differs in seed (3 there" in runs.attempt(job, folder)
    assert run_state.read(folder).state == "failed"


def test_a_run_is_loaded_with_the_commits_that_it_read(tmp_path, monkeypatch):
    """Its configuration keeps a branch, which moves."""
    read, loaded = [f"org/name@{'a' * 40}", f"org/mt@{'b' * 40}"], []

    def stop(cfg):
        loaded.append([f"{part.path}@{part.revision}" for part in (cfg.model, cfg.mt)])
        raise InterruptedError

    def load(*options, backbone=read[0]):
        made = {"human": {}, "translation of train": {"checkpoint": read[1]}}
        traced(tmp_path, artefacts={"backbone": {"digest": backbone}}, translations=made)
        with pytest.raises(InterruptedError):
            loading.load(tmp_path, *options)
        return loaded.pop()

    given = ["model=custom", "model.path=org/name", "mt=custom", "mt.path=org/mt", "mt.revision=v2"]
    (job,), _ = validation.validate(given, False)
    (tmp_path / "metrics.json").write_text("{}")
    OmegaConf.save(job, tmp_path / "config.yaml", resolve=True)
    for name in ("english", "adapter"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(loading, "quiet", stop)
    assert load() == read
    assert load("model.path=org/other") == ["org/other@None", read[1]]
    assert load("mt.path=org/mt", "mt.revision=v3") == [read[0], "org/mt@v3"]
    assert load(backbone="org/name@main, commit unknown") == ["org/name@None", read[1]]
