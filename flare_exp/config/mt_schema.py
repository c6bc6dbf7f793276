"""Define the options of translation."""

from __future__ import annotations

from dataclasses import dataclass, field

from flare_exp.config.options import option
from flare_exp.translation.base import BENCHMARK
from flare_exp.translation.noise import ERRORS


@dataclass
class MtPretrainConfig:
    """Training of the embedded translation model."""

    pairs: int = option(0, "sentence pairs of generated text", min=1)
    steps: int = option(0, "optimizer steps", min=1)
    batch_size: int = option(0, "pairs per step", min=1)
    lr: float = option(0.0, "learning rate", above=0)
    vocab_size: int = option(0, "size of the learned vocabulary", min=100)
    hidden_size: int = option(0, "width", min=8)
    layers: int = option(0, "blocks of the encoder, and of the decoder", min=1)
    heads: int = option(0, "attention heads", min=1)


@dataclass
class MtConfig:
    """The translations and the noise that is added to them."""

    name: str = option("???", "translation", group="mt")
    noise: float = option(0.0, "share of words made wrong after translation", min=0, max=1)
    errors: list[str] = field(
        default_factory=lambda: list(ERRORS),
        metadata={"help": "kinds of wrong words", "each": ERRORS},
    )
    noise_in: str = option(
        "all",
        "translations with these wrong words: all, those to train on, or those of the test data",
        choices=("all", "train", "test"),
    )
    seed: int = option(0, "seed of that noise", min=0, max=2**32 - 1)
    path: str | None = option(
        None,
        "mt=file: folder of mt_<from>-<to>/<split>.parquet; models: hub id or checkpoint folder",
        only=("file", "model"),
    )
    fallback: str | None = option(
        None, "mt=file: what stands in for a missing direction", choices=("gold",), only=("file",)
    )
    revision: str | None = option(
        None,
        "models: commit or branch of the hub checkpoint; null: its newest commit. mt=command: "
        "version of the program and its data, in your own words",
        only=("model", "command"),
    )
    command: str | None = option(
        None,
        "mt=command: the program and its arguments, with {from} and {to}; lines in, lines out",
        only=("command",),
    )
    codes: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "mt=command: its codes of languages, e.g. {en: eng, es: spa}; else ISO 639-3",
            "only": ("command",),
        },
    )
    timeout: float = option(
        3600.0,
        "mt=command: most seconds for one shard",
        above=0,
        no_effect="what takes longer is an error",
        only=("command",),
    )
    blank_lines: bool = option(
        True,
        "mt=command: an empty line after every line, in and out, so that lines stay apart",
        only=("command",),
    )
    backend: str = option(
        "transformers",
        "models: what runs them",
        choices=("transformers", "ctranslate2"),
        only=("model",),
    )
    quantization: str | None = option(
        None,
        "ctranslate2: of the weights; null: int8, on GPUs int8_float16",
        choices=("float32", "float16", "bfloat16", "int8", "int8_float16"),
        only=("model",),
    )
    beams: int = option(1, "models: 1 is greedy", min=1, only=("model",))
    max_length: int = option(
        256,
        "models: longest piece in tokens; longer texts are split into sentences",
        min=16,
        max=1024,
        only=("model",),
    )
    no_repeat_ngram: int = option(
        0,
        "models: no n-gram twice in a translation, against loops (0: off)",
        min=0,
        only=("model",),
    )
    batch_tokens: int | None = option(
        None,
        "models: tokens per batch; null: by device",
        min=1,
        no_effect="a translation does not depend on the texts beside it",
        only=("model",),
    )
    marker: str = option(
        "quotes",
        "question answering: how an answer is marked in translation",
        choices=("quotes", "brackets", "tags"),
        only=("model", "command"),
    )
    shard: int = option(
        512,
        "models and mt=command: texts between two saved pieces of work",
        min=1,
        no_effect="a translation does not depend on the texts beside it",
        only=("model", "command"),
    )
    pretrain: MtPretrainConfig | None = option(None, "how mt=toy_nllb is built", only=("toy_nllb",))

    @property
    def kind(self) -> str:
        """Return what translates: "benchmark" (its authors), "file", "command" or "model"."""
        if self.name in BENCHMARK:
            return "benchmark"
        return self.name if self.name in ("file", "command") else "model"

    @property
    def translates(self) -> bool:
        """Return whether a model or a program of this run translates."""
        return self.kind in ("model", "command")
