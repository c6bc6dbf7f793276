"""The table of faults that the tests must find is about the present code."""

import pytest
from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize(("file", "before", "after", "tests"), MUTATIONS)
def test_a_fault_can_still_be_put_in(file, before, after, tests):
    code = (ROOT / "flare_exp" / file).read_text()
    assert code.count(before) >= 1
    compile(code.replace(before, after, 1), file, "exec")
    assert (ROOT / "tests" / tests).is_file()
