"""Every shipped configuration composes and type-checks; what contradicts itself is refused."""

import re

import pytest
from tables import files_of

from flare_exp.cli import commandline
from flare_exp.config import composition, schema, validation
from flare_exp.config.methods import METHODS
from flare_exp.tasks import NusaX


def problems(*overrides, multirun=False):
    return validation.validate(list(overrides), multirun)[1]


GROUPS = {g: o for g, o in composition.groups().items() if g != "experiment"}


# the options of these are in every pair of them, below
PAIRED = ("model", "task", "method")


@pytest.mark.parametrize(
    ("group", "name"), [(g, n) for g, names in GROUPS.items() if g not in PAIRED for n in names]
)
def test_every_option_composes_and_passes_the_check(group, name):
    extra = ["task=nusax"] if group == "mt" and not name.startswith("toy") else []
    extra += ["mt.path=org/name"] if (group, name) == ("mt", "custom") else []
    extra += ["mt.command='cat {from} {to}'"] if name == "command" else []
    extra += ["method=flare"] if group == "fusion" else []
    assert problems(f"{group}={name}", *extra) == []


@pytest.mark.parametrize("name", composition.groups()["experiment"])
def test_every_experiment_composes(name, tmp_path):
    for lang in ("eng", "ace", "en", "sw", "es", "eng_Latn", "jav_Latn"):
        (tmp_path / lang).mkdir()
    training = [f"task.train_data_dir={tmp_path}"] if name.endswith("xquad") else []
    folders = [f"model.path={tmp_path}", f"task.data_dir={tmp_path}", *training]
    given = [] if name == "half_known" else folders  # what is generated needs none
    assert problems(f"experiment={name}", *given) == []


@pytest.mark.parametrize(
    ("name", "model", "mt", "train", "epochs", "length"),
    [
        ("e5_nusax", "e5_small", "gold", "train", 8, 128),
        ("e5_sib200", "e5_small", "gold", "train", 8, 128),
        ("e5_xnli", "e5_small", "gold", "validation[:2000]", 5, 128),
        ("e5_xquad", "e5_small", "nllb_3b3", "train[:1000]", 2, 384),
    ],
)
def test_the_presets_of_e5_share_a_recipe(name, model, mt, train, epochs, length):
    ((job,), found) = validation.validate([f"experiment={name}"], False)
    assert not found
    assert (job.model.name, job.mt.name, job.task.train_split) == (model, mt, train)
    assert (job.finetune.tuning, job.finetune.lr, job.transfer.lr) == ("full", 1e-4, 5e-4)
    assert (job.finetune.epochs, job.transfer.epochs) == (epochs, epochs)
    assert job.data.max_length == length


@pytest.mark.parametrize("model", GROUPS["model"])
def test_every_pair_of_model_task_and_method_composes(model, tmp_path):
    """Every model with every task, with the next method each time, so that every pair of two groups
    occurs.
    """
    tasks, methods, first = GROUPS["task"], GROUPS["method"], GROUPS["model"].index(model)
    assert len(methods) <= len(GROUPS["model"])
    for number in range(max(len(tasks), len(methods))):
        task, method = tasks[number % len(tasks)], methods[(number + first) % len(methods)]
        if method in ("ensemble", "distil") and task in ("toy_qa", "tydiqa", "xquad"):
            continue  # it needs labels
        given = [f"model={model}", f"task={task}", f"method={method}", "model.path=org/name"]
        given += files_of(task, tmp_path)
        if method == "flare_mt" and task.startswith("toy"):
            given.append("mt=toy_nllb")
        if method in METHODS and METHODS[method].full:
            # large models are in 4 bits, which cannot be trained
            given += ["model.quantize=null", "model.dtype=float32"]
        assert problems(*given) == []


def test_a_task_that_is_not_on_the_hub_asks_for_its_folder(monkeypatch, tmp_path):
    monkeypatch.delattr(NusaX, "hub_id")
    (problem,) = problems("task=nusax")
    assert problem.startswith("task.data_dir=<folder of <language>/<split>.parquet> is missing")
    assert problems("task=nusax", *files_of("nusax", tmp_path)) == []


def test_a_task_chooses_its_translation_and_the_user_wins():
    def mt(*overrides):
        return validation.validate(list(overrides), False)[0][0].mt.name

    assert mt() == "toy"
    assert [mt(f"task={name}") for name in ("nusax", "xnli", "tydiqa", "xquad")] == ["nllb_3b3"] * 4
    assert mt("mt=gold") == "gold"
    assert mt("task=nusax", "mt=gold") == "gold"
    assert mt("task=xnli", "mt=file") == "file"


def test_xnli_has_the_papers_three_epochs():
    for overrides, epochs in (
        (["task=xnli"], (3, 3)),
        (["task=nusax"], (10, 10)),
        (["task=xnli", "transfer.epochs=7"], (3, 7)),
    ):
        (job,), _ = validation.validate(["model=xlmr_large", *overrides], False)
        assert (job.finetune.epochs, job.transfer.epochs) == epochs


def test_tydiqa_has_no_test_split_and_long_contexts(tmp_path):
    job = validation.validate(["task=tydiqa"], False)[0][0]
    assert (job.data.max_length, job.task.select) == (768, "last")
    assert (job.task.window, job.task.doc_stride) == (384, 128)
    assert (job.task.train_split, job.task.validation_split) == ("train", None), (
        "the last epoch is kept: nothing is held out"
    )
    assert (
        validation.validate([], False)[0][0].data.max_length,
        validation.validate([], False)[0][0].task.select,
    ) == (128, "best")
    assert (
        validation.validate(["task=tydiqa", "data.max_length=64"], False)[0][0].data.max_length
        == 64
    )
    for lang in ("en", "sw"):
        (tmp_path / lang).mkdir()
    job = validation.validate(["task=tydiqa", f"task.data_dir={tmp_path}", "mt=file"], False)[0][0]
    assert job.mt.path == str(tmp_path)


HELD_OUT = ["task.train_split='train[400:]'", "task.validation_split='train[:400]'"]


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        (["task=tydiqa", "task.test_split=train"], []),  # other questions than the English ones
        (["task=tydiqa", "task.english_test_split=train", *HELD_OUT], ["train", "validation"]),
        (["task=tydiqa", "task.english_test_split='train[:400]'", *HELD_OUT], ["validation"]),
        (["task=tydiqa", "task.english_test_split='train[:400]'"], ["train"]),
        (
            [
                "task=tydiqa",
                "task.english_test_split=null",
                "task.test_split='train[400:]'",
                *HELD_OUT,
            ],
            ["train"],
        ),
        (["task=xnli", "task.test_split=train"], ["train"]),  # translations of the English ones
        (["task=xnli", "task.test_split=train", "task.english_test_split=test"], ["train"]),
        (["task=xnli", "task.english_test_split=validation"], ["validation"]),
        (["task=xnli", "task.english_test_split='test[:9]'"], []),
    ],
)
def test_what_is_tested_is_not_trained_on(overrides, shared):
    found = problems(*overrides)
    assert [p.split("=")[0] for p in found] == [f"task.{role}_split" for role in shared]
    assert all(p.endswith("they share examples") for p in found)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize(
    "key", [key for key, f in schema.keys().items() if f.type in ("float", "float | None")]
)
def test_no_number_is_infinite_or_nan(key, value):
    needs = {
        "fusion": ["fusion=gated"],
        "mt": ["mt=toy_nllb"],
        "mt.timeout": ["mt=command", "mt.command='cat {from} {to}'"],
        "mixup": ["method=x_mixup"],
        "distil": ["method=distil"],
    }
    extra = needs.get(key, needs.get(key.split(".")[0], []))
    assert problems(*extra, f"{key}={value}") == [f"{key}={value}: must be a finite number"]


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ([], ["mt=command: mt.command='<program and its arguments, with {from} and {to}>' is"]),
        (["mt.command=cat {from} {to}"], []),
        (["mt.command=cat {from}"], ["mt.command=cat {from}: {to} missing"]),
        (["mt.command=cat {from} {to}", "mt.codes={ace: ace_ID, en: 1}"], []),
        (
            ["mt.command=cat {from} {to}", "mt.codes={q: x, es: ''}"],
            ["mt.codes: there is no language q", "mt.codes: the code of es is ''"],
        ),
        (["mt.command=cat {from} {to}", "mt.codes=[a]"], ["mt.codes=['a']: must be a table, e.g."]),
        (
            ["mt.command=cat {from} {to}", "task.lang=bbc"],
            ["mt.codes: the command's code for the language bbc is not known"],
        ),
        (["mt.command=cat {from} {to}", "mt.beams=2"], ["mt.beams=2: only mt=custom and"]),
        (["mt.command=cat {from} {to}", "method=flare_mt"], ["method=flare_mt with mt=command: "]),
        (["mt=nllb_600m", "mt.codes={en: x}"], ["mt.codes={'en': 'x'}: only mt=command has it"]),
    ],
)
def test_a_command_is_checked_with_its_codes(overrides, found):
    """As a shell gives them: nothing inside them is quoted for Hydra."""
    lang = [] if any(o.startswith("task.lang") for o in overrides) else ["task.lang=ban"]
    mt = [] if any(o.startswith("mt=") for o in overrides) else ["mt=command"]
    given = commandline.normalized(["task=nusax", *lang, *mt, *overrides])
    told = problems(*given)
    assert len(told) == len(found)
    assert all(t.startswith(f) for t, f in zip(told, found, strict=True))


@pytest.mark.parametrize("place", ["~nobody_here/x", "/" + "x" * 300])
def test_a_place_that_cannot_be_looked_at_is_one_problem(place):
    others = {
        "model.path": ["model=custom"],
        "task.data_dir": ["task=nusax"],
        "task.spec": ["task=custom"],
    }
    for key in ("output_dir", "cache_dir", *others):
        assert problems(*others.get(key, []), f"{key}={place}")[0].startswith(f"{key}={place}: ")


def test_the_default_cache_needs_no_variable(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    for value in ("", "/elsewhere"):
        monkeypatch.setenv("FLARE_EXP_CACHE", value)
        ((job,), found) = validation.validate([], False)
        assert found == []
        assert job.cache_dir == value or (not value and job.cache_dir.endswith("/.cache/flare_exp"))


def test_an_option_may_be_repeated_with_the_same_value():
    assert problems("seed=1", "seed=1") == []
    assert "seed is given twice" in problems("seed=0,1", "seed=1", multirun=True)[0]


def test_a_list_of_languages_is_one_run_and_a_sweep_over_lists_is_several(tmp_path):
    words = ["task=nusax", "task.lang=[jav,ban],[ace],sun", "logger=wandb"]
    jobs, problems = validation.validate(words, multirun=True)
    assert problems == []
    assert [job.task.lang for job in jobs] == [["jav", "ban"], "ace", "sun"]
    names = [re.sub("outputs/[^n]*", "", job.output_dir) for job in jobs]
    assert names == ["nusax_jav+ban_flare", "nusax_ace_flare", "nusax_sun_flare"]
    assert jobs[0].logger.group == "nusax-jav+ban-tiny"
    quoted = ["task=nusax", "task.lang=['jav','ban'],'ace',sun"]
    assert [job.task.lang for job in validation.validate(quoted, True)[0]] == [
        job.task.lang for job in jobs
    ]
    assert validation.validate(quoted, True)[1] == []
    many = [lang for lang in NusaX.languages if lang != "sun"]
    (job,), _ = validation.validate(["task=nusax", f"task.lang=[{','.join(many)}]"], multirun=False)
    assert job.output_dir.endswith("nusax_ace+ban+bbc+bjn+bug+ind+4more_flare")


def test_the_files_of_every_language_must_be_there(tmp_path):
    for lang in ("eng", "jav", "ban", "ace"):
        (tmp_path / lang).mkdir()
    (tmp_path / "ban" / "test.parquet").touch()
    words = ["task=nusax", f"task.data_dir={tmp_path}", "task.lang=[jav,sun]"]
    _, problems = validation.validate([*words, "task.unseen=[ban,ace]"], multirun=False)
    assert problems == [
        f"task.unseen=[ban,ace]: there is no {tmp_path}/ace/test.parquet to test ace on; choose "
        "languages that have a test split",
        f"task.data_dir={tmp_path}: it has no folder sun/ (expected <language>/<split>.parquet)",
    ]


def test_a_grid_leaves_out_drawn_sources_for_methods_without_a_fusion():
    words = ["method=lora,x_mixup,flare", "source=plain,robust"]
    jobs, problems = validation.validate(words, multirun=True)
    assert problems == []
    cells = zip(jobs, composition.job_overrides(words), strict=True)
    kept = [job for job, cell in cells if not composition.without_fusion(job, cell)]
    assert [(job.method.name, job.source.noise) for job in kept] == [
        ("lora", 0),
        ("x_mixup", 0),
        ("flare", 0),
        ("flare", 0.2),
    ]
    # a member that mixes would not learn from them
    both = ["method=ensemble", "method.of=[flare,x_mixup]", "source=robust"]
    assert len(validation.validate(both, multirun=False)[1]) == 2


def test_a_learned_fusion_in_several_processes_needs_sources_in_training_alone():
    words = ["fusion=gated", "trainer=ddp_cpu", "source.empty=true"]
    _, (problem,) = validation.validate(words, multirun=False)
    assert "weights are never used then" in problem
    assert validation.validate([*words, "source.ablate_in=test"], multirun=False)[1] == []
