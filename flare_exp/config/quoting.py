"""Quote the values of a command line that Hydra's grammar would misread."""

from __future__ import annotations

import os
import re

from flare_exp.config import schema

# Options that are taken literally, as the shell passes them: paths, and the command of a program.
PATHS = (
    "output_dir",
    "cache_dir",
    "task.data_dir",
    "task.train_data_dir",
    "task.spec",
    "model.path",
    "mt.path",
    "mt.command",
    "distil.texts",
)
TEXTS = ("str", "str | None")  # types of options


def quoted(override: str, several: bool) -> str:
    """Quote the value of a key=value word if it is a text that Hydra would misread.

    Args:
        override: the key=value word.
        several: a comma separates two values; otherwise it is a part of the text.
    """
    key, _, value = override.partition("=")
    if not value or (_is_hydras(value) and _parses(override)):
        return override
    if several and key.lstrip("+") not in PATHS and re.search("['\"]", value) and _parses(override):
        return override  # several texts, of which some are quoted
    parts = value.split(",") if several else [value]
    return f"{key}={','.join(_as_text(key.lstrip('+'), part) for part in parts)}"


def _as_text(key: str, part: str) -> str:
    """Quote one value if it is a text that Hydra would refuse, split or not keep as it is."""
    if key in PATHS:
        part = os.path.expanduser(part)  # the shell leaves ~ as it is behind a =
        misread = not re.fullmatch(r"[\w./-]*", part, re.ASCII) or _is_rewritten(part)
    elif key.endswith("_split") and "[" in part:
        misread = part[0] not in "'\""
    else:
        option = schema.keys().get(key)
        text = option is not None and option.type in TEXTS
        misread = part == "nan" if key == "task.lang" else text and _is_misread(part)
    if not misread:
        return part
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(part, Quote.single).with_quotes()


def _is_misread(text: str) -> bool:
    """Return whether Hydra's grammar refuses a text, or takes it for several or for a number."""
    return ", " in text or not _parses(f"key={text}") or _is_rewritten(text)


def _is_rewritten(text: str) -> bool:
    """Return whether Hydra reads a text as a number that it writes otherwise: 1.10 as 1.1."""
    try:
        float(text)
    except ValueError:
        return False
    from hydra.core.override_parser.overrides_parser import OverridesParser

    # Hydra's grammar refuses numerals of other scripts, which float takes
    return (
        text.isascii()
        and str(OverridesParser.create().parse_override(f"key={text}").value()) != text.strip()
    )


def _is_hydras(value: str) -> bool:
    """Return whether a value uses Hydra's grammar.

    Such a value is quoted, holds an interpolation, or is a sweep such as choice(a,b).
    """
    return (
        (value[0] == value[-1] and value[0] in "'\"")
        or "${" in value
        or bool(re.fullmatch(r"\w+\(.*\)", value))
    )


def _parses(override: str) -> bool:
    """Return whether Hydra's grammar accepts an override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True
