"""XNLI: natural language inference in 15 languages (arXiv 1809.05053)."""

from __future__ import annotations

from typing import Any, ClassVar

from flare_exp.tasks.base import Benchmark
from flare_exp.tasks.examples import Example
from flare_exp.tasks.tables import LABEL, TEXT


class XNLI(Benchmark):
    """XNLI. Row i is the same example in every language.

    Validation and test are human translations. The train split of the other languages is the
    authors' *machine* translation of MultiNLI, which mt=gold therefore uses for training (unless
    task.train_split is a slice of validation).
    """

    name = "xnli"
    english = "en"
    languages = ("ar", "bg", "de", "el", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
    fields = ("premise", "hypothesis")
    prompt = "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:"
    labels = ("entailment", "neutral", "contradiction")
    metric = "accuracy"
    parallel = True
    machine_splits = ("train",)

    hub_id = "facebook/xnli"
    # the commit that several public projects pin; not loaded live when this was written
    revision = "b8dd5d7af51114dbda02c0e3f6133f332186418e"
    columns: ClassVar = {"premise": TEXT, "hypothesis": TEXT, "label": LABEL}
    sizes: ClassVar = {"train": 392_702, "validation": 2_490, "test": 5_010}

    def example(self, id: str, row: dict[str, Any]) -> Example:
        """Convert one row to an example."""
        return Example(id, id.rpartition("/")[2], (row["premise"], row["hypothesis"]), row["label"])
