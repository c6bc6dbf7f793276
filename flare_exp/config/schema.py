"""Define every option of a run: its type, default, help and rules.

This module is light on purpose: it imports no torch, and Hydra only inside functions, so that
`--help` answers at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from flare_exp.config.methods import METHODS
from flare_exp.tasks import TASKS
from flare_exp.translation.noise import ERRORS
from flare_exp.translation.translators import BENCHMARK

FUSING_METHODS = tuple(name for name, method in METHODS.items() if method.fuses)
LEARNED_FUSIONS = ("cross_attn", "gated")  # fusions with weights of their own
# option -> the fusion that has it
FUSION_OPTIONS = {
    "query": "cross_attn",
    "heads": "cross_attn",
    "bias": "gated",
}
# names of translations by a model
MACHINES = (
    "toy_nllb",
    "nllb_600m",
    "nllb_1b3_distilled",
    "nllb_1b3",
    "nllb_3b3",
    "custom",
)

SHARED = "loss and gradients are those of the whole batch, up to rounding and dropout masks"
OPTIMIZERS = (
    "torch.optim.AdamW",
    "torch.optim.Adam",
    "bitsandbytes.optim.AdamW8bit",
    "bitsandbytes.optim.PagedAdamW8bit",
)


def option(default: Any, help: str, **rules: Any) -> Any:
    """Return a dataclass field with its help text and rules.

    Args:
        default: the default value; "???" if a value must be given.
        help: help text of the option.
        **rules: `min`, `above` (exclusive), `max`, `choices`, `each` (choices for the items of a
            list), `refused` (value -> reason), or `no_effect`: the reason why the value cannot
            change a result. Every option without `no_effect` belongs in the key of an artifact.
    """
    return field(default=default, metadata={"help": help, **rules})


def section(cls: type, **rules: Any) -> Any:
    """Return a dataclass field for a group of options; `no_effect` applies to all of them."""
    return field(default_factory=cls, metadata=rules)


@dataclass
class PretrainConfig:
    """Pre-training of an embedded model."""

    architecture: str = option(
        "xlm-roberta",
        "family of the embedded model",
        choices=("xlm-roberta", "llama", "gemma2", "mt5"),
    )
    documents: int = option(0, "documents of generated text", min=1)
    steps: int = option(0, "optimizer steps", min=1)
    batch_size: int = option(0, "documents per step", min=1)
    lr: float = option(0.0, "learning rate", above=0)
    vocab_size: int = option(0, "size of the learned vocabulary", min=100)
    hidden_size: int = option(0, "width d", min=8)
    layers: int = option(0, "blocks", min=1)
    heads: int = option(0, "attention heads", min=1)
    target_share: float = option(0.0, "share of target-language text", min=0, max=1)
    recall: float = option(0.0, "share of documents that come back to what they said", min=0, max=1)


@dataclass
class ModelConfig:
    """The pre-trained multilingual model."""

    name: str = option(
        "???",
        "name of the model in results",
        no_effect="model.path or model.pretrain say which model it is",
    )
    path: str | None = option(None, "hub id or checkpoint folder (model=custom needs it)")
    revision: str | None = option(
        None, "commit or branch of the hub checkpoint; null: its newest commit"
    )
    dtype: str = option("float32", "of the weights", choices=("float32", "bfloat16"))
    quantize: str | None = option(
        None, "keep the frozen weights in 4 bits (needs bitsandbytes)", choices=("nf4",)
    )
    double_quant: bool = option(True, "quantize the 4-bit constants too")
    compute_dtype: str = option(
        "bfloat16", "matrix products of 4-bit weights", choices=("bfloat16", "float32", "float16")
    )
    attention: str | None = option(
        None, "implementation; null: the fastest that works", choices=("sdpa", "eager")
    )
    gradient_checkpointing: bool = option(
        False,
        "compute activations again in the backward pass, to save memory",
        no_effect="the same activations, computed twice",
    )
    pretrain: PretrainConfig | None = option(
        None, "how the embedded model is built (model=tiny...)"
    )


@dataclass
class TaskConfig:
    """The benchmark, its target language and its splits."""

    name: str = option("???", "name of the benchmark", choices=tuple(TASKS))
    lang: str = option("???", "target language, in the benchmark's own code")
    data_dir: str | None = option(None, "folder of <language>/<split>.parquet instead of the hub")
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


@dataclass
class FusionConfig:
    """The fusion function and its inputs."""

    name: str = option("???", "fusion function")
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
    query: str | None = option(None, "cross_attn: who asks", choices=("target", "source"))
    heads: int | None = option(None, "cross_attn: heads; must divide adapter.r", min=1)
    bias: float | None = option(None, "gated: initial bias of the gate")


@dataclass
class DecodeConfig:
    """Decoding of a generative model's answers."""

    name: str = option("???", "how a generative model answers")
    beams: int = option(1, "generation: 1 is greedy", min=1)
    max_new_tokens: int = option(100, "generation: longest answer in tokens", min=1)
    cache: str = option(
        "dynamic",
        "generation: key-value cache",
        choices=("dynamic", "static"),
        no_effect="the same tokens from other memory",
    )


@dataclass
class SourceConfig:
    """The source of a fusion: ablations and the cache of its states."""

    shuffle: bool = option(False, "ablation: every example gets another one's source")
    empty: bool = option(False, "ablation: no source at all")
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
class MethodConfig:
    """The method and its label."""

    name: str = option("???", "method")
    # the method with its fusion, if it has one
    label: str = option("${.name}", "", no_effect="a name for curves")


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

    name: str = option("???", "translation", choices=(*BENCHMARK, "file", *MACHINES))
    noise: float = option(0.0, "share of words made wrong after translation", min=0, max=1)
    errors: list[str] = field(
        default_factory=lambda: list(ERRORS),
        metadata={"help": "kinds of wrong words", "each": ERRORS},
    )
    seed: int = option(0, "seed of that noise", min=0, max=2**32 - 1)
    path: str | None = option(
        None,
        "mt=file: folder of mt_<from>-<to>/<split>.parquet; models: hub id or checkpoint folder",
    )
    fallback: str | None = option(
        None, "mt=file: what stands in for a missing direction", choices=("gold",)
    )
    revision: str | None = option(
        None, "models: commit or branch of the hub checkpoint; null: its newest commit"
    )
    backend: str = option(
        "transformers", "models: what runs them", choices=("transformers", "ctranslate2")
    )
    quantization: str | None = option(
        None,
        "ctranslate2: of the weights; null: int8, on GPUs int8_float16",
        choices=("float32", "float16", "bfloat16", "int8", "int8_float16"),
    )
    beams: int = option(1, "models: 1 is greedy", min=1)
    max_length: int = option(
        256,
        "models: longest piece in tokens; longer texts are split into sentences",
        min=16,
        max=1024,
    )
    no_repeat_ngram: int = option(
        0, "models: no n-gram twice in a translation, against loops (0: off)", min=0
    )
    batch_tokens: int | None = option(
        None,
        "models: tokens per batch; null: by device",
        min=1,
        no_effect="a translation does not depend on the texts beside it",
    )
    marker: str = option(
        "quotes",
        "question answering: how an answer is marked in translation",
        choices=("quotes", "brackets", "tags"),
    )
    shard: int = option(
        512,
        "models: texts between two saved pieces of work",
        min=1,
        no_effect="a translation does not depend on the texts beside it",
    )
    pretrain: MtPretrainConfig | None = option(None, "how mt=toy_nllb is built")


@dataclass
class AdapterConfig:
    """The LoRA adapter."""

    r: int = option(8, "rank of the bottleneck", min=1)
    alpha: int = option(16, "scale is alpha / r", min=1)
    dropout: float = option(0.0, "dropout on the adapter's target input", min=0, max=0.99)
    targets: str = option(
        "qv", "adapted projections; fusion is in query and value only", choices=("qv", "all_linear")
    )
    also_train: list[str] = field(
        default_factory=list,
        metadata={
            "help": "decoders: trained in full with the adapter, as the paper's Llama is",
            "each": ("embeddings", "lm_head"),
            "may_be_empty": True,
        },
    )


@dataclass
class StageConfig:
    """A training stage."""

    lr: float = option(2e-5, "peak learning rate", above=0)
    epochs: int = option(10, "passes over the training data", min=1)
    warmup: float = option(0.1, "share of the steps with rising learning rate", min=0, max=1)


@dataclass
class FinetuneConfig(StageConfig):
    """English fine-tuning."""

    tuning: str = option("lora", "what English fine-tuning trains", choices=("lora", "full"))


@dataclass
class OptimConfig:
    """The optimizer."""

    _target_: str = option("torch.optim.AdamW", "optimizer", choices=OPTIMIZERS)
    _partial_: bool = option(True, "", no_effect="not read")
    weight_decay: float = option(0.01, "decoupled weight decay", min=0)
    eps: float = option(1e-8, "denominator term", above=0)


@dataclass
class DataConfig:
    """Batches, text lengths and loader processes."""

    batch_size: int = option(32, "examples per optimizer step, over all devices", min=1)
    micro_batch_size: int | None = option(
        None,
        "rows per forward pass and device, to save memory; null: all of the batch",
        min=1,
        no_effect=SHARED,
    )
    max_length: int = option(128, "longest text in tokens; longer ones are cut and counted", min=4)
    truncation_side: str = option(
        "right", "which end of a text that is too long is cut", choices=("right", "left")
    )
    workers: int = option(
        0, "loader processes", min=0, no_effect="the same batches in the same order"
    )


@dataclass
class TrainerConfig:
    """The Lightning Trainer: devices, precision and limits."""

    _target_: str = option(
        "lightning.pytorch.Trainer",
        "",
        choices=("lightning.pytorch.Trainer",),
        no_effect="has one value",
    )
    accelerator: str = option("auto", "where to run", choices=("auto", "cpu", "gpu"))
    devices: int = option(
        1,
        "devices, with a process for each; data.batch_size is shared out among them",
        min=1,
        no_effect=SHARED,
    )
    nodes: int = option(
        1,
        "machines with so many devices each; more than one inside a SLURM job only",
        min=1,
        no_effect=SHARED,
    )
    strategy: str | None = option(
        None,
        "several devices: each with the whole model (ddp), or with a part of it (fsdp)",
        choices=("ddp", "fsdp"),
        no_effect="the same weights, kept in other places",
    )
    precision: str | None = option(
        None,
        "null: bf16-mixed on GPUs, 32-true on CPUs",
        choices=("32-true", "64-true", "bf16-mixed", "16-mixed"),
        refused={
            "bf16-true": "trained weights of 16 bits lose most of their updates; choose "
            "bf16-mixed, with model.dtype=bfloat16 for frozen weights of 16 bits"
        },
    )
    max_epochs: int | None = option(None, "caps finetune.epochs and transfer.epochs", min=1)
    limit_train_batches: int | None = option(None, "only so many batches per epoch", min=1)
    gradient_clip_val: float | None = option(1.0, "clip the gradient's norm", above=0)
    checkpoint_minutes: float = option(
        1.0,
        "minutes between the states that a killed training goes on from; more where keeping "
        "one takes over 2 % of the time",
        above=0,
        no_effect="a resumed training equals an uninterrupted one",
    )
    enable_progress_bar: bool = option(True, "show progress", no_effect="only what is shown")


@dataclass
class LoggerConfig:
    """Logging of curves."""

    name: str = option("???", "where curves go", choices=("csv", "wandb"))
    project: str = option("flare_exp", "wandb project")
    entity: str | None = option(None, "wandb entity")
    mode: str | None = option(
        None,
        "wandb; null: WANDB_MODE, or offline with offline=true",
        choices=("online", "offline", "disabled"),
    )
    group: str | None = option(None, "wandb group")
    job_type: str | None = option(None, "wandb job type")
    run_name: str | None = option(None, "wandb name of the run")
    tags: list[str] = field(default_factory=list, metadata={"help": "wandb tags"})


@dataclass
class Config:
    """All options of a run."""

    seed: int = option(
        0,
        "training seed; the toy world and its checkpoints have seeds of their own",
        min=0,
        max=2**32 - 1,
    )
    output_dir: str = option(
        "???",
        "the run folder; in multirun the parent of the run folders",
        no_effect="a place, not content",
    )
    cache_dir: str = option(
        "???",
        "artifacts shared by all runs (FLARE_EXP_CACHE, else ~/.cache/flare_exp)",
        no_effect="a place, not content",
    )
    offline: bool = option(
        False,
        "never ask the network; tell what is missing before anything runs (see prefetch)",
        no_effect="what is read is known by commit or content",
    )
    print_config: bool = option(
        False, "print the resolved configuration and stop", no_effect="nothing runs"
    )
    resume: bool = option(
        True,
        "an output_dir with this same configuration continues or returns its result",
        no_effect="whether a run is taken up, not what it gives",
    )
    experiment: str | None = option(
        None, "the preset in use", no_effect="a name; the preset's values count"
    )
    model: ModelConfig = section(ModelConfig)
    task: TaskConfig = section(TaskConfig)
    fusion: FusionConfig = section(FusionConfig)
    source: SourceConfig = section(SourceConfig)
    method: MethodConfig = section(MethodConfig)
    decode: DecodeConfig = section(DecodeConfig)
    mt: MtConfig = section(MtConfig)
    adapter: AdapterConfig = section(AdapterConfig)
    finetune: FinetuneConfig = section(FinetuneConfig)
    transfer: StageConfig = section(StageConfig)
    optim: OptimConfig = section(OptimConfig)
    data: DataConfig = section(DataConfig)
    trainer: TrainerConfig = section(TrainerConfig)
    logger: LoggerConfig = section(LoggerConfig, no_effect="where curves are shown")


def keys(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> dataclass field, for every option."""
    import typing

    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for f in fields(cls):
        inner = [t for t in (hints[f.name], *typing.get_args(hints[f.name])) if is_dataclass(t)]
        found[prefix + f.name] = f
        if inner:
            found |= keys(inner[0], f"{prefix}{f.name}.")  # type: ignore[arg-type]
    return found


def no_effect() -> dict[str, str]:
    """Return dotted key -> the reason why it cannot change a result.

    Only options with such a reason, on them or on their section, are listed.
    """
    every = keys()
    found = {}
    for key, f in every.items():
        parent = every.get(key.rpartition(".")[0], f)
        if reason := f.metadata.get("no_effect") or parent.metadata.get("no_effect"):
            found[key] = reason
    return found


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value, as on the command line."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {
        k: v for name, value in tree.items() for k, v in flat(value, f"{prefix}{name}.").items()
    }


def default_cache() -> str:
    """Return the default folder of the artifacts: FLARE_EXP_CACHE, else ~/.cache/flare_exp."""
    return os.environ.get("FLARE_EXP_CACHE") or str(Path.home() / ".cache" / "flare_exp")
