"""Jobs of a plan: what each builds, and what it shares with an earlier one."""

import pytest
from planned import jobs

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
