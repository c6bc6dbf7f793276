"""Say what is allowed, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

LISTED = 40  # the most values that a message lists


def allowed(value: str, values: Sequence[Any]) -> str:
    """Return a message with the allowed values, and the one that is spelled most alike.

    Of many values, the first ones are listed.
    """
    names = list(map(str, values))
    listed = (
        ", ".join(names)
        if len(names) <= LISTED
        else f"{', '.join(names[:10])}, ... ({len(names)} in all)"
    )
    return f"choose one of {listed}{nearest(value, names)}"


def same_name(key: str, known: Iterable[str]) -> str:
    """Suggest options with the same last part as `key`, from the uppermost sections."""
    same = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    upper = [k for k in same if k.count(".") == min(s.count(".") for s in same)]
    return f"; did you mean {' or '.join(upper)}?" if upper else ""


def nearest(value: str, known: Sequence[str]) -> str:
    """Suggest the known value that is spelled most alike, or begins so; "" without one."""
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.6)
    near = near or [name for name in known if value and name.startswith(value)]
    return f"; did you mean {near[0]}?" if near else ""
