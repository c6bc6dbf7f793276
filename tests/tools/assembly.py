"""Configurations of many runs, assembled from sections that were composed once.

A task and a model are composed in every pair, because conf/recipe depends on both; so is a preset.
Any other group changes sections of its own, whatever they are, and these are put in place.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import OmegaConf

from flare_exp.config import composition, validation
from flare_exp.config.schema import Config

PAIRED = ("experiment", "task", "model")
FREE = ("logger", "output_dir")  # where results go; no rule is about them


def comparable(cfg: Config) -> Config:
    """The configuration without the texts that are made of several groups' names."""
    return replace(cfg, output_dir="x", logger=None, method=replace(cfg.method, label="x"))


@functools.cache
def composed(*words: str) -> Config:
    cfg: Any = OmegaConf.to_object(composition.compose_cell([*words, "output_dir=x"], {}))
    return comparable(cfg)


@functools.cache
def effect(group: str, option: str) -> dict[str, Any]:
    """Section -> what it becomes by the choice of an option; the group's own is always there."""
    plain, chosen = composed(), composed(f"{group}={option}")
    sections = {f.name: getattr(chosen, f.name) for f in fields(chosen)}
    return {k: v for k, v in sections.items() if k == group or v != getattr(plain, k)}


def assembled(values: dict[str, Any]) -> Config:
    """The configuration of a run, as it is composed from group=option and key=value."""
    groups = [key for key in values if key in composition.groups()]
    cfg = composed(*(f"{group}={values[group]}" for group in PAIRED if group in groups))
    changed: dict[str, Any] = {}
    for group in groups:
        if group not in (*PAIRED, *FREE):
            own = effect(group, values[group])
            assert not own.keys() & changed.keys(), "two groups change one section: compose them"
            changed |= own
    cfg = replace(cfg, **changed)
    for key, value in values.items():
        if key not in groups and key.split(".")[0] not in FREE:
            cfg = with_value(cfg, key.split("."), value)
    return cfg


def with_value(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return replace(
        section, **{name: with_value(getattr(section, name), rest, value) if rest else value}
    )


@functools.cache
def read(word: str) -> tuple[str, tuple[Any, ...], tuple[str, ...]]:
    """Key and values of a word of the command line, as Hydra reads it, and its problems."""
    override = OverridesParser.create().parse_override(word)
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    texts = tuple(value.text if isinstance(value, QuotedString) else value for value in values)
    return override.key_or_group, texts, tuple(validation.check_override(override))


def axes(words: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Key -> its values."""
    return {key: values for key, values, _ in map(read, words)}


def runs(axes: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for cell in itertools.product(*axes.values()):
        yield dict(zip(axes, cell, strict=True))


def problems(words: Sequence[str], multirun: bool = False) -> set[str]:
    """The problems of every run of a command line.

    No rule joins the seed with anything, so the seeds take turns over the other values.
    """
    if wrong := {problem for word in words for problem in read(word)[2]}:
        return wrong
    found = axes(words)
    seeds = found.pop("seed", (0,))
    cells = list(runs(found))
    chosen = [word for word in words if word.startswith("fusion")]
    return {
        problem
        for i in range(max(len(cells), len(seeds)))
        for problem in validation.check_config(
            assembled({**cells[i % len(cells)], "seed": seeds[i % len(seeds)]}), chosen, multirun
        )
    }
