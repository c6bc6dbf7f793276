"""`python -m flare_exp predict run=FOLDER text="..."`: predict with the model of a finished run.

Texts are in the run's target language. A method that reads English, too, takes it from the input
(`source`), or has the run's translator make it.

  run=FOLDER      the run folder
  text="..."      one text; of a task with several fields each of them, for example
                  premise="..." hypothesis="..." or context="..." question="..."
  source="..."    its English translation (of several fields source_premise="..." and so on)
  file=FILE       many texts: .jsonl, .csv, .tsv or .parquet with a column for each field, and, if
                  you have them, source (or source_<field>) and id
  split=test      the run's own test set: a parquet file equals its predictions.parquet
  out=FILE        write .jsonl, .csv, .tsv or .parquet instead of a table on the terminal; the same
                  command goes on with what a killed one has left
  mt=..., mt.*=   another translator than the run's, as on the command line of a run
  trainer.accelerator=cpu, data.batch_size=8, model.path=..., task.data_dir=..., cache_dir=...,
  offline=true    where to run, and places that have moved

Examples:
  python -m flare_exp predict run=outputs/my_run text="me kujo lano"
  python -m flare_exp predict run=outputs/my_run file=reviews.csv out=labels.csv
  python -m flare_exp predict run=outputs/my_run file=reviews.jsonl out=labels.parquet mt=nllb_600m
  python -m flare_exp predict run=outputs/my_run split=test out=again.parquet

docs/use.md describes input and output.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flare_exp.cli.commandline import normalized
from flare_exp.config.schema import Config
from flare_exp.errors import UserError
from flare_exp.experiment.overriding import KEYS as OPTIONS
from flare_exp.experiment.overriding import is_allowed
from flare_exp.experiment.runs import quiet_as
from flare_exp.utils.suggestions import nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flare_exp.data.rows import Row
    from flare_exp.tasks import Task

KEYS = ("run", "file", "split", "out")
SHOWN = 100  # most rows of a table on the terminal


@dataclass
class Given:
    """Hold the words of a command line.

    Attributes:
        run: the run folder.
        values: key -> value of the command's other keys.
        options: changes of the run's options.
        texts: name of a field, or of its source -> text.
    """

    run: Path
    values: Mapping[str, str]
    options: Sequence[str]
    texts: Mapping[str, str]

    def path(self, key: str) -> Path | None:
        """Return the value of a key as a path."""
        return Path(self.values[key]).expanduser() if key in self.values else None


@dataclass
class Input:
    """Hold the rows that are to be predicted.

    Attributes:
        rows: the rows; None for the run's own test set.
        count: how many they are; None for the test set, which the loaded run counts.
        identity: hash of their content.
        id_type: type of their ids; None without ids.
    """

    rows: Iterable[Row] | None
    count: int | None
    identity: str
    id_type: type | None = None


def parse(arguments: Sequence[str], keys: Sequence[str] = KEYS) -> Given:
    """Sort the words of a command line; texts are taken literally.

    Args:
        arguments: the words.
        keys: the command's own keys.

    Raises:
        UserError: a word is wrong; one message names all mistakes.
    """
    values: dict[str, str] = {}
    texts: dict[str, str] = {}
    options, problems = [], []
    for word in arguments:
        key, equals, value = word.partition("=")
        place = values if key in keys else texts
        if word.startswith("-"):
            problems.append(f"{word}: there is no such flag; allowed: --help")
        elif not equals:
            problems.append(f"{word}: not of the form key=value")
        elif is_allowed(word):
            options += normalized([word])
        elif key in place:
            problems.append(f"{key}=: is given twice")
        elif not value:
            problems.append(f"{key}=: needs a value")
        else:
            place[key] = value
    if "run" not in values:
        hints = {name: nearest(name, keys) for name in texts}
        problems += [f"{name}=: there is no such key{hint}" for name, hint in hints.items() if hint]
        problems.append("name a run: run=<run folder>")
    if problems:
        raise UserError("; ".join(problems))
    return Given(Path(values.pop("run")).expanduser(), values, options, texts)


def main(arguments: Sequence[str]) -> int:
    """Predict, and print or write the predictions; return the exit code."""
    given = parse(arguments)
    quiet_as(given.run, given.options)
    from flare_exp.experiment.loading import finished_config
    from flare_exp.experiment.overriding import overridden
    from flare_exp.experiment.pipeline import load_task

    cfg, problems = finished_config(given.run), []
    try:
        cfg = overridden(cfg, given.options)
    except UserError as error:
        problems.append(str(error))
    task = load_task(cfg)
    if problems := [*problems, *_input_problems(given, cfg, task), *_out_problems(given)]:
        raise UserError("; ".join(problems))
    found = _input(given, cfg, task)
    if out := given.path("out"):
        return _write(given, found, out)
    if found.rows is None or (found.count or 0) > SHOWN:
        raise UserError(f"a table shows {SHOWN} rows at most: give out=FILE")
    _show(given, found.rows)
    return 0


def _input_problems(given: Given, cfg: Config, task: Task) -> Iterator[str]:
    """Yield what is wrong with the texts that are given."""
    from flare_exp.data.rows import path_problem, source_columns, text_problem
    from flare_exp.experiment.source_texts import source_texts

    # those of a method without a source are refused later, with the reason
    sources = source_texts(cfg, task).columns or source_columns(task.fields)
    known = [*task.fields, *sources]
    if unknown := [name for name in given.texts if name not in known]:
        allowed = [*KEYS, *known, "mt", "mt.*", *OPTIONS]
        near = "".join(nearest(name, allowed) for name in unknown)
        yield f"{', '.join(unknown)}: there is no such key; {', '.join(allowed)}{near}"
    texts = {name: text for name, text in given.texts.items() if name in known}
    if sum([bool(texts), "file" in given.values, "split" in given.values]) != 1:
        asked = " ".join(f'{name}="..."' for name in task.fields)
        yield f"give one of {asked}, file=FILE and split=test"
    elif texts:
        lacking = [name for name in task.fields if name not in texts]
        if 0 < sum(name in texts for name in sources) < len(sources):
            lacking += [name for name in sources if name not in texts]
        yield from (f"{name}=: is missing" for name in lacking)
        yield from filter(None, [text_problem(texts)])
    if (path := given.path("file")) and (problem := path_problem(path)):
        yield f"file={path}: {problem}"
    if given.values.get("split", "test") != "test":
        yield f"split={given.values['split']}: must be test"


def _out_problems(given: Given) -> Iterator[str]:
    """Yield what is wrong with the file that is to be written."""
    from flare_exp.serving.output import WRITERS

    path = given.path("out")
    if path is None:
        return
    if path.suffix.lower() not in WRITERS:
        yield f"out={path}: must end in {', '.join(WRITERS)}"
    elif not path.parent.is_dir():
        yield f"out={path}: there is no folder {path.parent}"
    elif path.exists():
        yield f"out={path}: is there already; choose another file, or remove it"


def _input(given: Given, cfg: Config, task: Task) -> Input:
    """Return the rows to predict.

    Raises:
        UserError: a row is wrong, or nothing translates it.
    """
    from flare_exp.artifacts import digest_of, file_sha256
    from flare_exp.data.rows import Reader, Row, source_columns
    from flare_exp.experiment.source_texts import source_texts
    from flare_exp.experiment.translating import translator_problem

    if "split" in given.values:
        return Input(None, None, "test")
    reads = source_texts(cfg, task).columns
    names = reads or source_columns(task.fields)
    untranslated = translator_problem(cfg) if reads else None
    if path := given.path("file"):
        reader = Reader(path, task.fields, sources=reads)
        count = reader.check(untranslated)
        if reader.has_sources and not reads:
            print(f"method={cfg.method.name} reads no source: that of {path} is left out")
        return Input(reader, count, file_sha256(path), reader.id_type)
    source = tuple(given.texts[name] for name in names if name in given.texts)
    if source and not reads:
        raise UserError(f"method={cfg.method.name} reads no source: leave {names[0]}= out")
    if untranslated and not source:
        raise UserError(untranslated)
    row = Row(tuple(given.texts[name] for name in task.fields), source or None)
    return Input([row], 1, digest_of([row.texts, row.source]))


def _write(given: Given, found: Input, path: Path) -> int:
    """Write predictions to a file; return the exit code."""
    import flare_exp
    from flare_exp.serving import prediction
    from flare_exp.serving.output import Output
    from flare_exp.utils import progress

    run = flare_exp.load(given.run, *given.options)
    identity = prediction.identity(given.run, given.options, found.identity)
    try:
        with Output(path, identity, run.run.cfg.data.batch_size) as output:
            before = output.done
            count = len(run.test_set()[0].pairs) if found.count is None else found.count
            with progress.bar("predicting", count) as advance:
                advance(before)
                if found.rows is None:
                    prediction.write_test_predictions(run, output, advance)
                else:
                    prediction.write_predictions(run, found.rows, found.id_type, output, advance)
    except OSError as error:
        raise UserError(
            f"out={path}: cannot be written ({error.strerror}); the same command goes on"
        ) from None
    except KeyboardInterrupt:
        print("\nstopped; what is predicted is kept, and the same command goes on", file=sys.stderr)
        return 130
    kept = f", {before:,} of them predicted before" if before else ""
    print(f"wrote {path}: {count:,} rows{kept}")
    return 0


def _show(given: Given, rows: Iterable[Row]) -> None:
    """Print a table of predictions."""
    from rich.console import Console

    import flare_exp
    from flare_exp.serving.output import flat
    from flare_exp.serving.prediction import predict_rows

    run = flare_exp.load(given.run, *given.options)
    found = [flat(row) for row in predict_rows(run, rows)]
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False)
    console.print(_fitting(console, found, run.task.fields))


def _fitting(console: Console, rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> Table:
    """Return a table of rows, with the answers alone where all columns would cut their words."""
    whole = _table(rows, [*rows[0]])
    wide = console.options.update(max_width=10**6)
    if console.measure(whole, options=wide).minimum <= console.width:
        return whole
    answer = (*fields, "prediction", "probability")
    table = _table(rows, [name for name in rows[0] if name in answer])
    table.caption = "out=FILE has the other columns"
    return table


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """Return a table of some columns of rows."""
    from rich import box
    from rich.table import Table

    table = Table(*names, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in names))
    return table


def _cell(value: Any) -> Text:
    """Return a cell of the table; its text is no markup."""
    from rich.text import Text

    return Text("" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value))
