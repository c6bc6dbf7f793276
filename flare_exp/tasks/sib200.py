"""SIB-200: topics of sentences in 205 languages (arXiv 2309.07445).

The texts are those of FLORES-200, human translations of one another.
"""

from __future__ import annotations

from typing import Any, ClassVar

from flare_exp.languages import FLORES
from flare_exp.tasks.base import Benchmark
from flare_exp.tasks.examples import Example
from flare_exp.tasks.tables import ID, NAME, TEXT


class SIB200(Benchmark):
    """SIB-200. Rows are paired across languages by the benchmark's `index_id`.

    They cannot be paired by position: the files differ in row order.
    """

    name = "sib200"
    english = "eng_Latn"
    languages = tuple(
        "sat_Olck" if code == "sat_Beng" else code for code in FLORES if code != "eng_Latn"
    )
    fields = ("text",)
    prompt = "{text}\nTopic:"
    labels = (
        "science/technology",
        "travel",
        "politics",
        "sports",
        "health",
        "entertainment",
        "geography",
    )
    metric = "accuracy"
    parallel = True

    hub_id = "mteb/sib200"
    # the commit that several public projects pin; not loaded live when this was written
    revision = "a74d7350ea12af010cfb1c21e34f1f81fd2e615b"
    columns: ClassVar = {"index_id": ID, "category": NAME, "text": TEXT}
    sizes: ClassVar = {"train": 701, "validation": 99, "test": 204}

    def example(self, id: str, row: dict[str, Any]) -> Example:
        """Convert one row to an example."""
        return Example(id, str(row["index_id"]), (row["text"],), self.label_of(row["category"]))
