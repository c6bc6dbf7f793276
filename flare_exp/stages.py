"""The stages of a run: each builds one artefact, or finds it built.

What an artefact depends on is its key: configuration, data and predecessors, never paths or the machine.
"""

from __future__ import annotations

import functools
import importlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
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
from flare_exp.loggers import Tracker
from flare_exp.modules import ClassificationModule
from flare_exp.sources import BackboneSource
from flare_exp.tasks import ROLES, Example, Task, fingerprint
from flare_exp.tiny.pretrain import pretrain
from flare_exp.translation import ParallelTranslator

log = logging.getLogger(__name__)


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
        self._data: dict[str, PairedDataModule] = {}
        # what every trained artefact depends on, besides its data and its predecessor
        self.recipe = {
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
        stage, lora = self.capped(self.cfg.finetune), self.cfg.finetune.tuning == "lora"
        key = {"stage": "finetune", "backbone": self.backbone.digest, "data": pairs_digest(data, "train", "validation"),
               "labels": self.task.labels, "adapter": asdict(self.cfg.adapter) if lora else None, "hyper": asdict(stage),
               **self.recipe}  # fmt: skip

        def build(folder: Path) -> dict[str, Any]:
            backbone, family = self.fresh_backbone()
            model = self.add_adapter(backbone, family) if lora else backbone
            facts = self.fit(model, None, data, stage, folder, "finetune")
            save_model(model, folder / ("adapter" if lora else "model"))
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
            results.write_parquet(folder / "translations.parquet", rows)
            return {"examples": len(rows)}

        artifact = self.store.get("translation", key, build)
        self.translations[f"translation of {examples[0].id.rpartition('/')[0]} into {lang}"] = artifact
        texts = pq.read_table(artifact.path / "translations.parquet", columns=["translation"])["translation"].to_pylist()
        return [replace(e, texts=tuple(t)) for e, t in zip(examples, texts, strict=True)]

    # --- stage 3: transfer ------------------------------------------------------------------------------------------

    def transfer(self, english: Artifact, view: str, fuses: bool) -> Artifact:
        """Train a new adapter (and the head) on English-paired translations, on the frozen English model."""
        data = self.data(view)
        stage = self.capped(self.cfg.transfer)
        fusion = self.fusion_options() if fuses else None
        key = {"stage": "transfer", "english": english.digest, "data": pairs_digest(data, "train", "validation"),
               "fusion": fusion, "adapter": asdict(self.cfg.adapter), "hyper": asdict(stage), **self.recipe}  # fmt: skip

        def build(folder: Path) -> dict[str, Any]:
            backbone, family = self.english_model(english)
            model = self.add_adapter(backbone, family, **(fusion or {}))
            source = BackboneSource(model) if fusion else None
            facts = self.fit(model, source, data, stage, folder, "transfer")
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
            results.write_parquet(
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

    def data(self, view: str) -> PairedDataModule:
        """The benchmark's DataModule, seen as `view` asks (made once)."""
        if view not in self._data:
            self._data[view] = self._make_data(view)
        return self._data[view]

    def _make_data(self, view: str) -> PairedDataModule:
        ablation = {"shuffle_source": self.cfg.source.shuffle, "empty_source": self.cfg.source.empty} if view == "paired" else {}
        return DATAMODULES[type(self.task)](
            self.task, self.cfg.task.lang, self.tokenizer, self.translate, view=view, batch_size=self.cfg.data.batch_size,
            max_length=self.cfg.data.max_length, workers=self.cfg.data.workers, seed=self.cfg.seed, **ablation,
        )  # fmt: skip

    def capped(self, stage: StageConfig) -> StageConfig:
        return replace(stage, epochs=min(stage.epochs, self.cfg.trainer.max_epochs or stage.epochs))

    def fusion_options(self) -> dict[str, Any]:
        """The fusion as arguments of `adapter.add_adapter`."""
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

    def fit(
        self,
        model: nn.Module,
        source: BackboneSource | None,
        data: PairedDataModule,
        stage: StageConfig,
        folder: Path,
        name: str,
    ) -> dict[str, Any]:
        """Train, then put the weights of the best validation epoch back; returns facts for the manifest."""
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
        monitor = f"validation/{self.task.metric}"
        counts = backbones.parameter_counts(model)
        log.info("%s: %s of %s parameters train", name, f"{counts['trainable']:,}", f"{counts['total']:,}")
        module = ClassificationModule(
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
        return {
            "parameters": counts,
            "best": {monitor: round(float(best.best_model_score), 6), "epoch": checkpoint["epoch"]},  # type: ignore[arg-type]
            "truncated": {role: data.dataset(role).truncated for role in ROLES[:2]},
        }

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
