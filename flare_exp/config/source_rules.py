"""Check the sources of a fusion: how they are drawn, ablated, weighed and read again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from flare_exp.config.composition import groups, systems_of
from flare_exp.config.method_schema import FUSING_METHODS, SOURCE_METHODS, SourceConfig
from flare_exp.config.methods import DISTIL, ENSEMBLE, answering, fuses, members_of, modes_of
from flare_exp.config.schema import Config
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.source_augmentation import WORDS
from flare_exp.utils.suggestions import allowed

DRAWN = ("dropout", "noise")  # options that draw the sources of training examples


def source_problems(cfg: Config) -> Iterator[str]:
    """Check the ablations of the sources, and how sources are drawn in training.

    That a method has no fusion to draw sources for is another check (`undrawn_problems`).
    """
    source, name = cfg.source, cfg.method.name
    if source.shuffle and source.empty:
        yield "source.shuffle=true with source.empty=true: choose one ablation"
    tests_alone = source.ablate_in == "test"  # which a distillation's teachers do not read
    methods = (answering if tests_alone else members_of)(cfg.method).values()
    for key in ("shuffle", "empty"):
        if getattr(source, key) and not any(method.mode.pairs for method in methods):
            yield (
                f"source.{key}=true with method={name}: only {', '.join(SOURCE_METHODS)} read a "
                "source"
            )
    if max(source.dropout, source.noise) <= 1 < source.dropout + source.noise:
        yield (
            f"source.dropout={source.dropout} with source.noise={source.noise}: their sum must be "
            "1 or less"
        )
    mixes = any(method.mixes for method in members_of(cfg.method).values())
    if mixes and fuses(cfg.method):
        yield from undrawn_problems(cfg)
    for key in DRAWN:
        value = getattr(source, key)
        if value and (source.shuffle or source.empty) and source.ablate_in != "test":
            ablation = "shuffle" if source.shuffle else "empty"
            yield (
                f"source.{key}={value} with source.{ablation}=true: the ablation changes the same "
                "sources; choose source.ablate_in=test"
            )


def several_problems(cfg: Config, task: Any) -> Iterator[str]:
    """Check the languages and the translation systems of several sources.

    Args:
        cfg: the configuration.
        task: the class of the task.
    """
    source = cfg.source
    if len(source.langs) < 2 and not source.systems and source.combine != SourceConfig().combine:
        yield (
            f"source.combine={source.combine}: a text has one source; name two languages or more "
            "(source.langs), or a further translation system (source.systems)"
        )
    if source.langs:
        yield from _language_problems(cfg, task, f"source.langs=[{','.join(source.langs)}]")
    if source.systems:
        yield from _system_problems(cfg, f"source.systems=[{','.join(source.systems)}]")


def _unfused_problems(cfg: Config, asked: str, what: str) -> Iterator[str]:
    """Check that the method fuses several sources. `what`: what they are."""
    methods = members_of(cfg.method).values()
    if not any(m.fuses and m.mode is PairingMode.PAIRED for m in methods):
        yield f"{asked} with method={cfg.method.name}: only flare fuses {what}"
    if any(m.mixes for m in methods):
        yield f"{asked}: x_mixup reads English by mt alone; leave it out of method.of"
    if cfg.method.weights == "similarity" and cfg.method.name == ENSEMBLE:
        yield f"{asked} with method.weights=similarity: it compares a text with one English source"


def _system_problems(cfg: Config, asked: str) -> Iterator[str]:
    """Check the names of further translation systems, and that a test reads their translations."""
    yield from _unfused_problems(cfg, asked, "translations by several systems")
    if cfg.source.langs:
        yield (
            f"{asked} with source.langs=[{','.join(cfg.source.langs)}]: sources are in several "
            "languages or by several systems; choose one"
        )
    if cfg.method.name == DISTIL:
        yield (
            f"{asked} with method={DISTIL}: only tests read these translations, and the student is "
            "tested without a source"
        )
    names = cfg.source.systems
    known = groups()["mt"]
    for name in dict.fromkeys(names):
        if name not in known:
            yield f"{asked}: {name}: {allowed(name, known)}"
        elif names.count(name) > 1:
            yield f"{asked}: {name} is named {names.count(name)} times"
    for own in systems_of(cfg):
        if own.mt.kind == "file" and own.mt.path is None:
            yield f"{asked}: file reads its translations below task.data_dir, which is not given"
        if all(
            getattr(own.mt, f.name) == getattr(cfg.mt, f.name)
            for f in fields(own.mt)
            if "no_effect" not in f.metadata
        ):
            yield (
                f"{asked} with mt={cfg.mt.name}: both are the same translations; choose another "
                "system, or another option of mt, e.g. mt.seed=1 where mt has wrong words"
            )


def _language_problems(cfg: Config, task: Any, asked: str) -> Iterator[str]:
    """Check the languages of the sources. `task`: the class of the task."""
    langs = cfg.source.langs
    yield from _unfused_problems(cfg, asked, "sources in languages of choice")
    known = [lang for lang in (task.english, *task.languages) if lang not in cfg.task.tested]
    for lang in dict.fromkeys(langs):
        if lang not in known:
            yield f"{asked}: {lang}: {allowed(lang, known)}"
        elif langs.count(lang) > 1:
            yield f"{asked}: {lang} is named {langs.count(lang)} times"
    if len(langs) > 1 and cfg.source.noise and WORDS in cfg.source.noise_kinds:
        yield f"{asked} with source.noise_kinds={WORDS}: wrong words are put into one source alone"
    if cfg.distil.texts is not None:
        yield f"{asked} with distil.texts={cfg.distil.texts}: its texts have English sources alone"


def undrawn_problems(cfg: Config) -> Iterator[str]:
    """Name the options that draw sources, for a method that fuses none."""
    for key in DRAWN:
        if value := getattr(cfg.source, key):
            yield (
                f"source.{key}={value} with method={cfg.method.name}: only "
                f"{' and '.join(FUSING_METHODS)} fuse a source"
            )


def similarity_problems(cfg: Config, asked: str) -> Iterator[str]:
    """Check that a source can be weighed against the text alone, and that pairs show how."""
    if len({mode.translates_tests for mode in modes_of(cfg.method)}) < 2:
        yield (
            f"{asked}: it weighs methods that read the translation of a test text against methods "
            "that do not; name both kinds, e.g. method.of=[lora,flare]"
        )
    if (cfg.source.shuffle or cfg.source.empty) and cfg.source.ablate_in != "test":
        yield (
            f"{asked}: validation pairs show how similar texts and sources are; choose "
            "source.ablate_in=test"
        )


def passes_problems(cfg: Config, task: Any) -> Iterator[str]:
    """Check that the passes of `predict.sources` can be made, and that their answers average."""
    sources = cfg.predict.sources
    if sources == ["given"]:
        return
    asked = f"predict.sources=[{','.join(sources)}]"
    answers = answering(cfg.method).values()  # no teacher of a distillation
    if cfg.method.name == ENSEMBLE or not any(method.fuses for method in answers):
        yield f"{asked} with method={cfg.method.name}: only {' and '.join(FUSING_METHODS)} have it"
    elif sources == ["none"]:
        yield f"{asked}: choose source.empty=true source.ablate_in=test for no source alone"
    elif len(set(sources)) < len(sources):
        yield f"{asked}: each kind of pass is made once"
    elif not task.labels:
        yield f"{asked}: label probabilities are averaged, and task={task.name} has no labels"
    elif cfg.decode.name == "generate":
        yield f"{asked}: generated labels have no probabilities; choose decode=score"
