"""Translate benchmark texts: English training data to the target language, test data to English.

There are three sources of translations: a parallel benchmark's own (mt=gold and mt=toy), files
(mt=file), and a translation model (every other mt; flare_exp.translation.engines). A benchmark's
own translations are human, except for the splits that the benchmark itself has translated by
machine (`Task.machine_splits`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from flare_exp.artifacts import ArtifactStore, digest_of, file_sha256
from flare_exp.code import code_of
from flare_exp.errors import UserError
from flare_exp.languages import language
from flare_exp.tasks import Example, Task, fingerprint
from flare_exp.tasks.base import check_labels, read_answers, read_parquet, warn_once
from flare_exp.tasks.tables import ANSWERS, TEXT, check_row
from flare_exp.translation import projection

log = logging.getLogger(__name__)

BENCHMARK = ("toy", "gold")
# signs of a bad translation (flare_exp.translation.quality.flags)
FLAGS = ("truncated", "empty", "repetitive", "copy")
Flagged = list[tuple[Example, dict[str, bool]]]


class Translator(ABC):
    """Translates examples of one language and split; ids, keys and labels stay the same.

    An answer becomes the matching span of the translated context. An example whose answer is lost
    has none.
    """

    @abstractmethod
    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Return the examples in `lang`, in their order."""

    def flagged(self, examples: Sequence[Example], lang: str) -> Flagged:
        """Translate the examples and add FLAGS of each translation, if the translator has any."""
        return [(example, {}) for example in self.translate(examples, lang)]

    @abstractmethod
    def identity(self, examples: Sequence[Example], lang: str) -> dict[str, Any]:
        """Return all that the translation depends on besides the examples.

        The call also checks at once that the translation can be obtained.

        Raises:
            UserError: the translation cannot be obtained.
        """


class MTModel(Protocol):
    """A translation model that is loaded when the first text is translated."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return checkpoint and decoding: all that a translation depends on besides languages."""
        ...

    @property
    def engine(self) -> Any:
        """Load and return the `translation.engines.Engine`."""
        ...

    def check(self, *codes: str) -> None:
        """Check early that the model and the languages (FLORES-200 codes) are available.

        Raises:
            UserError: one of them is not.
        """
        ...


def translator(
    task: Task,
    name: str,
    *,
    path: str | None = None,
    fallback: str | None = None,
    machine: Callable[[], MachineTranslator] | None = None,
) -> Translator:
    """Build the translator of an mt group.

    Args:
        task: the benchmark to translate.
        name: name of the mt option.
        path: mt.path, the folder of translations (mt=file).
        fallback: mt.fallback; "gold" falls back to the benchmark's own translations (mt=file).
        machine: builds the translator of a translation model.

    Raises:
        UserError: the translator does not suit the task, or mt.path is missing.
        ValueError: `name` is a translation model, and `machine` is None.
    """
    if name == "file":
        if path is None:
            raise UserError(
                "mt=file: set mt.path=<folder> of mt_<from>-<to>/<split>.parquet, translations of "
                f"{task.name}"
            )
        return FileTranslator(
            task, Path(path).expanduser(), ParallelTranslator(task) if fallback == "gold" else None
        )
    if name in BENCHMARK:
        return ParallelTranslator(task)
    if machine is None:
        raise ValueError(f"mt={name} is a model, and none is given")
    return machine()


class ParallelTranslator(Translator):
    """Translator that looks translations up among a parallel benchmark's rows."""

    def __init__(self, task: Task):
        if not task.parallel:
            raise UserError(f"mt=gold and mt=toy need a parallel benchmark; {task.name} is not one")
        self.task = task

    def identity(self, examples: Sequence[Example], lang: str) -> dict[str, Any]:
        """Return who translated (a human or a machine) and a fingerprint of the translations."""
        machine = self.task.translated_by(examples[0], lang) == "machine"
        by = "machine (benchmark)" if machine else "human"
        return {
            "by": by,
            "reference": fingerprint(list(self._counterparts(examples, lang).values())),
        }

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Return the examples in `lang`, in the order of `examples`.

        Raises:
            UserError: an example has no counterpart in `lang`, or one with another label.
        """
        found = self._counterparts(examples, lang)
        own = [found[_split(e), e.key] for e in examples]
        return [
            replace(e, texts=o.texts, answers=o.answers) for e, o in zip(examples, own, strict=True)
        ]

    def _counterparts(
        self, examples: Sequence[Example], lang: str
    ) -> dict[tuple[str, str], Example]:
        """Return (split, key) -> example in `lang`, for all rows of the splits of `examples`."""
        splits = sorted({_split(example) for example in examples})
        found = {(split, row.key): row for split in splits for row in self.task.read(lang, split)}
        missing = [e.id for e in examples if (_split(e), e.key) not in found]
        if missing:
            raise UserError(
                f"{len(missing)} examples have no translation into {lang} in {self.task.name}, "
                f"e.g. {missing[0]}"
            )
        check_labels(self.task, examples, list(found.values()))
        return found


class FileTranslator(Translator):
    """Translator that reads `<path>/mt_<from>-<to>/<split>.parquet`, row by row as the benchmark.

    For every field f of the task a file has the original in column f and the translation in
    f_translated. For question answering it also has answers_translated {text[], answer_start[]},
    with empty lists where the answer was lost in translation.

    Args:
        task: the benchmark.
        path: the folder.
        fallback: translates where the file of a direction is missing; None makes that an error.
    """

    def __init__(self, task: Task, path: Path, fallback: Translator | None = None):
        self.task, self.path, self.fallback = task, path, fallback

    def identity(self, examples: Sequence[Example], lang: str) -> dict[str, Any]:
        """Return the hash of the file, or the identity of the fallback if the file is missing.

        Raises:
            UserError: there is no file and no fallback, or a row is not the benchmark's.
        """
        place = self._place(examples, lang)
        if not isinstance(place, Path):
            return place.identity(examples, lang)
        self._read(place, examples)
        return {"by": "file", "sha256": file_sha256(place)}

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Return the examples in `lang`, in the order of `examples`.

        Raises:
            UserError: the file is missing, or a row of it is not the benchmark's; the message names
                file and row.
        """
        place = self._place(examples, lang)
        return (
            self._read(place, examples)
            if isinstance(place, Path)
            else place.translate(examples, lang)
        )

    def _place(self, examples: Sequence[Example], lang: str) -> Path | Translator:
        """Return the file of a direction, or the fallback if the file is missing."""
        _, own, split, _ = examples[0].id.split("/")
        file = self.path / f"mt_{own}-{lang}" / f"{split}.parquet"
        if file.is_file():
            return file
        if self.fallback is None:
            also = (
                ", or mt.fallback=gold for the benchmark's own translations"
                if self.task.parallel
                else ""
            )
            raise UserError(
                f"mt=file: there is no {file}; give the folder that holds it as mt.path{also}"
            )
        by = self.task.translated_by(examples[0], lang)
        warn_once(
            f"mt=file: there is no {file}; the benchmark's own {by} translations stand in "
            "(mt.fallback=gold)"
        )
        return self.fallback

    def _read(self, file: Path, examples: Sequence[Example]) -> list[Example]:
        spans = () if self.task.labels else ("answers_translated",)
        columns = (
            *self.task.fields,
            *(f"{field}_translated" for field in self.task.fields),
            *spans,
        )
        rows = read_parquet(file, columns, "mt.path")
        return [self._translated(file, rows, example) for example in examples]

    def _translated(self, file: Path, rows: Sequence[dict[str, Any]], example: Example) -> Example:
        number = int(example.id.rpartition("/")[2])
        if number >= len(rows):
            raise UserError(
                f"mt.path: {file} ends at row {len(rows) - 1}; it has no translation of "
                f"{example.id}"
            )
        row = rows[number]
        for field, text in zip(self.task.fields, example.texts, strict=True):
            if row[field] != text:
                raise UserError(
                    f"mt.path: {file}, row {number}: {field} is not that of {example.id}: "
                    f"{str(row[field])[:60]!r}"
                )
        # only rows that are used are checked: others may have no translation
        kinds = {f"{field}_translated": TEXT for field in self.task.fields}
        if row.get("answers_translated") is not None:
            kinds["answers_translated"] = ANSWERS
        check_row(row, kinds, f"mt.path: {file}", number)
        texts = tuple(row[f"{field}_translated"] for field in self.task.fields)
        answers = () if self.task.labels else read_answers(row["answers_translated"])
        context = "" if self.task.context is None else texts[self.task.context]
        if wrong := [a for a in answers if a.start < 0 or not context.startswith(a.text, a.start)]:
            raise UserError(
                f"mt.path: {file}, row {number}: context_translated has no {wrong[0].text!r} at "
                f"{wrong[0].start}"
            )
        return replace(example, texts=texts, answers=answers)


class MachineTranslator(Translator):
    """Translator that uses a model and translates every distinct text once.

    The texts are translated in shards that are artifacts of their own: an interrupted translation
    continues after its last finished shard.

    Answers are translated along into the target language only (training data): they are marked, and
    the marks are found again (flare_exp.translation.projection). Test data must not show where its
    answers are, so its translations have none. An answer that is found in such a translation is
    translated back by itself (`texts`).

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
        own, other = (language(code) for code in (_lang(examples[0]), lang))
        self.model.check(own.flores, other.flores)
        for code, row in ((_lang(examples[0]), own), (lang, other)):
            if row.proxy:
                warn_once(
                    f"the translation model does not know {code}: {row.flores} stands in for it "
                    "(flare_exp/languages.py)"
                )
        return {
            **self.model.identity,
            "from": own.flores,
            "to": other.flores,
            "marker": self.marker if self._marks(lang) else None,
        }

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Return the examples in `lang`, in the order of `examples`."""
        return [example for example, _ in self.flagged(examples, lang)]

    def flagged(self, examples: Sequence[Example], lang: str) -> Flagged:
        """Translate the examples and add FLAGS of each translation."""
        marks = self._marks(lang)
        asked = [self._marked(e) if marks else e.texts for e in examples]
        found = self._texts([text for texts in asked for text in texts], _lang(examples[0]), lang)
        return [
            self._translated(e, [found[text] for text in texts], marks)
            for e, texts in zip(examples, asked, strict=True)
        ]

    def texts(self, texts: Sequence[str], own: str, lang: str) -> list[str]:
        """Translate `texts` from one language of the benchmark into another, in their order."""
        found = self._texts(texts, own, lang)
        return [found[text]["translation"] for text in texts]

    def texts_identity(self, own: str, lang: str) -> dict[str, Any]:
        """Return all that the translation of texts depends on besides the texts."""
        return {**self.model.identity, "from": language(own).flores, "to": language(lang).flores}

    def _marks(self, lang: str) -> bool:
        return not self.task.labels and lang != self.task.english

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

    def _texts(self, texts: Sequence[str], own: str, lang: str) -> dict[str, dict[str, Any]]:
        """Translate each distinct text and map it to its row (original, translation, flags)."""
        from flare_exp.utils import progress

        unique, source, target = (
            list(dict.fromkeys(texts)),
            language(own).flores,
            language(lang).flores,
        )
        rows: dict[str, dict[str, Any]] = {}
        with progress.bar(f"translating {own} -> {lang}", len(unique)) as advance:
            for first in range(0, len(unique), self.shard):
                part = unique[first : first + self.shard]
                rows |= {row["original"]: row for row in self._shard(part, source, target, advance)}
        return rows

    def _shard(
        self, texts: Sequence[str], source: str, target: str, advance: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        from flare_exp.translation import quality
        from flare_exp.utils import files

        protected = None if self.task.labels else [self.marker, code_of("marks")]
        key = {
            **self.model.identity,
            "from": source,
            "to": target,
            "protect": protected,
            "texts": digest_of(list(texts)),
        }

        def build(folder: Path) -> dict[str, Any]:
            protect = (
                None
                if self.task.labels
                else lambda text: projection.marked_range(text, self.marker)
            )
            made = self.model.engine.translate(
                texts, source, target, progress=advance, protect=protect
            )
            rows = [
                {"original": t, "translation": m.text, **quality.flags(t, m)}
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


def has_span(example: Example) -> bool:
    """Return True if the example has an answer with a place in its context."""
    return bool(example.answers) and example.answers[0].start >= 0


def _lang(example: Example) -> str:
    return example.id.split("/")[1]


def _split(example: Example) -> str:
    return example.id.split("/")[2]
