"""Run the stages: fine-tune on English, test that model, transfer, test.

`run_stages` has their order. Translation has no place of its own in it: `PairedDataModule.pairs`
asks for one when a stage first needs it. Each stage (flare_exp.experiment.stages) hands over
through an artifact, so whatever was finished before is reused: English fine-tuning happens once per
model x task x seed, for every method.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from flare_exp import code, hub
from flare_exp.artifacts import Artifact, ArtifactStore
from flare_exp.config.composition import systems_of
from flare_exp.config.methods import DISTIL, ENSEMBLE, Method, fuses, members_of
from flare_exp.config.options import flat
from flare_exp.config.schema import Config
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.errors import UserError
from flare_exp.experiment import launch, results, run_state
from flare_exp.experiment.building import ModelBuilder
from flare_exp.experiment.checkpoints import MT, make_translator, prepare_backbone
from flare_exp.experiment.context import (
    RunContext,
    family_of_model,
    make_preprocessor,
    make_source_preprocessor,
    task_type_of,
)
from flare_exp.experiment.data_checks import check_data, check_every_translation
from flare_exp.experiment.stages.distillation import check_texts, distil
from flare_exp.experiment.stages.ensemble import ensemble, test_passes
from flare_exp.experiment.stages.finetune import finetune
from flare_exp.experiment.stages.testing import evaluate
from flare_exp.experiment.stages.transfer import trained_by
from flare_exp.experiment.stages.translation import translate
from flare_exp.experiment.tested import name_of_test, scores_of, stage_of, tests_of
from flare_exp.models.backbones import quantization_problem
from flare_exp.tasks import CUSTOM, ROLES, Task, task_class
from flare_exp.training.distributed import SINGLE_PROCESS, DistributedContext
from flare_exp.training.tracking import Tracker


def run(cfg: Config, folder: Path, distributed: DistributedContext | None = None) -> dict[str, Any]:
    """Run one configuration and leave everything in `folder`.

    With several devices a process is started for each of the others.

    Args:
        distributed: given if this process is one of those others; it writes nothing.

    Returns:
        what metrics.json holds.

    Raises:
        UserError: something that the user can correct (data, checkpoint, disk, device).
    """
    start = time.perf_counter()
    methods = members_of(cfg.method)
    cfg = pinned(hardware_of_training(cfg))
    task = load_task(cfg)
    code.remember(type(task).__module__)
    task_type_of(cfg, task, family_of_model(cfg))  # what the model cannot do is refused early
    data = check_data(task, *cfg.task.tested)
    store = ArtifactStore(cfg.cache_dir)
    makers = [make_translator(own, task, MT(own, store)) for own in (cfg, *pinned_systems(cfg))]
    check_every_translation(cfg, task, *makers)
    check_texts(cfg, task)
    with (
        launch.launch_workers(cfg, folder)
        if distributed is None
        else nullcontext(distributed) as distributed
    ):
        return _execute_stages(cfg, folder, methods, task, data, distributed, start)


def _execute_stages(
    cfg: Config,
    folder: Path,
    methods: Mapping[str, Method],
    task: Task,
    data: Mapping[str, Any],
    distributed: DistributedContext,
    start: float,
) -> dict[str, Any]:
    """Go through the stages, and write what they leave (rank 0)."""
    store = ArtifactStore(cfg.cache_dir, distributed)
    with Tracker(
        folder, flat(asdict(cfg)), wandb_options(cfg) if distributed.is_main else None
    ) as tracker:
        backbone = prepare_backbone(cfg, store)
        context = make_context(cfg, store, task, backbone, tracker, distributed)

        made = run_stages(context, methods)
        reads_source = any(method.mode.pairs for method in methods.values())
        if not distributed.is_main:
            return {}
        scores = scores_of(cfg.task, made)
        measured = {
            "task": task.name,
            "lang": cfg.task.lang,
            "model": cfg.model.name,
            "method": cfg.method.name,
            **({"of": cfg.method.of} if cfg.method.of else {}),
            "fusion": cfg.fusion.name if fuses(cfg.method) else None,
            "mt": cfg.mt.name,
            "seed": cfg.seed,
            **own_facts(cfg, task),
            "translation": {"noise": cfg.mt.noise, "chrf++": chrf_of(context.translations)},
            **({"source": asdict(cfg.source)} if reads_source else {}),
            "test": scores.pop("test"),
            "english": made["english_test"].info["metrics"],
            **scores,
            "seconds": seconds_of(made, list(context.translations), time.perf_counter() - start),
        }
        # before the results: a folder that has them is never taken up again
        tracker.summary(summary_of(measured) | selected(made))
        tests = tests_of(made, "test", cfg.task.tested)
        run_state.check_alone(folder)
        results.write_outputs(folder, measured, made, tests, data, task.metric)
    return measured


def make_context(
    cfg: Config,
    store: ArtifactStore,
    task: Task,
    backbone: Artifact,
    tracker: Tracker,
    distributed: DistributedContext = SINGLE_PROCESS,
) -> RunContext:
    """Make what the stages of a settled configuration share."""
    path, mt = str(backbone.path), MT(cfg, store)
    task_type = task_type_of(cfg, task, family_of_model(cfg))
    run = RunContext(
        cfg,
        store,
        task,
        backbone,
        models=ModelBuilder(cfg, task, backbone, task_type),
        preprocessor=make_preprocessor(cfg, task, path, task_type),
        mt=mt,
        translator=make_translator(cfg, task, mt),
        translate=translate,
        make_source_preprocessor=make_source_preprocessor,
        tracker=tracker,
        distributed=distributed,
    )
    run.systems = [with_system(run, MT(own, store), own) for own in pinned_systems(cfg)]
    return run


def context_of(cfg: Config, folder: Path) -> RunContext:
    """Make the context of a finished run, which reads texts as the run did; nothing is tracked."""
    cfg = resolve_hardware(cfg)
    store = ArtifactStore(cfg.cache_dir)
    task, backbone = load_task(cfg), prepare_backbone(cfg, store)
    return make_context(cfg, store, task, backbone, Tracker(folder, {}))


def with_system(run: RunContext, mt: MT, cfg: Config) -> RunContext:
    """Return a run that translates by another system, and notes its translations with the rest.

    Args:
        run: the run.
        mt: the translation model.
        cfg: the configuration of the run with that system (`pinned_systems`).
    """
    translator = make_translator(cfg, run.task, mt)
    return replace(
        run, cfg=cfg, store=mt.store, mt=mt, translator=translator, system=cfg.mt.name, systems=()
    )


def run_stages(run: RunContext, methods: Mapping[str, Method]) -> dict[str, Artifact]:
    """Go through the stages in their order.

    Args:
        methods: name -> the run's method, or each member of an ensemble.

    Returns:
        name in the provenance -> the artifact that a stage leaves.
    """
    english, langs = finetune(run), run.cfg.task.tested

    made = {
        "backbone": run.backbone,
        "finetune": english,
        "english_test": evaluate(run, english, PairingMode.ENGLISH),
        **{
            name_of_test("zero_shot", lang, langs): evaluate(
                run, english, PairingMode.TARGET, lang=lang
            )
            for lang in langs
        },
    }
    if run.cfg.method.name == ENSEMBLE:
        tested = ensemble(run, english, methods)
    elif run.cfg.method.name == DISTIL:
        tested = distil(run, english, methods)
    else:
        (method,) = methods.values()
        trained, below = trained_by(run, english, method)
        tested = {"transfer": trained} if method.trains else {}
        for lang in langs:
            passes = test_passes(run, trained, below, method, lang)
            tested |= {name_of_test(name, lang, langs): test for name, test in passes.items()}
    return {**made, **run.translations, **tested}


def own_facts(cfg: Config, task: Task) -> dict[str, Any]:
    """Return what only the description of a user's data says, for reports."""
    if cfg.task.name != CUSTOM:
        return {}
    return {"metric": task.metric, "labels": list(task.labels)}


def wandb_options(cfg: Config) -> dict[str, Any] | None:
    """Arguments of `wandb.init`; None: W&B is not asked for."""
    if cfg.logger.name != "wandb":
        return None
    given = asdict(cfg.logger)
    mode = given["mode"] or ("offline" if cfg.offline else None)
    return {
        **{k: given[k] for k in ("project", "entity", "group", "job_type", "tags")},
        "name": given["run_name"],
        "mode": mode,
    }


def summary_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """Return `<block>/<metric>` of the scores, and `<block>/<language>/<metric>` of several."""
    own = {f"/{lang}": blocks for lang, blocks in measured.get("languages", {}).items()}
    return {
        f"{block}{place}/{name}": value
        for place, blocks in {"": measured, **own}.items()
        for block in ("test", "english", "zero_shot")
        for name, value in blocks.get(block, {}).items()
    }


def selected(made: Mapping[str, Artifact]) -> dict[str, float]:
    """Return `<stage>/validation/<metric>` of the weights that each training kept."""
    kept = {stage: made[stage].info for stage in ("finetune", "transfer") if stage in made}
    return {
        f"{stage}/{key}": value
        for stage, info in kept.items()
        for key, value in (info.get("best") or info["last"]).items()
        if key.startswith("validation/")
    }


def seconds_of(
    made: dict[str, Artifact], translations: list[str], total: float
) -> dict[str, float]:
    """Return the seconds that building each stage took, whenever it was built.

    The stages of an ensemble are those of all its members. `total` is this run alone.
    """
    spent = {
        stage: sum((a.seconds for name, a in made.items() if stage_of(name) == stage), 0.0)
        for stage in ("backbone", "finetune", "transfer", "test")
    }
    return {
        **spent,
        "translate": round(sum(made[name].seconds for name in translations), 3),
        "total": round(total, 3),
    }


def chrf_of(translations: dict[str, Artifact]) -> dict[str, float | None]:
    """Return target language -> chrF++ of the translations into it, the lowest of the splits'.

    Those of a further system (`source.systems`) go by "<language> by <system>". None: they are
    human, or there is no reference.
    """
    found: dict[str, float | None] = {}
    for name, artifact in translations.items():
        lang, score = name.partition(" into ")[2], artifact.info.get("chrf++")
        found[lang] = min((x for x in (found.get(lang), score) if x is not None), default=None)
    return found


def resolve_hardware(cfg: Config) -> Config:
    """Resolve what depends on the machine: device and precision.

    Raises:
        UserError: more GPUs are asked for than there are, or 4-bit weights and bitsandbytes does
            not load.
    """
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator=gpu: torch sees no GPU here; choose trainer=cpu or trainer=auto, "
            "or for a finished run trainer.accelerator=cpu"
        )
    if cfg.model.quantize:
        _check_bitsandbytes()
    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu and (there := torch.cuda.device_count()) < cfg.trainer.devices:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices}: torch sees {there} GPU{'s' * (there > 1)} "
            "here; "
            f"choose trainer.devices={there} or trainer=ddp_cpu"
        )
    return with_device_defaults(cfg, on_gpu)


def hardware_of_training(cfg: Config) -> Config:
    """Resolve what depends on the machine, for a run that trains.

    Raises:
        UserError: as `resolve_hardware`, or the optimizer's bitsandbytes does not load, or the
            device has no such precision. Lightning would replace it, and the key of what is
            trained would name another one.
    """
    if cfg.optim._target_.startswith("bitsandbytes."):
        _check_bitsandbytes()
    cfg = resolve_hardware(cfg)
    if cfg.trainer.accelerator == "cpu" and cfg.trainer.precision == "16-mixed":
        raise UserError(
            "trainer.precision=16-mixed: a CPU does not train in it; choose "
            "trainer.precision=bf16-mixed"
        )
    return cfg


def _check_bitsandbytes() -> None:
    if problem := quantization_problem():
        raise UserError(
            f"bitsandbytes cannot be used here ({problem}); mend its installation, or "
            "choose model.quantize=null optim._target_=torch.optim.AdamW"
        )


def with_device_defaults(cfg: Config, on_gpu: bool) -> Config:
    """Put a configuration on a kind of device, in the usual precision unless one is given."""
    precision = cfg.trainer.precision or ("bf16-mixed" if on_gpu else "32-true")
    return replace(
        cfg,
        trainer=replace(cfg.trainer, accelerator="gpu" if on_gpu else "cpu", precision=precision),
    )


def pinned(cfg: Config, required: bool = True) -> Config:
    """Replace the revisions of hub checkpoints by commits, so that a run reads one commit.

    Args:
        required: raise where a commit is not known; otherwise leave that revision as it is.

    Raises:
        UserError: a commit is not known, without network or because there is no such checkpoint.
    """
    read: dict[str, Any] = {"model": cfg.model}
    if any(m.translates for m in members_of(cfg.method).values()) and cfg.mt.kind == "model":
        read["mt"] = cfg.mt
    found: dict[str, Any] = {}
    for name, part in read.items():
        if part.path is None or hub.looks_local(part.path):
            continue
        try:
            found[name] = replace(part, revision=hub.commit_of(part.path, part.revision))
        except Exception as error:  # the hub's libraries raise many kinds
            if required:
                raise UserError(
                    f"{name}.path={part.path}: the commit of {part.revision or 'main'} is not "
                    f"known ({hub.reason(error)}); "
                    "without network, fetch it beforehand (python -m flare_exp prefetch)"
                ) from error
    return replace(cfg, **found)


def pinned_systems(cfg: Config, required: bool = True) -> list[Config]:
    """Return the configuration with each of `source.systems` in the place of `mt`, pinned."""
    return [pinned(own, required) for own in systems_of(cfg)]


def load_task(cfg: Config) -> Task:
    """Make the benchmark of a configuration, or the data set that it describes."""
    t = cfg.task
    splits = {role: getattr(t, f"{role}_split") for role in (*ROLES, "english_test")}
    if t.name == CUSTOM:
        return task_class(t.name, t.spec)(splits=splits, limit=t.limit)
    own = {"world_seed": t.world_seed} if t.name.startswith("toy_") else {"data_dir": t.data_dir}
    # an option of one benchmark alone is an argument of its class
    own |= {f.name: getattr(t, f.name) for f in fields(t) if t.name in f.metadata.get("only", ())}
    return task_class(t.name)(splits=splits, limit=t.limit, **own)
