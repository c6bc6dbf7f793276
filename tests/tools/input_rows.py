"""The inputs of tests/tools/inputs.py: what is typed, in which files, and what must come of it."""

# ruff: noqa: E501
# fmt: off
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tables import write_rows

VARIABLES = {
    "SMALL": "trainer=debug trainer.enable_progress_bar=false task.limit=32 finetune.lr=1e-3 transfer.lr=1e-3",
    "TINY": "$SMALL model.pretrain.documents=1000 model.pretrain.steps=20",
    "MODEL": "$SMALL model=custom model.path=my_model",
    "OWN": "$MODEL task=nusax task.data_dir=my_data task.lang=jav mt=gold",
    "NLI": "$MODEL task=xnli task.data_dir=my_nli task.lang=sw mt=gold",
    "LONG": "trainer=cpu trainer.enable_progress_bar=false task.limit=64 data.batch_size=8 model=custom model.path=my_model "
            "method=zero_shot finetune.epochs=400 output_dir=out",
    "QA": "$MODEL task=tydiqa task.data_dir=my_qa task.lang=sw method=zero_shot",
}
Step = str | Callable[[Path], None]


@dataclass(frozen=True)
class Row:
    """One input.

    Attributes:
        given: the words after `python -m flare_exp`, as a shell reads them.
        code: the exit code that it must have.
        says: phrases that its output must have, whatever the line breaks.
        about: what the reader must know of the files.
        first: commands, and functions of the folder, that come before.
        leaves: what must be new in cache and folder, in the words of the table; None: anything.
        right: raises if a result of exit code 0 is not right.
        known: how it is known that exit code 0 is right, in words.
        real: the command itself, with its imports.
        within: seconds that it may take.
        way: carries the words out in another way: (words, file for the output, environment) -> exit code.
        last: tidies up.
        spared: where empty folders may stay, as in a cache.
        env: environment.
    """

    given: str
    code: int
    says: Sequence[str]
    about: str = ""
    first: Sequence[Step] = ()
    leaves: str | None = None
    right: Callable[[Path], None] | None = None
    known: str = ""
    real: bool = False
    within: float = 240
    way: Callable[[list[str], Path, dict[str, str]], int] | None = None
    last: Callable[[Path], None] | None = None
    spared: str = "cache"
    env: dict[str, str] = field(default_factory=dict)


def refused(given: str, *says: str, **more: Any) -> Row:
    """Make a row that is refused before anything is read or made."""
    return Row(given, 2, says, leaves="nothing", **more)


def told(given: str, *says: str, about: str, **more: Any) -> Row:
    """Make a row whose data or files are refused: only the run folder's own record stays, and no artifact."""
    return Row(given, 2, says, about, **more)


# --- the files ----------------------------------------------------------------------------------------------------------


def prepare(base: Path) -> None:
    """Make the folders that every row finds: a checkpoint and three benchmarks of generated text, with translations."""
    from small_checkpoints import tiny_checkpoint

    from flare_exp.tasks import ToyNLI, ToyQA, ToySentiment

    tiny_checkpoint(base / "my_model")
    for split in ("train", "validation", "test"):
        for folder, lang in (("eng", "en"), ("jav", "far")):
            write_rows(base / f"my_data/{folder}/{split}.parquet",
                  [{"id": int(e.key), "text": e.texts[0], "label": e.label} for e in ToySentiment(limit=64).load(lang, split)])
        for folder, lang in (("en", "en"), ("sw", "far")):
            write_rows(base / f"my_nli/{folder}/{split}.parquet",
                  [{"premise": e.texts[0], "hypothesis": e.texts[1], "label": e.label} for e in ToyNLI(limit=64).load(lang, split)])
            write_rows(base / f"my_qa/{folder}/{split}.parquet", [
                {"id": f"{folder}-{e.key}", "context": e.texts[0], "question": e.texts[1],
                 "answers": {"text": [a.text for a in e.answers], "answer_start": [a.start for a in e.answers]}}
                for e in ToyQA(limit=64).load(lang, split)])
        for own, other in (("eng", "jav"), ("jav", "eng")):
            pairs = zip(rows(base / f"my_data/{own}/{split}.parquet"), rows(base / f"my_data/{other}/{split}.parquet"), strict=True)
            write_rows(base / f"my_mt/mt_{own}-{other}/{split}.parquet", [{"text": a["text"], "text_translated": b["text"]} for a, b in pairs])


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def changed(name: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Step:
    """Make a step that changes the rows of a file."""
    return lambda folder: write_rows(folder / name, change(rows(folder / name)))


def cells(name: str, column: str, value: Callable[[int, Any], Any]) -> Step:
    """Make a step that changes the cells of a column: (row number, cell) -> cell."""
    return changed(name, lambda table: [{**row, column: value(i, row[column])} for i, row in enumerate(table)])


def column(name: str, which: str, array: Callable[[int], pa.Array]) -> Step:
    """Make a step that replaces a column by an array of another type."""

    def step(folder: Path) -> None:
        table = pq.read_table(folder / name)
        write_rows(folder / name, table.set_column(table.column_names.index(which), which, array(len(table))))

    return step


def both(which: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> list[Step]:
    """Make steps that change the same file of both languages."""
    return [changed(f"my_data/{lang}/{which}.parquet", change) for lang in ("eng", "jav")]


def bad_utf8(count: int) -> pa.Array:
    offsets = pa.py_buffer(b"".join((i * 2).to_bytes(4, "little") for i in range(count + 1)))
    return pa.Array.from_buffers(pa.utf8(), count, [None, offsets, pa.py_buffer(b"a\xff" * count)])


def move(source: str, target: str) -> Step:
    def step(folder: Path) -> None:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / source, folder / target)

    return step


def remove(*names: str) -> Step:
    def step(folder: Path) -> None:
        for name in names:
            place = folder / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()

    return step


def text(name: str, content: str | bytes | Callable[[str], str]) -> Step:
    """Make a step that writes a file, or changes its text."""

    def step(folder: Path) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        made = content(place.read_text()) if callable(content) else content
        place.write_bytes(made if isinstance(made, bytes) else made.encode())

    return step


def setting(key: str, value: Any, name: str = "my_model/config.json") -> Step:
    return text(name, lambda old: json.dumps({**json.loads(old), key: value}))


def cut(name: str, share: float = 0.5) -> Step:
    """Make a step that keeps the first part of a file; the first that matches."""

    def step(folder: Path) -> None:
        place = next(folder.glob(name))
        place.write_bytes(place.read_bytes()[: int(place.stat().st_size * share)])

    return step


def flip(name: str) -> Step:
    """Make a step that changes one byte in the middle of a file; the first that matches."""

    def step(folder: Path) -> None:
        place = next(folder.glob(name))
        data = bytearray(place.read_bytes())
        data[len(data) // 2] ^= 0xFF
        place.write_bytes(bytes(data))

    return step


def weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Step:
    def step(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        place = folder / "my_model/model.safetensors"
        save_file(change(load_file(place)), place, metadata={"format": "pt"})

    return step


def pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    place = folder / "my_model/model.safetensors"
    torch.save(load_file(place), folder / "my_model/pytorch_model.bin")
    place.unlink()


class Command:
    """An object whose unpickling would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_run",)


def harmful(folder: Path) -> None:
    import pickle

    (folder / "my_model/model.safetensors").unlink()
    (folder / "my_model/pytorch_model.bin").write_bytes(pickle.dumps(Command()))


def other_tokenizer(folder: Path) -> None:
    """Put a tokenizer with more tokens than the model has into its folder."""
    from flare_exp.toy.tokenizers import train_tokenizer
    from flare_exp.toy.world import World

    train_tokenizer(World().corpus(500), 600, 64).save_pretrained(folder / "my_model")


def foreign_script(i: int, _: Any) -> str:
    return "語彙にない文字だけの文 " * 3 + str(i)


# --- what is right ------------------------------------------------------------------------------------------------------


def only(folder: Path, name: str) -> Path:
    """The one file of that name below a folder's outputs, or `out`."""
    found = [p for p in folder.rglob(name) if "cache" not in p.parts]
    assert len(found) == 1, f"{len(found)} files are called {name}"
    return found[0]


def scores(path: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads(path.read_text()).items() if k in ("test", "english", "zero_shot")}


def whole(examples: int = 32) -> Callable[[Path], None]:
    """Check that a run is complete and has one prediction per test example, from which its score follows."""

    def check(folder: Path) -> None:
        from flare_exp.experiment.checksums import damage
        from flare_exp.tasks import TASKS

        place = only(folder, "metrics.json")
        assert not damage(place.parent)
        table = rows(place.parent / "predictions.parquet")
        assert len(table) == examples, f"{len(table)} predictions"
        measured = json.loads(place.read_text())
        if TASKS[measured["task"]].labels:
            right = sum(row["prediction"] in row["gold"] if isinstance(row["gold"], list) else row["prediction"] == row["gold"] for row in table)
            assert abs(measured["test"]["accuracy"] - right / examples) < 1e-6, "the accuracy is not that of the predictions"

    return check


def same_as(other: str, name: str = "out") -> Callable[[Path], None]:
    """Check that a run's predictions and scores are those of another run."""

    def check(folder: Path) -> None:
        assert scores(folder / name / "metrics.json") == scores(folder / other / "metrics.json"), "the scores differ"
        texts = [[(r["id"].split("/")[-1], r["prediction"]) for r in rows(folder / n / "predictions.parquet")] for n in (name, other)]
        assert texts[0] == texts[1], "the predictions differ"

    return check


def same_bytes(folder: Path) -> None:
    """Check that `out` has the files of `clean`, byte for byte."""
    names = ["predictions.parquet", *(str(p.relative_to(folder / "clean")) for p in (folder / "clean").glob("*/*.safetensors"))]
    for name in names:
        assert (folder / "out" / name).read_bytes() == (folder / "clean" / name).read_bytes(), f"{name} differs"
    assert scores(folder / "out/metrics.json") == scores(folder / "clean/metrics.json")


def noted(key: str, place: str, expected: Any) -> Callable[[Path], None]:
    """Check that the run is whole and that provenance.json counts what is doubtful."""

    def check(folder: Path) -> None:
        facts = json.loads(only(folder, "provenance.json").read_text())["data"][place]
        assert facts[key] == expected, f"{key} is {facts.get(key)}"

    return check


# --- other ways to run --------------------------------------------------------------------------------------------------


def signalled(when: Callable[[Path], bool], *signals: signal.Signals, pause: float = 0.3) -> Callable[..., int]:
    """Make a way that sends signals to the process, the first when the working folder is as `when` asks.

    A process that ends by SIGINT has the exit code that a shell shows for it, 130.
    """

    def way(words: list[str], said: Path, env: dict[str, str]) -> int:
        with said.open("a") as file:
            process = subprocess.Popen([sys.executable, "-m", "flare_exp", *words], stdout=file, stderr=subprocess.STDOUT, env=env,
                                       start_new_session=True, stdin=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while not when(Path.cwd()) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            for each in signals:
                if process.poll() is None:
                    process.send_signal(each)
                time.sleep(pause)
            try:
                code = process.wait(150)
                return 130 if code == -signal.SIGINT else code
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()

    return way


def begun(kind: str, after: float = 0.5) -> Callable[[Path], bool]:
    """Tell when an artifact of a kind has been in the making for some seconds."""
    seen: list[float] = []

    def when(folder: Path) -> bool:
        if not list(folder.glob(f"cache/{kind}/.*.part")):
            seen.clear()
            return False
        seen.append(time.monotonic())
        return seen[-1] - seen[0] > after

    return when


def started(seconds: float) -> Callable[[Path], bool]:
    """Tell when some seconds have passed."""
    since: list[float] = []

    def when(_: Path) -> bool:
        since.append(time.monotonic())
        return since[-1] - since[0] > seconds

    return when


def disk(name: str, kilobytes: int) -> Step:
    def step(folder: Path) -> None:
        place = folder / name
        place.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], check=True)

    return step


def unmount(name: str) -> Callable[[Path], None]:
    return lambda folder: subprocess.run(["umount", "--lazy", folder / name], check=True) and None


def more_room(name: str) -> Step:
    return lambda folder: subprocess.run(["mount", "-o", "remount,size=200m", folder / name], check=True) and None


def expand(line: str) -> str:
    """Replace the variables that the page defines, as a shell does."""
    for name, value in VARIABLES.items():
        line = re.sub(rf"\${name}\b", lambda _, value=value: expand(value), line)  # type: ignore[misc]
    return line


def fails(words: str, code: int = 2) -> Step:
    """Make a step that runs a command which must fail."""

    def step(folder: Path) -> None:
        done = subprocess.run([sys.executable, "-m", "flare_exp", *shlex.split(expand(words))], capture_output=True, text=True, timeout=120,
                              env={**os.environ, "FLARE_EXP_CACHE": str(folder / "cache")})
        assert done.returncode == code, done.stderr

    return step
