"""Command lines: wrong ones get one message each and exit 2; help, paths, folders."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from run_folders import finished

import flare_exp
from flare_exp.cli import commandline
from flare_exp.cli.commandline import COMMANDS, help_text, normalized
from flare_exp.cli.main import main
from flare_exp.config import composition, validation
from flare_exp.config.method_schema import SOURCE_METHODS
from flare_exp.experiment.runs import check_folder

WRONG = [
    (["model=tniy"], "did you mean tiny"),
    (["modle=tiny"], "modle: there is no such option; did you mean model?"),
    (["trainer.max_epoch=3"], "did you mean trainer.max_epochs?"),
    (["trainer.max_epochs=0"], "trainer.max_epochs=0: must be 1 or more"),
    (["lr=1e-3"], "did you mean distil.lr or finetune.lr or transfer.lr?"),
    (["train.max_epochs=3"], "did you mean trainer.max_epochs?"),
    (
        ["pan", "model=xlmr_base"],
        "pan: not of the form key=value, and no command; commands: analyse, check-data, "
        "export, plan, predict, prefetch, report, serve, status, submit; did you mean plan?",
    ),
    (["seed=x"], "seed=x: must be a whole number"),
    (["seed=99999999999"], "seed=99999999999: must be 4294967295 or less"),
    (["-m", "seed=glob(*)"], "glob(...) does not list its values in an order; write -m seed=a,b,c"),
    (
        ["-m", "hydra.launcher.partition=gpu,long"],
        "all jobs have the same value of it; a text with commas is written "
        "\"hydra.launcher.partition='gpu,long'\"",
    ),
    (["fusion=glob(*)"], "glob(...) does not list its values in an order; write -m fusion=a,b,c\n"),
    (["transfer.lr=interval(1e-5,1e-3)"], "a,b,c, or transfer.lr=range(start,stop,step)"),
    (["-m", "seed=str(shuffle(0,1,2))"], "shuffle(...) does not list its values in an order"),
    (["-m", "seed=range(2,1)"], "seed=range(2,1): there is no value in it"),
    (["-m", "seed=range(0,3,0)"], "seed=range(0,3,0): there is no value in it"),
    (["-m", "seed='a','b'"], "seed=a: must be a whole number"),
    (["task.limit=ten"], "task.limit=ten: must be a whole number, or null"),
    (["transfer.lr=1e-3x"], "transfer.lr=1e-3x: must be a number"),
    (["source.shuffle=maybe"], "source.shuffle=maybe: must be true or false"),
    (["offline=2"], "offline=2: must be true or false"),
    (
        ["--method", "lora"],
        "--method: there is no such flag; options are given as key=value, without dashes",
    ),
    (
        ["--method=lora", "-x"],
        "  - --method=lora: there is no such flag; options are given as key=value, without "
        "dashes\n  - -x: ",
    ),
    (["--resolve"], "--resolve: it goes with --cfg, e.g. --cfg job --resolve"),
    (["seed=x", "--info"], "seed=x: must be a whole number"),
    (["experiment=null"], "experiment=null: no preset is the default; leave it out"),
    (["-m", "experiment=null,half_known"], "experiment=null: no preset is the default"),
    (["source.langs=[[en,near]]"], "source.langs=[['en', 'near']]: must be a list, e.g. [a,b]"),
    (["mt.errors=[{a: 1}]"], "mt.errors=[{'a': 1}]: must be a list, e.g. [drop,swap]"),
    (["method=x_mixup", "mixup.depths=[[0.5]]"], "mixup.depths=[[0.5]]: must be a list of numbers"),
    (["mt=command", "mt.codes={en: [a]}"], "mt.codes={'en': ['a']}: must be a table, e.g."),
    (["-cn", "config"], "--config-name=config: the configuration is conf/config.yaml"),
    (["hydra.run.dir=x"], "hydra.run.dir=x: the program sets it; a run's folder is output_dir="),
    (["-m", "hydra.sweep.subdir=x"], "hydra.sweep.subdir=x: the program sets it"),
    (["-m", "--cfg", "job", "method=lora,flare"], "-m with --cfg: choose one"),
    (["--cfg", "job", "--info", "all"], "--cfg with --info: choose one"),
    (["method=ensemble", "task=toy_qa"], "answers have none; choose a task with labels"),
    (["method=ensemble", "method.of=[lora]"], "method=ensemble has two to four methods, each once"),
    (["method=ensemble", "decode=generate"], "generated labels have no probabilities"),
    (
        ["method=ensemble", "task.validation_split=null", "task.select=last"],
        "choose method.weights=equal",
    ),
    (
        ["method=lora", "method.of=[lora,flare]"],
        "only method=ensemble and method=distil has it, not lora",
    ),
    (["method=full", "model=llama31"], "method=full with model.quantize=nf4: 4-bit weights"),
    (["method=lora", "mixup.rank=4"], "only x_mixup has it"),
    (["source.langs=[far]"], "source.langs=[far]: far: choose one of en, near"),
    (["source.langs=[en,en]"], "en is named 2 times"),
    (["method=lora", "source.langs=[near]"], "only flare fuses sources in languages of choice"),
    (["source.combine=mean"], "name two languages or more"),
    (
        ["mt=[toy,other]"],
        "source.systems=[other]: other: choose one of command, custom, file, gold",
    ),
    (["mt=[toy,gold,gold]"], "gold is named 2 times"),
    (["mt=[toy,toy]"], "source.systems=[toy] with mt=toy: both are the same translations"),
    (["mt=[toy,gold]", "method=flare_mt"], "only flare fuses translations by several systems"),
    (["mt=[toy,gold]", "method=distil"], "the student is tested without a source"),
    (["mt=[toy,gold]", "source.langs=[near]"], "in several languages or by several systems"),
    (["mt=[toy,custom]"], "(its options are those of conf/mt/custom.yaml)"),
    (["mt=[toy,file]"], "file reads its translations below task.data_dir, which is not given"),
    (["mt=[toy,toy_nllb]", "source.systems=[gold]"], "source.systems is given twice"),
    (["-m", "mt=toy,[toy,gold]"], "mt=[toy,gold]: write several systems as mt=a source"),
    (
        ["source.langs=[en,near]", "source.noise=0.1", "source.noise_kinds=[words]"],
        "wrong words are put into one source alone",
    ),
    (
        ["method=distil", "source.langs=[near]", "distil.texts=texts.csv"],
        "its texts have English sources alone",
    ),
    (["method=distil", "method.of=[]"], "one to four teachers, each once"),
    (
        ["method=distil", "predict.sources=[given,none]"],
        "predict.sources=[given,none] with method=distil: only flare and flare_mt have it",
    ),
    (
        ["method=distil", "source.empty=true", "source.ablate_in=test"],
        "source.empty=true with method=distil: only input_fusion",
    ),
    (["mt=toy_nllb", "source.langs=[en,half]"], "mt=toy_nllb with source.langs=half: it transl"),
    (
        ["task=xquad", "task.lang=[ar,de]", "mt=gold", "method=lora"],
        "mt=gold with task=xquad and method=lora: the benchmark has no train and validation in ar",
    ),
    (["method=distil", "task=toy_qa"], "answers have none"),
    (["method=distil", "model=tiny_decoder"], "a prompt has none; choose an encoder"),
    (["method=distil", "task.form=generative", "model=tiny_seq2seq"], "a prompt has none; leave"),
    (["method=lora", "distil.weight=2"], "only distil has it"),
    (["method=distil", "distil.texts=texts.txt"], "must end in .jsonl, .csv"),
    (["method=x_mixup", "mixup.depths=[2]"], "must be one or more numbers from 0 to 1"),
    (["method=x_mixup", "trainer=fsdp"], "choose trainer=ddp"),
    (["method=x_mixup", "decode.cache=static"], "choose decode.cache=dynamic"),
    (["mt.errors=drop"], "mt.errors=drop: must be a list, e.g. [drop,swap]"),
    (["mixup.depths=0.5"], "mixup.depths=0.5: must be a list of numbers, e.g. [0.5], or null"),
    (["task.test_split=null"], "task.test_split=null: must be text"),
    (["adapter.r=null"], "adapter.r=null: must be a whole number"),
    (
        ["optim=adam"],
        "optim=adam: optim is a section; its options: optim._target_, optim.weight_decay, "
        "optim.eps",
    ),
    (["cache_dir="], "cache_dir=: must not be empty"),
    (["task=nusax", "task.data_dir="], "task.data_dir=: must not be empty"),
    (["adapter.r=-1"], "adapter.r=-1: must be 1 or more"),
    (["adapter.r=2.5"], "adapter.r=2.5"),
    (["finetune.tuning=half"], "choose one of lora, full"),
    (["method=lora", "fusion=add"], "only flare and flare_mt fuse"),
    (["method=zero_shot", "fusion.source_layer=same"], "only flare and flare_mt fuse"),
    (["task.lang=fr"], "choose one of near, half, far; did you mean far?"),
    (["task=nusax", "task.lang=acee"], "did you mean ace?"),
    (
        ["task.lang=[near,fr]"],
        "task.lang=[near,fr]: fr: choose one of near, half, far; did you mean",
    ),
    (["task.lang=[near,far,near]"], "near is named 2 times; name each language once"),
    (["task.lang=[]"], "task.lang=[]: name one language or more; choose one of near, half, far"),
    (["task.lang=null"], "task.lang=null: must be text, or a list of texts, e.g. [a,b]"),
    (["task.lang=[1]"], "task.lang=[1]: must be text, or a list of texts"),
    (
        ["task.lang=near,far"],
        "several values need -m (multirun); one run of all of them: task.lang=[near,far]",
    ),
    (["task.unseen=near"], "task.unseen=near: must be a list, e.g. [a,b]"),
    (["task.unseen=[fr]"], "task.unseen=[fr]: fr: choose one of near, half, far"),
    (["task.unseen=[far]"], "task.unseen=[far] with task.lang=far: far is trained on"),
    (["task.temperature=0"], "task.temperature=0.0: must be above 0"),
    (["task=nusax", "task.data_dir=/no/such"], "task.data_dir=/no/such: there is no such folder"),
    (["task.data_dir=/tmp"], "is generated and reads no files"),
    (["task=nusax", "mt=toy"], "mt=toy with task=nusax"),
    (["task=tydiqa", "mt=toy"], "mt=toy with task=tydiqa"),
    (
        ["task=tydiqa", "mt=gold"],
        "mt=gold with task=tydiqa: the benchmark has no human translations",
    ),
    (["task=tydiqa", "mt.fallback=gold"], "mt.fallback=gold with task=tydiqa"),
    (["task=nusax", "mt=gold", "mt.fallback=gold"], "only mt=file has it, not gold"),
    (["task=nusax", "mt=file", "mt.fallback=toy"], "choose one of gold"),
    (["task=nusax", "mt=gold", "mt.beams=2"], "has it, not gold"),
    (["mt.errors=[drop,typo]"], "mt.errors=typo: choose one of drop, swap, replace, hallucinate"),
    (["mt.errors=[]"], "mt.errors=[]: choose one of"),
    (["task=nusax", "mt=toy_nllb"], "it knows the generated languages only"),
    (
        ["task.lang=half", "mt=toy_nllb"],
        "mt=toy_nllb with task.lang=half: it translates en, near, far",
    ),
    (["task=nusax", "mt=custom"], "mt.path=<hub id or checkpoint folder> is missing"),
    (["mt=custom", "mt.path=./nowhere"], "mt.path=./nowhere: there is no such folder"),
    (["mt=toy_nllb", "mt.marker=stars"], "mt.marker=stars: choose one of quotes, brackets, tags"),
    (["mt=toy_nllb", "mt.quantization=int8"], "only mt.backend=ctranslate2 has it"),
    (["method=flare_mt"], "choose mt=toy_nllb"),
    (["task=nusax", "mt=gold", "method=flare_mt"], "choose mt=custom or mt=nllb_1b3 or"),
    (
        ["mt=toy_nllb", "method=flare_mt", "fusion.source_layer=same"],
        "every layer fuses the same states",
    ),
    (["source.cache=tape"], "source.cache=tape: choose one of off, memory, disk"),
    (["method.name=flair"], "method.name=flair: choose one of distil, ensemble, flare, "),
    (["decode.name=x"], "decode.name=x: choose one of generate, score"),
    (["optim._partial_=true"], "optim._partial_: is no longer an option"),
    (["print_config=true"], "--cfg job --resolve prints the configuration"),
    (["task=nusax", "mt=file", "mt.path=/no/such"], "mt.path=/no/such: there is no such folder"),
    (["task=nusax", "mt=gold", "mt.path=/tmp"], "mt.path=/tmp: only mt=file and mt=custom and"),
    (
        ["mt.name=nllb"],
        "one problem in the command line\n  - mt.name=nllb: choose one of command, custom, file,",
    ),
    (["task=tydiqa", "task.lang=en"], "choose one of ar, bn, fi, id, ko, ru, sw, te"),
    (["task.select=first"], "choose one of best, last"),
    (["task.english_test_split=test[5]"], "task.english_test_split: 'test[5]' is not a split"),
    (["model=custom"], "model.path=<hub id or checkpoint folder> is missing"),
    (["model=custom", "model.path=./no/such"], "there is no such folder"),
    (["source.shuffle=true", "source.empty=true"], "choose one ablation"),
    (
        ["method=lora", "source.empty=true"],
        f"only {', '.join(SOURCE_METHODS)} read a source",
    ),
    (["source.dropout=0.6", "source.noise=0.6"], "their sum must be 1 or less"),
    (["method=x_mixup", "source.noise=0.1"], "only flare and flare_mt fuse a source"),
    (["method=lora", "predict.sources=[given,none]"], "only flare and flare_mt have it"),
    (
        ["method=ensemble", "method.weights=similarity", "method.of=[lora,flare_mt]"],
        "name both kinds, e.g. method.of=[lora,flare]",
    ),
    (
        [
            "method=ensemble",
            "method.weights=similarity",
            "method.of=[lora,flare]",
            "source.shuffle=true",
        ],
        "choose source.ablate_in=test",
    ),
    (["predict.sources=[none]"], "choose source.empty=true source.ablate_in=test"),
    (["predict.sources=[none,none]"], "each kind of pass is made once"),
    (["task=toy_qa", "predict.sources=[given,none]"], "task=toy_qa has no labels"),
    (
        ["model=tiny_decoder", "decode=generate", "predict.sources=[given,none]"],
        "generated labels have no probabilities",
    ),
    (["source.dropout=0.1", "source.empty=true"], "choose source.ablate_in=test"),
    (["trainer.devices=2"], "choose trainer=ddp, fsdp or ddp_cpu"),
    (
        ["trainer=fsdp", "model=llama31"],
        "4-bit weights are not shared out; choose trainer=ddp, or model.quantize=null",
    ),
    (
        ["trainer=fsdp", "model=llama31"],
        "its steps know whole weights only; choose optim._target_=torch.optim.AdamW",
    ),
    (["trainer=fsdp", "trainer.precision=16-mixed"], "choose bf16-mixed"),
    (
        ["trainer.precision=bf16-true"],
        "trainer.precision=bf16-true: trained weights of 16 bits lose most of their updates; "
        "choose bf16-mixed",
    ),
    (
        ["finetune.tuning=full", "model.dtype=bfloat16"],
        "choose model.dtype=float32 (with trainer.precision=bf16-mixed",
    ),
    (
        ["adapter.also_train=[embedding]"],
        "adapter.also_train=embedding: choose one of embeddings, lm_head; did you mean embeddings?",
    ),
    (["trainer.devices=0"], "trainer.devices=0: must be 1 or more"),
    (["trainer=ddp_cpu", "source.empty=true", "fusion=gated"], "choose trainer.devices=1"),
    (["fusion.heads=2"], "only fusion=cross_attn has it"),
    (["fusion=cross_attn", "fusion.heads=3"], "must divide adapter.r=8"),
    (["task.train_split=train[:50]", "task.validation_split=train[40:60]"], "they share examples"),
    (["task.test_split=test[5]"], "is not a split"),
    (["method=lora,flare"], "several values need -m"),
    (["optim._target_=os.system"], "choose one of torch.optim.AdamW"),
    (["nonsense"], "not of the form key=value"),
    (["mt.noise=1.5"], "must be 1 or less"),
    (["experiment=nope"], "experiment=nope"),
    (["hydra/launcher=ray"], "hydra/launcher=ray: choose one of basic, slurm"),
    (["model=tiny", "outputs/x"], "  - outputs/x: not of the form key=value\n"),
    (["model.pretrain.steps=0"], "must be 1 or more"),
    (["+model=tiny"], "+model=tiny: leave out the +; it is for options that there are not yet"),
    (["~model"], "a group cannot be removed"),
    (["model=custom", "model.path=org/name", "model.pretrain.steps=3"], "only embedded models"),
    (
        ["task.validation_split=null"],
        "task.validation_split=null with task.select=best: nothing can be selected on; choose "
        "task.select=last",
    ),
    (["+foo=1"], "foo: there is no such option"),
    (
        ["task=toy_qa", "method=translate_test", "mt=file", "mt.path=conf"],
        "method=translate_test with mt=file and task=toy_qa: no file can translate the answers "
        "back",
    ),
    (["transfer.lr=inf"], "transfer.lr=inf: must be a finite number"),
    (["fusion=gated", "fusion.bias=nan"], "fusion.bias=nan: must be a finite number"),
    (
        ["model=tiny", "model=xlmr_base"],
        "model=tiny and model=xlmr_base: model is given twice with different values; keep one",
    ),
    (
        ["seed=1", "method=lora", "++seed=2"],
        "seed=1 and ++seed=2: seed is given twice with different values; keep one",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(o) for o, _ in WRONG])
def test_wrong_options_exit_2_with_one_message(overrides, message, capsys, tmp_path):
    assert main([*overrides, f"output_dir={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists(), "nothing may be left behind"


def test_all_problems_at_once(capsys):
    assert (
        main(
            [
                "model=tniy",
                "adapter.r=-1",
                "task.lang=fr",
                "method=lora",
                "fusion=add",
                "trainer.max_epoch=3",
                "seed=x",
            ]
        )
        == 2
    )
    printed = capsys.readouterr().err
    assert printed.startswith("flare_exp: 6 problems")
    for part in (
        "tiny",
        "adapter.r=-1",
        "task.lang=fr",
        "fusion=add",
        "trainer.max_epochs?",
        "seed=x",
    ):
        assert part in printed


def test_checked_for_cfg_and_multirun_too(capsys):
    assert main(["--cfg", "job", "model=tniy"]) == 2
    assert main(["-m", "method=lora,flaer"]) == 2
    assert "did you mean flare" in capsys.readouterr().err
    # fusion x lora is an error in a single run only: a grid leaves the cell out
    assert validation.validate(["method=lora,flare", "fusion=add,mul"], True)[1] == []
    assert len(validation.validate(["method=lora,flare", "seed=0,1"], True)[0]) == 4


def test_a_grid_takes_lists_and_null_as_values():
    jobs, problems = validation.validate(["source.systems=[],[gold]", "task.limit=null,8"], True)
    assert problems == []
    assert [(job.source.systems, job.task.limit) for job in jobs] == [
        ([], None),
        ([], 8),
        (["gold"], None),
        (["gold"], 8),
    ]


def test_flags_and_overrides_in_any_order_and_bare_slices():
    mixed = ["seed=0", "-m", "method=lora,flare", "--cfg", "job", "task.train_split=train[:50]"]
    assert normalized(mixed) == [
        "-m",
        "--cfg",
        "job",
        "seed=0",
        "method=lora,flare",
        "task.train_split='train[:50]'",
    ]
    assert main(["seed=0", "-m", "method=lora,flaer"]) == 2


def test_several_translation_systems_have_a_short_form():
    assert normalized(["mt=[toy, gold,file]"]) == ["mt=toy", "source.systems=[gold,file]"]
    assert validation.validate(normalized(["mt=[toy,toy]", "mt.seed=1"]), False)[1] == []


def test_a_grid_has_one_folder(capsys):
    assert main(["-m", "output_dir=x,y", "seed=0"]) == 2
    assert "output_dir=x,y: a grid has one folder, in which each job" in capsys.readouterr().err


def test_the_home_folder_is_named_as_in_a_shell():
    home = str(Path("~").expanduser())
    assert normalized(["output_dir=~/r", "cache_dir=a~b"]) == [
        f"output_dir={home}/r",
        "cache_dir='a~b'",
    ]


def test_an_unknown_choice_is_one_problem(capsys):
    """Its options are not checked against the choice that is shipped."""
    assert main(["task=custm", "task.lang=zumi"]) == 2
    printed = capsys.readouterr().err
    assert "did you mean custom?" in printed
    assert "task.lang" not in printed


def test_output_folder_of_another_run(tmp_path, capsys):
    from omegaconf import OmegaConf

    job = validation.validate([f"output_dir={tmp_path}"], False)[0][0]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(job, resolve=True))
    assert main([f"output_dir={tmp_path}", "seed=1", "adapter.r=4"]) == 2
    printed = capsys.readouterr().err
    assert "adapter.r (8 there, 4 here), seed (0 there, 1 here)" in printed
    assert main([f"output_dir={tmp_path}", "resume=false"]) == 2
    assert "resume=false" in capsys.readouterr().err


def test_a_run_folder_may_be_taken_up_with_another_logger(tmp_path):
    from omegaconf import OmegaConf

    before, after = (
        validation.validate([f"output_dir={tmp_path}", f"logger={name}"], False)[0][0]
        for name in ("csv", "wandb")
    )
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(before, resolve=True))
    assert not list(check_folder(after, tmp_path))


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_an_empty_folder_name_is_not_the_current_folder(key, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([f"{key}="]) == 2
    assert f"{key}=: must not be empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_grid_makes_no_folder_for_a_job_that_has_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("flare_exp.cli.main._hand_over", lambda *_: 0)
    assert (
        main(
            ["-m", "seed=0,1", f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'grid'}"]
        )
        == 0
    )
    assert [place.name for place in (tmp_path / "grid").iterdir()] == ["grid.json"]


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([f"cache_dir={tmp_path / 'file'}", f"output_dir={tmp_path / 'out'}"]) == 2
    assert (
        f"cache_dir={tmp_path / 'file'}: cannot be written (File exists)" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([f"output_dir={tmp_path / 'file' / 'sub'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_explain_themselves_and_refuse_unknown_flags(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"python -m flare_exp {name}" in capsys.readouterr().out
    assert main([name, "--dry-run"]) == 2
    assert "--dry-run: there is no such flag; allowed: -" in capsys.readouterr().err


def test_the_example_with_an_own_checkpoint_runs_as_printed_and_downloads_nothing(
    tmp_path, monkeypatch
):
    from flare_exp.experiment import downloads

    (line,) = [line for line in commandline.EXAMPLES.splitlines() if "model.path=" in line]
    for folder in ("my_model", "my_data/eng", "my_data/jav"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    jobs, found = validation.validate(normalized(shlex.split(line)[3:]), False)
    assert found == []
    assert downloads.hub_resources_of_jobs(jobs) == []


def test_submit_explains_itself(capsys):
    assert main(["submit", "--help"]) == 0
    said = capsys.readouterr().out
    assert "python -m flare_exp submit" in said
    assert "SLURM" in said
    assert "Groups:" not in said


def test_the_default_folder_is_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "flare_exp.cli.main.check_folder", lambda *_: time.sleep(1.1) or []
    )  # another second has begun
    ran = []
    monkeypatch.setattr("flare_exp.cli.main.attempt", lambda _, folder: ran.append(folder))
    assert main([]) == 0
    assert [folder.resolve() for folder in (tmp_path / "outputs").iterdir()] == [
        folder.resolve() for folder in ran
    ]


def test_two_commands_of_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flare_exp.cli.main.time.strftime", lambda _: "outputs/now")
    monkeypatch.setattr("flare_exp.cli.main._hand_over", lambda *_: 0)
    for name in ("now", "now_2", "now_3"):
        assert main(["-m", "seed=0,1"]) == 0
        assert (tmp_path / "outputs" / name / "grid.json").is_file()
    assert main(["-m", "seed=0,1", "trainer.nodes=2", "trainer=ddp_cpu"]) == 2
    assert len(list((tmp_path / "outputs").iterdir())) == 3, "a refused one leaves nothing"


@pytest.mark.parametrize("words", [[], ["-m", "seed=0,1"]])
def test_the_time_in_a_name_of_a_folder_is_taken_once(words, tmp_path, monkeypatch):
    monkeypatch.setattr("flare_exp.cli.main.downloads.checked", lambda *_: time.sleep(0.01))
    ran = []
    for name in ("attempt", "attempt_in_grid"):
        monkeypatch.setattr(f"flare_exp.cli.main.{name}", lambda _, folder: ran.append(folder))
    main([*words, f"cache_dir={tmp_path}/cache", f"output_dir={tmp_path}/out/${{now:%f}}"])
    (made,) = (tmp_path / "out").iterdir()
    assert {folder.parent if words else folder for folder in ran} == {made}


def test_a_finished_grid_is_shown_where_its_models_are_not(tmp_path, monkeypatch):
    words = ["task=nusax", "model=xlmr_base", "mt=gold", "offline=true"]
    for number in (0, 1):
        finished(tmp_path / "grid" / str(number), *words, f"seed={number}")
    asked = []
    monkeypatch.setattr("flare_exp.cli.main._hand_over", lambda *_: 0)
    monkeypatch.setattr(
        "flare_exp.cli.main.downloads.checked", lambda jobs, *_: asked.append([*jobs])
    )
    grid = ["-m", *words, f"output_dir={tmp_path / 'grid'}", f"cache_dir={tmp_path / 'cache'}"]
    assert main([*grid, "seed=0,1"]) == 0
    assert not (tmp_path / "cache").exists()
    assert main([*grid, "seed=0,1,2"]) == 0
    assert [[job.seed for job in jobs] for jobs in asked] == [[2]]


def test_a_stored_result_is_shown_without_heavy_imports(tmp_path):
    from omegaconf import OmegaConf

    (job,) = validation.validate([f"output_dir={tmp_path}"], False)[0]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(job, resolve=True))
    scores, spent = (
        {"accuracy": 0.5},
        dict.fromkeys(("backbone", "finetune", "transfer", "test", "translate", "total"), 1.0),
    )
    measured = {
        "task": "toy_sentiment",
        "lang": "far",
        "model": "tiny",
        "method": "flare",
        "fusion": "add_relu",
        "mt": "toy",
        "seed": 0,
        "test": scores,
        "english": scores,
        "zero_shot": scores,
        "seconds": spent,
    }
    (tmp_path / "metrics.json").write_text(json.dumps(measured))
    facts = {
        "data": {},
        "parameters": {"trainable": 1, "total": 2},
        "test": {"cut_off": 0, "unparsable": 0},
        "artefacts": {},
        "translations": {},
    }
    (tmp_path / "provenance.json").write_text(json.dumps(facts))
    code = f"""
import sys
from flare_exp.cli.main import main
assert main(["output_dir={tmp_path}"]) == 0
print([m for m in ("torch", "transformers", "lightning", "datasets", "matplotlib") \
if m in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "1 of 2 parameters trained" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


AWKWARD = 'a b/größe, it\'s "50 %" [x] (y) {z} #1 = & @ : \\ end'


def test_paths_are_what_the_shell_gives(tmp_path):
    folder = tmp_path / AWKWARD
    for name in ("en", "sw"):
        (folder / name).mkdir(parents=True)
    given = [
        f"output_dir={folder / 'out'}",
        f"cache_dir={folder}",
        f"task.data_dir={folder}",
        "task=xnli",
        "model=custom",
        f"model.path={folder}",
        "mt=custom",
        f"mt.path={folder}",
    ]
    (job,), found = validation.validate(commandline.overrides(normalized(given)), False)
    assert found == []
    paths = [job.output_dir, job.cache_dir, job.task.data_dir, job.model.path, job.mt.path]
    assert paths == [str(folder / "out"), *[str(folder)] * 4]


def test_paths_of_a_grid_may_have_spaces(tmp_path):
    places = [tmp_path / name for name in ("ein Modell", "größer", "it's", "plain")]
    for place in places:
        place.mkdir()
    paths = ",".join(map(str, places))
    words = normalized(
        ["-m", "model=custom", f"model.path={paths}", f"output_dir={tmp_path / 'out of'}"]
    )
    jobs, found = validation.validate(commandline.overrides(words), True)
    assert found == []
    assert [job.model.path for job in jobs] == [str(place) for place in places]
    cells = composition.job_overrides(commandline.overrides(words))
    assert [validation.validate(cell, False)[0][0].model.path for cell in cells] == [
        str(place) for place in places
    ]


def test_texts_that_look_like_numbers_stay_texts():
    given = ["1.10", "1e3", "007", "1_000", "2024"]
    words = normalized(["-m", f"model.revision={','.join(given)}", "output_dir=2024.10", "seed=1"])
    jobs, found = validation.validate(commandline.overrides(words), True)
    assert found == []
    assert [job.model.revision for job in jobs] == given
    assert {(job.output_dir, job.seed) for job in jobs} == {("2024.10", 1)}
    assert validation.validate([r"model.revision='it\'s glob(x)'"], False)[1] == []


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("distil.texts=/tmp/my (1).jsonl", "distil.texts"),
        ("mt.revision=apertium 3.8, spa-arg 0.2", "mt.revision"),
        ("logger.run_name=élan", "logger.run_name"),
        ("task.lang=nan", "task.lang"),  # Min Nan
    ],
)
def test_texts_are_what_the_shell_gives(word, key):
    for flags in [[]] if ", " in word else [[], ["-m"]]:  # a comma separates values of a grid
        (given,) = commandline.overrides(normalized([*flags, word]))
        override = OverridesParser.create().parse_override(given)
        assert (override.key_or_group, override.value()) == (key, word.partition("=")[2])


def test_quoted_texts_of_a_grid_stay_whole():
    words = normalized(["-m", "logger=wandb", 'logger.group="a,b",c'])
    jobs, found = validation.validate(commandline.overrides(words), True)
    assert found == []
    assert [job.logger.group for job in jobs] == ["a,b", "c"]


def test_what_hydra_shows_or_groups_may_be_chosen():
    assert commandline.flag_problems(["--cfg", "job", "-p", "model"]) == []
    assert validation.validate(["hydra.sweeper.max_batch_size=2"], True)[1] == []


def test_a_grid_of_bare_slices():
    words = normalized(["-m", "task.train_split=train[:100],train,train[:200]"])
    jobs, found = validation.validate(commandline.overrides(words), True)
    assert found == []
    assert [job.task.train_split for job in jobs] == ["train[:100]", "train", "train[:200]"]


@pytest.mark.parametrize(
    "given",
    [
        "output_dir='a b'",
        'output_dir="a, b"',
        "task.data_dir=null",
        "cache_dir=${oc.env:HOME}/x",
        "model.path=choice(a/b,c/d)",
    ],
)
def test_quotes_and_hydras_own_grammar_stay(given):
    assert normalized([given]) == [given]


def test_a_run_in_an_awkward_folder(tmp_path, monkeypatch):
    """Also through Hydra, alone and as a grid."""
    ran = []
    monkeypatch.setattr(
        "flare_exp.cli.main.attempt", lambda cfg, folder: ran.append((cfg.cache_dir, folder))
    )
    monkeypatch.setattr(
        "flare_exp.cli.main.attempt_in_grid",
        lambda cfg, folder: ran.append((cfg.cache_dir, folder)),
    )
    folder = tmp_path / AWKWARD
    assert main([f"output_dir={folder}", f"cache_dir={folder / 'c'}"]) == 0
    grid = tmp_path / "it's größer [1]"
    main(["-m", f"output_dir={grid}", f"cache_dir={grid / 'c'}", "seed=0,1"])
    assert ran == [
        (str(folder / "c"), folder),
        (str(grid / "c"), grid / "0"),
        (str(grid / "c"), grid / "1"),
    ]


def test_the_version_is_this_programs(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flare_exp {flare_exp.__version__}\n"


@pytest.mark.parametrize("words", ["--help", "plan --help"])
def test_help_may_be_cut_short(words):
    done = subprocess.run(
        f"{sys.executable} -m flare_exp {words} | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert "python -m flare_exp" in done.stdout
    assert not done.stderr


def test_help_teaches_and_is_quick():
    text = help_text()
    assert text.count("python -m flare_exp ") >= 5
    for group, names in composition.groups().items():
        assert f"\n  {group}\n" in text
        assert all(f"\n    {name} " in text for name in names)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "flare_exp", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert time.perf_counter() - start < 2
    assert done.stdout.strip() == text.strip()


def test_import_is_light():
    heavy = "('torch', 'transformers', 'lightning', 'datasets')"
    code = f"import sys, flare_exp.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


def test_cfg_job():
    done = subprocess.run(
        [sys.executable, "-m", "flare_exp", "--cfg", "job", "--resolve", "adapter.r=4"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "r: 4" in done.stdout
    assert "${" not in done.stdout
