"""Define the options of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flare_exp.config.languages import as_list, simplified
from flare_exp.config.options import option
from flare_exp.tasks import CUSTOM, TASKS


@dataclass
class TaskConfig:
    """The benchmark, its target languages and its splits."""

    name: str = option("???", "name of the benchmark", choices=(*TASKS, CUSTOM))
    # one language is text, as most runs have it; OmegaConf has no union of text and list
    lang: Any = option(
        "???",
        "target language, in the benchmark's own code; [a,b]: one adapter for several",
        may_be_empty=True,
    )
    spec: str | None = option(
        None, "custom: YAML file that describes your data (docs/your-data.md)", only=("custom",)
    )
    unseen: list[str] = field(
        default_factory=list,
        metadata={
            "help": "further languages to test on, which the adapter is not trained on",
            "may_be_empty": True,
        },
    )
    temperature: float | None = option(
        None,
        "several languages: an epoch draws each with a probability proportional to "
        "rows^(1/temperature) (null: it reads every row of all of them once)",
        above=0,
    )
    data_dir: str | None = option(None, "folder of <language>/<split>.parquet instead of the hub")
    train_data_dir: str | None = option(
        None,
        "xquad: folder of TyDiQA's <language>/<split>.parquet, the training data",
        only=("xquad",),
    )
    limit: int | None = option(None, "only the first N examples of every split", min=1)
    world_seed: int = option(0, "seed of the generated world (toy tasks)", min=0, max=2**32 - 1)
    form: str = option(
        "auto",
        "by a head where the model has one, or as a prompt",
        choices=("auto", "head", "generative"),
    )
    window: int | None = option(
        None, "question answering by a head: tokens of a window (null: data.max_length)", min=8
    )
    doc_stride: int | None = option(
        None,
        "question answering by a head: long contexts are read in windows that share so many "
        "tokens (null: they are cut)",
        min=0,
    )
    max_answer_length: int = option(
        30, "question answering by a head: longest answer in tokens", min=1
    )
    train_split: str = option("train", "split or slice to train on, e.g. validation[:2000]")
    validation_split: str | None = option(
        "validation", "split or slice that selects the checkpoint (null: none is held out)"
    )
    test_split: str = option("test", "split or slice to report")
    english_test_split: str | None = option(
        None, "split or slice of the English test block (null: test_split)"
    )
    select: str = option(
        "best",
        "which epoch's weights are kept: best on validation, or last",
        choices=("best", "last"),
    )

    def __post_init__(self) -> None:
        """Read a list of one language as that language."""
        self.lang = simplified(self.lang)

    @property
    def langs(self) -> list[str]:
        """Return the languages that are trained on, and tested."""
        return as_list(self.lang)

    @property
    def tested(self) -> list[str]:
        """Return the languages that are tested, the unseen ones last."""
        return [*self.langs, *self.unseen]
