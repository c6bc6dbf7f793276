"""Jobs of a command line, as `plan` sees them."""

from pathlib import Path

from flare_exp.cli import plan
from flare_exp.config import composition, validation
from flare_exp.planning import plans


def jobs(*overrides: str, scratch: Path, multirun: bool = False) -> list[plans.Job]:
    """Return the jobs of a command line without mistakes, which are not priced."""
    composed, problems = validation.validate(overrides, multirun)
    assert not problems
    pairs = zip(composition.job_overrides(overrides), map(plan._typed, composed), strict=True)
    return plans.looked_up(list(pairs), multirun, scratch)
