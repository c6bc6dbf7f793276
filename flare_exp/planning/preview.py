"""Look at a run from outside: what is built, and what would be. Nothing is trained or downloaded.

The stages are those of a run (flare_exp.experiment.stages), over a store that builds nothing; so
the keys are theirs. What is not there yet is replaced: a tiny model by its first training step, a
translation by the text itself, a checkpoint by its shapes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from flare_exp.artifacts import Artifact, ArtifactStore
from flare_exp.config.schema import Config
from flare_exp.data.generation import GenerationPreprocessor
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Item, Preprocessor
from flare_exp.errors import UserError
from flare_exp.experiment.building import ModelBuilder
from flare_exp.experiment.checkpoints import (
    MT,
    existing_checkpoint,
    make_translator,
    prepare_backbone,
)
from flare_exp.experiment.context import (
    RunContext,
    make_preprocessor,
    make_source_preprocessor,
    preprocessor_of,
    stride_of,
    task_type_of,
    wanted_length,
)
from flare_exp.experiment.pipeline import load_task
from flare_exp.experiment.stages.translation import translate
from flare_exp.flare import adapter
from flare_exp.hub import Checkpoint, local, looks_local
from flare_exp.models import backbones, families
from flare_exp.models.backbones import Backbone
from flare_exp.planning.architectures import ARCHITECTURES
from flare_exp.tasks import Answer, Example, Task
from flare_exp.tasks.base import Benchmark
from flare_exp.toy.translation_model import train_mt

CHARACTERS = 4  # per token, where there is no tokenizer to ask
FEW = 256  # rows that stand for a split that is not here


def weights_here(path: str, revision: str | None = None) -> bool:
    """Return True if a checkpoint is a folder, or in the hub's cache."""
    return looks_local(path) or Checkpoint("model", path, revision).find().lacks is None


def config_of(path: str, revision: str | None = None) -> PreTrainedConfig:
    """Return a checkpoint's configuration: its own where it is here, else the published numbers.

    Raises:
        UserError: neither is known.
    """
    with suppress(OSError, ValueError):
        return AutoConfig.from_pretrained(local(path), revision=revision, local_files_only=True)
    if path not in ARCHITECTURES:
        raise UserError(
            f"{path}: its config.json is not here and its numbers are not known to plan; "
            "download it, or give a folder"
        )
    return AutoConfig.for_model(**ARCHITECTURES[path])


class ArtifactMissing(Exception):
    """Something that later stages read is not there."""

    def __init__(self, artifact: Artifact):
        super().__init__(f"{artifact.kind}/{artifact.digest}")
        self.artifact = artifact


class ReadOnlyStore(ArtifactStore):
    """Find artifacts and build none, except translations that need no model.

    These are built into `scratch`.
    """

    def __init__(self, root: Path | str, scratch: Path, machine: bool):
        super().__init__(root)
        self.scratch, self.machine = scratch, machine

    def get(
        self, kind: str, key: Mapping[str, Any], build: Callable[[Path], Any], *_, **__
    ) -> Artifact:
        """Find an artifact; only a translation that needs no model is built.

        Raises:
            ArtifactMissing: a later stage reads the artifact, and it is not there.
        """
        found = self.find(kind, key)
        if found.reused or kind in (
            "backbone",
            "finetune",
            "transfer",
            "test",
        ):  # nothing here reads an unbuilt one
            return found
        if kind != "translation" or self.machine:
            raise ArtifactMissing(found)
        place = self.scratch / kind / found.digest
        if not place.is_dir():
            place.mkdir(parents=True)
            build(place)
        return replace(found, path=place)


class PreviewMT(MT):
    """A translation model that need not be here."""

    store: ReadOnlyStore

    @property
    def absent(self) -> bool:
        """Return True if the checkpoint is not here."""
        return self.cfg.path is not None and not weights_here(self.cfg.path, self.cfg.revision)

    def check(self, *codes: str) -> None:
        """Check the languages, as far as the checkpoint is here."""
        if not self.absent:
            super().check(*codes)

    @functools.cached_property
    def missing(self) -> Artifact | None:
        """Return the embedded model, where it has yet to be trained."""
        try:
            if self.cfg.kind == "model":
                _ = super().checkpoint
        except ArtifactMissing as missing:
            return missing.artifact
        return None

    @functools.cached_property
    def checkpoint(self) -> str:
        """Return the path of the checkpoint; the embedded model is trained for one step."""
        if self.missing is None:
            return super().checkpoint
        return str(
            first_step(self.store.scratch / "mt" / self.missing.digest, train_mt, self.options)
        )

    @functools.cached_property
    def encoder_config(self) -> Any:
        """Read the configuration of the encoder, or its published numbers."""
        return (
            config_of(str(self.cfg.path), self.cfg.revision)
            if self.absent
            else super().encoder_config
        )

    @functools.cached_property
    def encoder(self) -> Any:
        """Load the encoder; None: it is not here."""
        return None if self.absent else super().encoder


def first_step(folder: Path, build: Callable[..., Any], options: Mapping[str, Any]) -> Path:
    """Train a tiny model for one step: it has the shapes and the tokenizer of the finished one."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        build(folder, **{**options, "steps": 1})
    return folder


@dataclass
class DryRun:
    """A run that builds nothing.

    Attributes:
        run: what its stages share.
        store: the run's store.
        mt: the run's translation model.
        shapes: builds models without weights, where a checkpoint is not here; else None.
        untranslated: digest of a translation that a model has yet to make -> the examples, and how
            many of the benchmark's rows each of them stands for.
    """

    run: RunContext
    store: ReadOnlyStore
    mt: PreviewMT
    shapes: ShapeBuilder | None
    untranslated: dict[str, tuple[Sequence[Example], float]]

    def parts(self, mode: PairingMode) -> dict[str, float]:
        """Return role -> how many of the benchmark's rows each row of its data stands for."""
        task, lang = self.run.task, self.run.cfg.task.lang
        roles = (*task.training_roles, "test")
        if not task.assumed:  # type: ignore[attr-defined]
            return dict.fromkeys(roles, 1.0)
        langs = {"test": lang} if mode is not PairingMode.ENGLISH else {}
        rows = {role: task.load(langs.get(role, task.english), role) for role in roles}
        return {role: getattr(found, "times", 1.0) for role, found in rows.items()}


class CountingPreprocessor(GenerationPreprocessor):
    """Count the tokens of texts without a tokenizer: CHARACTERS to a token.

    Args:
        unknown: tokens of an example without text.
        stride: tokens that two windows share (`flare_exp.data.question_answering`); the question,
            which every window repeats, is not counted.
    """

    def __init__(self, task: Task, max_length: int, unknown: int, stride: int | None):
        Preprocessor.__init__(self, task, None, max_length)  # type: ignore[arg-type]
        self.unknown, self.stride = unknown, stride

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        """Encode texts as ranges, which have lengths and no content."""
        return [
            {
                "inputs": {"input_ids": range(stop - start)},
                "cut": False,
                "example": i,
                "window": (start * CHARACTERS, stop * CHARACTERS),
            }
            for i, example in enumerate(examples)
            for start, stop in self._windows(self._length(example))
        ]

    def encode_sources(self, examples: Sequence[Example]) -> list[Item]:
        """Encode sources as ranges, which have lengths and no content."""
        return [
            {"inputs": {"input_ids": range(min(self._length(e), self.max_length))}, "cut": False}
            for e in examples
        ]

    def _windows(self, length: int) -> list[tuple[int, int]]:
        """Return first and last token of each window of a text, or of what a cut text keeps."""
        if self.stride is None or length <= self.max_length:
            return [(0, min(length, self.max_length))]
        starts = range(0, length - self.stride, self.max_length - self.stride)
        return [(start, min(start + self.max_length, length)) for start in starts]

    def _length(self, example: Example) -> int:
        if not any(example.texts):
            return self.unknown
        return 2 + len(self.prompt(example.texts)) // CHARACTERS

    def answer(self, text: str) -> list[int]:
        """Encode an answer as zeros, with one token more for its end."""
        return [0] * (1 + -(-len(text) // CHARACTERS))


class ShapeBuilder(ModelBuilder):
    """Build models that have shapes and no weights.

    Args:
        depth: number of blocks of each stack; None: as many as the checkpoint has.
    """

    def __init__(
        self, cfg: Config, task: Task, backbone: Artifact, task_type: str, depth: int | None = None
    ):
        super().__init__(cfg, task, backbone, task_type)
        self.depth = depth

    def with_depth(self, depth: int) -> ShapeBuilder:
        """Return a builder of the same models with `depth` blocks in each stack."""
        return ShapeBuilder(self.cfg, self.task, self.backbone, self.task_type, depth)

    def fresh_backbone(self) -> Backbone:
        """Build the pre-trained checkpoint."""
        return self.load(str(self.backbone.path))

    def load(self, path: str, revision: str | None = None) -> Backbone:
        """Build a checkpoint from its configuration."""
        config, m = AutoConfig.from_pretrained(path), self.cfg.model
        if self.depth is not None:
            shorten(config, self.depth)
        family = families.FAMILIES[config.model_type]
        if self.task_type == "label":
            config.num_labels = max(1, len(self.task.labels))
        auto = backbones.auto_class(self.task_type, config.is_encoder_decoder)
        dtype = {"64-true": "float64"}.get(str(self.cfg.trainer.precision), m.dtype)
        attention = m.attention or family.attention[0]
        with torch.device("meta"):
            model = auto.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation=attention
            )
        if m.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return backbones.wrap(model, family, self.task_type)

    def add_adapter(self, backbone: Backbone, **fusion: Any) -> Any:
        """Put a new adapter on a backbone."""
        with torch.device("meta"):
            return super().add_adapter(backbone, **fusion)

    def english_model(self, english: Artifact) -> Backbone:
        """Build the English model, with a frozen adapter where its LoRA cannot be merged."""
        backbone = self.fresh_backbone()
        if self.precision.holds_updates:
            return backbone
        with torch.device("meta"):
            config = adapter.adapter_config(backbone, **asdict(self.cfg.adapter))
            return adapter.frozen(backbone, config)


def shorten(config: PreTrainedConfig, depth: int) -> None:
    """Give every stack of a model's configuration `depth` blocks."""
    config.num_hidden_layers = depth
    if hasattr(config, "num_decoder_layers"):
        config.num_decoder_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]


def preview(cfg: Config, scratch: Path) -> DryRun:
    """Make the dry run of a settled configuration.

    Raises:
        UserError: where a run would raise it, but not for what could be downloaded.
    """
    store = ReadOnlyStore(cfg.cache_dir, scratch, cfg.mt.kind == "model")
    task = _task(json.dumps(asdict(replace(cfg.task, lang=""))), max(FEW, cfg.data.batch_size))
    shapes_only = is_sketch(cfg) or bool(task.assumed and cfg.model.path)  # type: ignore[attr-defined]
    backbone = _sketched(cfg, scratch) if shapes_only else _prepared(cfg, store, scratch)
    task_type, mt = task_type_of(cfg, task, str(backbone.path)), PreviewMT(cfg, store)
    shapes = ShapeBuilder(cfg, task, backbone, task_type) if shapes_only else None
    untranslated: dict[str, tuple[Sequence[Example], float]] = {}

    def translate_or_note(run: RunContext, examples: Sequence[Example], lang: str) -> list[Example]:
        try:
            return translate(run, examples, lang)
        except ArtifactMissing as missing:
            digest = missing.artifact.digest
            run.translations[digest] = missing.artifact
            untranslated[digest] = examples, getattr(examples, "times", 1.0)
            # a model of the texts themselves would have another key
            return [replace(e, id=f"{e.id} by {digest}") for e in examples]

    run = RunContext(
        cfg,
        store,
        task,
        backbone,
        models=shapes or ModelBuilder(cfg, task, backbone, task_type),
        preprocessor=(_counting_preprocessor if shapes_only else make_preprocessor)(
            cfg, task, str(backbone.path), task_type
        ),
        mt=mt,
        translator=make_translator(cfg, task, mt),
        translate=translate_or_note,
        # lengths need no tokenizer of the translation model
        make_source_preprocessor=(lambda run: run.preprocessor)
        if shapes_only
        else make_source_preprocessor,
    )
    return DryRun(run, store, mt, shapes, untranslated)


def _counting_preprocessor(cfg: Config, task: Task, path: str, task_type: str) -> Preprocessor:
    """Make the preprocessing of a checkpoint that is not here, with its tokenizer if that is."""
    wanted = wanted_length(cfg, task_type)
    wanted = min(wanted, families.longest_input(path) or wanted)
    counted = CountingPreprocessor(task, wanted, cfg.data.max_length, stride_of(cfg, task_type))
    if task.assumed:  # type: ignore[attr-defined]
        return counted
    try:
        tokenizer = backbones.load_tokenizer(str(cfg.model.path), cfg.model.revision)
    except UserError:
        return counted
    return preprocessor_of(cfg, task, task_type, tokenizer, wanted)


def _prepared(cfg: Config, store: ReadOnlyStore, scratch: Path) -> Artifact:
    """Return the checkpoint; a tiny model that is not built yet after its first step."""
    backbone = prepare_backbone(cfg, store)
    if cfg.model.path is not None or backbone.reused:
        return backbone
    from flare_exp.toy.pretrain import pretrain

    folder = scratch / "backbone" / backbone.digest
    return replace(backbone, path=first_step(folder, pretrain, pretraining(cfg)))


def is_sketch(cfg: Config) -> bool:
    """Return True if a model that is trained, or read for its states, is not here."""
    needed = [(cfg.model.path, cfg.model.revision)]
    if cfg.method.name == "flare_mt":
        needed.append((cfg.mt.path, cfg.mt.revision))
    return any(path is not None and not weights_here(path, revision) for path, revision in needed)


def pretraining(cfg: Config) -> dict[str, Any]:
    """Return the options that an embedded model is built from."""
    return {**asdict(cfg.model.pretrain), "world_seed": cfg.task.world_seed}  # type: ignore[arg-type]


def _sketched(cfg: Config, scratch: Path) -> Artifact:
    """Make a folder with the configuration of a hub checkpoint alone; returns its identity."""
    if cfg.model.path is None:
        raise UserError(
            "method=flare_mt with a translation model that is not here: plan it with a model "
            "that is not embedded"
        )
    folder = scratch / "sketch" / str(cfg.model.path).replace("/", "--")
    config_of(cfg.model.path, cfg.model.revision).save_pretrained(folder)
    families.family_of(str(folder))
    here = weights_here(cfg.model.path, cfg.model.revision)
    return replace(
        existing_checkpoint(cfg.model.path, cfg.model.revision), path=folder, reused=here
    )


@functools.cache
def _task(options: str, few: int) -> Task:
    """Read the benchmark of a task section, once for all jobs that have the same."""
    from flare_exp.config.schema import TaskConfig

    return with_sizes(load_task(SimpleNamespace(task=TaskConfig(**json.loads(options)))), few)  # type: ignore[arg-type]


class Sampled(list):
    """Rows of which each stands for `times` of the benchmark's."""

    def __init__(self, rows: Sequence[Example], times: float):
        super().__init__(rows)
        self.times = times


def with_sizes(task: Task, few: int = FEW) -> Task:
    """Let a benchmark that is not here have rows without text.

    `few` rows are made in place of as many as were published. `task.assumed`: (language, role) ->
    the published number of rows that those few represent.
    """
    assumed: dict[tuple[str, str], int] = {}
    task.assumed = assumed  # type: ignore[attr-defined]
    if not isinstance(task, Benchmark) or task.data_dir:
        return task
    read, load, sizes = task.read, task.load, task.sizes
    absent: dict[tuple[str, str], int] = {}

    @functools.cache
    def rows(lang: str, split: str) -> list[Example]:
        try:
            return read(lang, split)
        except UserError:
            if split not in sizes:
                raise
        count = absent[lang, split] = (
            sizes[split][lang] if isinstance(sizes[split], dict) else sizes[split]
        )
        parts = [part for part in task.splits.values() if part.split == split]
        kept = sorted(
            {i for part in parts for i in range(count)[part.start : part.stop][: task.limit][:few]}
        )
        blank, meaning = (
            ("",) * len(task.fields),
            {"label": 0} if task.labels else {"answers": (Answer("", 0),)},
        )
        return [Example(f"{task.name}/{lang}/{split}/{i}", str(i), blank, **meaning) for i in kept]

    @functools.cache
    def some(lang: str, role: str) -> list[Example]:
        part = task.splits["english_test" if role == "test" and lang == task.english else role]
        found = rows(lang, part.split)
        chosen = range(absent.get((lang, part.split), 0))[part.start : part.stop][: task.limit]
        if not chosen:
            return load(lang, role)
        assumed[lang, role] = len(chosen)
        kept = [
            replace(e, id=f"{e.id} of {len(chosen)}") for e in found if int(e.key) in chosen[:few]
        ]
        return Sampled(kept, len(chosen) / len(kept))

    task.read, task.load = rows, some  # type: ignore[method-assign]
    some(task.english, "train")  # tells whether the benchmark is here
    return task
