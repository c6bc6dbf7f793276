"""Processes of a run: where rank 0 waits, and what is left when one fails."""

import socket
import subprocess
import time
from datetime import timedelta

import pytest
from torch import distributed as dist

from flare_exp.config import validation
from flare_exp.errors import UserError
from flare_exp.experiment import launch, runs


def test_steps_of_one_allocation_meet_at_places_of_their_own(monkeypatch):
    given = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_ID": "77"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert launch.address(2) == ("n1", 15077)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[3-4]")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert launch.address(2) == ("n3", 15078)


@pytest.mark.parametrize(
    ("command", "fails"), [("kill -9 $$", True), ("exit 3", True), ("", False)]
)
def test_a_further_machine_fails_when_a_process_of_it_does(monkeypatch, command, fails):
    """Also by a signal, as when memory ran out."""
    monkeypatch.setattr(launch, "address", lambda nodes: ("n1", 1))

    def start(self, **options):
        return subprocess.Popen(["sh", "-c", command])

    monkeypatch.setattr(launch.WorkerSpec, "start", start)
    if not fails:
        assert launch.run_secondary_node(1, 1, 2, "cpu") is None
        return
    with pytest.raises(SystemExit) as ended:
        launch.run_secondary_node(1, 1, 2, "cpu")
    assert ended.value.code == 1


@pytest.mark.slow
def test_a_job_that_failed_leaves_no_process_group_to_the_next(tmp_path):
    """In a grid, which goes on in this process."""
    words = ["trainer=ddp_cpu", f"output_dir={tmp_path}", f"cache_dir={tmp_path}"]
    (job,), problems = validation.validate(words, multirun=False)
    assert not problems
    from omegaconf import OmegaConf

    cfg = OmegaConf.to_object(job)

    def fail():
        with launch.launch_workers(cfg, tmp_path):
            assert dist.is_initialized()
            raise UserError("the cache is full")

    with pytest.raises(UserError, match="the cache is full"):
        fail()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("files", "starts"),
    [({}, True), ({"metrics.json", "provenance.json"}, False), ({"metrics.json"}, True)],
    ids=["new", "finished", "damaged"],
)
def test_a_further_machine_has_no_part_in_a_finished_run(monkeypatch, tmp_path, files, starts):
    """Rank 0 shows the result, and waits for nobody."""
    for name in files:
        (tmp_path / name).write_text("{}")
    monkeypatch.setenv("SLURM_PROCID", "1")
    started = []
    monkeypatch.setattr(launch, "run_secondary_node", lambda *place: started.append(place))
    words = ["trainer=ddp_cpu", "trainer.nodes=2", f"output_dir={tmp_path}"]
    (job,), problems = validation.validate(words, multirun=False)
    assert not problems
    assert runs.run_if_secondary_node(job)
    assert bool(started) == starts


def test_a_process_waits_for_rank_0_as_long_as_all_others_do(monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", timedelta(seconds=1))
    with socket.socket() as unused:  # bound, and listening to nobody
        unused.bind((launch.LOCALHOST, 0))
        place = launch.WorkerSpec(1, 2, 1, launch.LOCALHOST, unused.getsockname()[1], "cpu")
        started = time.monotonic()
        with pytest.raises(dist.DistNetworkError):
            place.connect()
    assert time.monotonic() - started < 60, "torch's own limit is 300 s"
