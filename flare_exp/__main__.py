"""`python -m flare_exp key=value ...`: check every override, then hand over to Hydra.

Hydra stops at its first error and lets `--cfg` bypass the program, so the command line is checked here beforehand.
Nothing heavy is imported before that.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from flare_exp import config, preemption
from flare_exp.errors import UserError

# Subcommand -> what it does, for --help. Each is a module flare_exp.<subcommand> with `main(arguments) -> exit code`.
COMMANDS = {
    "plan": "what a run or a grid (-m) would build, need and take, without running it",
    "prefetch": "fetch models and data from the hub, for runs without network",
    "status": "what has become of the jobs of a grid",
}
EXAMPLES = """\
  python -m flare_exp                                             FLARE on the embedded world, no network needed
  python -m flare_exp method=lora task.lang=near seed=1           plain LoRA, the near language, another seed
  python -m flare_exp -m method=zero_shot,lora,flare seed=0,1,2   a grid; shared stages run once
  python -m flare_exp fusion=cross_attn fusion.heads=2 trainer.max_epochs=3
  python -m flare_exp method=flare_mt mt=toy_nllb                 the source is a translation model's encoder
  python -m flare_exp model=tiny_decoder task=toy_qa              a Llama that writes answers
  python -m flare_exp model=llama31 task=xnli task.lang=sw        4-bit weights, LoRA in all linear layers
  python -m flare_exp model=custom model.path=<checkpoint> task=nusax task.data_dir=<folder> task.lang=jav"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 a mistake in the command line, data or files, 1 a failed grid, 128 + n
    stopped by signal n."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        return _command(given[0], given[1:])
    preemption.listen()
    wait = given[:1] != ["submit"]
    arguments = _normalised(given if wait else ["-m", "hydra/launcher=slurm", *given[1:]])
    if any(a in ("--help", "-h") for a in arguments):
        print(help_text())
        return 0
    flags = [a for a in arguments if a.startswith("-")]
    overrides = _overrides(arguments)
    multirun = any(f in ("-m", "--multirun") for f in flags)
    if multirun and not any(o.startswith("output_dir=") for o in overrides):
        overrides.append("output_dir=" + time.strftime("outputs/%Y-%m-%d_%H-%M-%S_grid"))  # one folder for all its jobs
        arguments.append(overrides[-1])
    jobs, problems = config.check(overrides, multirun)
    only_shown = any(f.startswith(("--cfg", "-c", "--info", "-i", "--version", "--resolve")) for f in flags)
    if problems:
        return _refuse(problems)
    if only_shown:
        return _hand_over(arguments)
    if jobs[0].print_config:
        return _print_config(jobs[0])
    if not multirun and assists(jobs[0]):
        return 0
    folder = Path(str(jobs[0].output_dir)).expanduser()
    on_slurm = "hydra/launcher=slurm" in overrides
    grid = _Grid(folder, jobs, config.cells(overrides)) if multirun else None
    if on_slurm and not multirun:
        problems = ["hydra/launcher=slurm: a launcher starts the jobs of a grid; add -m (it may be a grid of one)"]
    elif multirun and not on_slurm and any(job.trainer.nodes > 1 for job in jobs):
        problems = ["trainer.nodes with -m: the jobs of a grid on several machines need hydra/launcher=slurm"]
    if problems := problems or list(grid.problems() if grid else _check_output(jobs[0], folder)):
        return _refuse(problems)
    if not (folder / "metrics.json").is_file() and (message := _missing(jobs, given, multirun)):
        print(f"flare_exp: {message}", file=sys.stderr)
        return 2
    if grid:
        grid.begin()
    return _on_slurm(grid, wait) if grid and on_slurm else _hand_over(arguments, grid)


def _command(name: str, arguments: Sequence[str]) -> int:
    """Run a subcommand; a user's mistake is one message and exit code 2."""
    import importlib

    try:
        return importlib.import_module(f"flare_exp.{name}").main(_normalised(arguments))
    except UserError as error:
        print(f"flare_exp {name}: {error}", file=sys.stderr)
        return 2


def _normalised(argv: Sequence[str]) -> list[str]:
    """A command line as Hydra wants it: flags before overrides, and task.train_split=validation[:2000] in quotes."""
    overrides = [a for a in argv if "=" in a and not a.startswith("-")]
    flags = [a for a in argv if a not in overrides]
    return flags + [_quoted(a) for a in overrides]


def _quoted(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}='{value}'" if key.endswith("_split") and "[" in value and value[0] not in "'\"" else override


def _overrides(arguments: Sequence[str]) -> list[str]:
    """The key=value words of a Hydra command line, read with Hydra's own parser."""
    from hydra._internal.utils import get_args_parser

    known, _ = get_args_parser().parse_known_args(list(arguments))
    return list(known.overrides)


def _missing(jobs: Sequence[Any], given: Sequence[str], multirun: bool) -> str | None:
    """A message when there is no network and the caches lack something that the jobs would ask the hub for."""
    from flare_exp import hub, prefetch

    return prefetch.refusal(jobs, given, multirun) if hub.offline(any(job.offline for job in jobs)) else None


def _refuse(problems: Sequence[str]) -> int:
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"flare_exp: {count} in the command line", file=sys.stderr)
    for problem in problems:
        print(f"  - {problem}", file=sys.stderr)
    print("Nothing was run. See: python -m flare_exp --help", file=sys.stderr)
    return 2


def _print_config(job: Any) -> int:
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(job, resolve=True), end="")
    return 0


# Options that do not change a result, so that a run folder may be taken up again with others.
VOLATILE = {
    "output_dir",
    "cache_dir",
    "resume",
    "print_config",
    "offline",
    "experiment",
    "method.label",
    *(f"logger.{f.name}" for f in fields(config.LoggerConfig)),
    "trainer.devices",
    "trainer.nodes",
    "trainer.strategy",
    "trainer.checkpoint_minutes",
    "trainer.enable_progress_bar",
    "data.workers",
}


def _check_writable(folder: Path) -> Iterator[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield f"output_dir={folder}: cannot be written ({error.strerror})"


def _check_output(job: Any, folder: Path) -> Iterator[str]:
    """Problems with a run folder: it cannot be written, or it holds another run."""
    from omegaconf import OmegaConf

    if unwritable := list(_check_writable(folder)):
        yield from unwritable
        return
    stored = folder / "config.yaml"
    try:
        before = OmegaConf.load(stored) if stored.is_file() else None
    except Exception as error:  # yaml raises its own kinds
        yield f"output_dir={folder}: its config.yaml is unreadable ({str(error).splitlines()[0]}); choose another folder"
        return
    if before is None:
        if (folder / "metrics.json").exists():
            yield f"output_dir={folder}: it holds a metrics.json but no config.yaml; choose another folder"
        return
    if not job.resume:
        yield f"output_dir={folder}: it holds a run already and resume=false; choose another folder"
        return
    old, new = (config.flat(OmegaConf.to_container(c, resolve=True)) for c in (before, job))
    differing = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and k not in VOLATILE]
    if differing:
        shown = ", ".join(f"{k} ({old.get(k)} there, {new.get(k)} here)" for k in differing)
        yield f"output_dir={folder}: it holds another run, which differs in {shown}"


class _Grid:
    """The jobs of a multirun as they were composed when it was started: editing a file later changes nothing."""

    def __init__(self, folder: Path, jobs: Sequence[Any], cells: Sequence[Sequence[str]]):
        self.folder, self.jobs, self.cells = folder, jobs, cells
        self.skipped = [n for n, job in enumerate(jobs) if config.without_fusion(job, cells[n])]
        self.numbers = [n for n in range(len(jobs)) if n not in self.skipped]

    def problems(self) -> Iterator[str]:
        """The folder cannot be written, or holds other jobs."""
        if unwritable := list(_check_writable(self.folder)):
            yield from unwritable
            return
        for n in self.numbers:
            yield from _check_output(self.jobs[n], self.folder / str(n))

    def begin(self) -> None:
        """Leave word of the jobs, for `status`."""
        from flare_exp import status

        for method in dict.fromkeys(self.jobs[n].method.name for n in self.skipped):
            print(f"skipped: method={method} has no fusion, so the cells that combine it with fusion=... are left out")
        status.write_grid(self.folder, {n: self.cells[n] for n in self.numbers})


def _on_slurm(grid: _Grid, wait: bool) -> int:
    """Submit the jobs that are not done, and wait for them unless told otherwise; returns the exit code."""
    from omegaconf import OmegaConf

    from flare_exp import slurm, status

    jobs = [slurm.Job(OmegaConf.to_object(grid.jobs[n]), (grid.folder / str(n)).absolute(), grid.cells[n])  # type: ignore[arg-type]
            for n in grid.numbers]  # fmt: skip
    before = {job.folder: status.read(job.folder) for job in jobs}
    missing = [job for job in jobs if before[job.folder].state not in ("done", "running")]
    print(f"{grid.folder}: {len(jobs)} jobs, {status.counts(before)}")
    if missing:
        try:
            array = slurm.submit(missing, config.launcher(grid.cells[0]))
            print(f"submitted as SLURM job array {array}; see: python -m flare_exp status {grid.folder}")
            if not wait:
                return 0
        except UserError as error:
            print(f"flare_exp: {error}", file=sys.stderr)
            return 2
        try:
            slurm.wait(missing, array)
        except (KeyboardInterrupt, preemption.Stopped, UserError) as error:
            print(f"\nno longer waiting{f' ({error})' if str(error) else ''}; the jobs go on (scancel {array} ends them)",
                  file=sys.stderr)  # fmt: skip
            return 130
    states = before | {job.folder: slurm.ended(status.read(job.folder)) for job in missing}
    status.print_table(states, {job.folder: list(job.overrides) for job in jobs})
    return 0 if all(s.state == "done" for s in states.values()) else 1


def _hand_over(arguments: Sequence[str], grid: _Grid | None = None) -> int:
    import hydra

    config.register_schema()
    sys.argv = [sys.argv[0], *arguments]
    outcome = _Outcome(grid)
    hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")(outcome.job)()
    return outcome.report()


class _Outcome:
    """Runs Hydra's jobs and remembers which failed, so that a grid goes on and its end tells."""

    def __init__(self, grid: _Grid | None):
        self.grid = grid
        self.failed: list[tuple[Path, str]] = []

    def job(self, cfg: Any) -> None:
        """One job of Hydra's; a user's mistake is told and remembered, so that a grid goes on."""
        from hydra.core.hydra_config import HydraConfig

        hydra_cfg = HydraConfig.get()
        folder = Path(hydra_cfg.runtime.output_dir)
        if self.grid is None:
            self._remember(folder, attempt(cfg, folder))
            return
        number = hydra_cfg.job.num
        if number in self.grid.numbers:
            self._remember(folder, attempt_in_grid(self.grid.jobs[number], folder))

    def _remember(self, folder: Path, reason: str | None) -> None:
        if reason is not None:
            self.failed.append((folder, reason))
            print(f"flare_exp: {reason}", file=sys.stderr)

    def report(self) -> int:
        if self.failed and self.grid:
            print(f"{len(self.failed)} of {len(self.grid.numbers)} jobs of the grid failed:", file=sys.stderr)
            for folder, reason in self.failed:
                print(f"  {folder}: {reason}; see {folder / 'flare_exp.log'}", file=sys.stderr)
            return 1
        return 2 if self.failed else 0


def assists(cfg: Any) -> bool:
    """Whether this is one of the further machines of a run (trainer.nodes); if so it has done its part on return."""
    machine = int(os.environ.get("SLURM_PROCID", 0)) if cfg.trainer.nodes > 1 else 0
    if machine:
        from flare_exp import parallel

        parallel.assist(machine, cfg.trainer.devices, cfg.trainer.nodes, cfg.trainer.accelerator)
    return machine > 0


def attempt(cfg: Any, folder: Path) -> str | None:
    """Run one configuration in `folder`; returns why it failed if that is something that the user can mend.

    Raises:
        SystemExit: it was stopped; what it had done is kept.
    """
    from flare_exp import status

    done = (folder / "metrics.json").is_file()
    try:
        with nullcontext() if done else status.running(folder):
            run_job(cfg, folder)
    except UserError as error:
        return str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return f"no more can be written to {error.filename or folder}: {error.strerror}"
    except preemption.Stopped as stop:
        raise SystemExit(_stopped(stop)) from None
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C during training into an exit
        print("\nstopped; finished stages are kept, and the same command goes on after them", file=sys.stderr)
        raise SystemExit(130) from None
    return None


def attempt_in_grid(cfg: Any, folder: Path) -> str | None:
    """Like `attempt`; what nobody foresaw is a reason too, with its traceback in the log, so that the other jobs go on."""
    try:
        return attempt(cfg, folder)
    except Exception as error:
        import logging

        logging.getLogger(__name__).exception("the job in %s failed", folder)
        return f"{type(error).__name__}: {error}"


def _stopped(stop: preemption.Stopped) -> int:
    """Say so, and have SLURM start the job again if it gave the warning; returns the exit code."""
    print(f"flare_exp: {stop}", file=sys.stderr, flush=True)
    if stop.by is signal.SIGUSR1:
        try:
            if job := preemption.requeue():
                print(f"flare_exp: SLURM job {job} is back in the queue", file=sys.stderr, flush=True)
        except RuntimeError as error:
            print(f"flare_exp: {error}", file=sys.stderr)
    return 128 + stop.by


def run_job(cfg: Any, folder: Path) -> dict[str, Any]:
    """Run one configuration in `folder`, or return the result that is there already; prints the table."""
    import json
    import logging

    from omegaconf import OmegaConf

    typed: config.Config = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    _quiet(typed)
    from flare_exp import pipeline, results

    done = folder / "metrics.json"
    if done.is_file():
        logging.getLogger(__name__).info("this run is complete; showing the stored result")
        measured = json.loads(done.read_text())
    else:
        results.write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        measured = pipeline.run(typed, folder)
    results.print_table(measured, pipeline.notes(typed, folder), folder)
    return measured


def _quiet(cfg: config.Config) -> None:
    """Before heavy imports: network settings, and silence from libraries that talk about themselves."""
    import logging
    import warnings

    from flare_exp import hub

    hub.offline(cfg.offline)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*directory .* exists and is not empty.*")  # as it must be to go on
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings("ignore", message=".*custom batch sampler `Shares` for prediction.*")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses optional kernels, and says so when peft looks at it
    import lightning.pytorch  # noqa: F401
    import transformers

    # these set their own level and handler when they are imported
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "httpx", "filelock", "fsspec"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def help_text() -> str:
    """Groups with the options' first comment lines, every key with its help, five commands."""
    lines = [
        "usage: python -m flare_exp [-m] [--cfg job] [group=option ...] [key=value ...]",
        "",
        "Examples:",
        EXAMPLES,
        "",
        "Commands:",
        *(f"  python -m flare_exp {name:<10} {text}" for name, text in COMMANDS.items()),
        "  python -m flare_exp submit     -m hydra/launcher=slurm, without waiting for the jobs",
        "",
        "Groups:",
    ]
    for group, options in config.groups().items():
        lines.append(f"  {group}")
        lines += [f"    {name:<20}{_comment(group, name)}" for name in options]
    lines += ["", "Options (default; a model, task or experiment may set another):"]
    for key, f in config.keys().items():
        text = f.metadata.get("help", "")
        if not text or key.endswith(".name") or key == "experiment":
            continue
        default = "" if f.default in ("???", None) or "dataclasses" in repr(f.default) else f" [{f.default}]"
        allowed = f.metadata.get("choices", f.metadata.get("each", ()))
        choices = f" ({', '.join(map(str, allowed))})" if len(allowed) > 1 else ""
        lines.append(f"  {key:<30}{text}{choices}{default}")
    return "\n".join([*lines, "", "-m runs every combination of comma-separated values; --cfg job shows a configuration."])


def _comment(group: str, name: str) -> str:
    for line in (config.conf_dir() / group / f"{name}.yaml").read_text().splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line[2:]
    return ""


if __name__ == "__main__":
    sys.exit(main())
