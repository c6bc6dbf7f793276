"""`python -m flare_exp check-data DESCRIPTION`: look at your own data before a training.

DESCRIPTION is the YAML file that task=custom reads (task.spec). Or give files and their columns;
the first file is then taken for the training data:

  python -m flare_exp check-data FILE ... --text COLUMN --label COLUMN

  --text A[,B]         column of the texts; two for pairs
  --label COLUMN       column of the labels
  --labels A,B,...     names of the labels, in an order [those of the files]
  --context COLUMN, --question COLUMN, --answers COLUMN [--answer-start COLUMN]
                       question answering, instead of --text and --label
  --id COLUMN          column of the ids
  --delimiter C        of CSV files, e.g. ';' or tab
  model=... [model.path=...] [data.max_length=N]
                       the model whose tokenizer counts tokens and finds texts that are cut

Prints rows and labels, scripts and lengths, rows that are training rows, too (near: similarity of
0.8 or more, the Jaccard index of the sets of 5 characters), and every problem with file, row (from
1, without the header), line and column. The exit code is 1 if a run would refuse the data, else 0.

Examples:
  python -m flare_exp check-data reviews.yaml model=tiny
  python -m flare_exp check-data train.csv test.csv --text review --label sentiment

docs/your-data.md is a walk from a CSV file to a result.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flare_exp.cli.commandline import normalized, parsed
from flare_exp.config import validation
from flare_exp.errors import UserError
from flare_exp.tasks import CUSTOM, ROLES, task_class
from flare_exp.tasks.custom import CustomTask, Examined, examined, label_text
from flare_exp.tasks.records import Problem, columns_of, read_records
from flare_exp.tasks.spec import Columns, file_problem

if TYPE_CHECKING:
    from flare_exp.data.inspection import Lengths, Part, Repeated
    from flare_exp.report.tables import Table

COLUMNS = ("--text", "--label", "--labels", "--context", "--question", "--answers")
VALUES = (*COLUMNS, "--answer-start", "--id", "--delimiter")
DESCRIPTIONS = (".yaml", ".yml")
OPTIONS = ("model", "data", "cache_dir", "offline", "task.world_seed")
MOST_LABELS = 50  # more distinct values are rather texts
HEADS = "data|rows#|training data|exact#|near#"  # of the table of repeated rows
SHOWN = 100  # the most problems that are printed


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the words of the command line.

    Raises:
        UserError: an option, its value or a file name is wrong; one message names all mistakes.
    """
    words = [a for a in arguments if "=" in a and not a.startswith("-") and not Path(a).exists()]
    given, problems = parsed([a for a in arguments if a not in words], "files", VALUES)
    given.overrides = normalized(words)
    for word in words:
        if not word.startswith(OPTIONS):
            problems.append(f"{word}: only model=..., model.path=... and data.max_length=... count")
    given.files = [Path(name).expanduser() for name in given.files]
    described = [path for path in given.files if path.suffix in DESCRIPTIONS]
    if not given.files:
        problems.append("name a description (my_data.yaml), or files: train.csv test.csv")
    elif described and (len(given.files) > 1 or any(getattr(given, _name(v)) for v in VALUES)):
        problems.append(f"{described[0]}: a description comes alone, without files and columns")
    elif not described:
        problems += _file_problems(given)
    if problems:
        raise UserError("; ".join(problems))
    return given


def _name(option: str) -> str:
    return option[2:].replace("-", "_")


def _file_problems(given: argparse.Namespace) -> Iterator[str]:
    """Yield what is wrong with single files, and with the choice of their columns."""
    wrong = [f"{path}: {problem}" for path in given.files if (problem := file_problem(path))]
    yield from wrong
    questions = [given.context, given.question, given.answers]
    whole = all(questions) if any(questions) else given.text and given.label
    if not wrong and not whole:
        there = ", ".join(columns_of(given.files[0])) or "none that can be read"
        yield (
            "say which columns are what: --text COLUMN --label COLUMN, or --context, --question "
            f"and --answers; {given.files[0]} has {there}"
        )
    if any(questions) and (given.text or given.label):
        yield "--text and --label, or --context, --question and --answers: not both"


def main(arguments: Sequence[str]) -> int:
    """Check a data set and print what was found; return the exit code."""
    given = parse(arguments)
    tokenizer, skipped, max_length = _tokenizer(given.overrides)
    described = given.files[0].suffix in DESCRIPTIONS
    parts, labels = _of_description(given.files[0]) if described else _of_files(given)
    from flare_exp.data import inspection

    train, others = parts[0], parts[1:]
    repeated = [inspection.repeated_rows(*pair) for pair in inspection.training_pairs(parts)]
    for found in repeated:
        inspection.doubt_repeated(found)
    if labels:
        inspection.doubt_labels(train, others, labels)
    counted = []
    for part in parts:
        inspection.doubt_repetitions(part, labels)
        inspection.doubt_script(part)
        if tokenizer is None:
            inspection.doubt_words(part, max_length)
        else:
            counted.append(inspection.lengths(part, tokenizer, max_length))
            inspection.doubt_tokens(part, counted[-1], max_length)
    from flare_exp.report.writers import terminal

    console = terminal.make_console()
    problems = [problem for part in parts for problem in part.problems]
    for table in _tables(parts, labels, repeated, counted, skipped, problems):
        terminal.show(table, console)
    return _verdict(problems, _command(given.files[0], parts) if described else None)


def _command(description: Path, parts: Sequence[Part]) -> str:
    """Return the command that runs on described data, and what it still misses.

    That is a translation system, for example. Where rows are translations of one another, these are
    taken (mt=gold).
    """
    from flare_exp.data.inspection import untranslated

    langs = list(dict.fromkeys(part.lang for part in parts[1:] if part.lang != parts[0].lang))
    known = {part.name for part in parts}
    chosen = [f"task.lang={langs[0]}"] if len(langs) == 1 else ["task.lang=<language>"]
    parallel = task_class(CUSTOM, str(description)).parallel
    whole = all(f"{lang}/{role}" in known for lang in langs for role in ROLES)
    if parallel and whole and not any(untranslated(parts)):
        chosen.append("mt=gold")
    words = ["task=custom", f"task.spec={description}", *chosen]
    command = f"python -m flare_exp {' '.join(map(_quoted, words))}"
    missing = validation.validate(normalized(words), multirun=False)[1] if len(langs) == 1 else []
    return "\n".join([command, *(f"  first: {problem}" for problem in missing)])


def _quoted(word: str) -> str:
    """Return a word as a shell takes it, and <language> as it is: the user replaces it."""
    return word if word.endswith("=<language>") else shlex.quote(word)


def _verdict(problems: Sequence[Problem], command: str | None) -> int:
    """Print whether a run would take the data, and what comes next; return the exit code.

    Args:
        problems: all problems of the data.
        command: what runs on them; None: they are not described yet.
    """
    wrong = sum(problem.fatal for problem in problems)
    warned = f"{(doubtful := len(problems) - wrong)} warning{'s' * (doubtful != 1)}"
    if wrong:
        print(f"{wrong} error{'s' * (wrong != 1)}, {warned}: a run refuses these data.")
        return 1
    print(f"No errors, {warned}: a run takes these data.")
    print(f"Next: {command or 'describe them in a YAML file; docs/your-data.md shows one.'}")
    return 0


# --- reading -----------------------------------------------------------------------------------


def _of_description(path: Path) -> tuple[list[Part], tuple[str, ...]]:
    """Read every split of a description, the training data first."""
    from flare_exp.data.inspection import doubt_untranslated

    cls = task_class(CUSTOM, str(path))
    assert issubclass(cls, CustomTask)
    task, columns = cls(), cls.spec.columns
    found: dict[tuple[str, str], Examined] = {}
    for lang in sorted(cls.spec.files, key=lambda lang: lang != task.english):
        for split in sorted(cls.spec.files[lang], key=lambda split: split != "train"):
            found[lang, split] = task.examine(lang, split)
            english = found.get((task.english, split))
            if task.parallel and lang != task.english and english:
                whole = not any(problem.fatal for problem in english.problems)
                task.check_partners(found[lang, split], english.examples, whole)
    parts = [_part(f"{lang}/{split}", part, columns, lang) for (lang, split), part in found.items()]
    parts[0].problems += _missing_splits(path, task)
    if task.parallel:
        doubt_untranslated(parts)
    return parts, task.labels


def _missing_splits(path: Path, task: CustomTask) -> Iterator[Problem]:
    """Yield a warning for each split that a run reads unless an option names another one."""
    needed = dict.fromkeys(task.languages, ("test",)) | {task.english: ROLES}
    for lang, splits in needed.items():
        for split in splits:
            if split not in task.spec.files[lang]:
                # the target's test set keeps its own option
                role = "english_test" if (lang, split) == (task.english, "test") else split
                said = f"{lang} has no {split}; a run needs another one: task.{role}_split=..."
                yield Problem(str(path), said, fatal=False)


def _of_files(given: argparse.Namespace) -> tuple[list[Part], tuple[str, ...]]:
    """Read single files, whose columns are given."""
    columns = _columns(given)
    if columns.label is not None and not columns.labels:
        columns = _with_labels_of_files(given.files, columns)
    parts = [
        _part(path.name, examined(path, columns, f"{path.stem}/file/rows"), columns)
        for path in given.files
    ]
    return parts, tuple(columns.labels)


def _part(name: str, found: Examined, columns: Columns, lang: str | None = None) -> Part:
    from flare_exp.data.inspection import Part

    column = columns.label or columns.answers
    return Part(name, found.place, found.examples, lang, found.problems, found.lines, column)


def _columns(given: argparse.Namespace) -> Columns:
    """Return the columns that the options name."""
    delimiter = {"tab": "\t", "\\t": "\t"}.get(given.delimiter or "", given.delimiter)
    if delimiter is not None and len(delimiter) != 1:
        raise UserError(f"--delimiter {given.delimiter}: must be one character, or tab")
    rest: dict[str, Any] = {"id": given.id, "delimiter": delimiter}
    if given.context:
        texts = {"context": given.context, "question": given.question}
        return Columns(texts, answers=given.answers, answer_start=given.answer_start, **rest)
    texts = {name: name for name in given.text.split(",")}
    labels = {name: (name,) for name in given.labels.split(",")} if given.labels else {}
    return Columns(texts, label=given.label, labels=labels, **rest)


def _with_labels_of_files(files: Sequence[Path], columns: Columns) -> Columns:
    """Return the columns with every value of the label's column as the name of a label.

    Raises:
        UserError: there are too many for labels.
    """
    from dataclasses import replace

    cells = [
        r.cells[str(columns.label)] for path in files for r in read_records(path, columns).rows
    ]
    names = sorted({name for name in map(label_text, cells) if name and name.strip()})
    if len(names) > MOST_LABELS:
        raise UserError(
            f"--label {columns.label}: the column has {len(names)} different values, e.g. "
            f"{names[0]!r}; is it the column of the labels?"
        )
    return replace(columns, labels={name: (name,) for name in names})


def _tokenizer(overrides: Sequence[str]) -> tuple[Any, str, int]:
    """Load the tokenizer of the model that options name, if it is on this machine.

    Returns:
        the tokenizer, or None; why there is none; `data.max_length`.

    Raises:
        UserError: the options are wrong, or the tokenizer is damaged.
    """
    (job,), problems = validation.validate(overrides, multirun=False)
    if problems:
        raise UserError("; ".join(problems))
    longest = int(job.data.max_length)
    if not any(o.startswith("model") for o in overrides):
        return None, "no model is given (model=tiny, or model=custom model.path=FOLDER)", longest
    from omegaconf import OmegaConf

    from flare_exp.experiment.tokenizers import local_tokenizer

    tokenizer, skipped = local_tokenizer(OmegaConf.to_object(job))  # type: ignore[arg-type]
    return tokenizer, skipped, longest


# --- tables ------------------------------------------------------------------------------------


def _tables(
    parts: Sequence[Part],
    labels: Sequence[str],
    repeated: Sequence[Repeated],
    counted: Sequence[Lengths],
    skipped: str,
    problems: Sequence[Problem],
) -> Iterator[Table]:
    """Yield the tables in the order in which they are printed."""
    yield _rows_table(parts, labels)
    yield _texts_table(parts, counted, skipped)
    if repeated:
        yield _repeated_table(repeated)
    if problems:
        yield _problems_table(problems)


def _table(
    name: str,
    title: str,
    columns: str,
    rows: Any,
    notes: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> Table:
    """Build a table.

    Args:
        columns: heads, separated by |; those that end in # hold numbers.
        numbers: further heads of numbers, whatever characters they have.
    """
    from flare_exp.report.tables import Column, Table, Value

    heads = [Column(head.rstrip("#"), head.endswith("#")) for head in columns.split("|")]
    heads += [Column(head, True) for head in numbers]
    return Table(name, title, heads, [[Value(str(cell)) for cell in row] for row in rows], notes)


def _rows_table(parts: Sequence[Part], labels: Sequence[str]) -> Table:
    from flare_exp.data.inspection import balance

    rows = []
    for part in parts:
        refused = len({p.row for p in part.problems if p.fatal and p.row is not None})
        total = len(part.examples)
        counts = balance(part.examples, labels).values()
        shares = [f"{n} ({n / total:.0%})" if total else "0" for n in counts]
        rows.append([part.name, part.place, total, refused, *shares])
    return _table("rows", "rows and labels", "data|file|rows#|refused#", rows, numbers=labels)


def _texts_table(parts: Sequence[Part], counted: Sequence[Lengths], skipped: str) -> Table:
    from flare_exp.data.inspection import scripts_of

    rows = []
    for number, part in enumerate(parts):
        scripts = [f"{k} {v:.0%}" for k, v in scripts_of(part.texts).items() if v >= 0.005]
        words = [sum(len(text.split()) for text in e.texts) for e in part.examples] or [0]
        empty = sum(not all(text.strip() for text in e.texts) for e in part.examples)
        mean = f"{sum(words) / len(words):.1f}"
        row = [part.name, ", ".join(scripts[:4]) or "-", mean, max(words), empty]
        if counted:
            c = counted[number]
            row += [f"{c.tokens / max(1, c.words):.2f}", c.longest, c.cut, f"{c.unknown:.1%}"]
        rows.append(row)
    heads = "data|scripts of letters|words#|most words#|empty#"
    if counted:
        return _table(
            "texts", "texts", f"{heads}|tokens per word#|most tokens#|cut#|unknown#", rows
        )
    return _table("texts", "texts", heads, rows, [f"Tokens were not counted: {skipped}."])


def _repeated_table(repeated: Sequence[Repeated]) -> Table:
    from flare_exp.data.inspection import GRAM, MOST, NEAR

    rows = [
        [
            *(found.part.name, len(found.part.examples), found.train.name),
            *(len(found.exact), len(found.near)),
        ]
        for found in repeated
    ]
    notes = [
        f"Near: the sets of {GRAM} characters have a Jaccard similarity of {NEAR} or more, in "
        "lower case and with single spaces."
    ]
    if max(len(p.examples) for found in repeated for p in (found.train, found.part)) > MOST:
        notes.append(f"Near ones were searched in the first {MOST:,} rows of each.")
    return _table("repeated", "rows that are training rows, too", HEADS, rows, notes)


def _problems_table(problems: Sequence[Problem]) -> Table:
    places = list(dict.fromkeys(problem.place for problem in problems))
    ordered = sorted(problems, key=lambda p: (not p.fatal, places.index(p.place), p.row or 0))
    rows = [
        [
            "error" if p.fatal else "warning",
            p.place,
            *("-" if cell is None else cell for cell in (p.row, p.line, p.column)),
            p.text,
        ]
        for p in ordered[:SHOWN]
    ]
    more = len(ordered) - SHOWN
    notes = [f"... and {more} more."] if more > 0 else []
    return _table("problems", "problems", "what|file|row#|line#|column|problem", rows, notes)
