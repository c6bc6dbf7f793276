"""Read `task.lang`, which is one language or a list of them."""

from __future__ import annotations

from typing import Any

NAMED = 6  # the most languages that a name of a run lists


def as_list(lang: Any) -> list[str]:
    """Return the languages that `task.lang` names: one as text, or several as a list."""
    return [lang] if isinstance(lang, str) else [*(lang or ())]


def simplified(lang: Any) -> Any:
    """Return a list of one language as that language, so that both are the same run."""
    return lang if isinstance(lang, str) or len(as_list(lang)) != 1 else lang[0]


def joined(lang: Any) -> str:
    """Return the name of some languages in titles and folder names: "jav+ban+ace".

    Of many, the first ones are named, since the name of a folder has a limited length.
    """
    names = list(map(str, as_list(lang)))
    more = len(names) - NAMED
    return "+".join(names[:NAMED]) + (f"+{more}more" if more > 0 else "")
