"""The stages of a run: each builds one artefact, or finds it built.

What an artefact depends on is its key: configuration, data and predecessors, never paths or the machine.
"""

from __future__ import annotations

import functools
import importlib
import logging
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import nn

from flare_exp.artifacts import Artifact, ArtifactStore, digest_of
from flare_exp.code import code_of
from flare_exp.config.schema import FUSION_OPTIONS, Config, StageConfig
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.generation import PromptForm
from flare_exp.data.preprocessing import Form, SourceTextForm
from flare_exp.data.preprocessors import FORM_CLASSES
from flare_exp.data.source_cache import cached_states
from flare_exp.errors import UserError
from flare_exp.experiment.checkpoints import MT, make_translator
from flare_exp.flare import adapter
from flare_exp.flare.source_encoders import BackboneSource, MTSource, Source
from flare_exp.languages import language
from flare_exp.models import backbones
from flare_exp.models.backbones import Backbone
from flare_exp.tasks import Example, Task, fingerprint, metrics
from flare_exp.tasks.base import read_answers
from flare_exp.training.checkpointing import (
    Interruptible,
    StepCheckpoint,
    continued_curves,
    steps_kept,
)
from flare_exp.training.distributed import ALONE, Team, gathered
from flare_exp.training.divergence import NotFinite, StopIfNotFinite
from flare_exp.training.modules import (
    ClassificationModule,
    Decoding,
    FusionModule,
    GenerationModule,
    Score,
    SpanModule,
)
from flare_exp.training.progress import StageProgress
from flare_exp.training.tracking import Tracker
from flare_exp.translation.noise import corrupt_examples
from flare_exp.translation.translators import (
    Flagged,
    MachineTranslator,
    ParallelTranslator,
    has_span,
)
from flare_exp.utils import files, signals
from flare_exp.utils.finite import check_finite

log = logging.getLogger(__name__)


class Stages:
    """The stages of one run; each returns the artefact it leaves.

    In a `team` every process goes through them; they train and predict together, and the leader writes.
    """

    def __init__(
        self,
        cfg: Config,
        store: ArtifactStore,
        task: Task,
        backbone: Artifact,
        tracker: Tracker,
        team: Team = ALONE,
    ):
        self.cfg, self.store, self.task, self.backbone, self.tracker = (
            cfg,
            store,
            task,
            backbone,
            tracker,
        )
        self.team = team
        self.mt = MT(cfg, store)
        self.translator = make_translator(cfg, task, self.mt)
        self.form_name = self._form_name()
        self.form = self._form()
        self.translations: dict[str, Artifact] = {}
        self._data: dict[str, PairedDataModule] = {}
        family = backbones.family_of(str(self.backbone.path), cfg.model.revision)
        prompted = self.form_name == "prompt"
        # what training (which selects on validation) and testing depend on, besides data and model
        self.reading = {
            "form": self.form_name,
            "max_length": self.form.max_length,
            "truncation_side": cfg.data.truncation_side,
            "doc_stride": self.stride,
            "prompt": task.prompt if prompted else None,
            "task": [task.fields, task.labels, task.metric],
            "answers": asdict(replace(self.decoding, cache="")) if prompted else None,
            "max_answer_length": cfg.task.max_answer_length if self.form_name == "span" else None,
            "family": asdict(family),
            "attention": cfg.model.attention or family.attention[0],
            "precision": cfg.trainer.precision,
            "weights": asdict(self.precision) if cfg.model.quantize else cfg.model.dtype,
            "code": code_of("model", task=type(task).__module__),
        }
        # what training depends on besides
        self.recipe = {
            **self.reading,
            "optim": {
                name: value for name, value in asdict(cfg.optim).items() if name != "_partial_"
            },
            "batch_size": cfg.data.batch_size,
            "select": cfg.task.select,
            "clip": cfg.trainer.gradient_clip_val,
            "limit_train_batches": cfg.trainer.limit_train_batches,
            "seed": cfg.seed,
        }

    # --- stage 1: English fine-tuning -------------------------------------------------------------------------------

    def finetune_source(self) -> Artifact:
        """Fine-tune backbone and head on English, with LoRA or in full."""
        data = self.data("english")
        stage, lora = self.capped(self.cfg.finetune), self.cfg.finetune.tuning == "lora"
        key = {
            "stage": "finetune",
            "backbone": self.backbone.digest,
            "data": pairs_digest(data, *self.task.training_roles),
            "adapter": asdict(self.cfg.adapter) if lora else None,
            "hyper": asdict(stage),
            **self.recipe,
        }

        def build(folder: Path) -> dict[str, Any]:
            backbone = self.fresh_backbone()
            model = self.add_adapter(backbone) if lora else backbone.model
            return self.fit(
                model, None, data, stage, folder, "finetune", "adapter" if lora else "model"
            )

        return self.store.get("finetune", key, build, together=True, resumable=True)

    # --- stage 2: translation ---------------------------------------------------------------------------------------

    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Translations of `examples` into `lang`, made once and kept as an artefact."""
        identity, o = self.translator.identity(examples, lang), self.cfg.mt
        artifact = self._kept_translation(
            {
                "task": self.task.name,
                "data": fingerprint(examples),
                "lang": lang,
                **identity,
                "code": code_of("translation"),
            },
            examples,
            lang,
            lambda: self.translator.flagged(examples, lang),
            identity,
        )
        made = read_translation(artifact, examples)
        if o.noise:
            errors = {
                "of": artifact.digest,
                "noise": o.noise,
                "errors": o.errors,
                "noise_seed": o.seed,
            }
            noisy = corrupt_examples(made, lang, o.noise, o.errors, o.seed, self.task.context)
            key = {**errors, "code": code_of("noise", "translation")}
            keep = functools.partial(self._kept_translation, key, examples, lang)
            artifact = keep(lambda: [(e, {}) for e in noisy], {**identity, **errors})
            made = noisy
        self.translations.setdefault(
            f"translation of {examples[0].id.rpartition('/')[0]} into {lang}", artifact
        )
        return made

    def _kept_translation(
        self,
        key: Mapping[str, Any],
        examples: Sequence[Example],
        lang: str,
        make: Callable[[], Flagged],
        facts: Mapping[str, Any],
    ) -> Artifact:
        def build(folder: Path) -> dict[str, Any]:
            made = make()
            rows = [
                {
                    "id": m.id,
                    "original": list(e.texts),
                    "translation": list(m.texts),
                    "answers": {
                        "text": [a.text for a in m.answers],
                        "answer_start": [a.start for a in m.answers],
                    },
                    **flags,
                }
                for e, (m, flags) in zip(examples, made, strict=True)
            ]
            files.write_parquet(folder / "translations.parquet", rows)
            return {"examples": len(rows), **facts, **quality(self.task, examples, made, lang)}

        return self.store.get("translation", key, build)

    # --- stage 3: transfer ------------------------------------------------------------------------------------------

    def transfer(self, english: Artifact, view: str, fuses: bool) -> Artifact:
        """Train a new adapter (and the head) on English-paired translations, on the frozen English model."""
        data = self.data(view)
        stage = self.capped(self.cfg.transfer)
        fusion = self.fusion_options(view) if fuses else None
        key = {
            "stage": "transfer",
            "english": english.digest,
            "data": pairs_digest(data, *self.task.training_roles),
            "fusion": fusion and {**fusion, "code": code_of("fusion")},
            "adapter": asdict(self.cfg.adapter),
            "hyper": asdict(stage),
            **self.recipe,
        }
        if fusion and self.cfg.source.cache != "off" and self.cfg.source.dtype:
            key["states"] = self.cfg.source.dtype  # rounded
        if view == "latent":
            assert data.source_form
            key["encoder"] = {**self.mt.encoder_identity, "max_length": data.source_form.max_length}

        def build(folder: Path) -> dict[str, Any]:
            self.mt.release()  # its translations are made
            model = self.add_adapter(self.english_model(english), **(fusion or {}))
            source = self.source(model) if fusion else None
            if source and self.cfg.source.cache != "off":
                self.cache_states(
                    source, data, self.mt.encoder_identity if view == "latent" else english.digest
                )
            facts = self.fit(model, source, data, stage, folder, "transfer", "adapter")
            data.drop_states()
            return facts

        return self.store.get("transfer", key, build, together=True, resumable=True)

    # --- stage 4: test ----------------------------------------------------------------------------------------------

    def test(self, trained: Artifact, view: str, english: Artifact | None = None) -> Artifact:
        """Predict and score the test split. `english` is the model that `trained` is an adapter of, if it is one."""
        data, back = self.data(view), self.answers_back(view)
        key = {
            "stage": "test",
            "model": trained.digest,
            "data": pairs_digest(data, "test"),
            **self.reading,
        }

        if back:
            key["back"] = {
                **back.texts_identity(self.task.english, self.cfg.task.lang),
                "code": code_of("translation"),
            }

        def build(folder: Path) -> dict[str, Any]:
            self.mt.release()
            module = self.module(*self.trained_model(trained, english))
            trainer = self.trainer(
                "test", [Interruptible(self.team)], enable_checkpointing=False, logger=False
            )
            outputs = trainer.predict(module, data)
            found = gathered({row: text for output in outputs for row, text in output.items()})  # type: ignore[union-attr]
            if not self.team.leads:
                return {}
            dataset = data.dataset("test")
            said = dataset.texts(found)
            predicted = back.texts(said, self.task.english, self.cfg.task.lang) if back else said
            gold = [self.task.gold(p.scored) for p in dataset.pairs]
            rows = [
                {
                    "id": p.target.id,
                    "gold": g[0] if self.task.labels else list(g),
                    "prediction": text,
                    **({"english_prediction": english_text} if back else {}),
                    "target": "\n".join(p.target.texts),
                    "source": None if p.source is None else "\n".join(p.source.texts),
                }
                for p, text, english_text, g in zip(
                    dataset.pairs, predicted, said, gold, strict=True
                )
            ]
            files.write_parquet(folder / "predictions.parquet", rows)
            return {
                "metrics": self.task.score(predicted, [p.scored for p in dataset.pairs]),
                "examples": len(rows),
                "truncated": dataset.truncated,
                "cut_off": dataset.cut_off,
                "unparsable": sum(
                    text not in self.task.labels if self.task.labels else not text
                    for text in predicted
                ),
            }

        return self.store.get("test", key, build, together=True)

    def answers_back(self, view: str) -> MachineTranslator | None:
        """What translates answers that are predicted in English back into the target language, where they must be: a translation
        model's English test examples have no answers to compare with."""
        asks = view == "translated" and not self.task.labels
        return self.translator if asks and isinstance(self.translator, MachineTranslator) else None

    # --- what the stages share --------------------------------------------------------------------------------------

    def data(self, view: str) -> PairedDataModule:
        """The benchmark's DataModule, seen as `view` asks (made once)."""
        if view not in self._data:
            self._data[view] = self._make_data(view)
        return self._data[view]

    def _make_data(self, view: str) -> PairedDataModule:
        fuses = view in ("paired", "latent")
        options: dict[str, Any] = {"scores_originals": self.answers_back(view) is not None}
        if fuses:
            options |= {
                "shuffle_source": self.cfg.source.shuffle,
                "empty_source": self.cfg.source.empty,
            }
        return PairedDataModule(
            self.task,
            self.cfg.task.lang,
            self.form,
            self.translate,
            source_form=self._mt_form() if view == "latent" else None,
            view=view,
            batch_size=self.cfg.data.batch_size,
            micro_batch_size=self.cfg.data.micro_batch_size,
            workers=self.cfg.data.workers,
            seed=self.cfg.seed,
            share=(self.team.rank, self.team.size),
            **options,
        )

    def _mt_form(self) -> SourceTextForm:
        """How the translation model's encoder reads the target text: padded on the side where the backbone's texts are."""
        tokenizer, own = self.mt.tokenizer, self.form.tokenizer
        tokenizer.src_lang = language(self.cfg.task.lang).flores
        tokenizer.padding_side, tokenizer.truncation_side = own.padding_side, own.truncation_side
        longest = min(self.cfg.data.max_length, self.mt.encoder_config.max_position_embeddings)
        return SourceTextForm(self.task, tokenizer, longest, self.form.order)

    def _form_name(self) -> str:
        """How this backbone takes this task: by a head where the family has one, else as a prompt (task.form=auto)."""
        path = str(self.backbone.path)
        family = backbones.family_of(path, self.cfg.model.revision)
        name = backbones.choose_form(
            family, "label" if self.task.labels else "span", self.cfg.task.form, path
        )
        if self.cfg.decode.name == "generate" and name != "prompt":
            raise UserError(
                f"decode=generate: {self.cfg.model.name} answers {self.task.name} by a head, which writes nothing"
            )
        return name

    def _form(self) -> Form:
        path, revision = str(self.backbone.path), self.cfg.model.revision
        longest, wanted = backbones.longest_input(path, revision), self.wanted_length
        if longest is not None and longest < wanted:
            log.info(
                "texts of %d tokens are asked for: this model reads %d at most", wanted, longest
            )
            wanted = longest
        return self._form_of(backbones.load_tokenizer(path, revision), wanted)

    def _form_of(self, tokenizer: Any, longest: int) -> Form:
        tokenizer.truncation_side = self.cfg.data.truncation_side
        options = {"stride": self.stride} if self.form_name == "span" else {}
        return FORM_CLASSES[self.form_name](self.task, tokenizer, longest, **options)

    @property
    def stride(self) -> int | None:
        """Tokens that two windows share; None: texts are not read in windows."""
        return self.cfg.task.doc_stride if self.form_name == "span" else None

    @property
    def wanted_length(self) -> int:
        """The longest text, or the longest window, that is asked for."""
        window = self.cfg.task.window if self.stride is not None else None
        return window or self.cfg.data.max_length

    @property
    def precision(self) -> backbones.Precision:
        m = self.cfg.model
        return backbones.Precision(m.dtype, m.quantize, m.double_quant, m.compute_dtype)

    @property
    def decoding(self) -> Decoding:
        d = self.cfg.decode
        scores = d.name == "score" and self.task.labels
        return (
            Decoding(self.task.labels)
            if scores
            else Decoding((), d.beams, d.max_new_tokens, d.cache)
        )

    def module(self, model: nn.Module, source: Source | None, **training) -> FusionModule:
        """The LightningModule of this form."""
        if self.form_name == "label":
            return ClassificationModule(model, self.task.labels, source=source, **training)
        if self.form_name == "span":
            return SpanModule(model, self.cfg.task.max_answer_length, source=source, **training)
        assert isinstance(self.form, PromptForm)
        options = {"rows": self.cfg.data.micro_batch_size, "source": source, **training}
        return GenerationModule(
            model, self.form.tokenizer, self.form.answer, self.decoding, **options
        )

    def capped(self, stage: StageConfig) -> StageConfig:
        return replace(stage, epochs=min(stage.epochs, self.cfg.trainer.max_epochs or stage.epochs))

    def fusion_options(self, view: str) -> dict[str, Any]:
        """The fusion as arguments of `adapter.add_adapter`."""
        f = self.cfg.fusion
        options = {k: getattr(f, k) for k in FUSION_OPTIONS if getattr(f, k) is not None}
        common = {"fusion": f.name, "fusion_options": options, "answer_source": f.answer_source}
        if view == "latent":
            return {**common, "source_width": self.mt.encoder_config.d_model}
        return {**common, "source_layer": f.source_layer, "source_state": f.source_state}

    def source(self, model: nn.Module) -> Source:
        """The source stream of a model with a fusion adapter."""
        if model.peft_config["default"].source_width:  # type: ignore[index, union-attr]
            return MTSource(model, self.mt.encoder)
        return BackboneSource(model)

    def cache_states(self, source: Source, data: PairedDataModule, reader: Any) -> None:
        """Compute the training sources' states once, instead of in every epoch: in the precision in which training reads them.

        Args:
            reader: identity of the weights that read the sources.
        """
        options, device = (
            self.cfg.source,
            torch.device("cuda" if self.cfg.trainer.accelerator == "gpu" else "cpu"),
        )
        precision = self.trainer(logger=False, enable_checkpointing=False).precision_plugin
        precision.convert_module(source.model)
        if (
            next(source.reader.parameters()).device.type != device.type
        ):  # Lightning moves models only when it trains
            source.reader.to(device)
        with precision.forward_context():
            for role in self.task.training_roles:
                dataset = data.dataset(role)
                if dataset.source is None:
                    continue
                form = data.source_form or data.form
                place = {
                    "reader": reader,
                    **source.reads,
                    "code": code_of("states"),
                    **{name: self.reading[name] for name in ("attention", "precision", "weights")},
                    "texts": digest_of([item["inputs"]["input_ids"] for item in dataset.source]),
                }
                store = self.store if options.cache == "disk" else None
                kept = getattr(torch, options.dtype) if options.dtype else None
                dataset.cache = cached_states(
                    source, dataset.source, form, device, kept, store, place
                )
        if isinstance(source, MTSource):
            source.drop_encoder()
            self.mt.release()

    def fresh_backbone(self) -> Backbone:
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)  # the head is drawn here
        return self.load(str(self.backbone.path), self.cfg.model.revision)

    def load(self, path: str, revision: str | None = None) -> Backbone:
        """A checkpoint in this task's form and this run's precision."""
        backbone = backbones.load(
            path,
            self.form_name,
            num_labels=len(self.task.labels),
            revision=revision,
            precision=self.precision,
            attention=self.cfg.model.attention,
            device="cuda" if self.cfg.trainer.accelerator == "gpu" else "cpu",
        )
        if self.cfg.model.gradient_checkpointing:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        return backbone

    def add_adapter(self, backbone: Backbone, **fusion) -> PeftModel:
        return adapter.add_adapter(backbone, **asdict(self.cfg.adapter), **fusion)

    def english_model(self, english: Artifact) -> Backbone:
        """The English model: its LoRA merged where the weights can hold it, else beside them as a frozen adapter."""
        folder = saved_weights(english.path)
        if not (folder / "adapter_config.json").is_file():
            # the adapter is drawn next: alike whether English was trained in this process or found
            pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
            return self.load(str(folder))
        return adapter.english_model(
            self.fresh_backbone(), str(folder), merge=self.precision.holds_updates
        )

    def trained_model(
        self, trained: Artifact, english: Artifact | None
    ) -> tuple[nn.Module, Source | None]:
        """The model of an artefact in eval mode, with its source stream when it fuses."""
        if english is None:
            return self.english_model(trained).model.eval(), None
        model = adapter.load_adapter(
            self.english_model(english), str(saved_weights(trained.path))
        ).eval()
        fuses = getattr(model.peft_config["default"], "fusion", None) is not None
        return model, self.source(model) if fuses else None

    def trainer(
        self, stage: str = "", callbacks: Sequence[pl.Callback] = (), **options
    ) -> pl.Trainer:
        """Return a Trainer for this machine; `stage` names its progress line."""
        t = self.cfg.trainer
        machine = {k: getattr(t, k) for k in ("accelerator", "devices", "enable_progress_bar")}
        machine |= self.team.trainer_options(t.strategy, str(t.precision))
        machine["callbacks"] = [
            *callbacks,
            *([StageProgress(stage)] if t.enable_progress_bar else ()),
        ]
        return pl.Trainer(
            **machine,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            **options,
        )

    def fit(
        self,
        model: nn.Module,
        source: Source | None,
        data: PairedDataModule,
        stage: StageConfig,
        folder: Path,
        name: str,
        saved: str,
    ) -> dict[str, Any]:
        """Train, going on from what an earlier attempt kept in `folder`, and save the weights of the best validation epoch (or of
        the last one) in `folder`/`saved`; returns facts for the manifest."""
        pl.seed_everything(self.training_seed, workers=True, verbose=False)
        monitor, best = f"validation/{self.task.metric}", self.cfg.task.select == "best"
        validated = "validation" in self.task.training_roles
        counts = backbones.parameter_counts(model)
        log.info(
            "%s: %s of %s parameters train",
            name,
            f"{counts['trainable']:,}",
            f"{counts['total']:,}",
        )
        module = self.module(
            model,
            source,
            score=self.validation_score(data) if validated else None,
            optimizer=self.optimizer(stage.lr),
            warmup=stage.warmup,
        )
        limit = self.cfg.trainer.limit_train_batches
        saver = ModelCheckpoint(
            dirpath=folder / "checkpoints", monitor=monitor, mode="max", save_weights_only=True
        )
        finite = StopIfNotFinite(name, self.causes_of_divergence(name, stage))
        kept = StepCheckpoint(folder / "state.ckpt", self.team, self.cfg.trainer.checkpoint_minutes)
        trainer = self.trainer(
            name,
            [finite, kept, *([saver] if best else [])],
            max_epochs=stage.epochs,
            enable_checkpointing=best,
            logger=self.tracker.loggers(name, folder),
            gradient_clip_val=self.cfg.trainer.gradient_clip_val,
            accumulate_grad_batches=data.passes,
            limit_train_batches=limit and limit * data.passes,
            limit_val_batches=None if validated else 0,
        )
        sharded = self.team.size > 1 and self.cfg.trainer.strategy == "fsdp"
        if steps := self.team.agree(
            steps_kept(kept.path, self.team.size, sharded) if self.team.leads else None
        ):
            log.info("%s: goes on after %d steps", name, steps)
        elif self.team.leads:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        with (
            signals.deferred(),
            continued_curves(folder / "metrics.csv", steps) if self.team.leads else nullcontext(),
        ):
            try:
                trainer.fit(
                    module, data, ckpt_path=str(kept.path) if steps else None, weights_only=True
                )
            except NotFinite:
                if self.team.leads:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
        last = (
            {} if best else module.trained(trainer.strategy.lightning_module_state_dict())
        )  # where every process has a part
        if not self.team.leads:
            return {}
        kept.path.unlink(missing_ok=True)
        score, epoch, weights = trainer.callback_metrics.get(monitor), stage.epochs - 1, last
        if best:
            checkpoint = torch.load(saver.best_model_path, weights_only=True, map_location="cpu")
            score, epoch, weights = (
                saver.best_model_score,
                checkpoint["epoch"],
                checkpoint["state_dict"],
            )
            shutil.rmtree(folder / "checkpoints")
        save_model(
            model,
            {name.removeprefix("model."): tensor for name, tensor in weights.items()},
            folder / saved,
        )
        return {
            "parameters": counts,
            "best" if best else "last": {
                **({} if score is None else {monitor: round(float(score), 6)}),
                "epoch": epoch,
            },
            "truncated": {role: data.dataset(role).truncated for role in self.task.training_roles},
            "cut_off": {role: data.dataset(role).cut_off for role in self.task.training_roles},
        }

    def validation_score(self, data: PairedDataModule) -> Score:
        """Return what scores the predictions of the validation set."""
        dataset = data.dataset("validation")
        examples = [p.scored for p in dataset.pairs]
        return lambda found: self.task.score(dataset.texts(found), examples)

    def causes_of_divergence(self, name: str, stage: StageConfig) -> str:
        """Name what makes losses infinite or NaN, as far as the configuration tells."""
        causes = [f"{name}.lr={stage.lr:g} is too high"]
        if (
            self.cfg.trainer.precision in ("16-mixed", "bf16-true")
            or self.precision.dtype != "float32"
        ):
            causes.append(
                f"trainer.precision={self.cfg.trainer.precision} with model.dtype={self.precision.dtype} is too coarse"
            )
        if self.cfg.trainer.gradient_clip_val is None:
            causes.append("trainer.gradient_clip_val=null does not limit the gradient")
        return "; ".join([*causes, "at the first step: the checkpoint itself"])

    @property
    def training_seed(self) -> int:
        """Of dropout: another one on every process of a team, so that no two rows share their mask."""
        return (
            self.cfg.seed
            if self.team.leads
            else random.Random(f"{self.cfg.seed}-{self.team.rank}").getrandbits(32)
        )

    def optimizer(self, lr: float) -> Callable[..., torch.optim.Optimizer]:
        options = {k: v for k, v in asdict(self.cfg.optim).items() if not k.startswith("_")}
        module, _, name = self.cfg.optim._target_.rpartition(".")
        return functools.partial(getattr(importlib.import_module(module), name), lr=lr, **options)


def saved_weights(folder: Path) -> Path:
    """Return where weights are: in an artefact's `adapter` or `model`, or (of a run folder) right there."""
    return next(
        (folder / name for name in ("adapter", "model") if (folder / name).is_dir()), folder
    )


def read_translation(artifact: Artifact, examples: Sequence[Example]) -> list[Example]:
    rows = pq.read_table(
        artifact.path / "translations.parquet", columns=["translation", "answers"]
    ).to_pylist()
    return [
        replace(e, texts=tuple(row["translation"]), answers=read_answers(row["answers"]))
        for e, row in zip(examples, rows, strict=True)
    ]


def quality(task: Task, examples: Sequence[Example], made: Flagged, lang: str) -> dict[str, Any]:
    """What a manifest says of translations: flags, answers that were carried over (`kept`; `exact`: to the words that the human
    translation has), and likeness to human ones, where the benchmark has them."""
    facts: dict[str, Any] = {
        flag: sum(flags[flag] for _, flags in made) for flag in (made[0][1] or ())
    }
    found = [m for m, _ in made]
    try:
        there = task.parallel and task.translated_by(examples[0], lang) == "human"
        human = ParallelTranslator(task).translate(examples, lang) if there else None
    except UserError:  # some splits have no counterpart
        human = None
    if not task.labels and lang != task.english:
        asked = [i for i, e in enumerate(examples) if has_span(e)]
        facts["answers"] = {"of": len(asked), "kept": sum(bool(found[i].answers) for i in asked)}
        if human:
            same = [
                {a.text for a in found[i].answers} & {a.text for a in human[i].answers}
                for i in asked
            ]
            facts["answers"]["exact"] = sum(map(bool, same))
    if human and texts_of(found) != texts_of(human):
        facts |= metrics.translation(texts_of(found), texts_of(human))
    return facts


def texts_of(examples: Sequence[Example]) -> list[str]:
    return [text for e in examples for text in e.texts]


def pairs_digest(data: PairedDataModule, *roles: str) -> str:
    """Identity of what a model is trained or tested on."""
    pairs = [p for role in roles for p in data.dataset(role).pairs]
    seen = [
        [p.target for p in pairs],
        [p.source for p in pairs if p.source],
        [p.original for p in pairs if p.original],
    ]
    return digest_of([fingerprint(examples) for examples in seen])[:20]


def save_model(model: nn.Module, trained: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Save an adapter in PEFT's format, or a full model in transformers' format; safetensors either way.

    Args:
        trained: the weights of the model that were trained, which it may no longer hold, or only a part of them.
    """
    check_finite(trained.items(), f"the trained weights for {folder}")
    options: dict[str, Any] = {"save_embedding_layers": False, "selected_adapters": ["default"]}
    model.save_pretrained(
        str(folder), state_dict=dict(trained), **(options if isinstance(model, PeftModel) else {})
    )  # type: ignore[operator]
