"""Jobs of a plan: what each builds, and what it shares with an earlier one."""

import pytest
from planned import jobs

from flare_exp.cli import plan
from flare_exp.config import validation
from flare_exp.config.methods import members_of
from flare_exp.experiment import pipeline
from flare_exp.planning import plans, preview

# neither model nor data of this are here
ABSENT = ["model=xlmr_base", "task=nusax", "task.lang=jav"]


@pytest.mark.parametrize("translator", ["nllb_600m", "gold"])
def test_each_rate_of_wrong_words_is_trained_and_tested_on(translator, tmp_path):
    words = [*ABSENT, f"mt={translator}", "method=flare", f"cache_dir={tmp_path / 'cache'}"]

    def owners(*noise):
        grid = jobs(*words, *noise, scratch=tmp_path, multirun=True)
        return [[job.owners[name] for name in ("transfer", "test")] for job in grid]

    assert owners("mt.noise=0,0.2,0.8") == [[None, None]] * 3
    assert owners("mt.noise=0.2", "mt.seed=0,1") == [[None, None]] * 2
    # the same training, and tests of other texts
    assert owners("mt.noise=0,0.2", "mt.noise_in=test") == [[None, None], [0, None]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["method=ensemble", "method.of=[zero_shot,translate_test]"],
        ["method=ensemble", "method.of=[lora,flare]", "method.weights=equal"],
        ["method=distil"],
    ],
    ids=["validated", "equal", "distil"],
)
def test_members_and_teachers_build_what_the_run_asks_of_them(method, tmp_path):
    words = [*ABSENT, "mt=nllb_600m", *method, f"cache_dir={tmp_path / 'cache'}"]
    found = jobs(*words, scratch=tmp_path)
    (composed,), _ = validation.validate(words, multirun=False)
    cfg = plans.settled(plan._typed(composed))
    made = pipeline.run_stages(preview.preview(cfg, tmp_path).run, members_of(cfg.method))
    if cfg.method.name == "ensemble":
        del made["test"]  # the mean of its members
    asked = {(a.kind, a.digest) for a in made.values()}
    assert {(a.kind, a.digest) for job in found for a in job.made.values()} == asked
    member = found[0]
    assert member.todo <= plans._estimate(member.cfg, tmp_path, member.todo).seconds.keys()


def test_a_cell_that_a_grid_leaves_out_has_no_members(tmp_path):
    words = [*ABSENT, "mt=gold", f"cache_dir={tmp_path / 'cache'}"]
    grid = [*words, "method=ensemble", "fusion=add,mul"]  # two methods without a fusion
    assert jobs(*grid, scratch=tmp_path, multirun=True) == []
