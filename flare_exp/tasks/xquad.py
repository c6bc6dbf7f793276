"""XQuAD: professional translations of SQuAD questions in twelve languages (arXiv 1910.11856).

The benchmark is a test set alone, so the English training data are TyDiQA-GoldP's.
"""

from __future__ import annotations

from typing import Any, ClassVar

from flare_exp.errors import UserError
from flare_exp.tasks.base import Benchmark
from flare_exp.tasks.examples import Example, read_answers
from flare_exp.tasks.reading import read_parquet
from flare_exp.tasks.tables import ANSWERS, ID, TEXT
from flare_exp.tasks.tydiqa import TyDiQA


class TrainingData(TyDiQA):
    """TyDiQA-GoldP, from the hub or from `task.train_data_dir`."""

    def rows(self, lang: str, split: str) -> list[dict[str, Any]]:
        """Read the rows of a split; a message about a file names its option."""
        if self.data_dir is None:
            return super().rows(lang, split)
        path = self.data_dir / lang / f"{split}.parquet"
        return read_parquet(path, self.columns, "task.train_data_dir")

    def _place(self, lang: str, split: str) -> str:
        if self.data_dir is None:
            return super()._place(lang, split)
        return f"task.train_data_dir: {self.data_dir / lang / f'{split}.parquet'}"


class XQuAD(Benchmark):
    """XQuAD's `test` split in every language, and TyDiQA's other splits in English.

    The test rows of all languages are translations of one another, paired by `id`. The training
    data exist in English alone, so mt=gold can translate tests only. Contexts may hold a byte-order
    mark, which counts in the answers' offsets; texts are kept as they are.

    Args:
        data_dir: folder of XQuAD's `<lang>/test.parquet`; None for the hub.
        train_data_dir: folder of TyDiQA's `en/<split>.parquet`; None for the hub.
    """

    name = "xquad"
    english = "en"
    languages = ("ar", "de", "el", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
    fields = TyDiQA.fields
    prompt = TyDiQA.prompt
    metric = "exact_match"
    parallel = True

    hub_id = "google/xquad"
    # the commit that several public projects pin; not loaded live when this was written
    revision = "51adfef1c1287aab1d2d91b5bead9bcfb9c68583"
    columns: ClassVar = {"id": ID, "context": TEXT, "question": TEXT, "answers": ANSWERS}
    # rows by language: a split has none in the other languages
    sizes: ClassVar = {
        "test": 1190,
        **{split: {"en": rows["en"]} for split, rows in TyDiQA.sizes.items()},
    }

    def __init__(self, data_dir: str | None = None, train_data_dir: str | None = None, **kwargs):
        super().__init__(data_dir, **kwargs)
        self.training = TrainingData(data_dir=train_data_dir)

    @classmethod
    def hub_config(cls, lang: str) -> str:
        """Return the configuration of the hub's data set that holds a language."""
        return f"xquad.{lang}"

    def hub_rows(self, lang: str, split: str) -> list[dict[str, Any]]:
        """Read the rows of the test split, which the hub calls validation."""
        return super().hub_rows(lang, "validation")

    def read(self, lang: str, split: str) -> list[Example]:
        """Return every example of one split, in file order.

        Raises:
            UserError: the data are unreadable, or another split than `test` is asked for in another
                language than English.
        """
        if split == "test":
            return super().read(lang, split)
        if lang != self.english:
            raise UserError(
                f"{self.name} has no split {split} in {lang}: test is its only split there; what "
                "it trains on is TyDiQA's English"
            )
        return self.training.read(lang, split)

    def example(self, id: str, row: dict[str, Any]) -> Example:
        """Convert one row to an example."""
        texts, answers = (row["context"], row["question"]), read_answers(row["answers"])
        return Example(id, str(row["id"]), texts, answers=answers)

    def _place(self, lang: str, split: str) -> str:
        if split == "test":
            return super()._place(lang, split)
        return self.training._place(lang, split)
