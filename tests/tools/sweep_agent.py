"""The W&B sweep files of the repository, and W&B's own agent without its server."""

from __future__ import annotations

from types import SimpleNamespace

from flare_exp.config import composition


def sweep_files():
    return sorted((composition.conf_dir().parent / "sweeps").glob("*.yaml"))


class Agent:
    """W&B's own agent, up to the moment where it starts a process."""

    def __init__(self, sweep, folder, monkeypatch):
        from wandb import wandb_agent

        for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets these here too
            monkeypatch.setenv(name, "")
        monkeypatch.setenv("WANDB_DIR", str(folder))
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
        monkeypatch.setattr(wandb_agent, "AgentProcess", SimpleNamespace)
        self.program, self.agent = (
            sweep["program"],
            wandb_agent.Agent(api=None, queue=None, sweep_id="sweep1"),
        )
        self.agent._sweep_command = list(sweep["command"])

    def start(self, values, run_id="run1"):
        """The process of a run: `command`, `env`."""
        given = {name: {"value": value} for name, value in values.items()}
        answer = self.agent._process_command(
            {"type": "run", "run_id": run_id, "program": self.program, "args": given}
        )
        assert "exception" not in answer, answer
        return self.agent._run_processes[run_id]
