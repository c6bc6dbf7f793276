"""Check a command line and report all its problems at once."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from flare_exp.config.composition import compose_cell, expand_grid, groups, without_fusion
from flare_exp.config.schema import (
    FUSING_METHODS,
    FUSION_OPTIONS,
    LEARNED_FUSIONS,
    MACHINES,
    Config,
    FusionConfig,
    MtConfig,
    MtPretrainConfig,
    PretrainConfig,
    keys,
)
from flare_exp.errors import first_line
from flare_exp.tasks import ROLES, TASKS, Slice


def validate(arguments: Sequence[str], multirun: bool) -> tuple[list[Any], list[str]]:
    """Check the overrides of a command line.

    Args:
        arguments: the overrides, one string each.
        multirun: whether options may have several values (-m).

    Returns:
        the composed configuration of each job (OmegaConf, resolved lazily), and a message for every
            problem.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, good, problems = OverridesParser.create(), [], []
    given: dict[str, list[Any]] = {}
    for text in arguments:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = f" ({first_line(error)})" if "=" in text else ""
            problems.append(f"{text}: not of the form key=value{reason}")
            continue
        given.setdefault(override.key_or_group, []).append(override)
        found = (
            [f"{text}: several values need -m (multirun)"]
            if override.is_sweep_override() and not multirun
            else []
        )
        found = found or list(_check_override(override))
        problems += found
        if not found:
            good.append(override)
    problems += _check_repeated(given)
    jobs = []
    bases: dict[tuple[str, ...], Any] = {}
    for cell in expand_grid(good):
        job, found = _check_job(cell, multirun, bases)
        problems += [p for p in found if p not in problems]
        jobs.append(job)
    return jobs, problems


def _check_repeated(given: dict[str, list[Any]]) -> Iterator[str]:
    """Refuse an option that is given several times with different values.

    Hydra would silently take the last one.
    """
    for key, overrides in given.items():
        values = {o.input_line.partition("=")[2] for o in overrides}
        if len(values) > 1:
            times = "twice" if len(overrides) == 2 else f"{len(overrides)} times"
            lines = " and ".join(o.input_line for o in overrides)
            yield f"{lines}: {key} is given {times} with different values; keep one"


def _check_override(override) -> Iterator[str]:
    """Check one override: its key exists, and its values are of the right type."""
    key, known_groups, known = override.key_or_group, groups(), keys()
    if key.startswith("hydra"):
        return
    values = (
        list(override.sweep_string_iterator())
        if override.is_sweep_override()
        else [override.value()]
    )
    if key in known_groups and override.is_add() and not override.is_force_add():
        yield f"{override.input_line}: leave out the +; it is for options that there are not yet"
    elif key in known_groups and not override.is_delete():
        for value in values:
            if str(value) not in known_groups[key] and not (key == "experiment" and value is None):
                yield f"{key}={value}: {_allowed(str(value), known_groups[key])}"
    elif key in known_groups:
        yield f"{override.input_line}: a group cannot be removed"
    elif key not in known:
        yield (
            f"{key}: there is no such "
            f"option{_same_name(key, known) or _nearest(key, [*known_groups, *known])}"
        )
    elif override.is_delete():
        yield f"{override.input_line}: options cannot be removed; set {key}=null"
    elif key.split(".")[0] in known_groups and "." not in key:
        yield f"{key}: {_allowed('', known_groups[key])}"
    else:
        for value in values:
            yield from _check_type(key, value)


def _check_type(key: str, value: Any) -> Iterator[str]:
    """Check that a value is of the type of its option."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    typed = OmegaConf.structured(Config)
    typed.model.pretrain, typed.mt.pretrain = PretrainConfig(), MtPretrainConfig()
    try:
        from hydra.core.override_parser.types import QuotedString

        # OmegaConf would take any other number for true
        if keys()[key].type == "bool" and isinstance(value, int) and value not in (0, 1):
            raise ValueError
        OmegaConf.update(typed, key, value.text if isinstance(value, QuotedString) else value)
    except (OmegaConfBaseException, ValueError) as error:
        yield f"{key}={'null' if value is None else value}: {_expected(key) or first_line(error)}"


# type of an option -> description of its values
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list[str]": "a list, e.g. [drop,swap]",
}


def _expected(key: str) -> str:
    """Return a description of the values that an option takes; "" for a text."""
    known = keys()
    if inside := [
        name for name, f in known.items() if name.startswith(f"{key}.") and f.metadata.get("help")
    ]:
        return f"{key} is a section; its options: {', '.join(inside)}"
    kind, _, null = known[key].type.partition(" | ")
    return f"must be {KINDS[kind]}{', or null' if null else ''}" if kind in KINDS else ""


def _check_job(
    overrides: list[str], multirun: bool, bases: dict[tuple[str, ...], Any]
) -> tuple[Any, list[str]]:
    """Compose one job and check it; return the configuration and a message for every problem."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        composed = compose_cell(overrides, bases)
        cfg: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    except AssertionError:  # OmegaConf raises it for a key below a section that is null
        return None, [
            "model.pretrain.*, mt.pretrain.*: only embedded models are built here and have these "
            "options"
        ]
    except (HydraException, OmegaConfBaseException) as error:
        reason = error.__cause__ or error
        # an unknown option of one of Hydra's own groups
        if isinstance(error, MissingConfigException) and error.options is not None:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            return None, [f"{group}={name}: {_allowed(name, error.options)}"]
        key = getattr(reason, "full_key", None)
        return None, [f"{key}: {line}" if key else line for line in [first_line(reason).strip()]]
    problems = [*_check_rules(cfg), *_cross_field_problems(cfg)]
    if without_fusion(cfg, overrides) and not multirun:
        problems.append(
            f"fusion={cfg.fusion.name} with method={cfg.method.name}: only "
            f"{' and '.join(FUSING_METHODS)} fuse; leave fusion out or choose method=flare"
        )
    return composed, problems


def _check_rules(cfg: Any, prefix: str = "") -> Iterator[str]:
    """Check all values against the rules in the fields' metadata."""
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
        elif "each" in rules and (
            wrong := [v for v in value if v not in rules["each"]] or ([] if value else ["[]"])
        ):
            yield f"{key}={wrong[0]}: {_allowed(wrong[0], rules['each'])}"
        elif "min" in rules and value < rules["min"]:
            yield f"{key}={value}: must be {rules['min']} or more"
        elif "above" in rules and not value > rules["above"]:
            yield f"{key}={value}: must be above {rules['above']}"
        elif "max" in rules and value > rules["max"]:
            yield f"{key}={value}: must be {rules['max']} or less"


def _cross_field_problems(cfg: Config) -> Iterator[str]:
    """Check constraints that span options: paths, languages, incompatible combinations."""
    task = TASKS.get(cfg.task.name)
    if task is not None:
        yield from _check_task(cfg, task)
    if cfg.model.path is None and cfg.model.pretrain is None:
        yield f"model={cfg.model.name}: model.path=<hub id or checkpoint folder> is missing"
    if cfg.model.path and (
        cfg.model.path.startswith((".", "/", "~")) or cfg.model.path.count("/") > 1
    ):
        if not Path(cfg.model.path).expanduser().is_dir():
            yield f"model.path={cfg.model.path}: there is no such folder"
    if cfg.model.quantize and cfg.finetune.tuning == "full":
        yield (
            f"finetune.tuning=full with model.quantize={cfg.model.quantize}: 4-bit weights cannot "
            "be trained; choose lora"
        )
    if cfg.model.dtype != "float32" and cfg.finetune.tuning == "full":
        yield (
            f"finetune.tuning=full with model.dtype={cfg.model.dtype}: trained weights of 16 bits "
            "lose most of their updates; choose model.dtype=float32 (with "
            "trainer.precision=bf16-mixed to compute in 16 bits), or lora"
        )
    needing = [
        key
        for key, value in (
            ("model.quantize", cfg.model.quantize),
            ("optim._target_", cfg.optim._target_),
        )
        if value and (value == "nf4" or value.startswith("bitsandbytes."))
    ]
    if needing and importlib.util.find_spec("bitsandbytes") is None:
        yield (
            f"{' and '.join(needing)}: needs bitsandbytes, which is not installed; pip install "
            "bitsandbytes, or choose model.quantize=null optim._target_=torch.optim.AdamW"
        )
    if cfg.offline and cfg.logger.mode == "online":
        yield "logger.mode=online with offline=true: choose one"
    if cfg.trainer.devices > 1 and cfg.trainer.strategy is None:
        yield (
            f"trainer.devices={cfg.trainer.devices}: several devices need a strategy; choose "
            "trainer=ddp, fsdp or ddp_cpu"
        )
    if cfg.trainer.nodes > 1 and cfg.trainer.strategy is None:
        yield (
            f"trainer.nodes={cfg.trainer.nodes}: several machines need a strategy; choose "
            "trainer=ddp, fsdp or ddp_cpu"
        )
    if cfg.trainer.strategy == "fsdp":
        yield from _check_sharding(cfg)
    several = cfg.trainer.devices * cfg.trainer.nodes > 1
    learned = cfg.fusion.name in LEARNED_FUSIONS or cfg.method.name == "flare_mt"
    if several and cfg.source.empty and learned and cfg.method.name in FUSING_METHODS:
        yield (
            f"source.empty=true with trainer.strategy={cfg.trainer.strategy}: the fusion's own "
            "weights are never used then, and several processes wait for their gradient; choose "
            "trainer.devices=1"
        )
    if cfg.source.shuffle and cfg.source.empty:
        yield "source.shuffle=true with source.empty=true: choose one ablation"
    for name in ("shuffle", "empty"):
        if getattr(cfg.source, name) and cfg.method.name not in FUSING_METHODS:
            yield (
                f"source.{name}=true with method={cfg.method.name}: only "
                f"{' and '.join(FUSING_METHODS)} read a source"
            )
    for name, owner in FUSION_OPTIONS.items():
        if getattr(cfg.fusion, name) is not None and cfg.fusion.name != owner:
            yield (
                f"fusion.{name}={getattr(cfg.fusion, name)}: only fusion={owner} has it, not "
                f"{cfg.fusion.name}"
            )
    if cfg.fusion.heads and cfg.adapter.r > 0 and cfg.adapter.r % cfg.fusion.heads:
        yield f"fusion.heads={cfg.fusion.heads}: must divide adapter.r={cfg.adapter.r}"


def _check_sharding(cfg: Config) -> Iterator[str]:
    """Refuse options that do not work with sharded weights."""
    if cfg.model.quantize:
        yield (
            f"model.quantize={cfg.model.quantize} with trainer.strategy=fsdp: 4-bit weights are "
            "not shared out; choose trainer=ddp, or model.quantize=null model.dtype=bfloat16"
        )
    if cfg.optim._target_.startswith("bitsandbytes."):
        yield (
            f"optim._target_={cfg.optim._target_} with trainer.strategy=fsdp: its steps know "
            "whole weights only; choose optim._target_=torch.optim.AdamW"
        )
    if cfg.trainer.precision == "16-mixed":
        yield (
            "trainer.precision=16-mixed with trainer.strategy=fsdp: Lightning does not scale "
            "gradients there; choose bf16-mixed"
        )


def _check_task(cfg: Config, task) -> Iterator[str]:
    """Check the language, data folder, splits and translation of a task."""
    toy = cfg.task.name.startswith("toy_")
    if cfg.task.lang not in task.languages:
        yield f"task.lang={cfg.task.lang}: {_allowed(cfg.task.lang, task.languages)}"
    if cfg.task.data_dir is not None:
        folder = Path(cfg.task.data_dir).expanduser()
        if toy:
            yield (
                f"task.data_dir={cfg.task.data_dir}: {cfg.task.name} is generated and reads no "
                "files"
            )
        elif not folder.is_dir():
            yield f"task.data_dir={cfg.task.data_dir}: there is no such folder"
        elif not (folder / task.english).is_dir():
            yield (
                f"task.data_dir={cfg.task.data_dir}: it has no folder {task.english}/ (expected "
                "<language>/<split>.parquet)"
            )
        elif cfg.task.lang in task.languages and not (folder / cfg.task.lang).is_dir():
            yield (
                f"task.data_dir={cfg.task.data_dir}: it has no folder {cfg.task.lang}/ (expected "
                "<language>/<split>.parquet)"
            )
    yield from _check_windows(cfg, task)
    yield from _check_translation(cfg, task)
    yield from _check_splits(cfg, task)


def _check_windows(cfg: Config, task) -> Iterator[str]:
    """Check the stride of overlapping windows."""
    stride, window = cfg.task.doc_stride, cfg.task.window
    name, longest = (
        ("data.max_length", cfg.data.max_length) if window is None else ("task.window", window)
    )
    if stride is not None and task.labels:
        yield (
            f"task.doc_stride={stride} with task={task.name}: only question answering reads in "
            "windows; leave it null"
        )
    elif stride is not None and stride >= longest:
        yield f"task.doc_stride={stride}: must be less than the window, {name}={longest}"


# option -> the kinds of mt that have it
MT_OPTIONS = {
    "fallback": ("file",),
    "path": ("file", *MACHINES),
    "pretrain": ("toy_nllb",),
    **{
        f.name: MACHINES
        for f in fields(MtConfig)
        if f.metadata["help"].startswith(("models: ", "ctranslate2: "))
    },
    "marker": MACHINES,
}


def _check_translation(cfg: Config, task) -> Iterator[str]:
    """Check that the translation fits the task and the method."""
    mt, human, toy = cfg.mt, "the benchmark has no human translations", task.name.startswith("toy_")
    if mt.name == "toy" and not toy:
        yield f"mt=toy with task={task.name}: it translates generated text only; choose another mt"
    if mt.name == "toy_nllb" and mt.path is None and not toy:
        yield (
            f"mt=toy_nllb with task={task.name}: it knows the generated languages only; choose "
            "another mt"
        )
    if mt.name == "gold" and not task.parallel:
        yield f"mt=gold with task={task.name}: {human}; choose another mt"
    if mt.fallback == "gold" and not task.parallel:
        yield f"mt.fallback=gold with task={task.name}: {human}; leave it null"
    plain = MtConfig(name=mt.name)
    for name, owners in MT_OPTIONS.items():
        if getattr(mt, name) != getattr(plain, name) and mt.name not in owners:
            yield (
                f"mt.{name}={getattr(mt, name)}: only mt={' and mt='.join(owners)} has it, not "
                f"{mt.name}"
            )
    if mt.name in MACHINES and mt.path is None and mt.pretrain is None:
        yield f"mt={mt.name}: mt.path=<hub id or checkpoint folder> is missing"
    if mt.quantization and mt.backend != "ctranslate2":
        yield f"mt.quantization={mt.quantization}: only mt.backend=ctranslate2 has it"
    if cfg.method.name == "translate_test" and mt.name == "file" and not task.labels:
        yield (
            f"method=translate_test with mt=file and task={task.name}: no file can translate the "
            f"answers back; choose mt={' or mt='.join(MACHINES[1:] if not toy else MACHINES[:1])}"
        )
    # a folder that is also task.data_dir has been checked as such
    local = mt.path is not None and (
        mt.name == "file" or mt.path.startswith((".", "/", "~")) or mt.path.count("/") > 1
    )
    if local and mt.path != cfg.task.data_dir and not Path(str(mt.path)).expanduser().is_dir():
        yield f"mt.path={mt.path}: there is no such folder"
    if cfg.method.name == "flare_mt" and mt.name not in MACHINES:
        yield (
            f"method=flare_mt with mt={mt.name}: its source is a translation model's encoder; "
            f"choose mt={' or mt='.join(MACHINES[1:] if not toy else MACHINES[:1])}"
        )
    for name in ("source_layer", "source_state"):
        if cfg.method.name == "flare_mt" and getattr(cfg.fusion, name) != getattr(
            FusionConfig(), name
        ):
            yield (
                f"fusion.{name} with method=flare_mt: every layer fuses the same states there; "
                "leave it out"
            )


def _check_splits(cfg: Config, task) -> Iterator[str]:
    """Check every slice, and that no test example is trained or selected on."""
    english = "test" if cfg.task.english_test_split is None else "english_test"
    slices, given = (
        {},
        {role: getattr(cfg.task, f"{role}_split") for role in dict.fromkeys((*ROLES, english))},
    )
    for role, text in given.items():
        if text is None:
            continue
        try:
            slices[role] = Slice.parse(text)
        except ValueError as error:
            yield f"task.{role}_split: {error}"
    if cfg.task.validation_split is None and cfg.task.select == "best":
        yield (
            "task.validation_split=null with task.select=best: nothing can be selected on; choose "
            "task.select=last"
        )
    # the target's test rows are other examples than the English ones, unless they translate them
    tests = dict.fromkeys((english, "test") if task.parallel else (english,))
    for a, b in [("train", "validation"), *itertools.product(ROLES[:2], tests)]:
        if a in slices and b in slices and slices[a].overlaps(slices[b]):
            yield f"task.{a}_split={given[a]} and task.{b}_split={given[b]}: they share examples"


def _allowed(value: str, allowed: Sequence[Any]) -> str:
    """Return a message with the allowed values, and the one that is spelled most alike."""
    return f"choose one of {', '.join(map(str, allowed))}{_nearest(value, list(map(str, allowed)))}"


def _same_name(key: str, known: Iterable[str]) -> str:
    """Suggest options with the same last part as `key`, from the uppermost sections."""
    same = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    upper = [k for k in same if k.count(".") == min(s.count(".") for s in same)]
    return f"; did you mean {' or '.join(upper)}?" if upper else ""


def _nearest(value: str, known: Sequence[str]) -> str:
    """Suggest the known value that is spelled most alike; "" without one."""
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
