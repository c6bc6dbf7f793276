"""`python -m flare_exp plan [-m] [memory=80GB] key=value ...`: show what a run would build.

Shows, before a run or a grid is started, what it would build, need and take. With memory=, also the
largest data.micro_batch_size that fits a device of that size.

Nothing is fetched or built. Costs are measured on a few batches of every stage. They are counted
from shapes where a model is not on this machine: docs/plan.md.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flare_exp.cli import commandline
from flare_exp.config import composition, schema, validation
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.experiment.runs import quiet

if TYPE_CHECKING:
    from flare_exp.artifacts import Artifact
    from flare_exp.planning.costs import Estimate


# column of the table -> names of artifacts (`pipeline.run_stages`); all others are translations
COLUMNS = {
    "model": ("backbone", "mt"),
    "finetune": ("finetune",),
    "translate": (),
    "transfer": ("transfer",),
    "test": ("english_test", "zero_shot", "test"),
}
ELSEWHERE = ("hub", "checkpoint")  # kinds that are never built here


@dataclass
class Job:
    """One run of the plan.

    Args:
        number: number of the job in its grid.
        overrides: its overrides.
        cfg: its configuration.
        made: name -> artifact.
        owners: name of an artifact to build -> number of the earlier job that builds it; None: this
            job.
        estimate: cost of the artifacts that this job builds; None if it builds nothing.
        parameters: number of parameters in its last training.
        download: bytes of checkpoints that are not on this machine.
        sizes: description of the assumed data; empty if the data is on this machine.
        counted: whether the cost is counted from shapes instead of measured.
    """

    number: int
    overrides: list[str]
    cfg: schema.Config
    made: dict[str, Artifact]
    owners: dict[str, int | None] = field(default_factory=dict)
    estimate: Estimate | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    download: int = 0
    sizes: str = ""
    counted: bool = False

    @property
    def todo(self) -> set[str]:
        """Return the names of the artifacts that this job builds."""
        return {name for name, owner in self.owners.items() if owner is None}

    @property
    def seconds(self) -> float:
        """Return the estimated seconds of the artifacts that this job builds."""
        return (
            sum(self.estimate.seconds.get(name, 0.0) for name in self.todo)
            if self.estimate
            else 0.0
        )

    @property
    def generic(self) -> dict[str, str]:
        """Return the names of this job's artifacts -> names that do not depend on its language.

        A translation that does not exist yet is named by its digest.
        """
        unnamed = [name for name, a in self.made.items() if name == a.digest]
        return {
            name: f"translation {unnamed.index(name)}" if name in unnamed else name
            for name in self.made
        }

    def column(self, name: str) -> str:
        """Return the states and the time of a column's artifacts."""
        every = {n for names in COLUMNS.values() for n in names}
        names = [n for n in self.made if (n in COLUMNS[name] if COLUMNS[name] else n not in every)]
        if not names:
            return "-"
        states = [self._state(n) for n in names]
        said = [
            f"{states.count(s)} {s}" if len(set(states)) > 1 else s for s in dict.fromkeys(states)
        ]
        taken = (
            sum(self.estimate.seconds.get(n, 0.0) for n in self.todo & {*names})
            if self.estimate
            else 0.0
        )
        return "\n".join(said) + (f"\n{duration(taken)}" if self.todo & {*names} else "")

    def _state(self, name: str) -> str:
        """Return the state of an artifact as shown in the table."""
        if self.made[name].kind in ELSEWHERE:
            return "here" if self.made[name].reused else "download"
        if self.made[name].reused:
            return "built"
        owner = self.owners[name]
        return "to do" if owner is None else f"shared with job {owner}"


def main(arguments: Sequence[str]) -> int:
    """Print the plan of a command line and return the exit code.

    0: done. 1: not even one row fits a given size of memory. 2: the command line has mistakes.
    """
    limits = [a.partition("=")[2] for a in arguments if a.startswith("memory=")]
    overrides = commandline.overrides([a for a in arguments if not a.startswith("memory=")])
    multirun = any(a in ("-m", "--multirun") for a in arguments)
    composed, problems = validation.validate(overrides, multirun)
    problems += [
        f"memory={text}: must be a size above 0 like 80GB or 40GiB"
        for text in limits
        if not bytes_of(text)
    ]
    if problems:
        return commandline.refuse(problems)
    jobs = [
        (o, _typed(c)) for o, c in zip(composition.job_overrides(overrides), composed, strict=True)
    ]
    _quietly(jobs[0][1])
    with tempfile.TemporaryDirectory(prefix="flare_exp_plan_") as scratch:
        found = looked_up(jobs, multirun, Path(scratch))
        price(found, Path(scratch))
        fits = [fitting(found, bytes_of(text), Path(scratch)) for text in limits]
    show(found, len(jobs) - len(found))
    for limit, sizes in zip(limits, fits, strict=True):
        for job, (rows, memory) in sizes.items():
            name = f"job {job}: " if multirun else ""
            if rows:
                print(f"{name}data.micro_batch_size={rows} fits {limit} ({size(memory)})")
            else:
                print(f"{name}not even data.micro_batch_size=1 fits {limit} ({size(memory)})")
    return 0 if all(rows for sizes in fits for rows, _ in sizes.values()) else 1


def _typed(composed: Any) -> schema.Config:
    """Convert a composed configuration to dataclasses."""
    from omegaconf import OmegaConf

    return OmegaConf.to_object(composed)  # type: ignore[return-value]


def _quietly(cfg: schema.Config) -> None:
    """Silence libraries, without network."""
    quiet(replace(cfg, offline=True))  # a plan never uses the network


def looked_up(
    jobs: Sequence[tuple[list[str], schema.Config]], multirun: bool, scratch: Path
) -> list[Job]:
    """Return the jobs, with the artifacts that each builds, finds, or shares with an earlier one.

    Jobs that a grid leaves out are left out here, too.
    """
    found: list[Job] = []
    building: dict[str, int] = {}  # artifact -> the job that builds it
    for number, (overrides, cfg) in enumerate(_progress(jobs, "looking at")):
        if multirun and composition.without_fusion(cfg, overrides):
            continue  # a grid leaves this job out, too
        job = _looked_at(number, overrides, settled(cfg), scratch)
        for name, artifact in job.made.items():
            if not artifact.reused and artifact.kind not in ELSEWHERE:
                owner = building.setdefault(f"{artifact.kind}/{artifact.digest}", number)
                job.owners[name] = owner if owner != number else None
        found.append(job)
    return found


def price(jobs: Sequence[Job], scratch: Path) -> None:
    """Estimate the cost of the jobs; jobs that cost the same are estimated once.

    Such jobs differ in the seed only, or also in a language whose data is assumed to be of the same
    size.
    """
    known: dict[str, Estimate] = {}
    for job in _progress(jobs, "estimating"):
        generic = job.generic
        human = {
            name
            for name in job.todo
            if job.made[name].kind == "translation" and name != job.made[name].digest
        }
        lang = job.sizes or job.cfg.task.lang
        same = replace(job.cfg, seed=0, output_dir="", task=replace(job.cfg.task, lang=lang))
        alike = repr((sorted(generic[name] for name in job.todo - human), same))
        if job.todo and alike not in known:
            known[alike] = _renamed(_estimated(job, scratch), generic)
        if alike in known:
            job.estimate = _renamed(known[alike], {own: name for name, own in generic.items()})
    for job in jobs:
        job.parameters = _trained(job, {other.number: other for other in jobs})


def _estimated(job: Job, scratch: Path) -> Estimate:
    """Return the cost of a job.

    It is counted in this process, or measured in a fresh process, whose peak memory is only its
    own.
    """
    if job.counted:
        return _estimate(job.cfg, scratch, job.todo)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_estimate, job.cfg, scratch, job.todo).result()


def _renamed(estimate: Estimate, names: dict[str, str]) -> Estimate:
    """Return an estimate with other names of artifacts."""
    seconds = {names.get(name, name): value for name, value in estimate.seconds.items()}
    return replace(
        estimate,
        seconds=seconds,
        disk={names.get(name, name): value for name, value in estimate.disk.items()},
    )


def _trained(job: Job, jobs: dict[int, Job]) -> dict[str, int]:
    """Return the parameter counts of a job's last training.

    They are those of the artifact, of this job's estimate, or of the estimate of the job that
    builds it.
    """
    stage = "transfer" if "transfer" in job.made else "finetune"
    if job.made[stage].reused:
        return job.made[stage].info["parameters"]
    maker = job if job.owners[stage] is None else jobs[job.owners[stage]]  # type: ignore[index]
    return maker.estimate.parameters[stage]  # type: ignore[union-attr]


def _progress(jobs: Sequence[Any], doing: str) -> Iterable[Any]:
    """Show on a terminal how many jobs are done."""
    from rich.console import Console
    from rich.progress import track

    return track(
        jobs, description=f"{doing} {len(jobs)} jobs", console=Console(stderr=True), transient=True
    )


def bytes_of(text: str) -> int:
    """Return the bytes of a size like 80GB or 40GiB; 0 for any other text."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT])(i?)B", text)):
        return 0
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kMGT".index(unit) + 1))


def fitting(jobs: Sequence[Job], limit: int, scratch: Path) -> dict[int, tuple[int, float]]:
    """Return each job's largest micro-batch whose estimate stays below `limit` bytes.

    The sizes tried are powers of two, and the whole batch. A tenth of a GPU's memory is left to its
    context and to the allocator's reserve.

    Returns:
        number of the job -> rows (0: not even one row fits), and the bytes that these rows, or one
            row, take.
    """
    found: dict[int, tuple[int, float]] = {}
    known: dict[str, tuple[int, float]] = {}
    for job in jobs:
        if not job.todo:
            continue
        room = limit * (0.9 if job.cfg.trainer.accelerator == "gpu" else 1)
        share = -(-job.cfg.data.batch_size // job.cfg.trainer.devices)
        sizes = [*(1 << n for n in range((share - 1).bit_length())), share]
        alike = repr((sorted(job.todo), replace(job.cfg, seed=0, output_dir="")))
        if alike not in known:
            taken = functools.cache(lambda rows, job=job: _memory(job, rows, scratch))
            count = bisect.bisect_right(sizes, room, key=taken)  # memory grows with the rows
            rows = sizes[count - 1] if count else 0
            known[alike] = rows, taken(rows or 1)
        found[job.number] = known[alike]
    return found


def _memory(job: Job, rows: int, scratch: Path) -> float:
    """Return the bytes that a job takes with this many rows per forward pass."""
    import torch

    cfg = replace(job.cfg, data=replace(job.cfg.data, micro_batch_size=rows))
    try:
        return _estimated(replace(job, cfg=cfg), scratch).memory
    except torch.OutOfMemoryError:  # in a probe
        return math.inf


def settled(cfg: schema.Config) -> schema.Config:
    """Return the configuration with the hardware of this machine and pinned revisions.

    If a model is not on this machine, a GPU is assumed unless the CPU is asked for.
    """
    from flare_exp.experiment import pipeline
    from flare_exp.planning.shapes import is_sketch

    cfg = replace(cfg, trainer=replace(cfg.trainer, enable_progress_bar=False))
    placed = (
        pipeline.with_device_defaults(cfg, cfg.trainer.accelerator != "cpu")
        if is_sketch(cfg)
        else pipeline.resolve_hardware(cfg)
    )
    return pipeline.pinned(placed, required=False)


def _looked_at(number: int, overrides: list[str], cfg: schema.Config, scratch: Path) -> Job:
    """Return one job with its artifacts, downloads and data sizes, without any cost."""
    from flare_exp.config.methods import METHODS
    from flare_exp.experiment import pipeline
    from flare_exp.planning import costs
    from flare_exp.planning.preview import preview

    dry, method = preview(cfg, scratch), METHODS[cfg.method.name]
    made = pipeline.run_stages(dry.run, method)
    reads_mt = dry.untranslated or method.mode is PairingMode.LATENT
    if reads_mt and dry.mt.missing:
        made["mt"] = dry.mt.missing
    names = {dry.run.task.english: "English", cfg.task.lang: "target"}
    assumed = dry.run.task.assumed if cfg.mt.name != "file" else {}  # type: ignore[attr-defined]
    sizes = sorted(
        (names[lang], role, rows) for (lang, role), rows in assumed.items() if lang in names
    )
    return Job(
        number,
        overrides,
        cfg,
        made,
        download=costs.downloads(dry, bool(reads_mt)),
        sizes=repr(sizes) if sizes else "",
        counted=dry.shapes is not None,
    )


def _estimate(cfg: schema.Config, scratch: Path, todo: set[str]) -> Estimate:
    """Estimate the cost of the artifacts `todo`; several devices divide the work."""
    _quietly(cfg)
    from flare_exp.planning import estimates

    # several devices divide the rows of a batch and the work
    devices = cfg.trainer.devices
    share = replace(cfg.data, batch_size=-(-cfg.data.batch_size // devices))
    alone = replace(cfg, data=share, trainer=replace(cfg.trainer, devices=1, strategy=None))
    found = estimates.estimate(alone, scratch, todo)
    together = {*COLUMNS["finetune"], *COLUMNS["transfer"], *COLUMNS["test"]}
    found.seconds = {
        name: taken / devices if name in together else taken
        for name, taken in found.seconds.items()
    }
    return found


# --- output ---------------------------------------------------------------------------------------


def show(jobs: Sequence[Job], left_out: int) -> None:
    """Print the table, the sums and the notes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True)
    for name in ("job", "overrides", *COLUMNS, "trained", "of all", "peak memory", "time"):
        table.add_column(
            name,
            justify="right"
            if name in ("job", "trained", "of all", "peak memory", "time")
            else "left",
        )
    for job in jobs:
        counts = job.parameters
        cells = [
            str(job.number),
            "\n".join(job.overrides) or "(default)",
            *(job.column(name) for name in COLUMNS),
        ]
        cells += [
            f"{counts['trainable']:,}",
            f"{counts['total']:,}",
            size(job.estimate.memory) if job.estimate else "-",
        ]
        table.add_row(*cells, duration(job.seconds))
    console = Console(width=150)
    console.print(table, highlight=False)
    for line in [*sums(jobs), *notes(jobs)]:
        console.print(line, highlight=False, markup=False)
    if left_out:
        console.print(
            f"{left_out} cells left out: they combine fusion=... with a method without fusion",
            highlight=False,
        )


def sums(jobs: Sequence[Job]) -> list[str]:
    """Return lines with the totals over all jobs: artifacts, time, memory, disk and downloads."""
    every = [job._state(name) for job in jobs for name in job.made]
    built, todo = every.count("built"), sum(len(job.todo) for job in jobs)
    shared = sum(len(job.owners) for job in jobs) - todo
    downloads = {repr((job.cfg.model.path, job.cfg.mt.path)): job.download for job in jobs}
    estimates = [(job.todo, job.estimate) for job in jobs if job.estimate]
    disk = sum(made.disk.get(name, 0) for names, made in estimates for name in names)
    return [
        f"jobs: {len(jobs)}, with {todo} artifacts to build, {shared} shared, {built} built",
        f"time: {duration(sum(job.seconds for job in jobs))} one job after the other",
        f"peak memory: {size(max((made.memory for _, made in estimates), default=0))}",
        f"disk: {size(disk)} in {jobs[0].cfg.cache_dir}, and less in the run folders; downloads: "
        f"{size(sum(downloads.values()))}",
    ]


def notes(jobs: Sequence[Job]) -> list[str]:
    """Return the notes on how the numbers were obtained, each once."""
    return list(dict.fromkeys(note for job in jobs if job.estimate for note in job.estimate.notes))


def size(count: float) -> str:
    """Return a number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min"
        if hours
        else f"{minutes} min {rest:02} s"
        if minutes
        else f"{rest} s"
    )
