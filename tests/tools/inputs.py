"""Type what a stranger types, and print what comes of it as a Markdown table.

    python tests/tools/inputs.py [--only <words>] [--work <folder>] [--into docs/inputs.md]

Each row has the exit code and a phrase that its output must have, and says what it leaves. The exit
code is 0 if all rows are as they must be. Every row is a process of its own, in a folder of its own
that has `my_model`, `my_data` and so on. Rows that need the libraries are forked from a process
that has imported them, unless the row is `real`: then it is the command itself, with its import.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from input_rows import VARIABLES, Row, expand, prepare
from input_table import GROUPS
from page import replace_section

TRACE = "Traceback (most recent call last)"
NOISE = re.compile(
    r"^\s*$|^\[\d\d:\d\d:\d\d\] (finetune|transfer): [\d,]+ of|^kernels|^Failed to load CPU gemm"
)


@dataclass
class Outcome:
    """What came of a row."""

    code: int
    said: str
    seconds: float
    kept: str
    problems: list[str]


def contents(folder: Path) -> set[str]:
    """Return what lies below `folder`: files, and folders that are empty."""
    found = set()
    for place, inside, files in os.walk(folder):
        names = files or ([] if inside else [""])
        found |= {str((Path(place) / name).relative_to(folder)).rstrip("./") for name in names}
    return found - {""}


def artifacts(cache: Path) -> dict[str, int]:
    """Return kind -> number of finished artifacts."""
    found: dict[str, int] = {}
    for manifest in cache.glob("*/[!.]*/manifest.json"):
        found[manifest.parent.parent.name] = found.get(manifest.parent.parent.name, 0) + 1
    return found


def in_words(
    before: set[str], after: set[str], kinds: tuple[dict[str, int], dict[str, int]]
) -> str:
    """Say what is new in the cache and the working folder."""
    built = {
        kind: n - kinds[0].get(kind, 0) for kind, n in kinds[1].items() if n > kinds[0].get(kind, 0)
    }
    new = sorted(name for name in after - before if name.split("/")[0] != "cache")
    parts = (
        [
            "cache: "
            f"{', '.join(f'{n} {kind}' if n > 1 else kind for kind, n in sorted(built.items()))}"
        ]
        if built
        else []
    )
    if begun := sorted(
        {x.split("/")[1] for x in after - before if re.match(r"cache/\w+/[.\w]+\.part/", x)}
    ):
        parts.append(f"cache: begun {', '.join(begun)}")
    if len(new) > 4:
        parts.append(f"{len(new)} files")
    elif new:
        parts.append(
            ", ".join(re.sub(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", "<time>", name) for name in new)
        )
    return "; ".join(parts) or "nothing"


def ended(pid: int, limit: float) -> tuple[int, float]:
    """Wait for a child and kill it after some seconds.

    Returns its exit code, and how long it waited for a processor.
    """
    deadline = time.monotonic() + limit
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline += 60
        time.sleep(0.01)
    try:
        waited = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        waited = 0.0
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), waited


def forked(words: list[str], said: Path, env: dict[str, str], limit: float) -> tuple[int, float]:
    """Run `main` in a child of this process; returns what `ended` does."""
    if child := os.fork():
        return ended(child, limit)
    code = 1
    try:
        os.setsid()
        out = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(env)
        sys.argv = ["flare_exp"]
        from flare_exp.__main__ import main

        code = main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run(row: Row, base: Path, work: Path) -> Outcome:
    """Carry out a row in a fresh folder."""
    home = Path.cwd()
    folder = work / "here"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, symlinks=True)
    os.chdir(folder)
    said = work / "said.txt"
    env = {
        "FLARE_EXP_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
        **row.env,
    }
    try:
        for line in row.first:  # a command, or a function that changes files
            if callable(line):
                line(folder)
            else:
                words = shlex.split(expand(line))
                said.unlink(missing_ok=True)
                code, _ = forked(words, said, env, 300)
                if code:
                    return Outcome(
                        code, said.read_text(), 0.0, "", [f"before it, `{line}` ended with {code}"]
                    )
        before, kinds = contents(folder), artifacts(folder / "cache")
        said.unlink(missing_ok=True)
        said.touch()
        start = time.monotonic()
        words = shlex.split(expand(row.given))
        waited, limit = 0.0, 120.0 if row.leaves == "nothing" else 300.0
        if row.way:
            code = row.way(words, said, {**os.environ, **env})
        elif row.real:
            with said.open("a") as file:
                command = [sys.executable, "-m", "flare_exp", *words]
                given = {
                    "stdout": file,
                    "stderr": subprocess.STDOUT,
                    "stdin": subprocess.DEVNULL,
                    "env": {**os.environ, **env},
                }
                code, waited = ended(subprocess.Popen(command, **given).pid, limit)
        else:
            code, waited = forked(words, said, env, limit)
        seconds = time.monotonic() - start - waited
        text = said.read_text(errors="replace").replace(f"{folder}/", "").replace(str(work), "~")
        kept = in_words(before, contents(folder), (kinds, artifacts(folder / "cache")))
        outcome = Outcome(code, text, seconds, kept, [])
        outcome.problems = list(wrong(row, outcome, folder, before))
        return outcome
    finally:
        os.chdir(home)
        if row.last:
            row.last(folder)


def wrong(row: Row, found: Outcome, folder: Path, before: set[str]) -> Iterable[str]:
    """What is not as it must be."""
    if found.code != row.code:
        yield f"exit code {found.code} instead of {row.code}"
    flat = " ".join(found.said.split())
    for phrase in row.says:
        if phrase not in flat:
            yield f"does not say {phrase!r}"
    if TRACE in found.said:
        yield "has a traceback"
    if found.seconds > row.within:
        yield f"took more than {row.within:.0f} s"
    if row.leaves is not None and found.kept != row.leaves:
        yield f"leaves {found.kept!r} instead of {row.leaves!r}"
    if empty := [
        n
        for n in contents(folder) - before
        if (folder / n).is_dir() and not n.startswith(("cache", row.spared))
    ]:
        yield f"leaves the empty folder {empty[0]}"
    if row.right and found.code == 0:
        try:
            row.right(folder)
        except Exception as error:
            yield (
                f"is not right: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}"
            )


def message(row: Row, said: str) -> str:
    """Cut the output down to what a reader sees of it: the lines that matter, at most three."""
    lines = [line.rstrip() for line in said.splitlines() if not NOISE.match(line)]
    told = [n for n, line in enumerate(lines) if line.startswith("flare_exp")]
    if told and row.code:
        lines = lines[told[0] :]
    elif row.says:
        first = row.says[0].split()[0]
        hits = [n for n, line in enumerate(lines) if row.says[0] in line] or [
            n for n, line in enumerate(lines) if first in line
        ]
        lines = lines[hits[0] :] if hits else lines[-3:]
        lines = lines[:2]
    shown = " ".join(
        re.sub(r"[\u2500-\u257f]+", " ", " ".join(lines[:3])).split()
    )  # without the lines of tables
    return shown if len(shown) <= 330 else shown[:327] + "..."


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="rows whose group or input has this text")
    parser.add_argument(
        "--full", action="store_true", help="print the whole output of each row too"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for everything (default: a temporary one)"
    )
    parser.add_argument(
        "--into", type=Path, help="a Markdown page whose section of inputs is replaced"
    )
    given = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell has it ignored in what it starts in the background
    work = (given.work or Path(tempfile.mkdtemp(prefix="inputs"))).absolute()
    base = work / "base"
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HOME": str(work / "hub")}
    import datasets  # noqa: F401
    import hydra  # noqa: F401
    import torch

    import flare_exp.experiment.pipeline  # noqa: F401  # before any fork

    torch.set_num_threads(1)  # OMP_NUM_THREADS came after its import: a row has it before

    if not (base / "ready.json").is_file():
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        child_prepare(base)
        (base / "ready.json").write_text(json.dumps(sorted(contents(base))[:5]))
    number, failed, out = 0, [], []
    for title, rows in GROUPS.items():
        chosen = [
            row
            for row in rows
            if not given.only or given.only in title or given.only in row.given + row.about
        ]
        if not chosen:
            continue
        out += [
            "",
            f"**{title}**",
            "",
            "| # | input | exit | output | s | kept |",
            "|---|---|---|---|---|---|",
        ]
        for row in chosen:
            number += 1
            found = run(row, base, work)
            about = f"{row.about}: " if row.about else ""
            how = f" ({row.known})" if row.known else ""
            seconds = f"{found.seconds:.1f}{'*' if row.real or row.way else ''}"
            out.append(
                f"| {number} | {cell(about)}{code(row.given) if row.given else code('(nothing)')} "
                f"| {found.code} | {cell(message(row, found.said))}{cell(how)} | {seconds} | "
                f"{cell(found.kept)} |"
            )
            print(out[-1], flush=True)
            if given.full:
                print("\n".join("      " + line for line in found.said.splitlines()))
            if found.problems:
                failed.append(f"row {number}, {row.given}: {'; '.join(found.problems)}")
                print(f"   >>> WRONG: {'; '.join(found.problems)}", flush=True)
                if not given.full:
                    print("\n".join("       " + line for line in found.said.splitlines()[-12:]))
    print(f"{number} rows, {len(failed)} are not as they must be", *failed, sep="\n")
    if given.into:
        out += [
            "",
            "The variables:",
            "",
            *(f"    {name}={shlex.quote(value)}" for name, value in VARIABLES.items()),
        ]
        count = f"{number} inputs; {len(failed)} are not as they must be."
        replace_section(given.into, "inputs", "\n".join([count, *out]))
    return 1 if failed else 0


def child_prepare(base: Path) -> None:
    """Make the common files in a child, so that this process computes nothing before it forks."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit("the common files could not be made")
        return
    try:
        prepare(base)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
