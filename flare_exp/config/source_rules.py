"""Check the sources of a fusion: how they are drawn, ablated, weighed and read again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flare_exp.config.method_schema import FUSING_METHODS, SOURCE_METHODS
from flare_exp.config.methods import ENSEMBLE, fuses, members_of, modes_of
from flare_exp.config.schema import Config

DRAWN = ("dropout", "noise")  # options that draw the sources of training examples


def source_problems(cfg: Config) -> Iterator[str]:
    """Check the ablations of the sources, and how sources are drawn in training.

    That a method has no fusion to draw sources for is another check (`undrawn_problems`).
    """
    source, name = cfg.source, cfg.method.name
    if source.shuffle and source.empty:
        yield "source.shuffle=true with source.empty=true: choose one ablation"
    for key in ("shuffle", "empty"):
        if getattr(source, key) and not any(mode.pairs for mode in modes_of(cfg.method)):
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
    if cfg.method.name == ENSEMBLE or not fuses(cfg.method):
        yield f"{asked} with method={cfg.method.name}: only {' and '.join(FUSING_METHODS)} have it"
    elif sources == ["none"]:
        yield f"{asked}: choose source.empty=true source.ablate_in=test for no source alone"
    elif len(set(sources)) < len(sources):
        yield f"{asked}: each kind of pass is made once"
    elif not task.labels:
        yield f"{asked}: label probabilities are averaged, and task={task.name} has no labels"
    elif cfg.decode.name == "generate":
        yield f"{asked}: generated labels have no probabilities; choose decode=score"
