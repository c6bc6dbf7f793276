"""Hold what the stages of one run share: configuration, data, preprocessing, models, keys."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flare_exp.artifacts import Artifact, ArtifactStore, digest_of
from flare_exp.code import code_of
from flare_exp.config.methods import DISTIL, fuses
from flare_exp.config.schema import Config, StageConfig
from flare_exp.data.datamodule import PairedDataModule, Unlabeled
from flare_exp.data.pairing import Translate
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Preprocessor, SourceTextPreprocessor
from flare_exp.data.preprocessors import PREPROCESSORS
from flare_exp.data.source_augmentation import WORDS, SourceAugmentation
from flare_exp.data.unlabeled import unlabeled_examples
from flare_exp.errors import UserError
from flare_exp.experiment.building import ModelBuilder
from flare_exp.experiment.checkpoints import MT
from flare_exp.flare import mixup
from flare_exp.flare.source_encoders import (
    BackboneSourceEncoder,
    MixupSourceEncoder,
    MTSourceEncoder,
    SourceEncoder,
)
from flare_exp.languages import language
from flare_exp.models import backbones, families
from flare_exp.models.families import Family
from flare_exp.tasks import Example, Task, fingerprint
from flare_exp.training.distributed import SINGLE_PROCESS, DistributedContext
from flare_exp.training.generation import AnswerDecoding
from flare_exp.training.tracking import Tracker
from flare_exp.translation.base import Translator
from flare_exp.translation.machine import MachineTranslator

log = logging.getLogger(__name__)


@dataclass
class RunContext:
    """Hold what every stage of a run reads.

    Attributes:
        backbone: the pre-trained checkpoint.
        models: builds the run's models.
        preprocessor: turns examples into the backbone's inputs.
        mt: the translation model, loaded when it is first needed.
        translate: the stage that translates; arguments: context, examples, language.
        make_source_preprocessor: makes the preprocessing of the translation model's encoder, for
            texts of some languages.
        tracker: writes what training logs; None where nothing is trained.
        distributed: the processes that train together.
        translations: name of a translation -> its artifact, as the stages ask for them.
        system: name of the translation system, in a run of `systems`; None: it is `mt`.
        systems: the run with each of `source.systems` in the place of `mt`, to translate.
    """

    cfg: Config
    store: ArtifactStore
    task: Task
    backbone: Artifact
    models: ModelBuilder
    preprocessor: Preprocessor
    mt: MT
    translator: Translator
    translate: Callable[[RunContext, Sequence[Example], str], list[Example]]
    make_source_preprocessor: Callable[[RunContext, Sequence[str]], Preprocessor]
    tracker: Tracker | None = None
    distributed: DistributedContext = SINGLE_PROCESS
    translations: dict[str, Artifact] = field(default_factory=dict)
    system: str | None = None
    systems: Sequence[RunContext] = ()
    _data: dict[tuple[PairingMode, tuple[str, ...], bool, bool], PairedDataModule] = field(
        default_factory=dict
    )

    @property
    def task_type(self) -> str:
        """Return how the backbone takes the task: `label`, `span` or `prompt`."""
        return self.models.task_type

    @property
    def decoding(self) -> AnswerDecoding:
        """Return how a prompted model answers."""
        d = self.cfg.decode
        if d.name == "score" and self.task.labels:
            return AnswerDecoding(self.task.labels)
        return AnswerDecoding((), d.beams, d.max_new_tokens, d.cache)

    # --- data ----------------------------------------------------------------------------------

    def data(
        self,
        mode: PairingMode,
        sources: bool = True,
        lang: str | None = None,
        distils: bool = False,
    ) -> PairedDataModule:
        """Return the benchmark's DataModule for a pairing mode; it is made once.

        Args:
            mode: what the model reads and fuses.
            sources: False leaves all sources out.
            lang: one language, to test on; None: all that are trained on.
            distils: add the unlabeled texts of a distillation to the training data, and give every
                training text its own source, which the teachers read.
        """
        langs = tuple(self.cfg.task.langs) if lang is None else (lang,)
        key = mode, langs, sources, distils
        if key not in self._data:
            self._data[key] = self._make_data(*key)
        return self._data[key]

    def _make_data(
        self, mode: PairingMode, langs: Sequence[str], sources: bool, distils: bool
    ) -> PairedDataModule:
        cfg, source = self.cfg, self.cfg.source
        return PairedDataModule(
            self.task,
            langs,
            self.joint_preprocessor if mode is PairingMode.JOINT else self.preprocessor,
            functools.partial(self.translate, self),
            source_preprocessor=self.make_source_preprocessor(self, langs)
            if mode is PairingMode.LATENT
            else None,
            mode=mode,
            batch_size=cfg.data.batch_size,
            micro_batch_size=cfg.data.micro_batch_size,
            workers=cfg.data.workers,
            seed=cfg.seed,
            share=(self.distributed.rank, self.distributed.size),
            scores_originals=self.answers_back(mode) is not None,
            shuffle_source=mode.pairs and source.shuffle,
            empty_source=mode.pairs and (source.empty or not sources),
            ablate_in=source.ablate_in if sources else "all",
            augmentation=self.augmentation if mode.fuses and not distils else None,
            sources=self.sources if mode is PairingMode.PAIRED else (),
            unlabeled=self.unlabeled if distils else None,
            temperature=cfg.task.temperature,
        )

    @property
    def sources(self) -> list[tuple[Translate, str]]:
        """Return a translator and a language for each of several sources; empty: English by mt."""
        if not self.systems:
            translate = functools.partial(self.translate, self)
            return [(translate, lang) for lang in self.cfg.source.langs]
        runs = (self, *self.systems)
        return [(functools.partial(run.translate, run), self.task.english) for run in runs]

    def release_models(self) -> None:
        """Give up the weights of the translation models; they are loaded again when needed."""
        for run in (self, *self.systems):
            run.mt.release()

    @property
    def unlabeled(self) -> Unlabeled | None:
        """Return what reads the unlabeled texts of a distillation; None: there are none."""
        path = self.cfg.distil.texts
        if path is None:
            return None
        translate = functools.partial(self.translate, self)
        return functools.partial(
            unlabeled_examples, Path(path), self.task, self.cfg.task.lang, translate
        )

    @property
    def augmentation(self) -> SourceAugmentation | None:
        """Return what draws the sources of training examples; None: each has its own."""
        source, kinds = self.cfg.source, tuple(self.cfg.source.noise_kinds)
        errors = tuple(self.cfg.mt.errors) if WORDS in kinds else ()
        shares = source.dropout, source.noise
        return SourceAugmentation(*shares, kinds, errors, self.cfg.seed) or None

    @functools.cached_property
    def joint_preprocessor(self) -> Preprocessor:
        """Return the preprocessor of texts that a model reads together with their sources.

        Each of the two gets as many tokens as where it is read alone (the input is twice as long),
        but at most half of what the model can read.
        """
        whole = self.preprocessor
        longest = families.longest_input(str(self.backbone.path), self.cfg.model.revision)
        half = whole.max_length if longest is None else min(whole.max_length, longest // 2)
        if half < whole.max_length:
            log.info("input_fusion: text and source get %d tokens each, half of the model's", half)
        return whole.with_max_length(half)

    def answers_back(self, mode: PairingMode) -> MachineTranslator | None:
        """Return the model that translates predicted English answers into the target language.

        A test example that a model has translated into English has no English answer to compare
        with, so question answering compares in the target language. None: nothing is translated.
        """
        if mode is not PairingMode.TRANSLATED or self.task.labels:
            return None
        return self.translator if isinstance(self.translator, MachineTranslator) else None

    @property
    def mixture(self) -> dict[str, Any]:
        """Return what a training on several languages depends on, beside their data."""
        task = self.cfg.task
        several = {"langs": task.langs, "temperature": task.temperature}
        return several if len(task.langs) > 1 else {}

    # --- models --------------------------------------------------------------------------------

    def source(self, model: nn.Module) -> SourceEncoder:
        """Return the encoder that reads the source of a model with a fusion adapter."""
        config: Any = model.peft_config["default"]  # type: ignore[index]
        if config.source_width:
            return MTSourceEncoder(model, self.mt.encoder)
        mixes = config.fusion == mixup.NAME
        return MixupSourceEncoder(model) if mixes else BackboneSourceEncoder(model)

    def capped(self, stage: StageConfig) -> StageConfig:
        """Return the options of a training with no more epochs than `trainer.max_epochs`."""
        most = self.cfg.trainer.max_epochs or stage.epochs
        return replace(stage, epochs=min(stage.epochs, most))

    # --- keys ----------------------------------------------------------------------------------

    def reading_of(self, mode: PairingMode) -> dict[str, Any]:
        """Return what training and testing in a pairing mode depend on, beside data and models."""
        if mode is not PairingMode.JOINT:
            return self.reading
        return {**self.reading, "joint": self.joint_preprocessor.max_length}

    @functools.cached_property
    def reading(self) -> dict[str, Any]:
        """Return what training (which selects on validation) and testing depend on.

        Data and models come on top of it.
        """
        cfg, task = self.cfg, self.task
        prompted = self.task_type == "prompt"
        family = families.family_of(str(self.backbone.path), cfg.model.revision)
        quantized = asdict(self.models.precision) if cfg.model.quantize else cfg.model.dtype
        return {
            "form": self.task_type,
            "max_length": self.preprocessor.max_length,
            "truncation_side": cfg.data.truncation_side,
            "doc_stride": stride_of(cfg, self.task_type),
            "prompt": task.prompt if prompted else None,
            "task": [task.fields, task.labels, task.metric],
            "answers": asdict(replace(self.decoding, cache="")) if prompted else None,
            "max_answer_length": cfg.task.max_answer_length if self.task_type == "span" else None,
            "family": asdict(family),
            "attention": cfg.model.attention or family.attention[0],
            "precision": cfg.trainer.precision,
            "weights": quantized,
            "code": code_of("model", task=type(task).__module__),
        }

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """Return what training depends on, besides data, model and the stage's own options."""
        cfg = self.cfg
        return {
            **self.reading,
            "optim": asdict(cfg.optim),
            "batch_size": cfg.data.batch_size,
            "select": cfg.task.select,
            "clip": cfg.trainer.gradient_clip_val,
            "limit_train_batches": cfg.trainer.limit_train_batches,
            "seed": cfg.seed,
        }


def family_of_model(cfg: Config) -> Family:
    """Return the family of the model; an embedded one has it before it is built."""
    if cfg.model.path is not None:
        return families.family_of(cfg.model.path, cfg.model.revision)
    assert cfg.model.pretrain
    return families.FAMILIES[cfg.model.pretrain.architecture]


def task_type_of(cfg: Config, task: Task, family: Family) -> str:
    """Choose how a model takes a task: by a head where its family has one, else as a prompt.

    Raises:
        UserError: the options ask for something that the family cannot do.
    """
    asked, model = "label" if task.labels else "span", cfg.model.name
    name = families.choose_task_type(family, asked, cfg.task.form, model)
    if cfg.decode.name == "generate" and name != "prompt":
        raise UserError(
            f"decode=generate: {model} answers {task.name} by a head, which writes nothing"
        )
    if cfg.fusion.options.get("query") == "source" and fuses(cfg.method) and name == "prompt":
        raise UserError(
            f"fusion.query=source with {model}: each position would read all positions of the "
            "prompt and of the answer, also those behind it, which are not there yet when an "
            "answer is written; choose fusion.query=target"
        )
    if cfg.method.name == DISTIL and name != "label":
        raise UserError(
            f"method={DISTIL} with model={model}: soft labels are learned by a classification "
            f"head, and this model answers {task.name} by a prompt; choose an encoder, for example "
            "model=xlmr_base"
        )
    return name


def make_preprocessor(cfg: Config, task: Task, path: str, task_type: str) -> Preprocessor:
    """Make the preprocessing of a checkpoint; texts are no longer than it can read."""
    longest = families.longest_input(path, cfg.model.revision)
    wanted = wanted_length(cfg, task_type)
    if longest is not None and longest < wanted:
        log.info("texts of %d tokens are asked for: this model reads %d at most", wanted, longest)
        wanted = longest
    tokenizer = backbones.load_tokenizer(path, cfg.model.revision)
    return preprocessor_of(cfg, task, task_type, tokenizer, wanted)


def preprocessor_of(
    cfg: Config, task: Task, task_type: str, tokenizer: Any, longest: int
) -> Preprocessor:
    """Make the preprocessing of a tokenizer. `longest`: most tokens of a text or of a window."""
    tokenizer.truncation_side = cfg.data.truncation_side
    options = {"stride": stride_of(cfg, task_type)} if task_type == "span" else {}
    return PREPROCESSORS[task_type](task, tokenizer, longest, **options)


def make_source_preprocessor(run: RunContext, langs: Sequence[str]) -> Preprocessor:
    """Make what prepares texts of some target languages for the translation model's encoder.

    Texts are padded and cut on the side where the backbone's texts are.
    """
    tokenizer, own = run.mt.tokenizer, run.preprocessor.tokenizer
    codes = {lang: language(lang).flores for lang in langs}
    tokenizer.padding_side, tokenizer.truncation_side = own.padding_side, own.truncation_side
    longest = min(run.cfg.data.max_length, run.mt.encoder_config.max_position_embeddings)
    return SourceTextPreprocessor(run.task, tokenizer, longest, run.preprocessor.order, codes)


def stride_of(cfg: Config, task_type: str) -> int | None:
    """Return the tokens that two windows share; None: texts are not read in windows."""
    return cfg.task.doc_stride if task_type == "span" else None


def wanted_length(cfg: Config, task_type: str) -> int:
    """Return the most tokens of a text, or of a window, that the options ask for."""
    window = cfg.task.window if stride_of(cfg, task_type) is not None else None
    return window or cfg.data.max_length


def pairs_digest(data: PairedDataModule, *roles: str) -> str:
    """Return the identity of the data that a model is trained or tested on."""
    pairs = [p for role in roles for p in data.dataset(role).pairs]
    seen = [
        [p.target for p in pairs],
        [p.source for p in pairs if p.source],
        [p.original for p in pairs if p.original],
    ]
    seen += [[*further] for further in zip(*(p.more for p in pairs), strict=True)]
    # training data end where validation data begin, which the examples alone do not tell
    sizes = [len(data.dataset(role).pairs) for role in roles]
    return digest_of([sizes, *(fingerprint(examples) for examples in seen)])[:20]


def device_of(cfg: Config) -> torch.device:
    """Return the device of a settled configuration."""
    return torch.device("cuda" if cfg.trainer.accelerator == "gpu" else "cpu")
