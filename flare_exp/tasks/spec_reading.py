"""Read the description of a data set of one's own: one YAML file, `task=custom task.spec=<file>`.

Every value is read as text, so that `no` is a language or a label and not a truth value.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flare_exp.errors import first_line
from flare_exp.languages import LANGUAGES, UNSPACED, Language
from flare_exp.tasks.spec import Columns, DataSpec, HubSplit, SpecError, file_problem
from flare_exp.utils.suggestions import nearest

KEYS = (
    "name", "english", "languages", "files", "delimiter", "quotes", "id", "text", "label", "labels",
    "context", "question", "answers", "answer_start", "parallel", "metric", "prompt",
)  # fmt: skip
METRICS = {
    "labels": ("macro_f1", "accuracy"),
    "answers": ("exact_match", "f1", "squad_exact_match", "squad_f1"),
}
HUB_KEYS = ("hub", "config", "split", "revision")
ENGLISH = ("en", "eng", "eng_Latn")
CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # ISO 639-3 and ISO 15924, as FLORES-200's
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
BUILT_IN = frozenset(LANGUAGES)
# names that a text column cannot have, and why
TAKEN = {
    "context": "in prompts, which question answering has",
    **dict.fromkeys(
        ("id", "source", "prediction", "probability", "cut"),
        "in files of predictions, where that column is another one",
    ),
    **dict.fromkeys(
        ("run", "file", "split", "out", "mt", "offline", "cache_dir"),
        "on predict's command line, where it is another option",
    ),
}


def read_spec(path: Path) -> DataSpec:
    """Read and check a description. Paths in it are relative to its folder.

    Raises:
        SpecError: the file is missing or is no YAML, or some values are wrong; a message for each.
    """
    given = _mapping(path)
    problems: list[str] = [
        f"there is no key {key!r}{nearest(key, KEYS)}; keys: {', '.join(KEYS)}"
        for key in given
        if key not in KEYS
    ]
    reader = _Reader(given, problems)
    spec = reader.spec(path)
    if problems:
        raise SpecError([f"task.spec={path}: {problem}" for problem in problems])
    return spec


class _Reader:
    """Reads the keys of a description and adds a message to `problems` for each mistake."""

    def __init__(self, given: Mapping[str, Any], problems: list[str]):
        self.given, self.problems = given, problems

    def spec(self, path: Path) -> DataSpec:
        """Return the description; it is of use only if there are no problems."""
        files = self._files(path.parent)
        columns = self.columns()
        kind = "labels" if columns.label is not None else "answers"
        parallel = self._choice("parallel", ("false", "true")) == "true"
        if parallel and columns.id is None:
            self.problems.append(
                "parallel: true needs id: <column>, the same for rows that translate one another"
            )
        return DataSpec(
            self._word("name", path.stem),
            self._english(files),
            files,
            columns,
            self._choice("metric", METRICS[kind]),
            self._prompt(columns),
            parallel,
            self._languages(files),
        )

    def columns(self) -> Columns:
        """Read which columns are texts, label or answers, and id."""
        asked = [
            key for key in ("context", "question", "answers", "answer_start") if self._has(key)
        ]
        if asked:
            return self._question_columns()
        texts = self._texts()
        if not self._has("label"):
            self.problems.append(
                "label: <column of the labels> is missing (or, for question answering, context, "
                "question and answers)"
            )
        return Columns(
            texts,
            label=self._text("label") or "",
            labels=self._labels(),
            id=self._text("id"),
            **self._writing(),
        )

    def _question_columns(self) -> Columns:
        for key in ("text", "label", "labels"):
            if self._has(key):
                self.problems.append(
                    f"{key} beside context, question or answers: a data set has labels or answers"
                )
        found = {key: self._text(key) for key in ("context", "question", "answers")}
        if lacking := [key for key, column in found.items() if column is None]:
            self.problems.append(f"{', '.join(lacking)}: <column> is missing")
        return Columns(
            {key: found[key] or "" for key in ("context", "question")},
            answers=found["answers"] or "",
            answer_start=self._text("answer_start"),
            id=self._text("id"),
            **self._writing(),
        )

    def _texts(self) -> dict[str, str]:
        """Read one or two columns of text: a name, a list, or field -> column."""
        given = self.given.get("text") or ()
        if not _is_plain(given):
            self.problems.append(
                "text: a list has names of columns alone; write field and column as a table: "
                "text: {premise: P, hypothesis: H}"
            )
            return {}
        named = given if isinstance(given, dict) else {n: n for n in _listed(given)}
        if not 1 <= len(named) <= 2 or not all(isinstance(n, str) for n in named.values()):
            self.problems.append(
                "text: must be one column, or a list of two: text: review, or "
                f"text: [premise, hypothesis]{'' if given else '; it is missing'}"
            )
            return {}
        for name in named:
            if not name.isidentifier() or name in TAKEN:
                why = TAKEN.get(name, "in prompts, one plain word")
                self.problems.append(
                    f"text: the column {name!r} needs another name {why}; write e.g. "
                    f"text: {{passage: {named[name]!r}}}"
                )
        return dict(named)

    def _labels(self) -> dict[str, tuple[str, ...]]:
        """Read the labels: a list of names, or name -> the raw values that stand for it."""
        given = self.given.get("labels") or ()
        if not _is_plain(given):
            self.problems.append(
                "labels: a list has names alone; write names and their values as a table: "
                "labels: {negative: Negative, positive: Positive}"
            )
            return {}
        raw = given if isinstance(given, dict) else {name: [name] for name in _listed(given)}
        labels = {name: tuple(_listed(values)) for name, values in raw.items()}
        if len(labels) < 2:
            self.problems.append(
                "labels: must name two labels or more, in an order: labels: [negative, positive], "
                "or with the values in the files: labels: {negative: 0, positive: 1}"
            )
        if not isinstance(given, dict) and len(labels) < len(_listed(given)):
            self.problems.append("labels: a name is there twice")
        stand_for: dict[str, str] = {}
        for name, values in labels.items():
            for value in values:
                if not isinstance(value, str):
                    self.problems.append(f"labels: {name} has {value!r} instead of a value")
                elif (other := stand_for.setdefault(value, name)) != name:
                    self.problems.append(f"labels: {value!r} stands for {other} and for {name}")
        return labels

    def _writing(self) -> dict[str, Any]:
        """Read how text files are written."""
        delimiter = self._text("delimiter")
        delimiter = {"tab": "\t", "\\t": "\t"}.get(delimiter or "", delimiter)
        if delimiter is not None and len(delimiter) != 1:
            self.problems.append(f"delimiter: {delimiter!r} must be one character, or tab")
            delimiter = None
        return {
            "delimiter": delimiter,
            "quotes": self._choice("quotes", ("yes", "no")) == "yes",
        }

    def _files(self, folder: Path) -> dict[str, dict[str, Path | HubSplit]]:
        """Read language -> split -> file or split of a hub data set."""
        given = self.given.get("files")
        if not isinstance(given, dict) or not all(isinstance(v, dict) for v in given.values()):
            self.problems.append(
                "files: must be language -> split -> file, e.g. files: {en: {train: train.csv, "
                "validation: dev.csv, test: test.csv}, sun_Latn: {test: sundanese.csv}}"
            )
            return {}
        found: dict[str, dict[str, Path | HubSplit]] = {}
        for lang, splits in given.items():
            if not re.fullmatch(r"[\w-]+", lang):
                self.problems.append(f"files: the language {lang!r} must be letters, digits, _, -")
            for split, value in splits.items():
                if not re.fullmatch(r"[A-Za-z_]\w*", split):
                    self.problems.append(
                        f"files: {lang}: the split {split!r} must be one word, e.g. train"
                    )
                place = self._place(f"files: {lang}: {split}", folder, value)
                if place is not None:
                    found.setdefault(lang, {})[split] = place
        return found

    def _place(self, key: str, folder: Path, value: Any) -> Path | HubSplit | None:
        """Read where the rows of a split are."""
        if isinstance(value, dict):
            return self._hub_split(key, value)
        if not isinstance(value, str) or not value:
            self.problems.append(f"{key}: must be a file, or {{hub: owner/name, revision: ...}}")
            return None
        path = folder / Path(value).expanduser()
        if suffix_problem := file_problem(path):
            self.problems.append(f"{key}: {value}: {suffix_problem}")
        return path

    def _hub_split(self, key: str, value: Mapping[str, Any]) -> HubSplit | None:
        unknown = [name for name in value if name not in HUB_KEYS]
        commit = str(value.get("revision", ""))
        if unknown or not value.get("hub"):
            said = (
                f"there is no key {unknown[0]!r}" if unknown else "hub: <owner>/<name> is missing"
            )
            self.problems.append(f"{key}: {said}; keys: {', '.join(HUB_KEYS)}")
            return None
        if not HUB_ID.fullmatch(str(value["hub"])):  # the hub's cache knows whole names alone
            self.problems.append(f"{key}: hub: {value['hub']} must be <owner>/<name>")
            return None
        if not re.fullmatch("[0-9a-f]{40}", commit):
            self.problems.append(
                f"{key}: revision: must be a commit of {value['hub']} (40 digits; its page on the "
                "hub has them under `Files and versions`), so that results can be repeated"
            )
        split = str(value.get("split") or key.rpartition(" ")[2])
        return HubSplit(str(value["hub"]), str(value.get("config") or "default"), split, commit)

    def _english(self, files: Mapping[str, Any]) -> str:
        """Read the language of the training data: English, unless the description names another."""
        given = self._text("english")
        found = [given] if given else [lang for lang in files if lang in ENGLISH]
        if files and (len(found) != 1 or found[0] not in files):
            self.problems.append(
                f"english: {given or '<language>'} must name the language of the training data, "
                f"one of {', '.join(files)}"
            )
        elif files and len(files) < 2:
            self.problems.append(
                f"files: {found[0]} is the only language; name the target language's test file too"
            )
        return found[0] if found else "en"

    def _languages(self, files: Mapping[str, Any]) -> dict[str, Language]:
        """Read the codes of languages."""
        given = self.given.get("languages") or {}
        if not isinstance(given, dict):
            self.problems.append("languages: must be language -> code, e.g. {madurese: mad_Latn}")
            return {}
        for lang, code in given.items():
            if lang not in files:
                self.problems.append(f"languages: {lang}: files has no such language")
            elif not CODE.fullmatch(str(code)):
                self.problems.append(
                    f"languages: {lang}: {code} must be ISO 639-3 and script, e.g. sun_Latn"
                )
            elif lang in BUILT_IN and LANGUAGES[lang].flores != code:
                self.problems.append(
                    f"languages: {lang}: flare_exp knows {lang} as {LANGUAGES[lang].flores}; call "
                    "the language otherwise in files"
                )
        codes = {lang: code for lang, code in given.items() if isinstance(code, str)}
        return {lang: _row(lang, codes.get(lang)) for lang in files}

    def _prompt(self, columns: Columns) -> str:
        """Read the prompt, or make one from the names of the texts."""
        end = "Label" if columns.label is not None else "Answer"
        heads = [f"{{{name}}}" for name in columns.texts]
        if len(heads) > 1:
            heads = [f"{name.capitalize()}: {{{name}}}" for name in columns.texts]
        prompt = self._text("prompt") or "\n".join([*heads, f"{end}:"])
        try:
            prompt.format(**dict.fromkeys(columns.texts, ""))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            names = " and ".join(f"{{{name}}}" for name in columns.texts)
            self.problems.append(f"prompt: {error} does not fit; its fields are {names}")
            return prompt
        read = {field for _, field, _, _ in string.Formatter().parse(prompt)}
        if lost := [name for name in columns.texts if name not in read]:
            self.problems.append(f"prompt: {{{lost[0]}}} is not in it, so it would not be read")
        return prompt

    def _word(self, key: str, default: str) -> str:
        value = self._text(key) or default
        if not re.fullmatch(r"[\w.-]+", value):
            self.problems.append(f"{key}: {value!r} must be letters, digits, _, - and .")
        return value

    def _text(self, key: str) -> str | None:
        value = self.given.get(key)
        if value is not None and not isinstance(value, str):
            self.problems.append(f"{key}: must be one text, not {value}")
            return None
        return value or None

    def _choice(self, key: str, choices: Sequence[str]) -> str:
        value = self._text(key) or choices[0]
        if value not in choices:
            self.problems.append(f"{key}: {value} must be one of {', '.join(choices)}")
        return value

    def _has(self, key: str) -> bool:
        return bool(self.given.get(key))


def _row(lang: str, code: str | None) -> Language:
    """Return code and script of a language.

    A language without a code has its name in place of one. As with every language that FLORES-200
    lacks, programs then get what `mt.codes` says, and translation models refuse it.
    """
    if lang in BUILT_IN:
        return LANGUAGES[lang]
    if code is None and not CODE.fullmatch(lang):
        return Language(lang, proxy=True)
    code = code or lang
    return Language(code, spaced=code.partition("_")[2] not in UNSPACED)


class _Loader(yaml.BaseLoader):
    """A loader that keeps every value as text and refuses a key that is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys and values."""
    if not os.path.isfile(path):
        raise SpecError([f"task.spec={path}: there is no such file"])
    try:
        found = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except OSError as error:
        raise SpecError([f"task.spec={path}: cannot be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise SpecError([f"task.spec={path}: is not UTF-8 ({error.reason})"]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        said = getattr(error, "problem", None) or first_line(error)
        raise SpecError([f"task.spec={path}{line}: is no YAML: {said}"]) from error
    if not isinstance(found, dict):
        raise SpecError([f"task.spec={path}: must hold keys and values, e.g. text: review"])
    return found


def _is_plain(value: Any) -> bool:
    """Return whether a value is a table, a text, or a list of texts."""
    return isinstance(value, dict) or all(isinstance(item, str) for item in _listed(value))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
