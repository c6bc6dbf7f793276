"""Machine translation of benchmark texts: English training data into the target language, target test data into English.

Here: a parallel benchmark's own human translations, as they are (mt=gold, an upper bound) or corrupted by a known
error rate (mt=toy), and translations that exist in files (mt=file).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from flare_exp.artifacts import file_sha256
from flare_exp.errors import UserError
from flare_exp.tasks import Answer, Example, Task, fingerprint
from flare_exp.tasks.base import read_answers, read_parquet, warn_once


class Translator(Protocol):
    """Turns examples of one language and split into the same examples (ids, keys, labels) in another.

    An answer is carried over as the span of the translated context; an example whose answer is lost has none.
    """

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]: ...

    def identity(self, examples: Sequence[Example], lang: str) -> dict[str, Any]:
        """What, besides the examples, their translation depends on; tells at once whether it can be had.

        Raises:
            UserError: it cannot.
        """
        ...


def translator(
    task: Task, name: str, noise: float = 0.0, seed: int = 0, path: str | None = None, fallback: str | None = None
) -> Translator:
    """The translator of an mt group: `name` chooses it, the rest are its options.

    Raises:
        UserError: it does not suit the task, or mt.path is missing.
    """
    if name == "file":
        if path is None:
            raise UserError(f"mt=file: set mt.path=<folder> of mt_<from>-<to>/<split>.parquet, translations of {task.name}")
        return FileTranslator(task, Path(path).expanduser(), ParallelTranslator(task) if fallback == "gold" else None)
    return ParallelTranslator(task, noise, seed)


class ParallelTranslator:
    """Looks translations up among the benchmark's parallel rows, then corrupts each word with probability `noise`.

    Args:
        task: a parallel benchmark.
        noise: share of words that are dropped, swapped with the next or replaced by another word of the language.
        seed: of the corruption; independent of the training seed.
    """

    def __init__(self, task: Task, noise: float = 0.0, seed: int = 0):
        if not task.parallel:
            raise UserError(f"mt=gold and mt=toy need a parallel benchmark; {task.name} is not one")
        self.task, self.noise, self.seed = task, noise, seed

    def identity(self, examples: Sequence[Example], lang: str) -> dict[str, Any]:
        found = self._counterparts(examples, lang)
        return {"by": "human", "noise": self.noise, "seed": self.seed, "reference": fingerprint(list(found.values()))}

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Examples in `lang`, in the order of `examples`.

        Raises:
            UserError: an example has no counterpart in `lang`.
        """
        found = self._counterparts(examples, lang)
        own = [found[_split(e), e.key] for e in examples]
        translated = [replace(e, texts=o.texts, answers=o.answers) for e, o in zip(examples, own, strict=True)]
        if not self.noise:
            return translated
        vocabulary = sorted({word for row in found.values() for text in row.texts for word in text.split()})
        return [self._corrupt(e, vocabulary, lang) for e in translated]

    def _counterparts(self, examples: Sequence[Example], lang: str) -> dict[tuple[str, str], Example]:
        """(split, key) -> example, of all of `lang` in the splits of `examples`."""
        splits = sorted({_split(example) for example in examples})
        found = {(split, row.key): row for split in splits for row in self.task.read(lang, split)}
        missing = [e.id for e in examples if (_split(e), e.key) not in found]
        if missing:
            raise UserError(f"{len(missing)} examples have no translation into {lang} in {self.task.name}, e.g. {missing[0]}")
        return found

    def _corrupt(self, example: Example, vocabulary: Sequence[str], lang: str) -> Example:
        texts, answers = [], example.answers
        for i, (field, text) in enumerate(zip(self.task.fields, example.texts, strict=True)):
            words = corrupted(text.split(), self.noise, vocabulary, f"{self.seed}|{lang}|{example.id}|{i}")
            texts.append(" ".join(word for word, _ in words))
            if field == "context":
                answers = tuple(kept for answer in answers if (kept := follow(answer, text, words)))
        return replace(example, texts=tuple(texts), answers=answers)


class FileTranslator:
    """Reads translations from <path>/mt_<from>-<to>/<split>.parquet, row by row those of the benchmark's split.

    For every field f of the task a file has the original in column f and the translation in f_translated; question answering
    has answers_translated {text[], answer_start[]} besides, with empty lists where translation has lost the answer.

    Args:
        path: the folder.
        fallback: translates where the file of a direction is missing; None: that is an error.
    """

    def __init__(self, task: Task, path: Path, fallback: Translator | None = None):
        self.task, self.path, self.fallback = task, path, fallback

    def identity(self, examples: Sequence[Example], lang: str) -> dict[str, Any]:
        place = self._place(examples, lang)
        if not isinstance(place, Path):
            return place.identity(examples, lang)
        self._read(place, examples)
        return {"by": "file", "sha256": file_sha256(place)}

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Examples in `lang`, in the order of `examples`.

        Raises:
            UserError: no such file, or a row of it is not the benchmark's; names file and row.
        """
        place = self._place(examples, lang)
        return self._read(place, examples) if isinstance(place, Path) else place.translate(examples, lang)

    def _place(self, examples: Sequence[Example], lang: str) -> Path | Translator:
        """The file of a direction, or what stands in for it."""
        _, own, split, _ = examples[0].id.split("/")
        file = self.path / f"mt_{own}-{lang}" / f"{split}.parquet"
        if file.is_file():
            return file
        if self.fallback is None:
            also = ", or mt.fallback=gold for the benchmark's own human translations" if self.task.parallel else ""
            raise UserError(f"mt=file: there is no {file}; give the folder that holds it as mt.path{also}")
        warn_once(f"mt=file: there is no {file}; the benchmark's own human translations stand in (mt.fallback=gold)")
        return self.fallback

    def _read(self, file: Path, examples: Sequence[Example]) -> list[Example]:
        spans = () if self.task.labels else ("answers_translated",)
        columns = (*self.task.fields, *(f"{field}_translated" for field in self.task.fields), *spans)
        rows = read_parquet(file, columns, "mt.path")
        return [self._translated(file, rows, example) for example in examples]

    def _translated(self, file: Path, rows: Sequence[dict[str, Any]], example: Example) -> Example:
        number = int(example.id.rpartition("/")[2])
        if number >= len(rows):
            raise UserError(f"mt.path: {file} ends at row {len(rows) - 1}; it has no translation of {example.id}")
        row = rows[number]
        for field, text in zip(self.task.fields, example.texts, strict=True):
            if row[field] != text:
                raise UserError(f"mt.path: {file}, row {number}: {field} is not that of {example.id}: {str(row[field])[:60]!r}")
        texts = tuple(row[f"{field}_translated"] for field in self.task.fields)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"mt.path: {file}, row {number}: a translation is missing")
        answers = () if self.task.labels else read_answers(row["answers_translated"])
        context = "" if self.task.labels else texts[self.task.fields.index("context")]
        if wrong := [a for a in answers if a.start < 0 or not context.startswith(a.text, a.start)]:
            raise UserError(f"mt.path: {file}, row {number}: context_translated has no {wrong[0].text!r} at {wrong[0].start}")
        return replace(example, texts=texts, answers=answers)


def corrupt(text: str, rate: float, vocabulary: Sequence[str], seed: str) -> str:
    """`text` with corrupted words."""
    return " ".join(word for word, _ in corrupted(text.split(), rate, vocabulary, seed))


def corrupted(words: Sequence[str], rate: float, vocabulary: Sequence[str], seed: str) -> list[tuple[str, int | None]]:
    """`words`, each with probability `rate` dropped, swapped with the next one or replaced by a word of `vocabulary` (a
    third each), with the number it had (None: replaced). The same seed gives the same result; the last word left is never
    dropped."""
    rng = random.Random(seed)
    kept: list[tuple[str, int | None]] = []
    rest: list[tuple[str, int | None]] = [(word, i) for i, word in enumerate(words)]
    while rest:
        word = rest.pop(0)
        if rng.random() < rate:
            error = rng.choice(["drop", "swap", "replace"])
            if error == "replace":
                word = (rng.choice(vocabulary), None)
            elif error == "swap" and rest:
                word, rest[0] = rest[0], word
            elif error == "drop" and (kept or rest):
                continue
        kept.append(word)
    return kept


def follow(answer: Answer, text: str, words: Sequence[tuple[str, int | None]]) -> Answer | None:
    """Where `answer`, a span of `text`, is after corruption to `words`; None when its words are no longer all there, side by
    side and in order."""
    if answer.start < 0 or not answer.text.strip():
        return None
    start = answer.start + len(answer.text) - len(answer.text.lstrip())
    before, inside = text[:start].split(), answer.text.split()
    # an answer may start inside a word: what stands before it there moves along
    cut = len(before[-1]) if before and not text[start - 1].isspace() else 0
    first = len(before) - bool(cut)
    numbers = [number for _, number in words]
    at = numbers.index(first) if first in numbers else len(numbers)
    if numbers[at : at + len(inside)] != list(range(first, first + len(inside))):
        return None
    return Answer(" ".join(inside), sum(len(word) + 1 for word, _ in words[:at]) + cut)


def _split(example: Example) -> str:
    return example.id.split("/")[2]
