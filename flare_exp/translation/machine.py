"""Translate with a model, and keep what is translated in shards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from flare_exp.artifacts import ArtifactStore, digest_of
from flare_exp.code import code_of
from flare_exp.languages import language
from flare_exp.tasks import Example, Task
from flare_exp.tasks.base import warn_once
from flare_exp.tasks.reading import read_parquet
from flare_exp.translation import projection
from flare_exp.translation.base import FLAGS, Flagged, Translator, has_span

log = logging.getLogger(__name__)


class MTModel(Protocol):
    """A translation model that is loaded when the first text is translated.

    Attributes:
        uncertain: only a try shows whether it translates between two languages, and it is a cheap
            one.
    """

    uncertain: bool

    @property
    def identity(self) -> dict[str, Any]:
        """Return checkpoint and decoding: all that a translation depends on besides languages."""
        ...

    @property
    def engine(self) -> Any:
        """Load and return the `translation.engines.Engine`."""
        ...

    def code(self, lang: str) -> str:
        """Return the model's code of a language of the benchmark.

        Raises:
            UserError: it is not known.
        """
        ...

    def check(self, *codes: str) -> None:
        """Check early that the model and the languages (the model's codes) are available.

        Raises:
            UserError: one of them is not.
        """
        ...


class MachineTranslator(Translator):
    """Translator that uses a model and translates every distinct text once.

    The texts are translated in shards that are artifacts of their own: an interrupted translation
    continues after its last finished shard.

    Answers are translated along from English only (training data): they are marked, and the marks
    are found again (flare_exp.translation.projection). Test data must not show where its answers
    are, so its translations into any language have none. An answer that is found in such a
    translation is translated back by itself (`texts`).

    Args:
        task: the benchmark that the examples belong to.
        model: the translation model.
        store: keeps the shards.
        marker: name of the marks around answers (`projection.MARKERS`).
        shard: texts per shard.
    """

    def __init__(
        self,
        task: Task,
        model: MTModel,
        store: ArtifactStore,
        marker: str = "quotes",
        shard: int = 512,
    ):
        self.task, self.model, self.store, self.marker, self.shard = (
            task,
            model,
            store,
            marker,
            shard,
        )

    def identity(self, examples: Sequence[Example], lang: str) -> dict[str, Any]:
        """Return the model's identity, both languages and the marker.

        A warning names each language for which the model uses a related one.

        Raises:
            UserError: the model or a language is not available.
        """
        own, other = (self.model.code(code) for code in (examples[0].lang, lang))
        self.model.check(own, other)
        for name, code in ((examples[0].lang, own), (lang, other)):
            if language(name).proxy and language(name).flores == code:
                warn_once(
                    f"the translation model does not know {name}: {code} stands in for it "
                    "(flare_exp/languages.py)"
                )
        return {
            **self.model.identity,
            "from": own,
            "to": other,
            "marker": self.marker if self._marks(examples) else None,
        }

    def try_out(self, examples: Sequence[Example], lang: str) -> None:
        """Translate one example, if only that shows whether the model knows the languages."""
        if self.model.uncertain:
            self.translate(examples[:1], lang)

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Return the examples in `lang`, in the order of `examples`."""
        return [example for example, _ in self.flagged(examples, lang)]

    def flagged(self, examples: Sequence[Example], lang: str) -> Flagged:
        """Translate the examples and add FLAGS of each translation."""
        marks = self._marks(examples)
        asked = [self._marked(e) if marks else e.texts for e in examples]
        every = [text for texts in asked for text in texts]
        found = self._texts(every, examples[0].lang, lang, self.marker if marks else None)
        return [
            self._translated(e, [found[text] for text in texts], marks)
            for e, texts in zip(examples, asked, strict=True)
        ]

    def texts(self, texts: Sequence[str], own: str, lang: str) -> list[str]:
        """Translate `texts` from one language of the benchmark into another, in their order."""
        found = self._texts(texts, own, lang, None)
        return [found[text]["translation"] for text in texts]

    def texts_identity(self, own: str, lang: str) -> dict[str, Any]:
        """Return all that the translation of texts depends on besides the texts."""
        codes = {"from": self.model.code(own), "to": self.model.code(lang)}
        return {**self.model.identity, **codes}

    def _marks(self, examples: Sequence[Example]) -> bool:
        """Return whether answers are translated along: those of English, which is trained on."""
        return not self.task.labels and examples[0].lang == self.task.english

    def _marked(self, example: Example) -> tuple[str, ...]:
        """Return the texts, with the answer marked in the context if it has a place there."""
        i = self.task.context
        if i is None or not has_span(example):
            return example.texts
        marked = projection.mark(example.texts[i], example.answers[0], self.marker)
        return (*example.texts[:i], marked, *example.texts[i + 1 :])

    def _translated(
        self, example: Example, rows: Sequence[dict[str, Any]], marked: bool
    ) -> tuple[Example, dict[str, bool]]:
        texts, answers = [row["translation"] for row in rows], ()
        i = self.task.context
        if i is not None and marked and has_span(example):
            texts[i], answer = projection.find(texts[i], self.marker)
            answers = (answer,) if answer else ()  # type: ignore[assignment]
        flags = {flag: any(row[flag] for row in rows) for flag in FLAGS}
        return replace(example, texts=tuple(texts), answers=answers), flags

    def _texts(
        self, texts: Sequence[str], own: str, lang: str, marker: str | None
    ) -> dict[str, dict[str, Any]]:
        """Translate each distinct text and map it to its row (original, translation, flags).

        Args:
            marker: name of the marks around answers; None: the texts were not marked.
        """
        from flare_exp.utils import progress

        unique = list(dict.fromkeys(texts))
        rows: dict[str, dict[str, Any]] = {}
        with progress.bar(f"translating {own} -> {lang}", len(unique)) as advance:
            for first in range(0, len(unique), self.shard):
                part = unique[first : first + self.shard]
                made = self._shard(part, own, lang, marker, advance)
                rows |= {row["original"]: row for row in made}
        return rows

    def _shard(
        self,
        texts: Sequence[str],
        own: str,
        lang: str,
        marker: str | None,
        advance: Callable[[int], None],
    ) -> list[dict[str, Any]]:
        from flare_exp.translation import quality
        from flare_exp.utils import files

        source, target, flores = self.model.code(own), self.model.code(lang), language(lang).flores
        key = {
            **self.model.identity,
            "from": source,
            "to": target,
            "language": flores,
            "protect": marker and [marker, code_of("marks")],
            "texts": digest_of(list(texts)),
        }

        def build(folder: Path) -> dict[str, Any]:
            # the sentences between the marks of an answer are translated as one
            protect = marker and (lambda text: projection.marked_range(text, marker))
            made = self.model.engine.translate(
                texts, source, target, progress=advance, protect=protect
            )
            rows = [
                {"original": t, "translation": m.text, **quality.flags(t, m, flores)}
                for t, m in zip(texts, made, strict=True)
            ]
            files.write_parquet(folder / "texts.parquet", rows)
            return {"texts": len(rows), **{flag: sum(row[flag] for row in rows) for flag in FLAGS}}

        shard = self.store.get("translation_shard", key, build)
        if shard.reused:
            advance(len(texts))
            log.info("a finished shard of %d texts is used again", len(texts))
        return read_parquet(
            shard.path / "texts.parquet", ("original", "translation", *FLAGS), "cache_dir"
        )
