"""The way through: fine-tune on English, translate, transfer, test. The only place that knows the order of the stages.

Each stage hands over through an artefact (flare_exp.artifacts), so whatever was finished before is reused: English
fine-tuning happens once per model x task x seed, for every method.
"""

from __future__ import annotations

import functools
import importlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from flare_exp import adapter, backbones, metrics, results
from flare_exp.artifacts import Artifact, ArtifactStore, digest_of, file_sha256
from flare_exp.config import Config, StageConfig
from flare_exp.data import DATAMODULES, PairedDataModule
from flare_exp.errors import UserError
from flare_exp.loggers import Tracker
from flare_exp.modules import ClassificationModule
from flare_exp.sources import BackboneSource
from flare_exp.tasks import ROLES, TASKS, Example, Task, fingerprint
from flare_exp.tiny.pretrain import pretrain
from flare_exp.translation import ParallelTranslator

log = logging.getLogger(__name__)


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
}


def run(cfg: Config, folder: Path) -> dict[str, Any]:
    """Run one configuration and leave everything in `folder`; returns what metrics.json holds.

    Raises:
        UserError: something the user can mend (data, checkpoint, disk, device).
    """
    start = time.perf_counter()
    method = METHODS[cfg.method.name]
    store = ArtifactStore(cfg.cache_dir)
    cfg = settle(cfg)
    task = load_task(cfg)
    data = check_data(task, cfg.task.lang)
    wandb_options = {k: v for k, v in asdict(cfg.logger).items() if k != "name"} if cfg.logger.name == "wandb" else None
    tracker = Tracker(folder, asdict(cfg), wandb_options)
    try:
        backbone = prepare_backbone(cfg, store)
        stages = Stages(cfg, store, task, backbone, tracker)
        english = stages.finetune_source()
        english_test = stages.test(english, "english")
        zero_shot = stages.test(english, "target")
        adapted = stages.transfer(english, method) if method.trains else english
        tested = stages.test(adapted, method.view, english if method.trains else None)
        seconds = {
            "backbone": backbone.seconds,
            "finetune": english.seconds,
            "translate": round(sum(a.seconds for a in stages.translations.values()), 3),
            "transfer": adapted.seconds if method.trains else 0.0,
            "test": tested.seconds,
            "total": round(time.perf_counter() - start, 3),
        }
        measured = {
            "task": task.name,
            "lang": cfg.task.lang,
            "model": cfg.model.name,
            "method": cfg.method.name,
            "fusion": cfg.fusion.name if method.fuses else None,
            "mt": cfg.mt.name,
            "seed": cfg.seed,
            "test": tested.info["metrics"],
            "english": english_test.info["metrics"],
            "zero_shot": zero_shot.info["metrics"],
            "seconds": seconds,
        }
        if method.fuses:
            measured["source"] = asdict(cfg.source)
        artefacts = {"backbone": backbone, "finetune": english, "english_test": english_test, "zero_shot": zero_shot,
                     **stages.translations, "transfer": adapted, "test": tested}  # fmt: skip
        for name in ("adapter", "model", "english", "logs"):
            shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(adapted.path, folder / "adapter") if method.trains else None
        shutil.copytree(english.path, folder / "english")
        shutil.copyfile(tested.path / "predictions.parquet", folder / "predictions.parquet")
        results.write_json(
            folder / "provenance.json",
            {
                **results.provenance(),
                "data": data,
                "parameters": adapted.info.get("parameters"),
                "training": {"finetune": english.info, "transfer": adapted.info if method.trains else None},
                "seconds": seconds,
                "artefacts": {n: {"kind": a.kind, "digest": a.digest, "reused": a.reused} for n, a in artefacts.items()},
            },
        )
        results.write_json(folder / "metrics.json", measured)  # last: its presence says that the run is complete
        tracker.summary({f"{block}/{k}": v for block in ("test", "english", "zero_shot") for k, v in measured[block].items()})
    except BaseException:
        tracker.close(failed=True)
        raise
    tracker.close()
    return measured


def notes(cfg: Config) -> list[str]:
    """What a reader of the table has to know."""
    found = []
    if cfg.mt.name == "gold" and METHODS[cfg.method.name].view in ("paired", "translated"):
        found.append("mt=gold: the test sources are human English, so this is an upper bound")
    if cfg.source.shuffle or cfg.source.empty:
        found.append(f"ablation: source.{'shuffle' if cfg.source.shuffle else 'empty'}=true")
    return found


def settle(cfg: Config) -> Config:
    """Resolve what depends on the machine: device and precision.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: torch sees no GPU here; choose trainer=cpu or trainer=auto")
    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    trainer = replace(
        cfg.trainer,
        accelerator="gpu" if on_gpu else "cpu",
        precision=cfg.trainer.precision or ("bf16-mixed" if on_gpu else "32-true"),
    )
    return replace(cfg, trainer=trainer)


def load_task(cfg: Config) -> Task:
    """The benchmark of a configuration."""
    t = cfg.task
    splits = {role: getattr(t, f"{role}_split") for role in ROLES}
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


def prepare_backbone(cfg: Config, store: ArtifactStore) -> Artifact:
    """The pre-trained checkpoint: built on first use (model=tiny), or wherever model.path points, with its identity."""
    if cfg.model.path is None:
        options = {**asdict(cfg.model.pretrain), "world_seed": cfg.task.world_seed}  # type: ignore[arg-type]
        return store.get("backbone", {"model": cfg.model.name, **options}, lambda folder: pretrain(folder, **options))
    path = Path(cfg.model.path).expanduser()
    if not backbones.looks_local(cfg.model.path):
        return Artifact(Path(cfg.model.path), "hub", f"{cfg.model.path}@{cfg.model.revision}", {}, 0.0, True)
    backbones.family_of(cfg.model.path)
    # what the weights, the architecture and the tokenizer are; not READMEs, nor where the folder lies
    names = [p for p in sorted(path.iterdir()) if p.suffix in (".json", ".safetensors", ".bin", ".model", ".txt")]
    identity = digest_of({p.name: file_sha256(p) for p in names})[:20]
    return Artifact(path, "checkpoint", identity, {}, 0.0, True)


class Stages:
    """The stages of one run; each returns the artefact it leaves."""

    def __init__(self, cfg: Config, store: ArtifactStore, task: Task, backbone: Artifact, tracker: Tracker):
        self.cfg, self.store, self.task, self.backbone, self.tracker = cfg, store, task, backbone, tracker
        self.tokenizer = backbones.load_tokenizer(str(backbone.path), cfg.model.revision)
        self.translations: dict[str, Artifact] = {}
        # what every trained artefact depends on, besides its data and its predecessor
        self.recipe = {
            "adapter": asdict(cfg.adapter),
            "optim": asdict(cfg.optim),
            "batch_size": cfg.data.batch_size,
            "max_length": cfg.data.max_length,
            "precision": cfg.trainer.precision,
            "clip": cfg.trainer.gradient_clip_val,
            "limit_train_batches": cfg.trainer.limit_train_batches,
            "seed": cfg.seed,
        }

    # --- stage 1: English fine-tuning -------------------------------------------------------------------------------

    def finetune_source(self) -> Artifact:
        """Fine-tune backbone and head on English, with LoRA or in full."""
        data = self.data("english")
        stage = self.capped(self.cfg.finetune)
        key = {"stage": "finetune", "backbone": self.backbone.digest, "data": pairs_digest(data, "train", "validation"),
               "labels": self.task.labels, "hyper": asdict(stage), **self.recipe}  # fmt: skip

        def build(folder: Path) -> dict[str, Any]:
            backbone, family = self.fresh_backbone()
            model = self.add_adapter(backbone, family) if self.cfg.finetune.tuning == "lora" else backbone
            facts = self.fit(ClassificationModule, model, None, data, stage, folder, "finetune")
            kind = "adapter" if self.cfg.finetune.tuning == "lora" else "model"
            save_model(model, folder / kind)
            return facts

        return self.store.get("finetune", key, build)

    # --- stage 2: translation ---------------------------------------------------------------------------------------

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Translations of `examples` into `lang`, made once and kept as an artefact."""
        translator = ParallelTranslator(self.task, self.cfg.mt.noise, self.cfg.mt.seed)
        key = {"task": self.task.name, "data": fingerprint(examples), "lang": lang, "mt": asdict(self.cfg.mt),
               "reference": fingerprint(ParallelTranslator(self.task).translate(examples, lang))}  # fmt: skip

        def build(folder: Path) -> dict[str, Any]:
            made = translator.translate(examples, lang)
            rows = [
                {"id": m.id, "original": list(e.texts), "translation": list(m.texts)} for e, m in zip(examples, made, strict=True)
            ]
            results.write_predictions(folder / "translations.parquet", rows)
            return {"examples": len(rows)}

        artifact = self.store.get("translation", key, build)
        self.translations[f"translation of {examples[0].id.rpartition('/')[0]} into {lang}"] = artifact
        texts = pq.read_table(artifact.path / "translations.parquet", columns=["translation"])["translation"].to_pylist()
        return [replace(e, texts=tuple(t)) for e, t in zip(examples, texts, strict=True)]

    # --- stage 3: transfer ------------------------------------------------------------------------------------------

    def transfer(self, english: Artifact, method: Method) -> Artifact:
        """Train a new adapter (and the head) on English-paired translations, on the frozen English model."""
        data = self.data(method.view)
        stage = self.capped(self.cfg.transfer)
        fusion = self.fusion_options() if method.fuses else None
        key = {"stage": "transfer", "english": english.digest, "data": pairs_digest(data, "train", "validation"),
               "fusion": fusion, "hyper": asdict(stage), **self.recipe}  # fmt: skip

        def build(folder: Path) -> dict[str, Any]:
            backbone, family = self.english_model(english)
            model = self.add_adapter(backbone, family, **(fusion or {}))
            source = BackboneSource(model) if fusion else None
            facts = self.fit(ClassificationModule, model, source, data, stage, folder, "transfer")
            save_model(model, folder / "adapter")
            return facts

        return self.store.get("transfer", key, build)

    # --- stage 4: test ----------------------------------------------------------------------------------------------

    def test(self, trained: Artifact, view: str, english: Artifact | None = None) -> Artifact:
        """Predict and score the test split. `english` is the model that `trained` is an adapter of, if it is one."""
        data = self.data(view)
        key = {"stage": "test", "model": trained.digest, "data": pairs_digest(data, "test"), "max_length": data.max_length,
               "precision": self.cfg.trainer.precision}  # fmt: skip

        def build(folder: Path) -> dict[str, Any]:
            model, source = self.trained_model(trained, english)
            module = ClassificationModule(model, len(self.task.labels), source=source)
            outputs = self.trainer(enable_checkpointing=False, logger=False).predict(module, data)
            logits = {i: row for out in outputs for i, row in zip(out["index"].tolist(), out["logits"], strict=True)}  # type: ignore
            pairs = data.dataset("test").pairs
            predicted = [int(logits[i].argmax()) for i in range(len(pairs))]
            results.write_predictions(
                folder / "predictions.parquet",
                [
                    {
                        "id": p.id,
                        "gold": self.task.labels[p.label],
                        "prediction": self.task.labels[guess],
                        "target": "\n".join(p.target),
                        "source": None if p.source is None else "\n".join(p.source),
                    }
                    for p, guess in zip(pairs, predicted, strict=True)
                ],
            )
            scores = metrics.score(predicted, [p.label for p in pairs], len(self.task.labels))
            return {"metrics": scores, "examples": len(pairs), "truncated": data.dataset("test").truncated}

        return self.store.get("test", key, build)

    # --- what the stages share --------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019 - one Stages per run
    def data(self, view: str) -> PairedDataModule:
        """The benchmark's DataModule, seen as `view` asks."""
        ablation = {"shuffle_source": self.cfg.source.shuffle, "empty_source": self.cfg.source.empty} if view == "paired" else {}
        return DATAMODULES[type(self.task)](
            self.task, self.cfg.task.lang, self.tokenizer, self.translate, view=view, batch_size=self.cfg.data.batch_size,
            max_length=self.cfg.data.max_length, workers=self.cfg.data.workers, seed=self.cfg.seed, **ablation,
        )  # fmt: skip

    def capped(self, stage: StageConfig) -> StageConfig:
        return replace(stage, epochs=min(stage.epochs, self.cfg.trainer.max_epochs or stage.epochs))

    def fusion_options(self) -> dict[str, Any]:
        f = self.cfg.fusion
        options = {k: getattr(f, k) for k in ("query", "heads", "bias") if getattr(f, k) is not None}
        return {
            "fusion": f.name,
            "fusion_options": options,
            "source_layer": f.source_layer,
            "source_state": f.source_state,
        }

    def fresh_backbone(self) -> tuple[PreTrainedModel, backbones.Family]:
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)  # the head is drawn here
        return backbones.load_classifier(str(self.backbone.path), len(self.task.labels), self.cfg.model.revision)

    def add_adapter(self, model: PreTrainedModel, family: backbones.Family, **fusion) -> PeftModel:
        a = self.cfg.adapter
        return adapter.add_adapter(model, family, r=a.r, alpha=a.alpha, dropout=a.dropout, targets=a.targets, **fusion)

    def english_model(self, english: Artifact) -> tuple[PreTrainedModel, backbones.Family]:
        """The English model, its LoRA merged (exact for float backbones)."""
        if (english.path / "model").is_dir():
            return backbones.load_classifier(str(english.path / "model"), len(self.task.labels))
        model, family = self.fresh_backbone()
        return load_adapter(model, english.path / "adapter").merge_and_unload(), family

    def trained_model(self, trained: Artifact, english: Artifact | None) -> tuple[nn.Module, BackboneSource | None]:
        """The model of an artefact in eval mode, with its source stream when it fuses."""
        if english is None:
            return self.english_model(trained)[0].eval(), None
        model = load_adapter(self.english_model(english)[0], trained.path / "adapter")
        fuses = isinstance(config := model.peft_config["default"], adapter.FlareConfig) and config.fusion is not None
        return model.eval(), BackboneSource(model) if fuses else None

    def trainer(self, **options) -> pl.Trainer:
        t = self.cfg.trainer
        machine = {k: getattr(t, k) for k in ("accelerator", "devices", "precision", "enable_progress_bar")}
        return pl.Trainer(**machine, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=10, **options)

    def fit(self, module_class: Callable[..., ClassificationModule], model: nn.Module, source: BackboneSource | None,
            data: PairedDataModule, stage: StageConfig, folder: Path, name: str) -> dict[str, Any]:  # fmt: skip
        """Train, then put the weights of the best validation epoch back; returns facts for the manifest."""
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
        monitor = f"validation/{self.task.metric}"
        counts = backbones.parameter_counts(model)
        log.info("%s: %s of %s parameters train", name, f"{counts['trainable']:,}", f"{counts['total']:,}")
        module = module_class(
            model, len(self.task.labels), source=source, optimizer=self.optimizer(stage.lr), warmup=stage.warmup
        )
        best = ModelCheckpoint(dirpath=folder / "checkpoints", monitor=monitor, mode="max", save_weights_only=True)
        trainer = self.trainer(
            max_epochs=stage.epochs,
            callbacks=[best],
            logger=self.tracker.loggers(name, folder),
            gradient_clip_val=self.cfg.trainer.gradient_clip_val,
            limit_train_batches=self.cfg.trainer.limit_train_batches,
        )
        trainer.fit(module, data)
        checkpoint = torch.load(best.best_model_path, weights_only=True, map_location="cpu")
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        shutil.rmtree(folder / "checkpoints")
        return {"parameters": counts, "best": {monitor: round(float(best.best_model_score), 6), "epoch": checkpoint["epoch"]},  # type: ignore[arg-type]
                "truncated": {role: data.dataset(role).truncated for role in ROLES[:2]}}  # fmt: skip

    def optimizer(self, lr: float) -> Callable[..., torch.optim.Optimizer]:
        options = {k: v for k, v in asdict(self.cfg.optim).items() if not k.startswith("_")}
        module, _, name = self.cfg.optim._target_.rpartition(".")
        return functools.partial(getattr(importlib.import_module(module), name), lr=lr, **options)


def pairs_digest(data: PairedDataModule, *roles: str) -> str:
    """Identity of what a model is trained or tested on."""
    return digest_of([[p.id, p.target, p.source, p.label] for role in roles for p in data.dataset(role).pairs])[:20]


def save_model(model: nn.Module, folder: Path) -> None:
    """Save an adapter in PEFT's format, or a full model in transformers' format; safetensors either way."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.save_pretrained(folder)  # type: ignore[operator]


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on its base model."""
    return PeftModel.from_pretrained(model, str(folder))
