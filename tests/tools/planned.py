"""Jobs of a command line as `plan` sees them, and sizes of a model that is not here."""

from pathlib import Path

from flare_exp.cli import plan
from flare_exp.config import composition, validation
from flare_exp.planning import plans

# sizes of a small model of any family, as if its checkpoint were on the hub
SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 1024,
}


def jobs(*overrides: str, scratch: Path, multirun: bool = False) -> list[plans.Job]:
    """Return the jobs of a command line without mistakes, which are not priced."""
    composed, problems = validation.validate(overrides, multirun)
    assert not problems
    pairs = zip(composition.job_overrides(overrides), map(plan._typed, composed), strict=True)
    return plans.looked_up(list(pairs), multirun, scratch)
