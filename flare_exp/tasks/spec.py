"""Describe a data set of one's own: its files, its columns, its languages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flare_exp.errors import UserError
from flare_exp.languages import Language

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".jsonl", ".parquet")


class SpecError(UserError):
    """Error for a description with mistakes; `problems` has a message for each."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n  - ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set on the Hugging Face hub, at a commit."""

    hub_id: str
    config: str
    split: str
    revision: str

    def __str__(self) -> str:
        return f"the data set {self.hub_id} ({self.config}, {self.split})"


@dataclass(frozen=True)
class Columns:
    """The columns of a data set that are read, and how its text files are written.

    Args:
        texts: field of an example -> column. Question answering has `context` and `question`.
        label: classification: the column of the labels.
        labels: name of a label -> the values of the column that stand for it, as text. Empty: not
            known.
        answers: question answering: the column of the answers.
        answer_start: the column of their places in the context; None: answers have none, or have
            SQuAD's form.
        id: the column of the ids; None: a row goes by its number.
        delimiter: of CSV and TSV files; None: by the file's suffix.
        quotes: whether `"` in CSV and TSV files encloses a cell.
    """

    texts: Mapping[str, str]
    label: str | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answers: str | None = None
    answer_start: str | None = None
    id: str | None = None
    delimiter: str | None = None
    quotes: bool = True

    @property
    def names(self) -> list[str]:
        """Return the columns that are read, each once."""
        own = (*self.texts.values(), self.label, self.answers, self.answer_start, self.id)
        return list(dict.fromkeys(name for name in own if name is not None))


@dataclass(frozen=True)
class DataSpec:
    """A data set of one's own.

    Args:
        name: its name in results.
        english: the language of the training data.
        files: language -> split -> where its rows are.
        columns: the columns that are read.
        metric: the metric that selects, and that tables show.
        prompt: a template over the fields of `columns.texts`, for generative models.
        parallel: whether rows with the same id are translations of one another.
        languages: language -> its code and script, for translation and noise.
    """

    name: str
    english: str
    files: Mapping[str, Mapping[str, Path | HubSplit]]
    columns: Columns
    metric: str
    prompt: str
    parallel: bool
    languages: Mapping[str, Language]


def file_problem(path: Path) -> str | None:
    """Return why a file cannot be data, as far as its name says; None: it can."""
    if path.suffix.lower() in SUFFIXES:
        return None if path.is_file() else f"there is no file {path}"
    export = "; save the sheet as CSV in UTF-8" if path.suffix.startswith(".xls") else ""
    return f"its name must end in {', '.join(SUFFIXES)}{export}"


def hub_splits(spec: DataSpec, langs: Sequence[str]) -> Iterator[HubSplit]:
    """Yield the splits of some languages that are on the hub."""
    for lang in langs:
        for place in spec.files.get(lang, {}).values():
            if isinstance(place, HubSplit):
                yield place
