"""Build or find the models that a run starts from: backbone and translation model."""

from __future__ import annotations

import functools
import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from flare_exp.artifacts import Artifact, ArtifactStore, digest_of, file_sha256
from flare_exp.code import code_of
from flare_exp.config.schema import Config
from flare_exp.errors import UserError
from flare_exp.hub import files_read, is_commit, looks_local
from flare_exp.languages import language
from flare_exp.models import families
from flare_exp.tasks import Task
from flare_exp.toy.pretrain import pretrain
from flare_exp.toy.translation_model import train_mt
from flare_exp.translation import engines, nllb
from flare_exp.translation.base import Translator
from flare_exp.translation.command import CommandEngine
from flare_exp.translation.lookup import FileTranslator, ParallelTranslator
from flare_exp.translation.machine import MachineTranslator


def prepare_backbone(cfg: Config, store: ArtifactStore) -> Artifact:
    """Return the pre-trained checkpoint with its identity.

    model=tiny is built on first use; any other model is where model.path points.
    """
    if cfg.model.path is None:
        options = pretraining(cfg)
        return store.get(
            "backbone",
            pretraining_key(cfg),
            lambda folder: pretrain(folder, **options),
            resumable=True,
        )
    if looks_local(cfg.model.path):
        families.family_of(cfg.model.path)
    return existing_checkpoint(cfg.model.path, cfg.model.revision)


def pretraining(cfg: Config) -> dict[str, Any]:
    """Return the options that an embedded model is built from."""
    assert cfg.model.pretrain
    return {**asdict(cfg.model.pretrain), "world_seed": cfg.task.world_seed}


def pretraining_key(cfg: Config) -> dict[str, Any]:
    """Return the key of an embedded model's artifact."""
    return {**pretraining(cfg), "code": code_of("backbone")}


def existing_checkpoint(path: str, revision: str | None) -> Artifact:
    """Identify a checkpoint that is not built here.

    The identity of a folder is its content; that of a hub checkpoint is its name and commit. A
    revision that is not a commit (only `plan` leaves one) never gives the identity of a commit.
    """
    if not looks_local(path):
        at = revision if is_commit(revision) else f"{revision or 'main'}, commit unknown"
        return Artifact(Path(path), "hub", f"{path}@{at}", {}, 0.0, True)
    folder = Path(path).expanduser()
    names = files_read([p.name for p in folder.iterdir() if p.is_file()])
    return Artifact(
        folder,
        "checkpoint",
        digest_of({name: file_sha256(folder / name) for name in names})[:20],
        {},
        0.0,
        True,
    )


class MT:
    """The translation model of a run: its checkpoint, built or found when it is first needed."""

    uncertain = False  # a checkpoint has a list of its languages

    def __init__(self, cfg: Config, store: ArtifactStore):
        self.cfg, self.store = cfg.mt, store
        self.device = "cuda" if cfg.trainer.accelerator == "gpu" else "cpu"
        self.options = (
            {**asdict(cfg.mt.pretrain), "world_seed": cfg.task.world_seed}
            if cfg.mt.pretrain
            else {}
        )

    @functools.cached_property
    def origin(self) -> Any:
        """Identity of the checkpoint, known without building anything."""
        if self.cfg.path is None:
            return {**self.options, "code": code_of("mt")}
        return existing_checkpoint(self.cfg.path, self.cfg.revision).digest

    @property
    def identity(self) -> dict[str, Any]:
        """Return what the translation of a text depends on."""
        return {
            "by": "machine",
            "checkpoint": self.origin,
            "backend": self.cfg.backend,
            "quantization": self.quantization,
            "weights": None if self.quantization else self.weights,
            "engine": code_of("engine"),
            **asdict(self.decoding),
        }

    @property
    def encoder_identity(self) -> dict[str, Any]:
        """Return what the encoder's states depend on, besides the texts."""
        return {"checkpoint": self.origin, "weights": self.weights, "code": code_of("encoder")}

    @property
    def weights(self) -> str:
        """Return how transformers keeps the weights.

        Which 16 bits a GPU takes, bfloat16 or float16, is up to the GPU.
        """
        return "float32" if self.device == "cpu" else "16 bits"

    @property
    def quantization(self) -> str | None:
        """Return CTranslate2's quantization; None: transformers translates, in `weights`."""
        if self.cfg.backend == "transformers":
            return None
        return self.cfg.quantization or ("int8_float16" if self.device == "cuda" else "int8")

    @property
    def decoding(self) -> nllb.MTDecoding:
        """Return how translations are decoded."""
        return nllb.MTDecoding(self.cfg.beams, self.cfg.max_length, self.cfg.no_repeat_ngram)

    def code(self, lang: str) -> str:
        """Return the FLORES-200 code of a language of the benchmark."""
        return language(lang).flores

    def check(self, *codes: str) -> None:
        """UserError when the checkpoint, the backend or a language cannot be had."""
        if self.cfg.backend == "ctranslate2":
            engines.ctranslate2()
        if self.cfg.path is not None:
            for code in codes:
                nllb.language_id(self._checked, code)

    @functools.cached_property
    def _checked(self) -> PreTrainedTokenizerBase:
        return nllb.check(str(self.cfg.path), self.cfg.revision, self.decoding)

    @functools.cached_property
    def checkpoint(self) -> str:
        """Return the path of the checkpoint; the embedded model is built on first use."""
        if self.cfg.path is not None:
            return self.cfg.path
        return str(
            self.store.get(
                "mt", self.origin, lambda folder: train_mt(folder, **self.options), resumable=True
            ).path
        )

    @functools.cached_property
    def engine(self) -> engines.Engine:
        """Load what translates: transformers, or CTranslate2 with a converted checkpoint."""
        how = (self.decoding, self.cfg.batch_tokens, self.device)
        if not self.quantization:
            return engines.TransformersEngine(self.checkpoint, self.cfg.revision, *how)
        key = {
            "checkpoint": self.origin,
            "quantization": self.quantization,
            "code": code_of("ctranslate2"),
        }

        def build(folder: Path) -> None:
            engines.convert(self.checkpoint, self.cfg.revision, folder, str(self.quantization))

        return engines.CTranslate2Engine(str(self.store.get("ctranslate2", key, build).path), *how)

    @functools.cached_property
    def encoder(self) -> nn.Module:
        """Load the encoder, whose states FLARE MT fuses."""
        return nllb.load_encoder(self.checkpoint, self.cfg.revision, self.device)[0]

    @functools.cached_property
    def encoder_config(self) -> Any:
        """Read the configuration of the encoder."""
        return nllb.read_config(self.checkpoint, self.cfg.revision)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return nllb.check(self.checkpoint, self.cfg.revision)

    def release(self) -> None:
        """Give up the weights: they are loaded again where they are needed again."""
        loaded = [
            self.__dict__.pop(name) for name in ("engine", "encoder") if name in self.__dict__
        ]
        if loaded:
            del loaded
            gc.collect()  # transformers' models hold themselves
            torch.cuda.empty_cache()  # nothing where there is no GPU

    def translator(self, task: Task) -> MachineTranslator:
        """Make the translator of a task, which loads the model when it is first needed.

        With mt=command it is a program, and this object has no checkpoint.
        """
        return MachineTranslator(
            task, self.command or self, self.store, self.cfg.marker, self.cfg.shard
        )

    @property
    def command(self) -> CommandEngine | None:
        """Return the program that translates instead of a checkpoint."""
        if self.cfg.command is None:
            return None
        return CommandEngine(
            self.cfg.command,
            self.cfg.codes,
            self.cfg.timeout,
            self.cfg.blank_lines,
            self.cfg.revision,
        )


def make_translator(cfg: Config, task: Task, model: MT) -> Translator:
    """Make the translator of a configuration.

    Raises:
        UserError: the translator does not suit the task, or mt.path is missing.
    """
    if cfg.mt.translates:
        return model.translator(task)
    if cfg.mt.kind == "benchmark":
        return ParallelTranslator(task)
    if cfg.mt.path is None:
        raise UserError(
            "mt=file: set mt.path=<folder> of mt_<from>-<to>/<split>.parquet, translations of "
            f"{task.name}"
        )
    fallback = ParallelTranslator(task) if cfg.mt.fallback == "gold" else None
    return FileTranslator(task, Path(cfg.mt.path).expanduser(), fallback)
