"""The typed schema of every option, and one check that reports all problems of a command line at once.

Light on purpose: no torch, and Hydra only inside functions, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from flare_exp.noise import ERRORS
from flare_exp.tasks import ROLES, TASKS, Slice

FUSING_METHODS = ("flare", "flare_mt")
LEARNED_FUSIONS = ("cross_attn", "gated")  # those with weights of their own
FUSION_OPTIONS = {"query": "cross_attn", "heads": "cross_attn", "bias": "gated"}  # option -> the fusion that has it
HUMAN_MT = ("toy", "gold")  # translations by the benchmark itself
MACHINES = ("toy_nllb", "nllb_600m", "nllb_1b3_distilled", "nllb_1b3", "nllb_3b3", "custom")  # translations by a model

SHARED = "loss and gradients are those of the whole batch, up to rounding and dropout masks"
OPTIMIZERS = ("torch.optim.AdamW", "torch.optim.Adam", "bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.PagedAdamW8bit")


def option(default: Any, help: str, **rules: Any) -> Any:
    """A field with its help and rules: `min`, `above` (exclusive), `max`, `choices`, `refused` (value -> why).

    `no_effect`: why its value cannot change a result; every option without it belongs in the key of an artifact.
    """
    return field(default=default, metadata={"help": help, **rules})


def section(cls: type, **rules: Any) -> Any:
    """A field of options; `no_effect` holds for all of them."""
    return field(default_factory=cls, metadata=rules)


@dataclass
class PretrainConfig:
    architecture: str = option("xlm-roberta", "family of the embedded model", choices=("xlm-roberta", "llama", "gemma2", "mt5"))
    documents: int = option(0, "documents of generated text", min=1)
    steps: int = option(0, "optimiser steps", min=1)
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
    name: str = option("???", "name of the model in results",
                       no_effect="model.path or model.pretrain say which model it is")  # fmt: skip
    path: str | None = option(None, "hub id or checkpoint folder (model=custom needs it)")
    revision: str | None = option(None, "commit or branch of the hub checkpoint; null: its newest commit")
    dtype: str = option("float32", "of the weights", choices=("float32", "bfloat16"))
    quantize: str | None = option(None, "keep the frozen weights in 4 bits (needs bitsandbytes)", choices=("nf4",))
    double_quant: bool = option(True, "quantise the 4-bit constants too")
    compute_dtype: str = option("bfloat16", "matrix products of 4-bit weights", choices=("bfloat16", "float32", "float16"))
    attention: str | None = option(None, "implementation; null: the fastest that works", choices=("sdpa", "eager"))
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass, to save memory",
                                          no_effect="the same activations, computed twice")  # fmt: skip
    pretrain: PretrainConfig | None = option(None, "how the embedded model is built (model=tiny...)")


@dataclass
class TaskConfig:
    name: str = option("???", "name of the benchmark", choices=tuple(TASKS))
    lang: str = option("???", "target language, in the benchmark's own code")
    data_dir: str | None = option(None, "folder of <language>/<split>.parquet instead of the hub")
    limit: int | None = option(None, "only the first N examples of every split", min=1)
    world_seed: int = option(0, "seed of the generated world (toy tasks)", min=0, max=2**32 - 1)
    form: str = option("auto", "by a head where the model has one, or as a prompt", choices=("auto", "head", "generative"))
    window: int | None = option(None, "question answering by a head: tokens of a window (null: data.max_length)", min=8)
    doc_stride: int | None = option(None, "question answering by a head: long contexts are read in windows that share so many "
                                    "tokens (null: they are cut)", min=0)  # fmt: skip
    max_answer_length: int = option(30, "question answering by a head: longest answer in tokens", min=1)
    train_split: str = option("train", "split or slice to train on, e.g. validation[:2000]")
    validation_split: str | None = option("validation", "split or slice that selects the checkpoint (null: none is held out)")
    test_split: str = option("test", "split or slice to report")
    english_test_split: str | None = option(None, "split or slice of the English test block (null: test_split)")
    select: str = option("best", "which epoch's weights are kept: best on validation, or last", choices=("best", "last"))


@dataclass
class FusionConfig:
    name: str = option("???", "fusion function")
    source_layer: str = option("ahead", "block i fuses what block i+1 (ahead) or i (same) reads in the source pass",
                               choices=("ahead", "same"))  # fmt: skip
    source_state: str = option("layer_input", "what the projections read, or raw hidden states",
                               choices=("layer_input", "block_output"))  # fmt: skip
    answer_source: str = option("last", "decoders: what answer tokens fuse, the last source prompt state or none",
                                choices=("last", "none"))  # fmt: skip
    query: str | None = option(None, "cross_attn: who asks", choices=("target", "source"))
    heads: int | None = option(None, "cross_attn: heads; must divide adapter.r", min=1)
    bias: float | None = option(None, "gated: initial bias of the gate")


@dataclass
class DecodeConfig:
    name: str = option("???", "how a generative model answers")
    beams: int = option(1, "generation: 1 is greedy", min=1)
    max_new_tokens: int = option(100, "generation: longest answer in tokens", min=1)
    cache: str = option("dynamic", "generation: key-value cache", choices=("dynamic", "static"),
                        no_effect="the same tokens from other memory")  # fmt: skip


@dataclass
class SourceConfig:
    shuffle: bool = option(False, "ablation: every example gets another one's source")
    empty: bool = option(False, "ablation: no source at all")
    cache: str = option("off", "compute the training sources' states once and keep them, or in every epoch anew",
                        choices=("off", "memory", "disk"))  # fmt: skip
    dtype: str | None = option(None, "of cached states; null: as they are read, so that nothing is rounded",
                               choices=("float32", "float16", "bfloat16"))  # fmt: skip


@dataclass
class MethodConfig:
    name: str = option("???", "method")
    label: str = option("${.name}", "", no_effect="a name for curves")  # with its fusion, if it has one


@dataclass
class MtPretrainConfig:
    pairs: int = option(0, "sentence pairs of generated text", min=1)
    steps: int = option(0, "optimiser steps", min=1)
    batch_size: int = option(0, "pairs per step", min=1)
    lr: float = option(0.0, "learning rate", above=0)
    vocab_size: int = option(0, "size of the learned vocabulary", min=100)
    hidden_size: int = option(0, "width", min=8)
    layers: int = option(0, "blocks of the encoder, and of the decoder", min=1)
    heads: int = option(0, "attention heads", min=1)


@dataclass
class MtConfig:
    name: str = option("???", "translation", choices=(*HUMAN_MT, "file", *MACHINES))
    noise: float = option(0.0, "share of words made wrong after translation", min=0, max=1)
    errors: list[str] = field(default_factory=lambda: list(ERRORS),
                              metadata={"help": "kinds of wrong words", "each": ERRORS})  # fmt: skip
    seed: int = option(0, "seed of that noise", min=0, max=2**32 - 1)
    path: str | None = option(None, "mt=file: folder of mt_<from>-<to>/<split>.parquet; models: hub id or checkpoint folder")
    fallback: str | None = option(None, "mt=file: what stands in for a missing direction", choices=("gold",))
    revision: str | None = option(None, "models: commit or branch of the hub checkpoint; null: its newest commit")
    backend: str = option("transformers", "models: what runs them", choices=("transformers", "ctranslate2"))
    quantization: str | None = option(None, "ctranslate2: of the weights; null: int8, on GPUs int8_float16",
                                      choices=("float32", "float16", "bfloat16", "int8", "int8_float16"))  # fmt: skip
    beams: int = option(1, "models: 1 is greedy", min=1)
    max_length: int = option(256, "models: longest piece in tokens; longer texts are split into sentences", min=16, max=1024)
    no_repeat_ngram: int = option(0, "models: no n-gram twice in a translation, against loops (0: off)", min=0)
    batch_tokens: int | None = option(None, "models: tokens per batch; null: by device", min=1,
                                      no_effect="a translation does not depend on the texts beside it")  # fmt: skip
    marker: str = option("quotes", "question answering: how an answer is marked in translation",
                         choices=("quotes", "brackets", "tags"))  # fmt: skip
    shard: int = option(512, "models: texts between two saved pieces of work", min=1,
                        no_effect="a translation does not depend on the texts beside it")  # fmt: skip
    pretrain: MtPretrainConfig | None = option(None, "how mt=toy_nllb is built")


@dataclass
class AdapterConfig:
    r: int = option(8, "rank of the bottleneck", min=1)
    alpha: int = option(16, "scale is alpha / r", min=1)
    dropout: float = option(0.0, "dropout on the adapter's target input", min=0, max=0.99)
    targets: str = option("qv", "adapted projections; fusion is in query and value only", choices=("qv", "all_linear"))
    also_train: list[str] = field(default_factory=list, metadata={
        "help": "decoders: trained in full with the adapter, as the paper's Llama is", "each": ("embeddings", "lm_head"),
        "may_be_empty": True})  # fmt: skip


@dataclass
class StageConfig:
    lr: float = option(2e-5, "peak learning rate", above=0)
    epochs: int = option(10, "passes over the training data", min=1)
    warmup: float = option(0.1, "share of the steps with rising learning rate", min=0, max=1)


@dataclass
class FinetuneConfig(StageConfig):
    tuning: str = option("lora", "what English fine-tuning trains", choices=("lora", "full"))


@dataclass
class OptimConfig:
    _target_: str = option("torch.optim.AdamW", "optimiser", choices=OPTIMIZERS)
    _partial_: bool = option(True, "", no_effect="not read")
    weight_decay: float = option(0.01, "decoupled weight decay", min=0)
    eps: float = option(1e-8, "denominator term", above=0)


@dataclass
class DataConfig:
    batch_size: int = option(32, "examples per optimiser step, over all devices", min=1)
    micro_batch_size: int | None = option(None, "rows per forward pass and device, to save memory; null: all of the batch", min=1,
                                          no_effect=SHARED)  # fmt: skip
    max_length: int = option(128, "longest text in tokens; longer ones are cut and counted", min=4)
    truncation_side: str = option("right", "which end of a text that is too long is cut", choices=("right", "left"))
    workers: int = option(0, "loader processes", min=0, no_effect="the same batches in the same order")


@dataclass
class TrainerConfig:
    _target_: str = option("lightning.pytorch.Trainer", "", choices=("lightning.pytorch.Trainer",),
                           no_effect="has one value")  # fmt: skip
    accelerator: str = option("auto", "where to run", choices=("auto", "cpu", "gpu"))
    devices: int = option(1, "devices, with a process for each; data.batch_size is shared out among them", min=1,
                          no_effect=SHARED)  # fmt: skip
    nodes: int = option(1, "machines with so many devices each; more than one inside a SLURM job only", min=1,
                        no_effect=SHARED)  # fmt: skip
    strategy: str | None = option(None, "several devices: each with the whole model (ddp), or with a part of it (fsdp)",
                                  choices=("ddp", "fsdp"), no_effect="the same weights, kept in other places")  # fmt: skip
    precision: str | None = option(None, "null: bf16-mixed on GPUs, 32-true on CPUs",
                                   choices=("32-true", "64-true", "bf16-mixed", "16-mixed"),
                                   refused={"bf16-true": "trained weights of 16 bits lose most of their updates; choose "
                                            "bf16-mixed, with model.dtype=bfloat16 for frozen weights of 16 bits"})  # fmt: skip
    max_epochs: int | None = option(None, "caps finetune.epochs and transfer.epochs", min=1)
    limit_train_batches: int | None = option(None, "only so many batches per epoch", min=1)
    gradient_clip_val: float | None = option(1.0, "clip the gradient's norm", above=0)
    checkpoint_minutes: float = option(1.0, "minutes between the states that a killed training goes on from; more where keeping "
                                       "one takes over 2 % of the time", above=0,
                                       no_effect="a resumed training equals an uninterrupted one")  # fmt: skip
    enable_progress_bar: bool = option(True, "show progress", no_effect="only what is shown")


@dataclass
class LoggerConfig:
    name: str = option("???", "where curves go", choices=("csv", "wandb"))
    project: str = option("flare_exp", "wandb project")
    entity: str | None = option(None, "wandb entity")
    mode: str | None = option(None, "wandb; null: WANDB_MODE, or offline with offline=true",
                              choices=("online", "offline", "disabled"))  # fmt: skip
    group: str | None = option(None, "wandb group")
    job_type: str | None = option(None, "wandb job type")
    run_name: str | None = option(None, "wandb name of the run")
    tags: list[str] = field(default_factory=list, metadata={"help": "wandb tags"})


@dataclass
class Config:
    seed: int = option(0, "training seed; the toy world and its checkpoints have seeds of their own", min=0,
                       max=2**32 - 1)  # fmt: skip
    output_dir: str = option("???", "the run folder; in multirun the parent of the run folders",
                             no_effect="a place, not content")  # fmt: skip
    cache_dir: str = option("???", "artefacts shared by all runs (FLARE_EXP_CACHE, else ~/.cache/flare_exp)",
                            no_effect="a place, not content")  # fmt: skip
    offline: bool = option(False, "never ask the network; tell what is missing before anything runs (see prefetch)",
                           no_effect="what is read is known by commit or content")  # fmt: skip
    print_config: bool = option(False, "print the resolved configuration and stop", no_effect="nothing runs")
    resume: bool = option(True, "an output_dir with this same configuration continues or returns its result",
                          no_effect="whether a run is taken up, not what it gives")  # fmt: skip
    experiment: str | None = option(None, "the preset in use", no_effect="a name; the preset's values count")
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


def conf_dir() -> Path:
    """The shipped configuration: beside the modules in a wheel, beside the package in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


def groups() -> dict[str, list[str]]:
    """Group -> its options, from the files of conf/."""
    folders = sorted({f.parent for f in conf_dir().glob("*/**/*.yaml")})
    return {p.relative_to(conf_dir()).as_posix(): sorted(f.stem for f in p.glob("*.yaml")) for p in folders}


def keys(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> dataclass field, for every option."""
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
    """Dotted key -> why it cannot change a result, for every option of which that is said."""
    every = keys()
    found = {}
    for key, f in every.items():
        parent = every.get(key.rpartition(".")[0], f)
        if reason := f.metadata.get("no_effect") or parent.metadata.get("no_effect"):
            found[key] = reason
    return found


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, as on the command line."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, value in tree.items() for k, v in flat(value, f"{prefix}{name}.").items()}


# --- the check -------------------------------------------------------------------------------------------------------


def register_schema() -> None:
    """Make the dataclasses the typed base of conf/config.yaml."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def check(arguments: Sequence[str], multirun: bool) -> tuple[list[Any], list[str]]:
    """Check the overrides of a command line.

    Returns:
        the composed configuration of each job (OmegaConf, resolved lazily) and every problem found, as messages.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, good, problems = OverridesParser.create(), [], []
    given: dict[str, list[Any]] = {}
    for text in arguments:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = f" ({str(error).splitlines()[0]})" if "=" in text else ""
            problems.append(f"{text}: not of the form key=value{reason}")
            continue
        given.setdefault(override.key_or_group, []).append(override)
        found = [f"{text}: several values need -m (multirun)"] if override.is_sweep_override() and not multirun else []
        found = found or list(_check_override(override))
        problems += found
        if not found:
            good.append(override)
    problems += _check_repeated(given)
    jobs = []
    bases: dict[tuple[str, ...], Any] = {}
    for cell in _cells(good):
        job, found = _check_job(cell, multirun, bases)
        problems += [p for p in found if p not in problems]
        jobs.append(job)
    return jobs, problems


def cells(arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a (checked) command line, in Hydra's order."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return list(_cells([OverridesParser.create().parse_override(text) for text in arguments]))


def launcher(overrides: Sequence[str]) -> dict[str, Any]:
    """`hydra.launcher` of a (checked) job."""
    from omegaconf import OmegaConf

    composed = _compose(overrides, return_hydra_config=True)
    return OmegaConf.to_container(composed.hydra.launcher, resolve=True)  # type: ignore[return-value]


def _compose(overrides: Sequence[str], **options) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.utils import setup_globals

    register_schema()
    setup_globals()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="flare_exp"):
        return compose("config", overrides=list(overrides), **options)


def _compose_cell(overrides: Sequence[str], bases: dict[tuple[str, ...], Any]) -> Any:
    """Compose one job of a grid. What follows from the groups alone is composed once for all jobs, and kept in `bases`."""
    import copy

    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    known = keys().keys() - groups().keys()
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [o for o in parsed if o.key_or_group in known and not (o.is_delete() or o.is_sweep_override())]
    chosen = tuple(str(o.input_line) for o in parsed if o not in values)
    if chosen not in bases:
        bases[chosen] = _compose(chosen)
    composed = copy.deepcopy(bases[chosen])
    ConfigLoaderImpl._apply_overrides_to_config(values, composed)
    return composed


def explicit_fusion(overrides: Sequence[str]) -> bool:
    """Whether the user chose a fusion on the command line."""
    return any(o.lstrip("+").split("=")[0].split(".")[0] == "fusion" for o in overrides)


def without_fusion(job: Any, overrides: Sequence[str]) -> bool:
    """Whether a cell of a grid combines a fusion with a method that has none: it is left out."""
    return job.method.name not in FUSING_METHODS and explicit_fusion(overrides)


def _check_repeated(given: dict[str, list[Any]]) -> Iterator[str]:
    """Refuse an option that is given several times with different values: Hydra would silently take the last one."""
    for key, overrides in given.items():
        values = {o.input_line.partition("=")[2] for o in overrides}
        if len(values) > 1:
            times = "twice" if len(overrides) == 2 else f"{len(overrides)} times"
            lines = " and ".join(o.input_line for o in overrides)
            yield f"{lines}: {key} is given {times} with different values; keep one"


def _check_override(override) -> Iterator[str]:
    key, known_groups, known = override.key_or_group, groups(), keys()
    if key.startswith("hydra"):
        return
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    if key in known_groups and not override.is_delete():
        for value in values:
            if str(value) not in known_groups[key] and not (key == "experiment" and value is None):
                yield f"{key}={value}: {_allowed(str(value), known_groups[key])}"
    elif key in known_groups:
        yield f"{override.input_line}: a group cannot be removed"
    elif key not in known:
        yield f"{key}: there is no such option{_same_name(key, known) or _nearest(key, [*known_groups, *known])}"
    elif override.is_delete():
        yield f"{override.input_line}: options cannot be removed; set {key}=null"
    elif key.split(".")[0] in known_groups and "." not in key:
        yield f"{key}: {_allowed('', known_groups[key])}"
    else:
        for value in values:
            yield from _check_type(key, value)


def _check_type(key: str, value: Any) -> Iterator[str]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    typed = OmegaConf.structured(Config)
    typed.model.pretrain, typed.mt.pretrain = PretrainConfig(), MtPretrainConfig()
    try:
        from hydra.core.override_parser.types import QuotedString

        if keys()[key].type == "bool" and isinstance(value, int) and value not in (0, 1):  # OmegaConf takes any for true
            raise ValueError
        OmegaConf.update(typed, key, value.text if isinstance(value, QuotedString) else value)
    except (OmegaConfBaseException, ValueError) as error:
        yield f"{key}={'null' if value is None else value}: {_expected(key) or str(error).splitlines()[0]}"


# type of an option -> what its value must be
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "list[str]": "a list, e.g. [drop,swap]"}


def _expected(key: str) -> str:
    """Say which type of value an option takes; "": a text."""
    known = keys()
    if inside := [name for name, f in known.items() if name.startswith(f"{key}.") and f.metadata.get("help")]:
        return f"{key} is a section; its options: {', '.join(inside)}"
    kind, _, null = known[key].type.partition(" | ")
    return f"must be {KINDS[kind]}{', or null' if null else ''}" if kind in KINDS else ""


def _cells(overrides: Sequence[Any]) -> Iterator[list[str]]:
    """The override lists of a multirun's jobs (one list for a single run)."""
    axes = [
        [f"{_prefix(o)}{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line]
        for o in overrides
    ]
    for cell in itertools.product(*axes):
        yield list(cell)


def _prefix(override) -> str:
    return "+" if override.is_add() and not override.get_key_element().startswith("+") else ""


def _check_job(overrides: list[str], multirun: bool, bases: dict[tuple[str, ...], Any]) -> tuple[Any, list[str]]:
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        composed = _compose_cell(overrides, bases)
        cfg: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    except AssertionError:  # omegaconf's answer to a key below something that is null
        return None, ["model.pretrain.*, mt.pretrain.*: only embedded models are built here and have these options"]
    except (HydraException, OmegaConfBaseException) as error:
        reason = error.__cause__ or error
        if isinstance(error, MissingConfigException) and error.options is not None:  # of a group of Hydra's own
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            return None, [f"{group}={name}: {_allowed(name, error.options)}"]
        key = getattr(reason, "full_key", None)
        return None, [f"{key}: {line}" if key else line for line in [str(reason).splitlines()[0].strip()]]
    problems = [*_check_rules(cfg), *_check_meaning(cfg)]
    if without_fusion(cfg, overrides) and not multirun:
        problems.append(
            f"fusion={cfg.fusion.name} with method={cfg.method.name}: only {' and '.join(FUSING_METHODS)} fuse; "
            "leave fusion out or choose method=flare"
        )
    return composed, problems


def _check_rules(cfg: Any, prefix: str = "") -> Iterator[str]:
    """Values against the rules in the fields' metadata."""
    for f in fields(cfg):
        value, key, rules = getattr(cfg, f.name), prefix + f.name, f.metadata
        if is_dataclass(value):
            yield from _check_rules(value, key + ".")
        elif value is None:
            continue
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{key}={value}: must be a finite number"
        elif value in rules.get("refused", ()):
            yield f"{key}={value}: {rules['refused'][value]}"
        elif "choices" in rules and value not in rules["choices"]:
            yield f"{key}={value}: {_allowed(str(value), rules['choices'])}"
        elif value == "":
            yield f"{key}=: must not be empty"
        elif value == [] and "may_be_empty" in rules:
            continue
        elif "each" in rules and (wrong := [v for v in value if v not in rules["each"]] or ([] if value else ["[]"])):
            yield f"{key}={wrong[0]}: {_allowed(wrong[0], rules['each'])}"
        elif "min" in rules and value < rules["min"]:
            yield f"{key}={value}: must be {rules['min']} or more"
        elif "above" in rules and not value > rules["above"]:
            yield f"{key}={value}: must be above {rules['above']}"
        elif "max" in rules and value > rules["max"]:
            yield f"{key}={value}: must be {rules['max']} or less"


def _check_meaning(cfg: Config) -> Iterator[str]:
    """What single values cannot tell: paths, languages, pairs of options."""
    task = TASKS.get(cfg.task.name)
    if task is not None:
        yield from _check_task(cfg, task)
    if cfg.model.path is None and cfg.model.pretrain is None:
        yield f"model={cfg.model.name}: model.path=<hub id or checkpoint folder> is missing"
    if cfg.model.path and (cfg.model.path.startswith((".", "/", "~")) or cfg.model.path.count("/") > 1):
        if not Path(cfg.model.path).expanduser().is_dir():
            yield f"model.path={cfg.model.path}: there is no such folder"
    if cfg.model.quantize and cfg.finetune.tuning == "full":
        yield f"finetune.tuning=full with model.quantize={cfg.model.quantize}: 4-bit weights cannot be trained; choose lora"
    if cfg.model.dtype != "float32" and cfg.finetune.tuning == "full":
        yield (f"finetune.tuning=full with model.dtype={cfg.model.dtype}: trained weights of 16 bits lose most of their updates; "
               "choose model.dtype=float32 (with trainer.precision=bf16-mixed to compute in 16 bits), or lora")  # fmt: skip
    needing = [key for key, value in (("model.quantize", cfg.model.quantize), ("optim._target_", cfg.optim._target_))
               if value and (value == "nf4" or value.startswith("bitsandbytes."))]  # fmt: skip
    if needing and importlib.util.find_spec("bitsandbytes") is None:
        yield (f"{' and '.join(needing)}: needs bitsandbytes, which is not installed; pip install bitsandbytes, or choose "
               "model.quantize=null optim._target_=torch.optim.AdamW")  # fmt: skip
    if cfg.offline and cfg.logger.mode == "online":
        yield "logger.mode=online with offline=true: choose one"
    if cfg.trainer.devices > 1 and cfg.trainer.strategy is None:
        yield f"trainer.devices={cfg.trainer.devices}: several devices need a strategy; choose trainer=ddp, fsdp or ddp_cpu"
    if cfg.trainer.nodes > 1 and cfg.trainer.strategy is None:
        yield f"trainer.nodes={cfg.trainer.nodes}: several machines need a strategy; choose trainer=ddp, fsdp or ddp_cpu"
    if cfg.trainer.strategy == "fsdp":
        yield from _check_sharding(cfg)
    several = cfg.trainer.devices * cfg.trainer.nodes > 1
    learned = cfg.fusion.name in LEARNED_FUSIONS or cfg.method.name == "flare_mt"
    if several and cfg.source.empty and learned and cfg.method.name in FUSING_METHODS:
        yield (f"source.empty=true with trainer.strategy={cfg.trainer.strategy}: the fusion's own weights are never used then, "
               "and several processes wait for their gradient; choose trainer.devices=1")  # fmt: skip
    if cfg.source.shuffle and cfg.source.empty:
        yield "source.shuffle=true with source.empty=true: choose one ablation"
    for name in ("shuffle", "empty"):
        if getattr(cfg.source, name) and cfg.method.name not in FUSING_METHODS:
            yield f"source.{name}=true with method={cfg.method.name}: only {' and '.join(FUSING_METHODS)} read a source"
    for name, owner in FUSION_OPTIONS.items():
        if getattr(cfg.fusion, name) is not None and cfg.fusion.name != owner:
            yield f"fusion.{name}={getattr(cfg.fusion, name)}: only fusion={owner} has it, not {cfg.fusion.name}"
    if cfg.fusion.heads and cfg.adapter.r > 0 and cfg.adapter.r % cfg.fusion.heads:
        yield f"fusion.heads={cfg.fusion.heads}: must divide adapter.r={cfg.adapter.r}"


def _check_sharding(cfg: Config) -> Iterator[str]:
    """What weights in parts rule out."""
    if cfg.model.quantize:
        yield (f"model.quantize={cfg.model.quantize} with trainer.strategy=fsdp: 4-bit weights are not shared out; choose "
               "trainer=ddp, or model.quantize=null model.dtype=bfloat16")  # fmt: skip
    if cfg.optim._target_.startswith("bitsandbytes."):
        yield (f"optim._target_={cfg.optim._target_} with trainer.strategy=fsdp: its steps know whole weights only; choose "
               "optim._target_=torch.optim.AdamW")  # fmt: skip
    if cfg.trainer.precision == "16-mixed":
        yield "trainer.precision=16-mixed with trainer.strategy=fsdp: Lightning does not scale gradients there; choose bf16-mixed"


def _check_task(cfg: Config, task) -> Iterator[str]:
    toy = cfg.task.name.startswith("toy_")
    if cfg.task.lang not in task.languages:
        yield f"task.lang={cfg.task.lang}: {_allowed(cfg.task.lang, task.languages)}"
    if cfg.task.data_dir is not None:
        folder = Path(cfg.task.data_dir).expanduser()
        if toy:
            yield f"task.data_dir={cfg.task.data_dir}: {cfg.task.name} is generated and reads no files"
        elif not folder.is_dir():
            yield f"task.data_dir={cfg.task.data_dir}: there is no such folder"
        elif not (folder / task.english).is_dir():
            yield f"task.data_dir={cfg.task.data_dir}: it has no folder {task.english}/ (expected <language>/<split>.parquet)"
        elif cfg.task.lang in task.languages and not (folder / cfg.task.lang).is_dir():
            yield f"task.data_dir={cfg.task.data_dir}: it has no folder {cfg.task.lang}/ (expected <language>/<split>.parquet)"
    yield from _check_windows(cfg, task)
    yield from _check_translation(cfg, task)
    yield from _check_splits(cfg, task)


def _check_windows(cfg: Config, task) -> Iterator[str]:
    stride, window = cfg.task.doc_stride, cfg.task.window
    name, longest = ("data.max_length", cfg.data.max_length) if window is None else ("task.window", window)
    if stride is not None and task.labels:
        yield f"task.doc_stride={stride} with task={task.name}: only question answering reads in windows; leave it null"
    elif stride is not None and stride >= longest:
        yield f"task.doc_stride={stride}: must be less than the window, {name}={longest}"


# option -> the kinds of mt that have it
MT_OPTIONS = {
    "fallback": ("file",),
    "path": ("file", *MACHINES),
    "pretrain": ("toy_nllb",),
    **{f.name: MACHINES for f in fields(MtConfig) if f.metadata["help"].startswith(("models: ", "ctranslate2: "))},
    "marker": MACHINES,
}


def _check_translation(cfg: Config, task) -> Iterator[str]:
    mt, human, toy = cfg.mt, "the benchmark has no human translations", task.name.startswith("toy_")
    if mt.name == "toy" and not toy:
        yield f"mt=toy with task={task.name}: it translates generated text only; choose another mt"
    if mt.name == "toy_nllb" and mt.path is None and not toy:
        yield f"mt=toy_nllb with task={task.name}: it knows the generated languages only; choose another mt"
    if mt.name == "gold" and not task.parallel:
        yield f"mt=gold with task={task.name}: {human}; choose another mt"
    if mt.fallback == "gold" and not task.parallel:
        yield f"mt.fallback=gold with task={task.name}: {human}; leave it null"
    plain = MtConfig(name=mt.name)
    for name, owners in MT_OPTIONS.items():
        if getattr(mt, name) != getattr(plain, name) and mt.name not in owners:
            yield f"mt.{name}={getattr(mt, name)}: only mt={' and mt='.join(owners)} has it, not {mt.name}"
    if mt.name in MACHINES and mt.path is None and mt.pretrain is None:
        yield f"mt={mt.name}: mt.path=<hub id or checkpoint folder> is missing"
    if mt.quantization and mt.backend != "ctranslate2":
        yield f"mt.quantization={mt.quantization}: only mt.backend=ctranslate2 has it"
    if cfg.method.name == "translate_test" and mt.name == "file" and not task.labels:
        yield (f"method=translate_test with mt=file and task={task.name}: no file can translate the answers back; choose "
               f"mt={' or mt='.join(MACHINES[1:] if not toy else MACHINES[:1])}")  # fmt: skip
    # a folder that is also task.data_dir has been checked as such
    local = mt.path is not None and (mt.name == "file" or mt.path.startswith((".", "/", "~")) or mt.path.count("/") > 1)
    if local and mt.path != cfg.task.data_dir and not Path(str(mt.path)).expanduser().is_dir():
        yield f"mt.path={mt.path}: there is no such folder"
    if cfg.method.name == "flare_mt" and mt.name not in MACHINES:
        yield (f"method=flare_mt with mt={mt.name}: its source is a translation model's encoder; "
               f"choose mt={' or mt='.join(MACHINES[1:] if not toy else MACHINES[:1])}")  # fmt: skip
    for name in ("source_layer", "source_state"):
        if cfg.method.name == "flare_mt" and getattr(cfg.fusion, name) != getattr(FusionConfig(), name):
            yield f"fusion.{name} with method=flare_mt: every layer fuses the same states there; leave it out"


def _check_splits(cfg: Config, task) -> Iterator[str]:
    """Every slice is one, and no test example is trained or selected on."""
    english = "test" if cfg.task.english_test_split is None else "english_test"
    slices, given = {}, {role: getattr(cfg.task, f"{role}_split") for role in dict.fromkeys((*ROLES, english))}
    for role, text in given.items():
        if text is None:
            continue
        try:
            slices[role] = Slice.parse(text)
        except ValueError as error:
            yield f"task.{role}_split: {error}"
    if cfg.task.validation_split is None and cfg.task.select == "best":
        yield "task.validation_split=null with task.select=best: nothing can be selected on; choose task.select=last"
    # the target's test rows are other examples than the English ones, unless they translate them
    tests = dict.fromkeys((english, "test") if task.parallel else (english,))
    for a, b in [("train", "validation"), *itertools.product(ROLES[:2], tests)]:
        if a in slices and b in slices and slices[a].overlaps(slices[b]):
            yield f"task.{a}_split={given[a]} and task.{b}_split={given[b]}: they share examples"


def _allowed(value: str, allowed: Sequence[Any]) -> str:
    return f"choose one of {', '.join(map(str, allowed))}{_nearest(value, list(map(str, allowed)))}"


def _same_name(key: str, known: Iterable[str]) -> str:
    """The options of the uppermost sections whose last part is that of `key`."""
    same = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    upper = [k for k in same if k.count(".") == min(s.count(".") for s in same)]
    return f"; did you mean {' or '.join(upper)}?" if upper else ""


def _nearest(value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def default_cache() -> str:
    return os.environ.get("FLARE_EXP_CACHE") or str(Path.home() / ".cache" / "flare_exp")
