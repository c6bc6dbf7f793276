"""Compose the configurations of the jobs of a command line, with Hydra."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from flare_exp.config.languages import joined, simplified
from flare_exp.config.methods import fuses
from flare_exp.config.schema import Config, default_cache, keys


def conf_dir() -> Path:
    """Return the folder of the shipped configuration.

    It is beside the modules in a wheel, and beside the package in a checkout.
    """
    inside = Path(__file__).parents[1] / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


@functools.cache
def groups() -> dict[str, list[str]]:
    """Return group -> names of its options, from the files of conf/."""
    folders = sorted({f.parent for f in conf_dir().glob("*/**/*.yaml")})
    return {
        p.relative_to(conf_dir()).as_posix(): sorted(f.stem for f in p.glob("*.yaml"))
        for p in folders
    }


@functools.cache
def register_schema() -> None:
    """Register the dataclasses as the typed base of conf/config.yaml, and its resolvers.

    A table such as mt.codes takes keys of the user's own. `${languages:${task.lang}}` is the name
    of one or several languages.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(Config)
    for key, f in keys().items():
        if str(f.type).startswith("dict["):
            OmegaConf.set_struct(OmegaConf.select(schema, key), False)
    ConfigStore.instance().store(name="schema", node=schema)
    OmegaConf.register_new_resolver("languages", joined, replace=True)
    OmegaConf.register_new_resolver("default_cache", default_cache, replace=True)


def job_overrides(arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job of a checked command line, in Hydra's order."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return list(expand_grid([OverridesParser.create().parse_override(text) for text in arguments]))


def launcher(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the options of `hydra.launcher` for a checked job."""
    from omegaconf import OmegaConf

    composed = _compose(overrides, return_hydra_config=True)
    return OmegaConf.to_container(composed.hydra.launcher, resolve=True)  # type: ignore[return-value]


@functools.cache
def now(pattern: str) -> str:
    """Return the time of `${now:pattern}`, one and the same for all jobs of a command line."""
    return datetime.now().strftime(pattern)


def _compose(overrides: Sequence[str], **options) -> Any:
    """Compose the configuration of some overrides with Hydra."""
    from hydra import compose, initialize_config_dir
    from hydra.core.utils import setup_globals

    register_schema()
    setup_globals()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="flare_exp"):
        return compose("config", overrides=list(overrides), **options)


def compose_cell(overrides: Sequence[str], bases: dict[tuple[str, ...], Any]) -> Any:
    """Compose one job of a grid.

    The part that depends on the chosen groups alone is composed once for all jobs.

    Args:
        overrides: the job's overrides.
        bases: chosen groups -> composed configuration; new ones are added.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    known = keys().keys() - groups().keys()
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [
        o
        for o in parsed
        if o.key_or_group in known and not (o.is_delete() or o.is_sweep_override())
    ]
    chosen = tuple(str(o.input_line) for o in parsed if o not in values)
    if chosen not in bases:
        bases[chosen] = _compose(chosen)
    OmegaConf.register_new_resolver("now", now, replace=True)  # in the place of Hydra's
    composed = copy.deepcopy(bases[chosen])
    ConfigLoaderImpl._apply_overrides_to_config(values, composed)
    return with_simple_language(composed)


def systems_of(cfg: Config) -> list[Config]:
    """Return the configuration with each of `source.systems` in the place of `mt`.

    A system has the options of its file of conf/mt. Unknown names are left out.
    """
    from omegaconf import OmegaConf

    found = []
    for name in cfg.source.systems:
        if name in groups()["mt"]:
            composed = copy.deepcopy(_with_system(name))
            composed.task = OmegaConf.structured(cfg.task)  # a file of conf/mt may refer to it
            system: Any = OmegaConf.to_object(composed.mt)
            found.append(replace(cfg, mt=system, source=replace(cfg.source, systems=[])))
    return found


@functools.cache
def _with_system(name: str) -> Any:
    """Compose the shipped configuration with a translation system."""
    return _compose([f"mt={name}"])


def with_simple_language(composed: Any) -> Any:
    """Turn a list of one language into that language, in place; return the configuration."""
    composed.task.lang = simplified(composed.task.lang)
    return composed


def literal(value: Any) -> Any:
    """Return a text in which OmegaConf finds no interpolation: every `${` is escaped.

    Of a list or a table, the same with each text in it; any other value stays.
    """
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    return [literal(item) for item in value] if isinstance(value, list) else value


def key_of(override: str) -> str:
    """Return the key of a key=value word, which a `+` may stand before; "" for any other word."""
    key, equals, _ = override.lstrip("+").partition("=")
    return key if equals else ""


def explicit_fusion(overrides: Sequence[str]) -> bool:
    """Return whether the user chose a fusion on the command line."""
    return any(key_of(o).split(".")[0] == "fusion" for o in overrides)


def without_fusion(job: Any, overrides: Sequence[str]) -> bool:
    """Return whether a job of a grid combines a fusion, or drawn sources, with a method without.

    Such a job is left out of the grid.
    """
    drawn = job.source.dropout or job.source.noise
    return not fuses(job.method) and bool(drawn or explicit_fusion(overrides))


def expand_grid(overrides: Sequence[Any]) -> Iterator[list[str]]:
    """Yield the overrides of each job of a multirun; a single run is one job."""
    axes = [
        [f"{_prefix(o)}{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in overrides
    ]
    for cell in itertools.product(*axes):
        yield list(cell)


def _prefix(override) -> str:
    """Return the "+" that an override needs to add a key, or ""."""
    return "+" if override.is_add() and not override.get_key_element().startswith("+") else ""
