"""Name the source texts that a finished run reads beside a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flare_exp.config.methods import answering
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.rows import source_columns


@dataclass(frozen=True)
class SourceTexts:
    """Hold what a run reads beside a text, as one sequence: the fields of each language in turn.

    Attributes:
        fields: names of a text's fields.
        langs: languages of the sources; none for methods without a source.
        english: the task's name of English.
    """

    fields: tuple[str, ...]
    langs: tuple[str, ...]
    english: str

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the name of each source text: its field, or its language where that is needed."""
        if self.langs in ((), (self.english,)):
            return self.fields if self.langs else ()
        if len(self.fields) == 1:
            return self.langs
        return tuple(f"{lang}_{field}" for lang in self.langs for field in self.fields)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the column, or the key, of each source text."""
        if self.langs == (self.english,):
            return source_columns(self.fields)
        return tuple(f"source_{part}" for part in self.parts)

    def by_language(self, texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return language -> fields of the source texts of one row."""
        size = len(self.fields)
        return {lang: tuple(texts[i * size : (i + 1) * size]) for i, lang in enumerate(self.langs)}


def source_texts(cfg: Any, task: Any) -> SourceTexts:
    """Return what a run reads beside a test text.

    Args:
        cfg: its configuration.
        task: names the fields and English.
    """
    langs: dict[str, None] = {}
    for method in answering(cfg.method).values():
        mode = method.mode
        if not mode.translates_tests or (mode.pairs and leaves_sources_out(cfg)):
            continue
        own = cfg.source.langs if mode is PairingMode.PAIRED else ()
        langs |= dict.fromkeys(own or (task.english,))
    return SourceTexts(tuple(task.fields), tuple(langs), task.english)


def leaves_sources_out(cfg: Any) -> bool:
    """Return whether the test texts of a run have no source (ablation `source.empty`)."""
    return cfg.source.empty and cfg.source.ablate_in != "train"
