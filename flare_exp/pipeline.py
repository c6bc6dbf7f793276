"""The way through: fine-tune on English, translate, transfer, test. The only place that knows the order of the stages.

Each stage (flare_exp.stages) hands over through an artefact, so whatever was finished before is reused: English
fine-tuning happens once per model x task x seed, for every method.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flare_exp import results
from flare_exp.artifacts import Artifact, ArtifactStore
from flare_exp.backbones import quantisation_problem
from flare_exp.checkpoints import MT, make_translator, prepare_backbone
from flare_exp.config import Config
from flare_exp.errors import UserError
from flare_exp.loggers import Tracker
from flare_exp.stages import Stages
from flare_exp.tasks import ROLES, TASKS, Task, fingerprint
from flare_exp.translation import FLAGS, Translator


@dataclass(frozen=True)
class Method:
    """What a method reads (`data.VIEWS`), whether it trains an adapter on the target language, whether that fuses."""

    view: str
    trains: bool
    fuses: bool = False


METHODS = {
    "zero_shot": Method("target", trains=False),
    "translate_test": Method("translated", trains=False),
    "lora": Method("target", trains=True),
    "flare": Method("paired", trains=True, fuses=True),
    "flare_mt": Method("latent", trains=True, fuses=True),
}


def run(cfg: Config, folder: Path) -> dict[str, Any]:
    """Run one configuration and leave everything in `folder`; returns what metrics.json holds.

    Raises:
        UserError: something the user can mend (data, checkpoint, disk, device).
    """
    start = time.perf_counter()
    method = METHODS[cfg.method.name]
    cfg = settle(cfg)
    task = load_task(cfg)
    data = check_data(task, cfg.task.lang)
    store = ArtifactStore(cfg.cache_dir)
    check_translations(make_translator(cfg, task, MT(cfg, store)), task, cfg.task.lang, method)
    wandb_options = {k: v for k, v in asdict(cfg.logger).items() if k != "name"} if cfg.logger.name == "wandb" else None
    with Tracker(folder, asdict(cfg), wandb_options) as tracker:
        backbone = prepare_backbone(cfg, store)
        stages = Stages(cfg, store, task, backbone, tracker)

        made = through(stages, method)
        measured = {
            "task": task.name,
            "lang": cfg.task.lang,
            "model": cfg.model.name,
            "method": cfg.method.name,
            "fusion": cfg.fusion.name if method.fuses else None,
            "mt": cfg.mt.name,
            "seed": cfg.seed,
            "translation": {"noise": cfg.mt.noise, "chrf++": chrf_of(stages.translations)},
            **({"source": asdict(cfg.source)} if method.fuses else {}),
            "test": made["test"].info["metrics"],
            "english": made["english_test"].info["metrics"],
            "zero_shot": made["zero_shot"].info["metrics"],
            "seconds": seconds_of(made, list(stages.translations), time.perf_counter() - start),
        }
        results.leave(folder, measured, made, data)
        tracker.summary({f"{block}/{k}": v for block in ("test", "english", "zero_shot") for k, v in measured[block].items()})
    return measured


def through(stages: Stages, method: Method) -> dict[str, Artifact]:
    """The stages in their order; what each of them leaves, by its name in the provenance."""
    english = stages.finetune_source()
    english_test = stages.test(english, "english")
    zero_shot = stages.test(english, "target")
    adapted = stages.transfer(english, method.view, fuses=method.fuses) if method.trains else None
    tested = stages.test(adapted, method.view, english) if adapted else stages.test(english, method.view)
    return {"backbone": stages.backbone, "finetune": english, "english_test": english_test, "zero_shot": zero_shot,
            **stages.translations, **({"transfer": adapted} if adapted else {}), "test": tested}  # fmt: skip


def seconds_of(made: dict[str, Artifact], translations: list[str], total: float) -> dict[str, float]:
    """What building each stage took, whenever it was built; `total` is this run alone."""
    spent = {stage: made[stage].seconds if stage in made else 0.0 for stage in ("backbone", "finetune", "transfer", "test")}
    return {**spent, "translate": round(sum(made[name].seconds for name in translations), 3), "total": round(total, 3)}


def chrf_of(translations: dict[str, Artifact]) -> dict[str, float | None]:
    """Target language -> chrF++ of the translations into it, the lowest of the splits'; None: human, or without a reference."""
    found: dict[str, float | None] = {}
    for name, artifact in translations.items():
        lang, score = name.rpartition(" ")[2], artifact.info.get("chrf++")
        found[lang] = min((x for x in (found.get(lang), score) if x is not None), default=None)
    return found


def notes(cfg: Config, folder: Path) -> list[str]:
    """What a reader of the table of a finished run has to know."""
    facts = json.loads((folder / "provenance.json").read_text())
    counts, test = facts["parameters"], facts["test"]
    trained = f"{counts['trainable']:,} of {counts['total']:,} parameters trained"
    found = [f"{trained} ({100 * counts['trainable'] / counts['total']:.1f} %)"]
    for name, meaning in (
        ("cut_off", "gold answers were cut off by data.max_length"),
        ("unparsable", "predictions are no answer"),
    ):
        if test[name]:
            found.append(f"{test[name]} of {test['examples']} {meaning}: counted as wrong")
    found += [
        translation_note(name, info)
        for name, info in facts["translations"].items()
        if "chrf++" in info or info["by"] == "machine"
    ]
    if cfg.mt.name == "gold" and METHODS[cfg.method.name].view in ("paired", "translated"):
        found.append("mt=gold: the test sources are human English, so this is an upper bound")
    if cfg.mt.fallback == "gold":
        found.append("mt.fallback=gold: human translations stand in where a file is missing (see provenance.json)")
    if cfg.source.shuffle or cfg.source.empty:
        found.append(f"ablation: source.{'shuffle' if cfg.source.shuffle else 'empty'}=true")
    return found


def translation_note(name: str, info: Mapping[str, Any]) -> str:
    """Quality and losses of one translation, in a line."""
    said = [f"{info['examples']:,} examples"]
    if "chrf++" in info:
        said.append(f"chrF++ {info['chrf++']:.1f}, BLEU {info['bleu']:.1f} against human ones")
    if "answers" in info:
        exact = f" ({info['answers']['exact']:,} as in the human one)" if "exact" in info["answers"] else ""
        said.append(f"{info['answers']['kept']:,} of {info['answers']['of']:,} answers carried over{exact}")
    said += [f"{info[flag]} {flag}" for flag in FLAGS if info.get(flag)]
    return f"{name}: {', '.join(said)}"


def settle(cfg: Config) -> Config:
    """Resolve what depends on the machine: device and precision.

    Raises:
        UserError: a GPU is asked for and there is none, or bitsandbytes and it does not load.
    """
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: torch sees no GPU here; choose trainer=cpu or trainer=auto")
    if cfg.model.quantize or cfg.optim._target_.startswith("bitsandbytes."):
        if problem := quantisation_problem():
            fix = "model.quantize=null optim._target_=torch.optim.AdamW"
            raise UserError(f"bitsandbytes cannot be used here ({problem}); mend its installation, or choose {fix}")
    return placed(cfg, cfg.trainer.accelerator != "cpu" and torch.cuda.is_available())


def placed(cfg: Config, on_gpu: bool) -> Config:
    """The configuration on a kind of device, in the precision that is usual there unless one is given."""
    precision = cfg.trainer.precision or ("bf16-mixed" if on_gpu else "32-true")
    return replace(cfg, trainer=replace(cfg.trainer, accelerator="gpu" if on_gpu else "cpu", precision=precision))


def load_task(cfg: Config) -> Task:
    """The benchmark of a configuration."""
    t = cfg.task
    splits = {role: getattr(t, f"{role}_split") for role in (*ROLES, "english_test")}
    own = {"world_seed": t.world_seed} if t.name.startswith("toy_") else {"data_dir": t.data_dir}
    return TASKS[t.name](splits=splits, limit=t.limit, **own)


def check_data(task: Task, lang: str) -> dict[str, dict[str, Any]]:
    """Load every split before any model; returns sizes and fingerprints for the provenance.

    Raises:
        UserError: unreadable data, or (in a parallel benchmark) test examples among the training examples.
    """
    loaded = {f"{lg}/{role}": task.load(lg, role) for lg, role in ((task.english, "train"), (task.english, "validation"),
              (task.english, "test"), (lang, "test"))}  # fmt: skip
    if task.parallel:
        trained = {(e.id.split("/")[2], e.key) for role in ROLES[:2] for e in loaded[f"{task.english}/{role}"]}
        if leaked := [e.id for e in loaded[f"{lang}/test"] if (e.id.split("/")[2], e.key) in trained]:
            raise UserError(f"{len(leaked)} test examples are translations of training or validation examples, e.g. {leaked[0]}")
    return {name: {"examples": len(rows), "fingerprint": fingerprint(rows)} for name, rows in loaded.items()}


def check_translations(maker: Translator, task: Task, lang: str, method: Method) -> None:
    """Find out before any model is loaded whether the translations that a method needs can be had.

    Raises:
        UserError: they cannot.
    """
    needed = [(task.english, role, lang) for role in ROLES[:2] if method.trains]
    if method.view in ("paired", "translated"):
        needed.append((lang, "test", task.english))
    for own, role, other in needed:
        maker.identity(task.load(own, role), other)
