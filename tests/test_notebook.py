"""The tutorial notebook: it runs, leaves nothing behind, and shows nothing of a machine."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from tutorial import NOTEBOOK

CELLS = json.loads(NOTEBOOK.read_text())["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_outputs_are_whole_and_show_nothing_of_a_machine():
    outputs = [output for cell in CELLS for output in cell.get("outputs", ())]
    assert {output["output_type"] for output in outputs} == {"stream"}
    shown = "".join("".join(output["text"]) for output in outputs)
    assert "every request that was accepted is answered" in shown
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|opt|Users|private)\b", shown)
    assert str(Path.home()) not in shown
    assert "\x1b" not in shown


def test_a_cell_is_short_and_has_prose_above():
    for above, cell in itertools.pairwise(CELLS):
        if cell["cell_type"] == "code":
            assert len(cell["source"]) <= 18
            assert "".join(above["source"]).strip()


@pytest.fixture
def signals_as_shipped():
    """Let SIGTERM through: a run in this process blocks it, and what it starts inherits that."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_the_server_of_the_notebook_ends_when_its_block_fails(tmp_path, signals_as_shipped):
    """The cell starts what `sys.executable` names; here a program that says where it is."""
    fake, pid = tmp_path / "python", tmp_path / "pid"
    fake.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            echo $$ > {pid}
            echo "serving run at http://127.0.0.1:1234; Ctrl-C ends it"
            exec sleep 600
            """
        )
    )
    fake.chmod(0o755)
    (cell,) = [source for source in SOURCES if "def serving" in source]
    names = {"sys": SimpleNamespace(executable=str(fake))}
    exec(cell, names)
    seen = []

    def fail(port):
        seen.append(port)
        os.kill(int(pid.read_text()), 0)  # it runs
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), names["serving"]("a_run") as port:
        fail(port)
    assert seen == [1234]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.slow
@pytest.mark.notebook
def test_the_notebook_runs_and_leaves_nothing(tmp_path):
    pytest.importorskip("nbmake", reason="nbmake is not installed: make .venv/.extras")
    import psutil  # ipykernel needs it

    before, mark = NOTEBOOK.read_bytes(), str(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    env = {**os.environ, "TMPDIR": mark, "FLARE_EXP_CACHE": str(tmp_path / "cache")}
    words = ["--nbmake", "--nbmake-timeout=1200", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(NOTEBOOK)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    left = [
        p
        for p in psutil.process_iter(["environ"])
        if (p.info["environ"] or {}).get("TMPDIR") == mark
    ]
    assert left == []
    assert list(Path(mark).glob("tmp*/*")) == []
    assert NOTEBOOK.read_bytes() == before
