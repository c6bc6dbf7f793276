"""Translate with another program: lines in, lines out.

The program gets every line of every text once, on its standard input, in UTF-8. It writes a line
for each, in the same order. What is not a line's content stays here: line breaks, tabs and other
control characters, and white space at the ends of lines. They are put back afterwards, so that
one text is one translation. Nothing heavy is imported here: a command line is checked with it.
"""

from __future__ import annotations

import difflib
import functools
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flare_exp.errors import UserError
from flare_exp.languages import FLORES, LANGUAGES, language
from flare_exp.translation.segmentation import Protect, Translation, report_finished

PLACEHOLDERS = ("{from}", "{to}")
# Control characters, Unicode's line and paragraph separators, and surrogates, which UTF-8 lacks.
# They are all at which str.splitlines splits, and more.
CONTROL = re.compile("([\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+)")
# A translation is rarely ten times as long as its text. More than these bytes is a loop.
LEAST_LIMIT, LIMIT = 1 << 20, 100


def command_problems(command: str) -> Iterator[str]:
    """Yield a message for each mistake in `mt.command` that shows without a language."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        yield f"mt.command={command}: {str(error).lower()}; quote it as in a shell"
        return
    if lacking := [name for name in PLACEHOLDERS if name not in command]:
        yield (
            f"mt.command={command}: {' and '.join(lacking)} missing; the codes of the languages go "
            "there (a program that takes none: sh -c 'PROGRAM' sh {from} {to})"
        )
    elif not _has_placeholder(words[0]) and shutil.which(words[0]) is None:
        yield _not_found(command, words[0])


def code_problems(codes: Mapping[str, str]) -> Iterator[str]:
    """Yield a message for each code in `mt.codes` that no program can get."""
    for lang, code in codes.items():
        if lang not in LANGUAGES:
            near = difflib.get_close_matches(lang, LANGUAGES, 3)
            meant = f", e.g. {' or '.join(near)}" if near else ""
            yield (
                f"mt.codes: there is no language {lang}; keys are codes of the benchmark or of "
                f"FLORES-200{meant}"
            )
        elif not code.strip() or not code.isprintable():
            yield f"mt.codes: the code of {lang} is {code!r}; leave it out, or give what is read"


def code_of_language(lang: str, codes: Mapping[str, str]) -> str:
    """Return the code that a program gets for a language of the benchmark.

    It is that of the table, under the benchmark's code or the FLORES-200 code. A language that is
    not there goes by its ISO 639-3 code, the first part of its FLORES-200 code.

    Raises:
        UserError: the table lacks the language, and FLORES-200 does not have it, or has it in
            several scripts while the benchmark's code is another one.
    """
    row = language(lang)
    if code := codes.get(lang) or codes.get(row.flores):
        return code
    iso = row.flores.partition("_")[0]
    several = [name for name in FLORES if name.startswith(f"{iso}_")]
    if row.proxy or (len(several) > 1 and lang != iso):
        reason = "FLORES-200 lacks it" if row.proxy else f"it could be {' or '.join(several)}"
        raise UserError(
            f"mt.codes: the command's code for the language {lang} is not known ({reason}); give "
            f"it, e.g. mt.codes='{{{lang}: {iso}}}'"
        )
    return iso


@dataclass(frozen=True)
class CommandEngine:
    """An external program that translates, as `translation.engines.Engine`.

    Languages are given by the program's own codes (`code_of_language`).

    Args:
        command: the program and its arguments, quoted as in a shell (none is used), with {from}
            and {to} where the codes go.
        codes: language -> code.
        timeout: seconds that a call of `translate` may take.
        blank_lines: put an empty line after every line. The program must write one there, too.
            Programs that translate across line breaks then keep lines apart.
        revision: what else decides translations: a version of the program or of its data.
    """

    command: str
    codes: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 3600
    blank_lines: bool = True
    revision: str | None = None

    # --- what `translation.machine.MTModel` asks for ---------------------------------------------

    uncertain = True  # only a try shows whether it translates between two languages

    @property
    def engine(self) -> CommandEngine:
        """Return this object: there is nothing to load."""
        return self

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Return the command, the version, and the content of all files that the command names.

        The program is one of these files. Its libraries and data are not seen, nor is a file whose
        name has a placeholder.
        """
        from flare_exp.artifacts import file_sha256
        from flare_exp.code import code_of

        first, *rest = shlex.split(self.command)
        program = None if _has_placeholder(first) else shutil.which(first)
        named = [program or "", *(word for word in rest if not _has_placeholder(word))]
        return {
            "by": "machine",
            "command": self.command,
            "files": [file_sha256(Path(name)) for name in named if Path(name).is_file()],
            "revision": self.revision,
            "blank_lines": self.blank_lines,
            "engine": code_of("command"),
        }

    def code(self, lang: str) -> str:
        """Return the program's code of a language of the benchmark; see `code_of_language`."""
        return code_of_language(lang, self.codes)

    def check(self, *codes: str) -> None:
        """Check that the program is there for the languages (the program's codes).

        Raises:
            UserError: it is not.
        """
        for problem in command_problems(self.command):
            raise UserError(problem)
        program = self._filled(codes[0], codes[-1])[0]
        if shutil.which(program) is None:
            raise UserError(_not_found(self.command, program))

    # --- translation -----------------------------------------------------------------------------

    def translate(
        self,
        texts: Sequence[str],
        source: str,
        target: str,
        progress: Callable[[int], None] | None = None,
        protect: Protect | None = None,
    ) -> list[Translation]:
        """Translate the texts; see `Engine.translate`. One call starts the program once.

        Raises:
            UserError: the program cannot be started, fails, is too slow, writes another number of
                lines, or writes what is not UTF-8.
        """
        del protect  # no line is split
        parts = {text: list(_parts(text)) for text in dict.fromkeys(texts)}
        cores = {text: [core for _, core, _ in found] for text, found in parts.items()}
        lines = list(dict.fromkeys(core for found in cores.values() for core in found if core))
        report = report_finished(cores, Counter(texts), progress)
        made = {"": ""}
        if lines:
            made |= zip(lines, self._lines(lines, source, target, report), strict=True)
        whole = {
            text: Translation("".join(a + made[core] + b for a, core, b in found), False)
            for text, found in parts.items()
        }
        return [whole[text] for text in texts]

    def _lines(
        self,
        lines: Sequence[str],
        source: str,
        target: str,
        report: Callable[[Sequence[str]], None],
    ) -> list[str]:
        """Translate lines that are not empty; `report` gets those that are finished."""
        from flare_exp.utils.programs import run_filter

        command, ends = self._filled(source, target), 2 if self.blank_lines else 1
        data = "".join(line + ends * "\n" for line in lines).encode()
        seen = told = 0

        def heard(piece: bytes) -> None:
            nonlocal seen, told
            seen += piece.count(b"\n")
            report(lines[told : seen // ends])
            told = seen // ends

        try:
            left = run_filter(
                command,
                data,
                seconds=self.timeout,
                limit=LEAST_LIMIT + LIMIT * len(data),
                heard=heard,
            )
        except OSError as error:
            raise UserError(f"mt.command={self.command}: it cannot be started: {error}") from error
        problem = left.problem
        if problem is None:
            found = self._read(bytes(left.output), len(lines))
            if not isinstance(found, str):
                report(lines[told:])
                return found
            problem = found
        words = f"; its last words: {left.last_words}" if left.last_words else "; it said nothing"
        raise UserError(
            f"mt.command={self.command}, from {source} to {target}: the program {problem}{words} "
            "(finished shards are kept)"
        )

    def _read(self, output: bytes, number: int) -> list[str] | str:
        """Return the translations of `number` lines, or what is wrong with the output."""
        try:
            text = output.decode()
        except UnicodeDecodeError as error:
            line = output.count(b"\n", 0, error.start) + 1
            return f"wrote bytes that are not UTF-8 (0x{output[error.start]:02x} in line {line})"
        found = text.removesuffix("\n").split("\n") if text else []
        if self.blank_lines:
            between = found[1::2]
            if len(found) == 2 * number - 1:
                between = [*between, ""]  # the last empty line is its to leave out
            if len(between) != number or "".join(between).strip():
                return _wrong_number(found, number, blank_lines=True)
            found = found[::2]
        if len(found) != number:
            return _wrong_number(found, number, blank_lines=False)
        return [CONTROL.sub(" ", line).strip() for line in found]

    def _filled(self, source: str, target: str) -> list[str]:
        """Return the program and its arguments for a direction."""
        found = []
        for word in shlex.split(self.command):
            pieces = re.split(r"(\{from\}|\{to\})", word)
            found.append(
                "".join({"{from}": source, "{to}": target}.get(piece, piece) for piece in pieces)
            )
        return found


def _wrong_number(found: Sequence[str], number: int, blank_lines: bool) -> str:
    """Describe an output with another number of lines than the input."""
    if not blank_lines:
        return f"wrote {len(found):,} lines for {number:,}"
    filled = sum(bool(line.strip()) for line in found)
    said = (
        f"wrote {len(found):,} lines ({filled:,} of them not empty) for {number:,} lines with an "
        "empty line after each"
    )
    if len(found) == number:
        return f"{said} (if it leaves out empty lines, set mt.blank_lines=false)"
    return said if len(found) != 2 * number else f"{said}, and empty lines are not where they were"


def _not_found(command: str, program: str) -> str:
    return (
        f"mt.command={command}: there is no program {program!r} here (in PATH, or as an executable "
        "file); install it or give its path"
    )


def _has_placeholder(word: str) -> bool:
    return any(name in word for name in PLACEHOLDERS)


def _parts(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (what is before it, a line, what is after it); all together they are the text.

    A line has no control characters and no white space at its ends; it can be empty.
    """
    for number, part in enumerate(CONTROL.split(text)):
        if number % 2:
            yield part, "", ""
            continue
        core = part.strip()
        before, _, after = part.partition(core) if core else (part, "", "")
        yield before, core, after
