"""Define every option of a run: its type, default, help and rules.

This module is light on purpose: it imports no torch, and Hydra only inside functions, so that
`--help` answers at once.
"""

from __future__ import annotations

import functools
import os
from dataclasses import MISSING, dataclass, field
from typing import Any

from flare_exp.config.method_schema import (
    DistilConfig,
    FusionConfig,
    MethodConfig,
    MixupConfig,
    SourceConfig,
)
from flare_exp.config.mt_schema import MtConfig
from flare_exp.config.options import keys_of, option, section
from flare_exp.config.task_schema import TaskConfig

# options of earlier versions -> why they are gone; a run folder may still name them
RETIRED = {
    "trainer._target_": "the trainer is always Lightning's",
    "optim._partial_": "the optimizer is always made for the model's parameters",
    "print_config": "--cfg job --resolve prints the configuration",
}
SHARED = "loss and gradients are those of the whole batch, up to rounding and dropout masks"
OPTIMIZERS = (
    "torch.optim.AdamW",
    "torch.optim.Adam",
    "bitsandbytes.optim.AdamW8bit",
    "bitsandbytes.optim.PagedAdamW8bit",
)


# of the embedded models, those that answer by a prompt alone (flare_exp.models.families)
PROMPTED = ("llama", "gemma2")


@dataclass
class PretrainConfig:
    """Pre-training of an embedded model."""

    architecture: str = option(
        "xlm-roberta",
        "family of the embedded model",
        choices=("xlm-roberta", *PROMPTED, "mt5"),
    )
    documents: int = option(0, "documents of generated text", min=1)
    steps: int = option(0, "optimizer steps", min=1)
    batch_size: int = option(0, "documents per step", min=1)
    lr: float = option(0.0, "learning rate", above=0)
    vocab_size: int = option(0, "size of the learned vocabulary", min=100)
    hidden_size: int = option(0, "width d", min=8)
    layers: int = option(0, "blocks", min=1)
    heads: int = option(0, "attention heads", min=1)
    target_share: float = option(0.0, "share of text in the languages near and far", min=0, max=1)
    recall: float = option(0.0, "share of documents that come back to what they said", min=0, max=1)
    half_share: float = option(0.0, "share of text in the language half", min=0, max=1)


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
class DecodeConfig:
    """Decoding of a generative model's answers."""

    name: str = option("???", "how a generative model answers", group="decode")
    beams: int = option(1, "generation: 1 is greedy", min=1)
    max_new_tokens: int = option(100, "generation: longest answer in tokens", min=1)
    cache: str = option(
        "dynamic",
        "generation: key-value cache",
        choices=("dynamic", "static"),
        no_effect="the same tokens from other memory",
    )


@dataclass
class PredictConfig:
    """Passes of a fusion adapter over a test text."""

    sources: list[str] = field(
        default_factory=lambda: ["given"],
        metadata={
            "help": "passes over each test text, with the given source or with none; of several "
            "passes the label probabilities are averaged",
            "each": ("given", "none"),
        },
    )


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
    predict: PredictConfig = section(PredictConfig)
    mt: MtConfig = section(MtConfig)
    mixup: MixupConfig = section(MixupConfig)
    distil: DistilConfig = section(DistilConfig)
    adapter: AdapterConfig = section(AdapterConfig)
    finetune: FinetuneConfig = section(FinetuneConfig)
    transfer: StageConfig = section(StageConfig)
    optim: OptimConfig = section(OptimConfig)
    data: DataConfig = section(DataConfig)
    trainer: TrainerConfig = section(TrainerConfig)
    logger: LoggerConfig = section(LoggerConfig, no_effect="where curves are shown")


@functools.cache
def keys() -> dict[str, Any]:
    """Return dotted key -> dataclass field, for every option."""
    return keys_of(Config)


def dataclass_defaults() -> dict[str, Any]:
    """Return dotted key -> default, for every option that has one in the schema."""
    found = {}
    for key, f in keys().items():
        if f.default is not MISSING:
            found[key] = f.default
        elif f.default_factory is not MISSING:
            found[key] = f.default_factory()
    return found


def default_cache() -> str:
    """Return the default folder of the artifacts: FLARE_EXP_CACHE, else ~/.cache/flare_exp."""
    return os.environ.get("FLARE_EXP_CACHE") or os.path.expanduser("~/.cache/flare_exp")


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
