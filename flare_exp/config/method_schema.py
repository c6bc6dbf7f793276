"""Define the options of methods: fusion, source, mixing and ensembles."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from flare_exp.config.methods import DISTIL, ENSEMBLE, METHODS
from flare_exp.config.options import option
from flare_exp.data.source_augmentation import KINDS, OTHER

FUSING_METHODS = tuple(name for name, method in METHODS.items() if method.fuses)
SOURCE_METHODS = tuple(name for name, method in METHODS.items() if method.mode.pairs)


@dataclass
class MethodConfig:
    """The method and its label."""

    name: str = option("???", "method", group="method")
    # the method with its fusion, if it has one
    label: str = option("${.name}", "", no_effect="a name for curves")
    of: list[str] = field(
        default_factory=list,
        metadata={
            "help": "ensemble: the methods whose probabilities are averaged; distil: the teachers, "
            "whose probabilities are averaged, too",
            "each": tuple(name for name in METHODS if name != DISTIL),
            "may_be_empty": True,
            "only": (ENSEMBLE, DISTIL),
        },
    )
    weights: str = option(
        "validation",
        "ensemble: of its members; chosen by the validation score, equal, or by the similarity of "
        "each test text and its translation",
        choices=("validation", "equal", "similarity"),
        only=(ENSEMBLE,),
    )


@dataclass
class FusionConfig:
    """The fusion function and its inputs."""

    name: str = option("???", "fusion function", group="fusion")
    source_layer: str = option(
        "ahead",
        "block i fuses what block i+1 (ahead) or i (same) reads in the source pass",
        choices=("ahead", "same"),
    )
    source_state: str = option(
        "layer_input",
        "what the projections read, or raw hidden states",
        choices=("layer_input", "block_output"),
    )
    answer_source: str = option(
        "last",
        "decoders: what answer tokens fuse, the last source prompt state or none",
        choices=("last", "none"),
    )
    query: str | None = option(
        None, "cross_attn: who asks", choices=("target", "source"), only=("cross_attn",)
    )
    heads: int | None = option(
        None, "cross_attn: heads; must divide adapter.r", min=1, only=("cross_attn",)
    )
    bias: float | None = option(None, "gated: initial bias of the gate", only=("gated",))

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that this fusion function alone has, as far as they are given."""
        own = [f.name for f in fields(self) if self.name in f.metadata.get("only", ())]
        return {name: value for name in own if (value := getattr(self, name)) is not None}


@dataclass
class SourceConfig:
    """The source of a fusion: how it is drawn in training, ablations, the cache of its states."""

    dropout: float = option(
        0.0,
        "share of training examples that lose their source, drawn in every epoch",
        min=0,
        max=1,
    )
    noise: float = option(
        0.0,
        "share of training examples that get a wrong source, drawn in every epoch",
        min=0,
        max=1,
    )
    noise_kinds: list[str] = field(
        default_factory=lambda: [OTHER],
        metadata={
            "help": "wrong sources: another example's, or the own one with any share of wrong "
            "words (mt.errors)",
            "each": KINDS,
        },
    )
    langs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "languages of the sources that are fused, e.g. [eng,ind]; empty: English",
            "may_be_empty": True,
        },
    )
    systems: list[str] = field(
        default_factory=list,
        metadata={
            "help": "further translations of the test texts that are fused with those by mt, each "
            "with the options of its file in conf/mt, e.g. [nllb_600m]; mt=[a,b] is short for mt=a "
            "source.systems=[b]",
            "may_be_empty": True,
        },
    )
    combine: str = option(
        "attention",
        "several sources at a position; cross_attn attends to the tokens of all of them",
        choices=("attention", "mean"),
    )
    shuffle: bool = option(False, "ablation: every example gets another one's source")
    empty: bool = option(False, "ablation: no source at all")
    ablate_in: str = option(
        "all", "data that shuffle and empty change", choices=("all", "train", "test")
    )
    cache: str = option(
        "off",
        "compute the training sources' states once and keep them, or in every epoch anew",
        choices=("off", "memory", "disk"),
    )
    dtype: str | None = option(
        None,
        "of cached states; null: as they are read, so that nothing is rounded",
        choices=("float32", "float16", "bfloat16"),
    )


@dataclass
class DistilConfig:
    """Method distil: what the student learns from its teachers."""

    weight: float = option(
        1.0, "weight of the loss against the teachers' soft labels; labels have 1", above=0
    )
    temperature: float = option(2.0, "softens both distributions in that loss", above=0)
    lr: float | None = option(
        None, "peak learning rate of the student; null: transfer.lr, the teachers'", above=0
    )
    texts: str | None = option(
        None,
        "file of further texts without labels, which the teachers label (.jsonl, .csv, .tsv, "
        ".parquet); columns as for predict",
    )


@dataclass
class MixupConfig:
    """Method x_mixup: where and how source and target states are mixed."""

    depths: list[float] | None = field(
        default=None,
        metadata={
            "help": "blocks that mix, as shares of the depth from 0 to 1; null: the authors' for "
            "the kind of task",
        },
    )
    rank: int = option(8, "rank of the maps that attend from target to source", min=1)
    most: float = option(0.5, "largest share of the source in the mixture", above=0, max=1)
    kl: float = option(1.0, "weight of the loss between the two label distributions", min=0)
    mse: float = option(1.0, "weight of the loss between the two final states", min=0)
