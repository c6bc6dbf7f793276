"""What the jobs of a plan cost, relative to others."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from planned import SIZES, jobs

from flare_exp.cli import plan
from flare_exp.cli.main import main
from flare_exp.config import validation
from flare_exp.errors import UserError
from flare_exp.planning import architectures, costs, plans, shapes


@pytest.fixture
def cost(tmp_path, monkeypatch):
    """(artifacts, overrides) -> their estimate, of a tiny model and data that are not here."""
    for family in ("xlm-roberta", "llama"):
        path = f"org/tiny-{family}"
        monkeypatch.setitem(architectures.ARCHITECTURES, path, {"model_type": family, **SIZES})
    common = ["model=custom", "task=nusax", "mt=gold", f"cache_dir={tmp_path / 'cache'}"]

    def estimated(artifacts, *overrides, family="xlm-roberta"):
        words = [*common, f"model.path=org/tiny-{family}", *overrides]
        cfg = jobs(*words, scratch=tmp_path)[-1].cfg
        return plans._estimate(cfg, tmp_path, {*artifacts})

    return estimated


@pytest.mark.slow
def test_texts_without_labels_are_labeled_and_trained_on(cost, tmp_path):
    names = ["labels flare", "transfer"]
    own = cost(names, "method=distil", "task.lang=jav").seconds
    # as many texts, and about as long, as the benchmark has to train on
    row = {"text": "x" * 500, "source": "y" * 500}
    file = tmp_path / "more.jsonl"
    file.write_text("\n".join(json.dumps(row) for _ in range(500)))
    more = cost(names, "method=distil", "task.lang=jav", f"distil.texts={file}").seconds
    assert [more[name] / own[name] for name in names] == pytest.approx([2, 2], rel=0.1)


@pytest.mark.slow
def test_devices_of_several_machines_divide_the_work(cost):
    def seconds(*trainer):
        return cost(["transfer"], "method=lora", "task.lang=jav", *trainer).seconds["transfer"]

    assert seconds("trainer=ddp", "trainer.devices=2", "trainer.nodes=2") == seconds(
        "trainer=ddp", "trainer.devices=4"
    )
    few = "trainer.limit_train_batches=4"  # of all devices together
    one, four = seconds("trainer=gpu", few), seconds("trainer=ddp", "trainer.devices=4", few)
    assert four == pytest.approx(one / 4, rel=0.02)


def test_states_of_sources_that_several_languages_share_are_kept_once(cost):
    one, three = (
        cost(["transfer"], "method=flare", "source.cache=disk", f"task.lang={langs}").states
        for langs in ("jav", "[jav,ban,ace]")
    )
    assert one == three > 0


@pytest.mark.slow
def test_every_beam_is_written_in_tests_and_validation(cost):
    words = ["method=lora", "task.lang=jav", "decode=generate", "transfer.epochs=1"]
    names = ["transfer", "test"]
    one, five = (
        cost(names, *words, f"decode.beams={beams}", family="llama").seconds for beams in (1, 5)
    )
    assert five["test"] > 2 * one["test"]
    # an epoch validates 100 rows, and the test set has 400
    added = {name: five[name] - one[name] for name in names}
    assert added["transfer"] == pytest.approx(added["test"] / 4, rel=0.01)


def test_a_job_that_does_not_fit_has_a_micro_batch_that_does(tmp_path, monkeypatch, capsys):
    counts = {"trainable": 1, "total": 1}

    def estimate(cfg, scratch, todo):
        if (cfg.data.micro_batch_size or 8) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return costs.Estimate([], parameters={"transfer": counts}, memory=10**9)

    monkeypatch.setattr(plans, "_estimate", estimate)
    words = ["model=xlmr_base", "task=nusax", "task.lang=jav", "mt=gold", "method=lora"]
    words += ["data.batch_size=8", f"cache_dir={tmp_path / 'cache'}"]
    assert main(["plan", "memory=24GB", *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "more than there is" in said
    assert "a job ran out of memory" in said
    assert "data.micro_batch_size=4 fits 24GB" in said


@pytest.mark.parametrize(("select", "copies"), [("best", 8), ("last", 6)])
def test_a_training_keeps_its_state_on_the_way(cost, select, copies):
    """Three copies of what is trained, twice while they are replaced, and the best epoch."""
    found = cost(["finetune"], "method=zero_shot", "task.lang=jav", f"task.select={select}")
    trained = 4 * found.parameters["finetune"]["trainable"]
    assert found.disk["finetune"] == trained
    assert found.passing["finetune"] == copies * trained


def test_the_largest_training_counts_on_the_disk():
    """Jobs that are planned run one after the other."""
    artifacts = {"finetune": None, "transfer": None}
    estimate = costs.Estimate([], disk=dict.fromkeys(artifacts, 10))
    found = []
    for number in range(2):
        own = replace(estimate, passing={"finetune": 100, "transfer": 50})
        cfg = SimpleNamespace(cache_dir="cache")
        made = dict.fromkeys(artifacts, SimpleNamespace(kind="finetune", reused=False))
        found.append(plans.Job(number, [], cfg, made, artifacts, own))
    assert "disk: 140 B in cache" in " ".join(plan.sums(found))


def test_a_model_without_its_data_is_planned_for_a_gpu(tmp_path, monkeypatch):
    """As one that is not here, since both are counted."""
    monkeypatch.setattr(shapes, "weights_here", lambda *_: True)
    words = ["model=xlmr_base", "task=nusax", "mt=gold", f"cache_dir={tmp_path / 'cache'}"]
    for trainer in ("auto", "gpu"):
        (composed,), problems = validation.validate([*words, f"trainer={trainer}"], False)
        assert not problems
        assert plans.settled(plan._typed(composed)).trainer.accelerator == "gpu"


def test_an_embedded_model_is_not_planned_without_data(tmp_path):
    words = ["model=tiny", "task=nusax", "mt=gold", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(UserError, match="task=nusax: the data are not here, and an embedded model"):
        jobs(*words, scratch=tmp_path)
