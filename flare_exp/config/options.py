"""Define what an option of the schema is made of: its default, help and rules.

Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass
from typing import Any


def option(default: Any, help: str, **rules: Any) -> Any:
    """Return a dataclass field with its help text and rules.

    Args:
        default: the default value; "???" if a value must be given.
        help: help text of the option.
        **rules: `min`, `above` (exclusive), `max`, `choices`, `each` (choices for the items of a
            list), `refused` (value -> reason), `group` (the value is a name of that group of
            conf/), `only` (names or kinds of the section that have the option), or `no_effect`: the
            reason why the value cannot change a result. Every option without `no_effect` belongs in
            the key of an artifact.
    """
    return field(default=default, metadata={"help": help, **rules})


def section(cls: type, **rules: Any) -> Any:
    """Return a dataclass field for a group of options; `no_effect` applies to all of them."""
    return field(default_factory=cls, metadata=rules)


def keys_of(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> dataclass field, for every option of a dataclass."""
    import typing

    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for f in fields(cls):
        inner = [t for t in (hints[f.name], *typing.get_args(hints[f.name])) if is_dataclass(t)]
        found[prefix + f.name] = f
        if inner:
            found |= keys_of(inner[0], f"{prefix}{f.name}.")  # type: ignore[arg-type]
    return found


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value, as on the command line."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {
        k: v for name, value in tree.items() for k, v in flat(value, f"{prefix}{name}.").items()
    }
