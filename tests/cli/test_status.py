"""What has become of a grid, read from its folders."""

import json
import os
import signal
import subprocess
import sys

import pytest

from flare_exp.cli import status
from flare_exp.errors import UserError
from flare_exp.experiment import run_state
from flare_exp.utils.signals import StopRequested


def leave(folder, state, **more):
    run_state.add(folder, run_state.State(state, **more))


def dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def grid(tmp_path):
    """A grid with a job in every state."""
    run_state.write_grid(tmp_path, {n: ["task=nusax", f"method.of=[lora,m{n}]"] for n in range(7)})
    (tmp_path / "0").mkdir()
    for name in ("metrics.json", "provenance.json"):
        (tmp_path / "0" / name).write_text("{}")
    here = {"host": run_state.socket.gethostname(), "pid": os.getpid(), "slurm_job": "8_1"}
    leave(tmp_path / "1", "waiting")
    leave(tmp_path / "1", "running", **here)
    (tmp_path / "1" / run_state.SIGN).touch()
    leave(tmp_path / "2", "running", **{**here, "pid": dead_process()})
    leave(tmp_path / "3", "waiting", reason="submitted to SLURM")
    leave(tmp_path / "4", "stopped", reason="stopped by SIGUSR1 after 7 steps")
    leave(tmp_path / "6", "running", host="elsewhere", pid=1)
    return tmp_path


def test_every_state_is_told_from_the_folders(grid, capsys):
    assert status.main([str(grid)]) == 1
    said = capsys.readouterr().out
    assert "1 done, 1 running, 1 waiting, 1 stopped, 2 failed, 1 missing" in said
    assert "task=nusax" not in said  # all have it
    assert "method.of=[lora,m4]" in said
    assert "SLURM job 8_1" in said
    states = [run_state.read(grid / str(n)).state for n in range(7)]
    assert states == ["done", "running", "failed", "waiting", "stopped", "missing", "failed"]


def test_a_job_of_another_machine_lives_as_long_as_it_gives_a_sign(grid):
    sign = grid / "6" / run_state.SIGN
    sign.touch()
    assert run_state.read(grid / "6").state == "running"
    os.utime(sign, (0, 0))
    assert run_state.read(grid / "6").state == "failed"


def test_the_timeline_is_in_order(grid, capsys):
    leave(grid / "4", "running", slurm_job="8_4")
    status.main(["--timeline", str(grid)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("20")]
    assert lines == sorted(lines, key=lambda line: line[:19])
    assert [line.split()[4] for line in lines if "job 4" in line] == ["stopped", "running"]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (UserError("no data"), "failed"),
        (KeyboardInterrupt(), "stopped"),
        (ZeroDivisionError("x"), "failed"),
    ],
)
def test_a_run_leaves_its_state_however_it_ends(tmp_path, error, state):
    def end(error):
        with run_state.running(tmp_path):
            assert run_state.read(tmp_path).state == "running"
            raise error

    with pytest.raises(type(error)):
        end(error)
    assert run_state.read(tmp_path).state == state
    assert not (tmp_path / run_state.SIGN).exists()
    with pytest.raises(StopRequested):
        end(StopRequested(signal.SIGUSR1, "after 3 steps"))
    assert "after 3 steps" in run_state.read(tmp_path).reason


def test_one_folder_has_one_process_at_a_time(tmp_path):
    code = f"""
from pathlib import Path
from flare_exp.experiment import run_state
from flare_exp.errors import UserError
try:
    with run_state.running(Path({str(tmp_path)!r})):
        print("in")
except UserError as error:
    print(error)
"""
    with run_state.running(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is running there" in done.stdout, done.stderr
        assert run_state.read(tmp_path).state == "running"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "in\n"
    )


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_wrong_arguments(arguments):
    with pytest.raises(UserError, match="name one folder"):
        status.main(arguments)


def test_a_line_that_a_full_disk_cut_off_is_left_out(tmp_path):
    leave(tmp_path, "running")
    with (tmp_path / run_state.STATES).open("a") as file:
        file.write('{"time": 2.0, "sta')
    leave(tmp_path, "stopped", reason="by hand")
    assert [state.state for _, state in run_state.history(tmp_path)] == ["running", "stopped"]


def test_unreadable_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no run and no grid lies there"):
        status.main([str(tmp_path)])
    (tmp_path / run_state.GRID).write_text("{")
    with pytest.raises(UserError, match=r"grid\.json is unreadable"):
        status.main([str(tmp_path)])
    (tmp_path / run_state.GRID).write_text(json.dumps([{"job": 0, "overrides": []}]))
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / run_state.STATES).write_text("half a li")
    assert run_state.read(tmp_path / "0").state == "failed"
