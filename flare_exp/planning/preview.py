"""Look at a run from outside: what is built, and what would be. Nothing is trained or downloaded.

The stages are those of a run (flare_exp.experiment.stages), over a store that builds nothing; so
the keys are theirs. What is not there yet is replaced: a tiny model by its first training step, a
translation by the text itself, a checkpoint by its shapes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flare_exp.artifacts import Artifact, digest_of
from flare_exp.config.methods import modes_of
from flare_exp.config.schema import Config
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.unlabeled import UNLABELED
from flare_exp.errors import UserError
from flare_exp.experiment.building import ModelBuilder
from flare_exp.experiment.checkpoints import make_translator, prepare_backbone, pretraining
from flare_exp.experiment.context import (
    RunContext,
    make_preprocessor,
    make_source_preprocessor,
    task_type_of,
)
from flare_exp.experiment.pipeline import load_task, pinned_systems, with_system
from flare_exp.experiment.stages.translation import noise_of, translate
from flare_exp.models import families
from flare_exp.planning import read_only
from flare_exp.planning.assumed_data import FEW, Sampled, with_assumed_rows, with_sizes
from flare_exp.planning.lengths import counting_preprocessor
from flare_exp.planning.read_only import ArtifactMissing, PreviewMT, ReadOnlyStore
from flare_exp.planning.shapes import ShapeBuilder, is_sketch, sketched
from flare_exp.tasks import Example, Task


@dataclass
class DryRun:
    """A run that builds nothing.

    Attributes:
        run: what its stages share.
        store: the run's store.
        mt: the run's translation model.
        shapes: builds models without weights, where a checkpoint is not here; else None.
        untranslated: digest of a translation that a model has yet to make -> the run with its
            translation system, the examples, and how many of the benchmark's rows each of them
            stands for.
    """

    run: RunContext
    store: ReadOnlyStore
    mt: PreviewMT
    shapes: ShapeBuilder | None
    untranslated: dict[str, tuple[RunContext, Sequence[Example], float]]

    @property
    def models(self) -> dict[str, PreviewMT]:
        """Return name of the artifact -> translation model, for each system of the run."""
        further: Any = {f"mt {run.system}": run.mt for run in self.run.systems}
        return {"mt": self.mt, **further}

    @property
    def models_read(self) -> dict[str, PreviewMT]:
        """Return those of `models` that have texts to translate, or states that are fused."""
        asked = [run.mt for run, *_ in self.untranslated.values()]
        if PairingMode.LATENT in modes_of(self.run.cfg.method):
            asked.append(self.mt)
        return {name: mt for name, mt in self.models.items() if mt in asked}

    def weights(self, data: PairedDataModule, role: str) -> list[float]:
        """Return how many of the benchmark's rows each row of a role stands for.

        A test is of one language. Texts without a label are not the benchmark's, and all there.
        """
        task, dataset = self.run.task, data.dataset(role)
        english = role != "test" or data.mode is PairingMode.ENGLISH
        rows = task.load(task.english if english else data.langs[0], role)
        times = getattr(rows, "times", 1.0)
        pairs = [dataset.pairs[number] for number in dataset.examples]
        return [1.0 if pair.target.key.startswith(f"{UNLABELED}/") else times for pair in pairs]


def is_counted(cfg: Config) -> bool:
    """Return True if a run is counted from shapes: a model, or a checkpoint's data, is not here.

    Raises:
        UserError: an embedded model has no data, on which alone it can be probed.
    """
    assumed = _task_of(cfg).assumed  # type: ignore[attr-defined]
    if assumed and cfg.model.path is None:
        raise UserError(
            f"task={cfg.task.name}: the data are not here, and an embedded model "
            f"(model={cfg.model.name}) is planned with real texts; give task.data_dir, or a model "
            "that is not embedded"
        )
    return bool(assumed) or is_sketch(cfg)


def preview(cfg: Config, scratch: Path) -> DryRun:
    """Make the dry run of a settled configuration.

    Raises:
        UserError: where a run would raise it, but not for what could be downloaded.
    """
    store = ReadOnlyStore(cfg.cache_dir, scratch, cfg.mt.translates)
    task = _task_of(cfg)
    shapes_only = is_counted(cfg)
    backbone = sketched(cfg, scratch) if shapes_only else _prepared(cfg, store, scratch)
    family = families.family_of(str(backbone.path), cfg.model.revision)
    task_type, mt = task_type_of(cfg, task, family), PreviewMT(cfg, store)
    shapes = ShapeBuilder(cfg, task, backbone, task_type) if shapes_only else None
    untranslated: dict[str, tuple[RunContext, Sequence[Example], float]] = {}

    def translate_or_note(run: RunContext, examples: Sequence[Example], lang: str) -> list[Example]:
        try:
            made = translate(run, examples, lang)
            if not isinstance(examples, Sampled):
                return made
            by = digest_of(run.translator.identity(examples, lang))
        except ArtifactMissing as missing:
            made, by = [*examples], missing.artifact.digest
            run.translations[by] = missing.artifact
            untranslated[by] = run, examples, getattr(examples, "times", 1.0)
        # a model of the texts themselves, or of rows without text, would have another key
        noise = noise_of(run, examples, lang)
        by += f" with {digest_of(noise)}" if noise else ""
        return [replace(e, id=f"{e.id} by {by}") for e in made]

    run = RunContext(
        cfg,
        store,
        task,
        backbone,
        models=shapes or ModelBuilder(cfg, task, backbone, task_type),
        preprocessor=(counting_preprocessor if shapes_only else make_preprocessor)(
            cfg, task, str(backbone.path), task_type
        ),
        mt=mt,
        translator=with_assumed_rows(make_translator(cfg, task, mt)),
        translate=translate_or_note,
        # lengths need no tokenizer of the translation model
        make_source_preprocessor=(lambda run, langs: run.preprocessor)
        if shapes_only
        else make_source_preprocessor,
    )
    for own in pinned_systems(cfg, required=False):
        kept = ReadOnlyStore(own.cache_dir, scratch, own.mt.translates)
        system = with_system(run, PreviewMT(own, kept), own)
        system.translator = with_assumed_rows(system.translator)
        run.systems = [*run.systems, system]
    return DryRun(run, store, mt, shapes, untranslated)


def _prepared(cfg: Config, store: ReadOnlyStore, scratch: Path) -> Artifact:
    """Return the checkpoint; a tiny model that is not built yet after its first step."""
    backbone = prepare_backbone(cfg, store)
    if cfg.model.path is not None or backbone.reused:
        return backbone
    from flare_exp.toy.pretrain import pretrain

    folder = scratch / "backbone" / backbone.digest
    return replace(backbone, path=read_only.first_step(folder, pretrain, pretraining(cfg)))


def _task_of(cfg: Config) -> Task:
    """Read the benchmark of a configuration, whatever its languages."""
    section = asdict(replace(cfg.task, lang="", unseen=[]))
    return _task(json.dumps(section), max(FEW, cfg.data.batch_size))


@functools.cache
def _task(options: str, few: int) -> Task:
    """Read the benchmark of a task section, once for all jobs that have the same."""
    from flare_exp.config.schema import TaskConfig

    return with_sizes(load_task(SimpleNamespace(task=TaskConfig(**json.loads(options)))), few)  # type: ignore[arg-type]
