"""sweeps/*.yaml and their twins against W&B's own schema, and the first runs that W&B's own
scheduler draws: `make test-sweeps`.

Needs the package `sweeps`, which wants another numpy than flare_exp does.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import multirun
import yaml

warnings.filterwarnings("ignore", category=UserWarning, module="pydantic")
from sweeps import RunState, SweepRun, next_run, schema_violations_from_proposed_config, stop_runs  # noqa: E402

SCORES = {"bad": 0.2, "middling": 0.5, "good": 0.8}


def drawn(sweep: dict, count: int = 3) -> list[SweepRun]:
    """The first runs, each finished with a score before the next one is drawn.

    Raises:
        Exception: of many kinds, where the scheduler cannot draw.
    """
    runs: list[SweepRun] = []
    while len(runs) < count and (run := next_run(sweep, runs, validate=True)) is not None:
        run.state, run.summary_metrics = (
            RunState.finished,
            {sweep["metric"]["name"]: 0.5 + len(runs) / 10},
        )
        runs.append(run)
    return runs


def stopped(sweep: dict) -> list[str]:
    """Which of three runs early termination stops after eight epochs."""
    name = sweep["metric"]["name"]
    runs = [
        SweepRun(name=run, state=RunState.running, history=[{name: score}] * 8)
        for run, score in SCORES.items()
    ]
    return [str(run.name) for run in stop_runs(sweep, runs, validate=True)]


def problems(sweep: dict) -> list[str]:
    """What W&B would not take, or would not do."""
    if violations := schema_violations_from_proposed_config(sweep):
        return violations
    try:
        if not drawn(sweep):
            return ["no run can be drawn"]
        if "early_terminate" in sweep and (found := stopped(sweep)) != ["bad"]:
            return [f"early termination stops {found} of the runs {list(SCORES)}"]
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def main() -> int:
    failed = False
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        sweep = yaml.safe_load(path.read_text())
        found = problems(sweep)
        if sweep.get("method") == "grid":
            found += [f"twin: {problem}" for problem in problems(multirun.twin(sweep))]
        failed = failed or bool(found)
        for problem in found:
            print(f"{path.name}: {problem}", file=sys.stderr)
        for run in [] if found else drawn(sweep):
            print(path.name, *(f"{name}={given['value']}" for name, given in run.config.items()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
