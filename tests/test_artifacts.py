"""Artifacts are whole or not there, whoever is killed, whatever is damaged."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import SoftFileLease

from flare_exp.artifacts import ArtifactStore
from flare_exp.errors import UserError
from flare_exp.utils import leases, signals


def builder(calls=None, text="content"):
    def build(folder):
        if calls is not None:
            calls.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "data.txt").write_text(text)
        return {"rows": 3}

    return build


def test_a_failed_builder_gives_its_lock_back_while_its_error_is_kept(tmp_path):
    def fail(folder):
        raise UserError("no")

    with pytest.raises(UserError) as kept:
        ArtifactStore(tmp_path).get("kind", {"a": 1}, fail)
    assert not list(tmp_path.glob("kind/*.lock"))
    assert str(kept.value) == "no"


def test_built_once_and_reused(tmp_path):
    calls = []
    first = ArtifactStore(tmp_path).get("kind", {"a": 1, "b": (2, 3)}, builder(calls))
    second = ArtifactStore(tmp_path).get("kind", {"b": [2, 3], "a": 1}, builder(calls))
    assert len(calls) == 1
    assert (first.reused, second.reused) == (False, True)
    assert first.path == second.path
    assert second.info == {"rows": 3}
    assert (second.path / "sub" / "data.txt").read_text() == "content"
    assert (
        ArtifactStore(tmp_path).get("kind", {"a": 2, "b": [2, 3]}, builder(calls)).path
        != first.path
    )
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["change", "delete", "manifest", "foreign", "truncate"])
def test_damaged_artefact_is_named_and_rebuilt(tmp_path, caplog, damage):
    made = ArtifactStore(tmp_path).get("kind", {"a": 1}, builder())
    data, manifest = made.path / "sub" / "data.txt", made.path / "manifest.json"
    if damage == "change":
        data.write_text("CONTENT")
    elif damage == "delete":
        data.unlink()
    elif damage == "truncate":
        data.write_text("cont")
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "key": {"a": 2}}))
    again = ArtifactStore(tmp_path).get("kind", {"a": 1}, builder())
    assert not again.reused
    assert data.read_text() == "content"
    assert str(made.path) in caplog.text
    assert (
        "data.txt" if damage in ("change", "delete", "truncate") else "manifest.json"
    ) in caplog.text


def test_a_failing_builder_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        ArtifactStore(tmp_path).get("kind", {"a": 1}, build)
    assert not list((tmp_path / "kind").iterdir())
    assert not ArtifactStore(tmp_path).get("kind", {"a": 1}, builder()).reused


KILLED = """
import sys, time
from flare_exp import artifacts
from flare_exp.utils import signals
from flare_exp.artifacts import ArtifactStore
def build(folder):
    (folder / "half.txt").write_text("half")
    print("started", flush=True)
    time.sleep(60)
ArtifactStore(sys.argv[1]).get("kind", {"a": 1}, build)
"""


@pytest.mark.slow
def test_a_killed_builders_lock_and_leftovers_are_taken_over(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert any(p.name.startswith(".") for p in (tmp_path / "kind").iterdir()), (
        "the kill left something half-made"
    )
    start = time.monotonic()
    made = ArtifactStore(tmp_path).get("kind", {"a": 1}, builder())
    assert time.monotonic() - start < 20
    assert not made.reused
    assert sorted(p.name for p in made.path.rglob("*")) == ["data.txt", "manifest.json", "sub"]
    assert list((tmp_path / "kind").iterdir()) == [made.path]


def _slow_get(root, queue):
    def build(folder):
        time.sleep(1.0)
        (folder / "data.txt").write_text("x")

    queue.put(ArtifactStore(root).get("kind", {"a": 1}, build).reused)


@pytest.mark.slow
def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_slow_get, args=(tmp_path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert sorted(queue.get(timeout=60) for _ in workers) == [False, True]
    for worker in workers:
        worker.join()


def test_unwritable_cache_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir=.*file"):
        ArtifactStore(tmp_path / "file").get("kind", {"a": 1}, builder())


SUSPENDED = """
import os, signal, sys
from flare_exp import artifacts
from flare_exp.errors import UserError
from flare_exp.utils import leases
leases.LEASE = 1.5

def build(folder):
    (folder / "data").write_text("stale")
    print("building", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    if len(sys.argv) > 2:
        (folder / "more").write_text("too late")

try:
    resumable = sys.argv[2:] == ["trains"]
    artifacts.ArtifactStore(sys.argv[1]).get("kind", {"a": 1}, build, resumable=resumable)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("resumes", "words"),
    [
        ("before its successor has built", []),
        ("before its successor has built", ["trains"]),
        ("after it has", ["writes"]),
        ("after it has", ["trains"]),
    ],
)
def test_a_builder_that_gives_no_sign_of_life_is_followed_and_gives_up(
    tmp_path, monkeypatch, resumes, words
):
    """As on another machine, where nobody can look for its process."""
    monkeypatch.setattr(leases, "LEASE", 1.5)
    late = resumes.startswith("after")
    command = [sys.executable, "-c", SUSPENDED, str(tmp_path), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "building\n"

    def resume():
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=30)
        assert said.count("gave no sign of life") == 1
        assert "Traceback" not in said

    def build(folder):
        (folder / "data").write_text("fresh")
        if not late:
            resume()
        assert not (folder / "more").exists()

    trains = words == ["trains"]
    assert not ArtifactStore(tmp_path).get("kind", {"a": 1}, build, resumable=trains).reused
    if late:
        resume()
    again = ArtifactStore(tmp_path).get("kind", {"a": 1}, lambda folder: None)
    assert again.reused
    assert (again.path / "data").read_text() == "fresh"
    assert [path.name for path in again.path.parent.iterdir()] == [again.path.name]


def test_who_waits_for_another_builder_can_be_stopped(tmp_path, monkeypatch):
    held = SoftFileLease(tmp_path / "kind" / "x.lock", lease_duration=leases.LEASE)
    (tmp_path / "kind").mkdir()
    with held:
        monkeypatch.setattr(signals, "pending_signal", lambda: signal.SIGUSR1)
        waiting = ArtifactStore(tmp_path)._locked(tmp_path / "kind" / "x")
        stopped = "while another process was building kind"
        with pytest.raises(signals.StopRequested, match=stopped), waiting:
            pass
