"""Check constraints that span options: paths, languages, incompatible combinations."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from flare_exp.config.combining_rules import combining_problems
from flare_exp.config.composition import groups, systems_of
from flare_exp.config.data_constraints import data_problems
from flare_exp.config.language_rules import language_problems
from flare_exp.config.method_schema import (
    FusionConfig,
)
from flare_exp.config.methods import METHODS, fuses, members_of, modes_of
from flare_exp.config.mt_schema import MtConfig
from flare_exp.config.schema import Config
from flare_exp.config.source_rules import passes_problems, several_problems, source_problems
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.errors import UserError
from flare_exp.hub import looks_local
from flare_exp.tasks import CUSTOM, ROLES, TASKS, CustomTask, Slice, SpecError, task_class
from flare_exp.toy.translation_model import LANGS
from flare_exp.translation.command import code_of_language, code_problems, command_problems
from flare_exp.translation.lookup import has_split
from flare_exp.utils.files import MISSING, folder_problem


def cross_field_problems(cfg: Config) -> Iterator[str]:
    """Check constraints that span options: paths, languages, incompatible combinations."""
    task: Any = TASKS.get(cfg.task.name)
    if cfg.task.name == CUSTOM:
        try:
            task = task_class(CUSTOM, cfg.task.spec)
        except SpecError as error:
            yield from error.problems
    if task is not None:
        yield from _check_task(cfg, task)
        yield from passes_problems(cfg, task)
        yield from several_problems(cfg, task)
    yield from _check_places(cfg)
    yield from _check_model(cfg)
    yield from _check_method(cfg)
    yield from combining_problems(cfg, task)
    yield from _check_devices(cfg)
    yield from source_problems(cfg)
    yield from _check_variants("task", cfg.task)
    yield from _check_variants("method", cfg.method)
    yield from _check_variants("fusion", cfg.fusion)
    yield from _check_variants("mt", cfg.mt)
    if cfg.offline and cfg.logger.mode == "online":
        yield "logger.mode=online with offline=true: choose one"
    if cfg.fusion.heads and cfg.adapter.r > 0 and cfg.adapter.r % cfg.fusion.heads:
        yield f"fusion.heads={cfg.fusion.heads}: must divide adapter.r={cfg.adapter.r}"


def _check_places(cfg: Config) -> Iterator[str]:
    """Check that the run folder and the cache can be looked at; they need not be there."""
    for key in ("output_dir", "cache_dir"):
        place = getattr(cfg, key)
        if place and (problem := folder_problem(place)) not in (None, MISSING):
            yield f"{key}={place}: {problem}"


def _check_method(cfg: Config) -> Iterator[str]:
    """Check the options of single methods, and that the weights can be trained as asked."""
    yield from _check_mixup(cfg)
    if any(method.full for method in members_of(cfg.method).values()):
        yield from _check_full_tuning(cfg, f"method={cfg.method.name}")
    if cfg.finetune.tuning == "full":
        yield from _check_full_tuning(cfg, "finetune.tuning=full")


def _check_mixup(cfg: Config) -> Iterator[str]:
    """Check the options of x_mixup, and that the method has them."""
    mixes = any(method.mixes for method in members_of(cfg.method).values())
    for f in fields(cfg.mixup):
        value = getattr(cfg.mixup, f.name)
        if value != f.default and not mixes:
            yield f"mixup.{f.name}={value} with method={cfg.method.name}: only x_mixup has it"
    if cfg.mixup.depths is not None and (
        not cfg.mixup.depths or not all(0 <= depth <= 1 for depth in cfg.mixup.depths)
    ):
        yield f"mixup.depths={cfg.mixup.depths}: must be one or more numbers from 0 to 1"
    if mixes and cfg.decode.cache == "static":
        yield (
            "method=x_mixup with decode.cache=static: it mixes no padding, and a static cache does "
            "not tell which tokens are; choose decode.cache=dynamic"
        )
    if mixes and cfg.trainer.strategy == "fsdp":
        yield (
            "method=x_mixup with trainer.strategy=fsdp: it was never tried with sharded weights; "
            "choose trainer=ddp"
        )


def _check_full_tuning(cfg: Config, given: str) -> Iterator[str]:
    """Check that all weights can be trained. `given`: the option that asks for it."""
    if cfg.model.quantize:
        yield (
            f"{given} with model.quantize={cfg.model.quantize}: 4-bit weights cannot "
            "be trained; choose lora"
        )
    if cfg.model.dtype != "float32":
        yield (
            f"{given} with model.dtype={cfg.model.dtype}: trained weights of 16 bits "
            "lose most of their updates; choose model.dtype=float32 (with "
            "trainer.precision=bf16-mixed to compute in 16 bits), or lora"
        )


def _check_model(cfg: Config) -> Iterator[str]:
    """Check the checkpoint, and the precision of weights that are trained or quantized."""
    if cfg.model.path is None and cfg.model.pretrain is None:
        yield f"model={cfg.model.name}: model.path=<hub id or checkpoint folder> is missing"
    path = cfg.model.path
    if path and looks_local(path) and (problem := folder_problem(path)):
        yield f"model.path={path}: {problem}"
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


def _check_devices(cfg: Config) -> Iterator[str]:
    """Check that several devices have a strategy, and that it can train these weights."""
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
    mixes = any(method.mixes for method in members_of(cfg.method).values())
    trained_empty = cfg.source.empty and cfg.source.ablate_in != "test"
    if several and trained_empty and (mixes or (fuses(cfg.method) and _has_weights(cfg))):
        yield (
            f"source.empty=true with trainer.strategy={cfg.trainer.strategy}: the fusion's own "
            "weights are never used then, and several processes wait for their gradient; choose "
            "trainer.devices=1"
        )


def _has_weights(cfg: Config) -> bool:
    """Return whether what fuses source and target has weights of its own."""
    from flare_exp.flare import fusion  # torch is imported for this question alone

    learned = next(fusion.build(cfg.fusion.name, rank=1).parameters(), None) is not None
    return learned or PairingMode.LATENT in modes_of(cfg.method)


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
    """Check the languages, data folder, splits and translation of a task."""
    yield from language_problems(cfg, task)
    yield from data_problems(cfg, task)
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
            f"task.doc_stride={stride} with task={cfg.task.name}: only question answering reads in "
            "windows; leave it null"
        )
    elif stride is not None and stride >= longest:
        yield f"task.doc_stride={stride}: must be less than the window, {name}={longest}"


def _check_variants(section: str, value: Any) -> Iterator[str]:
    """Refuse options that the chosen variant of a section does not have."""
    defaults = type(value)(name=value.name)
    kind = getattr(value, "kind", value.name)
    for f in fields(value):
        owners = f.metadata.get("only")
        given = getattr(value, f.name)
        if owners is None or given == getattr(defaults, f.name) or {value.name, kind} & {*owners}:
            continue
        names = [n for owner in owners for n in _named(section, type(value), owner)]
        yield (
            f"{section}.{f.name}={given}: only {section}={f' and {section}='.join(names)} has it, "
            f"not {value.name}"
        )


def _named(section: str, cls: type, owner: str) -> list[str]:
    """Return the names of the group `section` that are of a kind, or the name itself."""
    names = groups()[section]
    return [owner] if owner in names else [n for n in names if cls(name=n).kind == owner]


def _check_translation(cfg: Config, task) -> Iterator[str]:
    """Check that the translations fit the task and the method."""
    mt, fitting = cfg.mt, f"choose mt={' or mt='.join(_fitting_models(cfg, task))}"
    yield from _check_system(cfg, task)
    for own in systems_of(cfg):
        for problem in _check_system(own, task):
            yield (
                f"source.systems=[{','.join(cfg.source.systems)}]: {problem} (its options are "
                f"those of conf/mt/{own.mt.name}.yaml)"
            )
    if mt.name == "gold" and task.parallel:
        yield from _check_counterparts(cfg, task)
    if PairingMode.TRANSLATED in modes_of(cfg.method) and mt.kind == "file" and not task.labels:
        yield (
            f"method={cfg.method.name} with mt=file and task={cfg.task.name}: no file can "
            f"translate the answers back; {fitting}"
        )
    latent = [n for n, m in members_of(cfg.method).items() if m.mode is PairingMode.LATENT]
    if latent and mt.kind != "model":
        whose = "its" if latent == [cfg.method.name] else f"{latent[0]}'s"
        yield (
            f"method={cfg.method.name} with mt={mt.name}: {whose} source is a translation model's "
            f"encoder; {fitting}"
        )
    for name in ("source_layer", "source_state"):
        changed = getattr(cfg.fusion, name) != getattr(FusionConfig(), name)
        if {*modes_of(cfg.method)} & {PairingMode.PAIRED, PairingMode.LATENT} == {
            PairingMode.LATENT
        } and changed:
            yield (
                f"fusion.{name} with method={cfg.method.name}: every layer fuses the same states "
                "there; leave it out"
            )


def _fitting_models(cfg: Config, task: Any) -> list[str]:
    """Return the names of the translation models that know the languages of a task."""
    toy = _generated(cfg, task)
    return [n for n in _named("mt", MtConfig, "model") if (n == "toy_nllb") == toy]


def _check_system(cfg: Config, task) -> Iterator[str]:
    """Check that a translation system has its options, and fits the task."""
    mt = cfg.mt
    human = "the benchmark has no human translations"
    if issubclass(task, CustomTask):
        human = f"{cfg.task.spec} does not say parallel: true"
    if mt.name == "toy" and not cfg.task.name.startswith("toy_"):
        yield (
            f"mt=toy with task={cfg.task.name}: it translates generated text only; choose another "
            "mt"
        )
    if mt.name == "toy_nllb" and mt.path is None:
        yield from _check_toy_nllb(cfg, task)
    if mt.name == "gold" and not task.parallel:
        yield f"mt=gold with task={cfg.task.name}: {human}; choose another mt"
    if mt.fallback == "gold" and not task.parallel:
        yield f"mt.fallback=gold with task={cfg.task.name}: {human}; leave it null"
    if mt.name in _named("mt", MtConfig, "model") and mt.path is None and mt.pretrain is None:
        yield f"mt={mt.name}: mt.path=<hub id or checkpoint folder> is missing"
    if mt.kind == "command":
        yield from _check_command(cfg, task)
    if mt.quantization and mt.backend != "ctranslate2":
        yield f"mt.quantization={mt.quantization}: only mt.backend=ctranslate2 has it"
    # a folder that is also task.data_dir has been checked as such
    if mt.path is not None and mt.path != cfg.task.data_dir:
        local = mt.kind == "file" or looks_local(mt.path)
        if local and (problem := folder_problem(mt.path)):
            yield f"mt.path={mt.path}: {problem}"


def _check_toy_nllb(cfg: Config, task: Any) -> Iterator[str]:
    """Check that the tiny NLLB knows the languages of a run."""
    if not _generated(cfg, task):
        yield (
            f"mt=toy_nllb with task={cfg.task.name}: it knows the generated languages only; choose "
            "another mt"
        )
        return
    asked = {"task.lang": cfg.task.tested, "source.langs": cfg.source.langs}
    for option, langs in asked.items():
        for lang in langs:
            if lang in (task.english, *task.languages) and lang not in LANGS:
                yield (
                    f"mt=toy_nllb with {option}={lang}: it translates {', '.join(LANGS)}; choose "
                    "mt=toy"
                )


def _generated(cfg: Config, task: Any) -> bool:
    """Return whether the texts are in the languages of the generated world."""
    toy = TASKS["toy_sentiment"]
    own = (
        issubclass(task, CustomTask)
        and task.english == toy.english
        and {*cfg.task.tested} <= {*toy.languages}
    )
    return own or cfg.task.name.startswith("toy_")


def _check_counterparts(cfg: Config, task) -> Iterator[str]:
    """Check, for mt=gold, that target languages have the splits that training translates."""
    if not any(method.trains for method in members_of(cfg.method).values()):
        return
    given = [getattr(cfg.task, f"{role}_split") for role in ROLES[:2]]
    splits = dict.fromkeys(text.partition("[")[0] for text in given if text is not None)
    for lang in (lang for lang in cfg.task.langs if lang in task.languages):
        if lacking := [split for split in splits if not has_split(task, split, lang)]:
            others = [f"method={name}" for name, method in METHODS.items() if not method.trains]
            yield (
                f"mt=gold with task={cfg.task.name} and method={cfg.method.name}: the benchmark "
                f"has no {' and '.join(lacking)} in {lang}; choose another mt (mt=file "
                f"mt.fallback=gold keeps human translations of the tests), or {' or '.join(others)}"
            )


def _check_command(cfg: Config, task) -> Iterator[str]:
    """Check the program that translates, and its codes for the languages of the run."""
    if cfg.mt.command is None:
        yield (
            "mt=command: mt.command='<program and its arguments, with {from} and {to}>' is missing"
        )
        return
    yield from command_problems(cfg.mt.command)
    yield from code_problems(cfg.mt.codes)
    for lang in (task.english, *cfg.task.tested):
        try:
            if lang in (task.english, *task.languages):
                code_of_language(lang, cfg.mt.codes)
        except UserError as error:
            yield str(error)


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
