"""Leases: who holds one, when its holder counts as dead, and who takes over."""

import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import SoftFileLease

from flare_exp.errors import UserError
from flare_exp.experiment import run_state
from flare_exp.utils import leases, signals
from flare_exp.utils.leases import Lease

HOLDER = """
import sys, time
from pathlib import Path
from flare_exp.utils import leases
leases.LEASE = 1.0
lease = leases.Lease(Path(sys.argv[1]))
assert lease.acquire(1)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """A process that holds a lease, where filelock itself cannot take one over (as on NFS)."""
    monkeypatch.setattr(leases, "LEASE", 1.0)
    monkeypatch.setattr(SoftFileLease, "_take_over", lambda *_: None)
    words = [sys.executable, "-c", HOLDER, str(tmp_path / ".running")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def tries(lease, most=20):
    """Acquire a lease in tries of a tenth of a second; return how many were needed."""
    return next((n for n in range(1, most) if lease.acquire(0.1)), None)


def on_another_machine(monkeypatch):
    monkeypatch.setattr(leases, "own_name", lambda: "node2")


@pytest.mark.slow
def test_a_live_holder_keeps_its_lease(holder, tmp_path, monkeypatch):
    lease = Lease(tmp_path / ".running")
    assert not lease.acquire(0.1)
    assert lease.other_is_alive
    on_another_machine(monkeypatch)
    other = Lease(tmp_path / ".running")
    assert not other.acquire(0.1)
    assert not other.other_is_alive, "it may be: nobody has seen it renew the lease"
    assert tries(other) is None, "2 s: longer than a dead one would keep it"
    assert other.other_is_alive
    assert not other.is_held


@pytest.mark.slow
@pytest.mark.parametrize("waited_for", [True, False])
def test_a_dead_process_of_this_machine_is_followed_at_once(holder, tmp_path, waited_for):
    """Also one that its parent has not waited for, as in a container without an init process."""
    holder.kill()
    if waited_for:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    lease = Lease(tmp_path / ".running")
    assert tries(lease) == 3
    assert lease.is_held
    lease.release()
    assert not lease.is_held


@pytest.mark.slow
def test_a_process_of_another_machine_is_followed_when_it_gives_no_sign(
    holder, tmp_path, monkeypatch
):
    os.kill(holder.pid, signal.SIGSTOP)
    on_another_machine(monkeypatch)
    start = time.monotonic()
    assert tries(Lease(tmp_path / ".running"), 40) > 3
    assert time.monotonic() - start > leases.LEASE


def test_a_process_of_another_user_exists(monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refused)
    assert leases.process_exists(2**22)


def test_a_file_that_a_dead_holder_has_not_filled_is_no_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "LEASE", 0.2)
    (tmp_path / "lease").touch()
    assert tries(Lease(tmp_path / "lease"))


@pytest.mark.slow
def test_a_run_is_begun_again_from_another_machine(holder, tmp_path, monkeypatch, caplog):
    """Refused while its process lives there, which shows after a while; else taken over."""
    on_another_machine(monkeypatch)
    caplog.set_level("INFO", "flare_exp")
    refused = pytest.raises(UserError, match="another process is running there")
    with refused, run_state.running(tmp_path):
        pytest.fail("it runs already")
    assert "waiting up to 1 s for a sign of its life" in caplog.text
    os.kill(holder.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(signals, "pending_signal", lambda: signal.SIGUSR1)
        with pytest.raises(signals.StopRequested), run_state.running(tmp_path):
            pytest.fail("it was asked to stop")
    with run_state.running(tmp_path):
        assert run_state.read(tmp_path).state == "running"
    assert not (tmp_path / ".running").exists()


@pytest.mark.slow
def test_a_run_that_was_taken_over_leaves_the_folder_to_its_successor(tmp_path):
    """Its process was suspended: it writes no results and no state."""
    run_state.check_alone(tmp_path)

    def resumed_after_another_has_begun():
        with run_state.running(tmp_path):
            run_state.check_alone(tmp_path)
            (tmp_path / ".running").unlink()
            words = [sys.executable, "-c", HOLDER, str(tmp_path / ".running")]
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout.readline() == "held\n"
                try:
                    run_state.check_alone(tmp_path)
                finally:
                    process.kill()

    (tmp_path / "metrics.json").touch()
    with pytest.raises(UserError, match="another one has taken the run over"):
        run_state.check_alone(tmp_path)  # it has finished, too
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(UserError, match="another one has taken the run over"):
        resumed_after_another_has_begun()
    assert [state.state for _, state in run_state.history(tmp_path)] == ["running"]
    assert (tmp_path / ".running").exists(), "the other's"
