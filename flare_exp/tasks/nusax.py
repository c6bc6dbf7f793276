"""NusaX-senti: sentiment in Indonesian local languages, human translations of one another (arXiv 2205.15960)."""

from __future__ import annotations

from pathlib import Path

from flare_exp.errors import UserError
from flare_exp.tasks.base import Example, Task, read_hub, read_parquet


class NusaX(Task):
    """Rows are paired across languages by the benchmark's `id`, not by position: files differ in row order."""

    name = "nusax"
    english = "eng"
    languages = ("ace", "ban", "bbc", "bjn", "bug", "ind", "jav", "mad", "min", "nij", "sun")
    labels = ("negative", "neutral", "positive")
    metric = "macro_f1"
    parallel = True

    hub_id = "mteb/NusaX-senti"
    revision = "7b2ff4facde8a6473f667a38edef1d03ce9ca0dc"
    columns = ("id", "text", "label")

    def __init__(self, data_dir: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.data_dir = Path(data_dir).expanduser() if data_dir else None

    def read(self, lang: str, split: str) -> list[Example]:
        if self.data_dir:
            rows = read_parquet(self.data_dir / lang / f"{split}.parquet", self.columns)
        else:
            rows = read_hub(self.hub_id, lang, split, self.revision, self.columns)
        origin = f"{self.name}/{lang}/{split}"
        if len({row["id"] for row in rows}) != len(rows):
            raise UserError(f"{origin}: the column id has duplicates, so rows cannot be paired across languages")
        if wrong := [row for row in rows if row["label"] not in range(len(self.labels))]:
            raise UserError(f"{origin}: label {wrong[0]['label']!r} of id {wrong[0]['id']} is none of 0..{len(self.labels) - 1}")
        return [Example(f"{origin}/{i}", str(r["id"]), (r["text"],), r["label"]) for i, r in enumerate(rows)]
