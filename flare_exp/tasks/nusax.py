"""NusaX-senti: sentiment in Indonesian local languages (arXiv 2205.15960).

The texts are human translations of one another.
"""

from __future__ import annotations

from typing import Any, ClassVar

from flare_exp.tasks.base import Benchmark
from flare_exp.tasks.examples import Example
from flare_exp.tasks.tables import ID, LABEL, TEXT


class NusaX(Benchmark):
    """NusaX-senti. Rows are paired across languages by the benchmark's `id`.

    They cannot be paired by position: the files differ in row order.
    """

    name = "nusax"
    english = "eng"
    languages = ("ace", "ban", "bbc", "bjn", "bug", "ind", "jav", "mad", "min", "nij", "sun")
    fields = ("text",)
    prompt = "{text}\nSentiment:"
    labels = ("negative", "neutral", "positive")
    metric = "macro_f1"
    parallel = True

    hub_id = "mteb/NusaX-senti"
    revision = "7b2ff4facde8a6473f667a38edef1d03ce9ca0dc"
    columns: ClassVar = {"id": ID, "text": TEXT, "label": LABEL}
    sizes: ClassVar = {"train": 500, "validation": 100, "test": 400}

    def example(self, id: str, row: dict[str, Any]) -> Example:
        """Convert one row to an example."""
        return Example(id, str(row["id"]), (row["text"],), row["label"])
