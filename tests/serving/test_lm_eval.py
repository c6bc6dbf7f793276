"""lm-evaluation-harness scores a generative run on its own test set as the run did."""

import json
import math

import pytest
from finished_runs import SMALL_MT

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'flare-exp[lm-eval]'")

import pyarrow.parquet as pq
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from flare_exp.errors import UserError
from flare_exp.serving import lm_eval

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serving")]


def evaluate(given, tmp_path, **options):
    """`lm_eval --model flare_exp --model_args ... --tasks run.yaml`."""
    page = tmp_path / "run.yaml"
    page.write_text("task: flare_exp_run\nclass: !function flare_exp.serving.lm_eval.RunTask\n")
    manager = TaskManager(include_defaults=False, metadata=given)
    return simple_evaluate(
        "flare_exp", given, [str(page)], task_manager=manager, batch_size=1, **options
    )


@pytest.fixture
def scored(finished_run):
    """A Llama that reads its source and compares labels; the batches of its test have 4, 4, 2."""
    return finished_run("task=toy_nli", architecture="llama")


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", ("task=toy_nli",)),
        ("llama", ("task=toy_nli", "decode=generate", "decode.max_new_tokens=3")),
        ("mt5", ("task=toy_qa", "task.form=generative", "method=lora", "decode.max_new_tokens=4")),
        ("llama", ("task=toy_qa", "method=translate_test", "decode.max_new_tokens=4", *SMALL_MT)),
    ],
    ids=["labels", "generated-labels", "answers", "translated-back"],
)
def test_scores_are_those_of_the_run(architecture, overrides, finished_run, tmp_path):
    folder = finished_run(*overrides, architecture=architecture)
    found = evaluate({"run": str(folder)}, tmp_path)
    own = json.loads((folder / "metrics.json").read_text())["test"]
    assert {name: found["results"]["flare_exp_run"][f"{name},none"] for name in own} == own
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    samples = found["samples"]["flare_exp_run"]
    metric = next(iter(own))
    assert [sample[metric][1] for sample in samples] == [row["prediction"] for row in rows]


def test_likelihoods_are_those_that_the_run_compared(scored, tmp_path):
    """They need the source of every document, and give the probabilities of the run."""
    found = evaluate({"run": str(scored)}, tmp_path, limit=5)
    samples = found["samples"]["flare_exp_run"]
    rows = pq.read_table(scored / "predictions.parquet").to_pylist()
    assert len(samples) == 5
    for sample, row in zip(samples, rows, strict=False):
        assert "\n".join(sample["doc"]["source"]) == row["source"]
        likelihoods = [resp[0][0] for resp in sample["resps"]]
        assert max(likelihoods) < 0
        total = sum(map(math.exp, likelihoods))
        shares = [math.exp(one) / total for one in likelihoods]
        assert shares == pytest.approx(row["probabilities"], rel=1e-5)


def test_options_of_a_loaded_run_are_taken(scored, tmp_path):
    found = evaluate({"run": str(scored), "data.batch_size": 5, "offline": True}, tmp_path, limit=2)
    tests = lm_eval.load(str(scored), "data.batch_size=5", "offline=true")
    assert tests.run.run.cfg.data.batch_size == 5
    assert found["n-samples"]["flare_exp_run"] == {"original": 10, "effective": 2}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "model_args: run is missing; give run=<run folder>"),
        ({"run": "nowhere"}, "nowhere: there is no finished run"),
        ({"run": "x", "pretrained": "gpt2"}, "model_args: pretrained=gpt2: there is no such"),
        ({"run": "x", "data.batchsize": 2}, "did you mean data.batch_size?"),
    ],
)
def test_wrong_arguments_are_named(given, problem):
    with pytest.raises(UserError) as failure:
        lm_eval.RunModel(batch_size=1, **given)
    assert problem in str(failure.value)


def test_a_run_with_a_head_is_refused(flare_folder):
    with pytest.raises(UserError, match="by a head; give a generative run"):
        lm_eval.RunModel(run=str(flare_folder))


def test_what_the_run_has_not_read_is_refused(scored, tmp_path):
    given = {"run": str(scored)}
    with pytest.raises(UserError, match="the run reads its own prompt"):
        evaluate(given, tmp_path, system_instruction="Answer in English.")
    model, task = lm_eval.RunModel(**given), lm_eval.RunTask({"metadata": given})
    (prompt, label, name) = task.construct_requests(task.test_docs()[0], "x")[0].arguments
    for arguments in (("x", label), ("x", label, name), (prompt, label, "another/id")):
        other = Instance("loglikelihood", {}, arguments, 0, ("xnli_sw", 0, 1))
        with pytest.raises(UserError, match="task xnli_sw: model flare_exp answers the prompts"):
            model.loglikelihood([other])
    with pytest.raises(UserError, match="gives no likelihood of whole texts"):
        model.loglikelihood_rolling([])


def test_other_decoding_than_that_of_the_run_is_refused(finished_run, tmp_path):
    folder = finished_run(
        "task=toy_nli", "decode=generate", "decode.max_new_tokens=3", architecture="llama"
    )
    with pytest.raises(UserError, match=r"gen_kwargs=\{'max_gen_toks': 9\}: the run decodes with"):
        evaluate({"run": str(folder)}, tmp_path, gen_kwargs="max_gen_toks=9")


def test_a_mean_of_several_passes_is_refused_and_one_of_them_is_scored(finished_run, tmp_path):
    folder = finished_run("predict.sources=[given,none]", "task=toy_nli", architecture="llama")
    with pytest.raises(UserError, match=r"averages given and none, .*predict\.sources=\[given\]"):
        lm_eval.RunModel(run=str(folder))
    one = lm_eval.RunModel(run=str(folder), **{"predict.sources": "[given]"})
    assert len(one.tests.documents) == 10
