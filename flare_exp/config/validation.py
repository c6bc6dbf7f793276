"""Check a command line and report all its problems at once."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from flare_exp.config.composition import (
    compose_cell,
    expand_grid,
    explicit_fusion,
    groups,
    now,
    without_fusion,
)
from flare_exp.config.constraints import cross_field_problems
from flare_exp.config.method_schema import FUSING_METHODS
from flare_exp.config.mt_schema import MtPretrainConfig
from flare_exp.config.schema import RETIRED, Config, PretrainConfig, keys
from flare_exp.config.source_rules import undrawn_problems
from flare_exp.errors import first_line
from flare_exp.utils.suggestions import allowed, nearest, same_name


def validate(
    arguments: Sequence[str], multirun: bool, rules: bool = True
) -> tuple[list[Any], list[str]]:
    """Check the overrides of a command line.

    Args:
        arguments: the overrides, one string each.
        multirun: whether options may have several values (-m).
        rules: check the composed configurations, too (`check_config`).

    Returns:
        the composed configuration of each job (OmegaConf, resolved lazily), and a message for every
            problem.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    now.cache_clear()
    parser, good, problems = OverridesParser.create(), [], []
    unknown: set[str] = set()  # groups whose choice is wrong
    given: dict[str, list[Any]] = {}
    for text in arguments:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = f" ({first_line(error)})" if "=" in text else ""
            problems.append(f"{text}: not of the form key=value{reason}")
            continue
        given.setdefault(override.key_or_group, []).append(override)
        found = _sweep_problems(override, multirun) or list(check_override(override))
        problems += found
        if not found:
            good.append(override)
        elif override.key_or_group in groups():
            unknown.add(override.key_or_group)
    problems += _check_repeated(given)
    # options of an unknown choice would be checked against the shipped one
    good = [o for o in good if o.key_or_group.partition(".")[0] not in unknown]
    jobs = []
    bases: dict[tuple[str, ...], Any] = {}
    for cell in expand_grid(good):
        job, found = _check_job(cell, multirun, bases, rules)
        problems += [p for p in found if p not in problems]
        jobs.append(job)
    return jobs, problems


def _sweep_problems(override: Any, multirun: bool) -> list[str]:
    """Return a message if the values of an option cannot be listed, or not in a single run.

    A grid is expanded more than once, so values in a random order would give other jobs each time.
    """
    text, key = override.input_line, override.key_or_group
    bare = re.sub(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", "", text.partition("=")[2])
    if found := re.search(r"\b(glob|interval|shuffle)\(", bare):
        f = keys().get(key)
        numbers = f is not None and f.type.startswith(("int", "float"))
        also = f", or {key}=range(start,stop,step)" if numbers else ""
        return [
            f"{text}: {found[1]}(...) does not list its values in an order; write -m "
            f"{key}=a,b,c{also}"
        ]
    if not override.is_sweep_override():
        return []
    if key.startswith("hydra"):
        given = text.partition("=")[2]
        return [
            f"{text}: all jobs have the same value of it; a text with commas is written "
            f"\"{key}='{given}'\""
        ]
    values = override.value()
    if override.is_range_sweep() and not (values.step and any(True for _ in values.range())):
        return [f"{text}: there is no value in it; write range(start,stop,step)"]
    if multirun:
        return []
    return [f"{text}: several values need -m (multirun){_as_one_run(override)}"]


def _as_one_run(override: Any) -> str:
    """Return how a single run takes several values of an option; "" if it takes one."""
    f = keys().get(override.key_or_group)
    values = ",".join(override.sweep_string_iterator())
    if f is None or f.type != "Any" or "[" in values:
        return ""
    return f"; one run of all of them: {override.key_or_group}=[{values}]"


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


# Options of Hydra on which it depends which jobs there are, and in which folders.
FIXED = (
    *("hydra.run", "hydra.sweep", "hydra.sweeper.params", "hydra.mode"),
    *("hydra.job.chdir", "hydra.job.num"),
)


def check_override(override) -> Iterator[str]:
    """Check one override: its key exists, and its values are of the right type."""
    key, known_groups, known = override.key_or_group, groups(), keys()
    if key.startswith("hydra"):
        if key == "hydra" or any(f"{key}.".startswith(f"{fixed}.") for fixed in FIXED):
            yield (
                f"{override.input_line}: the program sets it; a run's folder is output_dir=..., "
                "several values of an option are -m"
            )
        return
    if not override.is_sweep_override():
        values = [override.value()]
    elif key in known_groups:
        values = list(override.sweep_string_iterator())
    else:  # a list stays one; texts lose their quotes
        values = list(override.sweep_iterator(transformer=override._convert_value))
    if key in known_groups and override.is_add() and not override.is_force_add():
        yield f"{override.input_line}: leave out the +; it is for options that there are not yet"
    elif key in known_groups and not override.is_delete():
        for value in values:
            if str(value) in known_groups[key]:
                continue
            if key == "experiment" and value in (None, "null"):
                yield "experiment=null: no preset is the default; leave it out"
            elif key == "mt" and str(value).startswith("["):
                yield f"mt={value}: write several systems as mt=a source.systems=[b]"
            else:
                yield f"{key}={value}: {allowed(str(value), known_groups[key])}"
    elif key in known_groups:
        yield f"{override.input_line}: a group cannot be removed"
    elif key in RETIRED:
        yield f"{key}: is no longer an option ({RETIRED[key]}); leave it out"
    elif key not in known:
        yield (
            f"{key}: there is no such "
            f"option{same_name(key, known) or nearest(key, [*known_groups, *known])}"
        )
    elif override.is_delete():
        yield f"{override.input_line}: options cannot be removed; set {key}=null"
    elif key.split(".")[0] in known_groups and "." not in key:
        yield f"{key}: {allowed('', known_groups[key])}"
    else:
        for value in values:
            yield from _check_type(key, value)


@functools.cache
def _typed() -> Any:
    """Return an empty configuration that takes values of the right types only."""
    from omegaconf import OmegaConf

    typed = OmegaConf.structured(Config)
    typed.model.pretrain, typed.mt.pretrain = PretrainConfig(), MtPretrainConfig()
    return typed


def _check_type(key: str, value: Any) -> Iterator[str]:
    """Check that a value is of the type of its option."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parent, _, name = key.rpartition(".")
    # a copy is made five times as fast as the structure
    typed = copy.deepcopy(OmegaConf.select(_typed(), parent) if parent else _typed())
    try:
        # OmegaConf would take any other number for true
        if keys()[key].type == "bool" and isinstance(value, int) and value not in (0, 1):
            raise ValueError
        if keys()[key].type == "Any" and not _is_text_or_list(value):
            raise ValueError
        if keys()[key].type.startswith(("list[", "dict[")) and _is_nested(value):
            raise ValueError
        OmegaConf.update(typed, name, value)
    except (OmegaConfBaseException, ValueError) as error:
        yield f"{key}={'null' if value is None else value}: {_expected(key) or first_line(error)}"


def _is_text_or_list(value: Any) -> bool:
    """Return whether a value is text, or a list of texts."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) for item in items)


def _is_nested(value: Any) -> bool:
    """Return whether a list or a table has lists, tables or null in it."""
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, (dict, list)) and any(
        item is None or isinstance(item, (dict, list)) for item in items
    )


# type of an option -> description of its values
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "Any": "text, or a list of texts, e.g. [a,b]",
    "list[str]": "a list, e.g. [a,b]",
    "list[float]": "a list of numbers, e.g. [0.5]",
    "dict[str, str]": "a table, e.g. '{en: eng, es: spa}'",
}


def _expected(key: str) -> str:
    """Return a description of the values that an option takes; "" if there is none."""
    known = keys()
    if inside := [
        name for name, f in known.items() if name.startswith(f"{key}.") and f.metadata.get("help")
    ]:
        return f"{key} is a section; its options: {', '.join(inside)}"
    kind, _, null = known[key].type.partition(" | ")
    said = KINDS.get(kind, "")
    if kind == "list[str]" and (each := known[key].metadata.get("each")):
        said = f"a list, e.g. [{','.join(each[:2])}]"
    return f"must be {said}{', or null' if null else ''}" if said else ""


def _check_job(
    overrides: list[str], multirun: bool, bases: dict[tuple[str, ...], Any], rules: bool
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
            return None, [f"{group}={name}: {allowed(name, error.options)}"]
        key = getattr(reason, "full_key", None)
        return None, [f"{key}: {line}" if key else line for line in [first_line(reason).strip()]]
    return composed, list(check_config(cfg, overrides, multirun)) if rules else []


def check_config(cfg: Config, overrides: Sequence[str], multirun: bool) -> Iterator[str]:
    """Check all values of a composed configuration, and those that contradict each other.

    Args:
        cfg: the configuration.
        overrides: the overrides of its job; they say whether the user chose a fusion.
        multirun: whether it is a job of a grid.
    """
    yield from _check_rules(cfg)
    yield from cross_field_problems(cfg)
    if multirun or not without_fusion(cfg, overrides):
        return
    yield from undrawn_problems(cfg)
    if explicit_fusion(overrides):
        yield (
            f"fusion={cfg.fusion.name} with method={cfg.method.name}: only "
            f"{' and '.join(FUSING_METHODS)} fuse; leave fusion out or choose method=flare"
        )


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
        elif "group" in rules and value not in groups()[rules["group"]]:
            yield f"{key}={value}: {allowed(str(value), groups()[rules['group']])}"
        elif "choices" in rules and value not in rules["choices"]:
            yield f"{key}={value}: {allowed(str(value), rules['choices'])}"
        elif value in ("", []) and "may_be_empty" in rules:
            continue
        elif value == "":
            yield f"{key}=: must not be empty"
        elif "each" in rules and (
            wrong := [v for v in value if v not in rules["each"]] or ([] if value else ["[]"])
        ):
            yield f"{key}={wrong[0]}: {allowed(wrong[0], rules['each'])}"
        elif "min" in rules and value < rules["min"]:
            yield f"{key}={value}: must be {rules['min']} or more"
        elif "above" in rules and not value > rules["above"]:
            yield f"{key}={value}: must be above {rules['above']}"
        elif "max" in rules and value > rules["max"]:
            yield f"{key}={value}: must be {rules['max']} or less"
