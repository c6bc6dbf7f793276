"""Plan the jobs of a command line: what each builds, finds, shares and takes."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flare_exp.config import composition, schema
from flare_exp.config.method_schema import MethodConfig
from flare_exp.config.methods import DISTIL, ENSEMBLE, METHODS, members_of
from flare_exp.experiment.runs import quiet
from flare_exp.experiment.tested import name_of_test, stage_of

if TYPE_CHECKING:
    from flare_exp.artifacts import Artifact
    from flare_exp.experiment.context import RunContext
    from flare_exp.planning.costs import Estimate


# column of the table -> names of artifacts (`pipeline.run_stages`); all others are translations
COLUMNS = {
    "model": ("backbone", "mt"),
    "finetune": ("finetune",),
    "translate": (),
    "transfer": ("labels", "transfer"),
    "test": ("english_test", "zero_shot", "test given", "test none", "test", "validation"),
}
# why the jobs of `method.of` are there
NEEDED = {
    ENSEMBLE: f"there for method={ENSEMBLE}, which averages what its members predict",
    DISTIL: f"there for method={DISTIL}, which learns from what its teachers predict",
}
NO_ROOM = (
    "probe: a job ran out of memory, so its time and disk are not known and not counted; "
    "memory=... searches a data.micro_batch_size that fits."
)
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
        download: path and revision -> bytes, of checkpoints that are not on this machine.
        sizes: description of the assumed data; empty if the data is on this machine.
        counted: whether the cost is counted from shapes instead of measured.
        needed: why the job is there, if the command line does not name it; else "".
    """

    number: int
    overrides: list[str]
    cfg: schema.Config
    made: dict[str, Artifact]
    owners: dict[str, int | None] = field(default_factory=dict)
    estimate: Estimate | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    download: dict[tuple[str, str | None], int] = field(default_factory=dict)
    sizes: str = ""
    counted: bool = False
    needed: str = ""

    @property
    def todo(self) -> set[str]:
        """Return the names of the artifacts that this job builds."""
        return {name for name, owner in self.owners.items() if owner is None}

    @property
    def fits(self) -> bool:
        """Return False if the device has less memory than the job takes."""
        return self.estimate is None or self.estimate.memory < math.inf

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

    def state(self, name: str) -> str:
        """Return the state of an artifact as shown in the table."""
        if self.made[name].kind in ELSEWHERE:
            return "here" if self.made[name].reused else "download"
        if self.made[name].reused:
            return "built"
        owner = self.owners[name]
        return "to do" if owner is None else f"shared with job {owner}"


def quietly(cfg: schema.Config) -> None:
    """Silence libraries, without network."""
    quiet(replace(cfg, offline=True))  # a plan never uses the network


def looked_up(
    jobs: Sequence[tuple[list[str], schema.Config]], multirun: bool, scratch: Path
) -> list[Job]:
    """Return the jobs, with the artifacts that each builds, finds, or shares with an earlier one.

    Jobs that a grid leaves out are left out here, too. The members of an ensemble, and the teachers
    of a distillation, are jobs of their own. Averaging probabilities takes no time.
    """
    found: list[Job] = []
    building: dict[str, int] = {}  # artifact -> the job that builds it
    number = 0
    for overrides, cfg in _progress(jobs, "looking at"):
        if multirun and composition.without_fusion(cfg, overrides):
            number += 1  # a grid leaves this job out, too
            continue
        for job in _with_members(overrides, cfg, scratch):
            job.number, number = number, number + 1
            for name, artifact in job.made.items():
                if not artifact.reused and artifact.kind not in ELSEWHERE:
                    owner = building.setdefault(f"{artifact.kind}/{artifact.digest}", job.number)
                    job.owners[name] = owner if owner != job.number else None
            found.append(job)
    return found


def _with_members(overrides: list[str], cfg: schema.Config, scratch: Path) -> list[Job]:
    """Return a job after those of its members or teachers, which build what it asks of them.

    An ensemble is its members alone.
    """
    own = _looked_at(overrides, settled(cfg), scratch)
    method = cfg.method
    if method.name not in NEEDED:
        return [own]
    rest = [o for o in overrides if not o.startswith(("method", "distil"))]
    asked = {(artifact.kind, artifact.digest) for artifact in own.made.values()}
    found = []
    for member in method.of:
        alone = replace(cfg, method=MethodConfig(member, member), distil=schema.DistilConfig())
        validates = method.name == ENSEMBLE and method.weights == "validation"
        job = _looked_at([*rest, f"method={member}"], settled(alone), scratch, validates)
        job.made = {n: a for n, a in job.made.items() if (a.kind, a.digest) in asked}
        job.needed = NEEDED[method.name]
        found.append(job)
    return found if method.name == ENSEMBLE else [*found, own]


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
    own. A job that does not fit the device has no numbers but an infinite memory.
    """
    import torch

    from flare_exp.planning.costs import Estimate

    try:
        if job.counted:
            return _estimate(job.cfg, scratch, job.todo)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_estimate, job.cfg, scratch, job.todo).result()
    except torch.OutOfMemoryError:  # in a probe
        return Estimate([NO_ROOM], memory=math.inf)


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
    builds it; none where that job does not fit the device.
    """
    stage = "transfer" if "transfer" in job.made else "finetune"
    if job.made[stage].reused:
        return job.made[stage].info["parameters"]
    maker = job if job.owners[stage] is None else jobs[job.owners[stage]]  # type: ignore[index]
    return maker.estimate.parameters.get(stage, {})  # type: ignore[union-attr]


def _progress(jobs: Sequence[Any], doing: str) -> Iterable[Any]:
    """Show on a terminal how many jobs are done."""
    from rich.console import Console
    from rich.progress import track

    return track(
        jobs, description=f"{doing} {len(jobs)} jobs", console=Console(stderr=True), transient=True
    )


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
        share = -(-job.cfg.data.batch_size // _processes(job.cfg))
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
    cfg = replace(job.cfg, data=replace(job.cfg.data, micro_batch_size=rows))
    return _estimated(replace(job, cfg=cfg), scratch).memory


def settled(cfg: schema.Config) -> schema.Config:
    """Return the configuration with the hardware of this machine and pinned revisions.

    If a model, or its data, is not on this machine, a GPU is assumed unless the CPU is asked for.
    """
    from flare_exp.experiment import pipeline
    from flare_exp.planning.preview import is_counted

    cfg = replace(cfg, trainer=replace(cfg.trainer, enable_progress_bar=False))
    placed = (
        pipeline.with_device_defaults(cfg, cfg.trainer.accelerator != "cpu")
        if is_counted(cfg)
        else pipeline.hardware_of_training(cfg)
    )
    return pipeline.pinned(placed, required=False)


def _looked_at(
    overrides: list[str], cfg: schema.Config, scratch: Path, validates: bool = False
) -> Job:
    """Return one job with its artifacts, downloads and data sizes, without number or cost.

    Args:
        overrides: its overrides.
        cfg: its settled configuration.
        scratch: folder for what is replaced.
        validates: whether it predicts validation data, too, as a member of an ensemble does.
    """
    from flare_exp.experiment import pipeline
    from flare_exp.planning import costs
    from flare_exp.planning.preview import preview

    dry = preview(cfg, scratch)
    made = pipeline.run_stages(dry.run, members_of(cfg.method))
    if validates:
        made |= _validations(dry.run, made["finetune"])
    made |= {name: mt.missing for name, mt in dry.models_read.items() if mt.missing}
    tested = cfg.task.tested
    targets = {lang: f"target {place}" for place, lang in enumerate(tested)}
    names = {dry.run.task.english: "English", **targets}
    assumed = dry.run.task.assumed if cfg.mt.name != "file" else {}  # type: ignore[attr-defined]
    sizes = sorted(
        (names[lang], role, rows) for (lang, role), rows in assumed.items() if lang in names
    )
    return Job(
        0,
        overrides,
        cfg,
        made,
        download=costs.downloads(dry),
        sizes=repr(sizes) if sizes else "",
        counted=dry.shapes is not None,
    )


def _validations(run: RunContext, english: Artifact) -> dict[str, Artifact]:
    """Return the predictions of validation data by a run's method, and the translations read."""
    from flare_exp.experiment.stages.testing import evaluate
    from flare_exp.experiment.stages.transfer import trained_by

    method, task = METHODS[run.cfg.method.name], run.cfg.task
    trained, below = trained_by(run, english, method)
    made = {
        name_of_test("validation", lang, task.tested): evaluate(
            run, trained, method.mode, below, "validation", lang=lang
        )
        for lang in task.langs
    }
    return {**run.translations, **made}


def _estimate(cfg: schema.Config, scratch: Path, todo: set[str]) -> Estimate:
    """Estimate the cost of the artifacts `todo`; several devices divide the work."""
    quietly(cfg)
    from flare_exp.planning import estimates

    # several devices divide the rows of a batch and the work: one has all rows in more steps
    count, limit = _processes(cfg), cfg.trainer.limit_train_batches
    single: dict[str, Any] = {"devices": 1, "nodes": 1, "strategy": None}
    trainer = replace(cfg.trainer, **single, limit_train_batches=limit and limit * count)
    share = replace(cfg.data, batch_size=-(-cfg.data.batch_size // count))
    alone = replace(cfg, data=share, trainer=trainer)
    found = estimates.estimate(alone, scratch, todo)
    if cfg.trainer.strategy == "fsdp":
        found.notes.append(
            "memory: with trainer.strategy=fsdp it is an upper bound, as if each device had all "
            "weights and moments."
        )
    together = {*COLUMNS["finetune"], *COLUMNS["transfer"], *COLUMNS["test"]}
    found.seconds = {
        name: taken / count if stage_of(name) in together else taken
        for name, taken in found.seconds.items()
    }
    return found


def _processes(cfg: schema.Config) -> int:
    """Return the number of devices of a run, on all of its machines."""
    return cfg.trainer.devices * cfg.trainer.nodes
