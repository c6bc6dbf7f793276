"""Load the model of a finished run from its folder, and predict with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import DataLoader
from yaml import YAMLError

from flare_exp.artifacts import Artifact, ArtifactStore
from flare_exp.config.methods import ENSEMBLE, METHODS
from flare_exp.config.schema import RETIRED, Config
from flare_exp.config.suggestions import allowed
from flare_exp.data.dataset import PairedCollator, PairedDataset
from flare_exp.data.pairing import Pair
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.errors import UserError, first_line
from flare_exp.experiment import fitting, pipeline
from flare_exp.experiment.checkpoints import prepare_backbone
from flare_exp.experiment.checksums import damage
from flare_exp.experiment.context import RunContext
from flare_exp.experiment.runs import quiet
from flare_exp.experiment.stages.testing import trained_model
from flare_exp.tasks import Example
from flare_exp.training.tracking import Tracker

Text = (
    str | Sequence[str]
)  # a sequence where a task has several fields, in the order of Task.fields


class LoadedRun:
    """Hold the model of a run, in eval mode, with what it needs to read texts.

    Attributes:
        model: the transformers model; with the adapter a PeftModel.
        tokenizer: the model's tokenizer.
        source: fills the source states before a forward (`flare_exp.flare.source_states`); None
            where the method does not fuse.
        task: labels, fields and prompt.
    """

    def __init__(self, run: RunContext, model: Any, source: Any):
        self.run, self.model, self.source = run, model, source
        self.task, self.tokenizer = run.task, run.preprocessor.tokenizer
        self.mode = METHODS[run.cfg.method.name].mode

    def predict(
        self,
        texts: Sequence[Text],
        sources: Sequence[Text] | None = None,
        lang: str | None = None,
    ) -> list[str]:
        """Return one label or answer per text.

        Args:
            texts: in the target language; for `translate_test` their English translations. A task
                with several fields takes a sequence of texts each, for example (context, question).
            sources: the texts' English translations, which methods `flare` and `input_fusion`
                read. Other methods take none.
            lang: the language of the texts, which `flare_mt` needs in a run with several.

        Raises:
            UserError: sources are missing or not wanted, their number or a text's fields do not
                fit, or the language is missing or unknown.
        """
        lang = self._language(lang)
        targets = self._examples(texts, "texts")
        if (self.mode in (PairingMode.PAIRED, PairingMode.JOINT)) != (sources is not None):
            wants = "give the texts' English translations" if sources is None else "leave them out"
            raise UserError(f"sources: method {self.run.cfg.method.name}: {wants}")
        read: Sequence[Example | None] = [None] * len(targets)
        if sources is not None:
            read = self._examples(sources, "sources")
        elif self.mode is PairingMode.LATENT:
            read = targets
        if len(read) != len(targets):
            raise UserError(f"sources: {len(read)} for {len(targets)} texts; give one for each")
        if not targets:
            return []
        data = self.run.data(self.mode, lang=lang)
        source_preprocessor = data.source_preprocessor
        pairs = [Pair(target, source) for target, source in zip(targets, read, strict=True)]
        joint = self.mode is PairingMode.JOINT
        dataset = PairedDataset(pairs, data.preprocessor, source_preprocessor, joint=joint)
        loader = DataLoader(
            dataset,
            batch_size=self.run.cfg.data.batch_size,
            collate_fn=PairedCollator(self.run.preprocessor, source_preprocessor),
        )
        module = fitting.make_module(self.run, self.model, self.source).eval()
        trainer = fitting.make_trainer(self.run, enable_checkpointing=False, logger=False)
        outputs: Sequence[Any] = trainer.predict(module, loader) or ()
        found = {row: one for output in outputs for row, one in output.items()}
        return dataset.texts(found)

    def _language(self, lang: str | None) -> str:
        """Return the language of texts; where the model does not depend on it, any of the run's.

        Raises:
            UserError: it is missing, or no language of the benchmark.
        """
        langs = self.run.cfg.task.langs
        if lang is None and self.mode is PairingMode.LATENT and len(langs) > 1:
            raise UserError(
                f"lang: method {self.run.cfg.method.name} needs the language of the texts; give "
                f"one of {', '.join(self.run.cfg.task.tested)}"
            )
        if lang is not None and lang not in self.task.languages:
            raise UserError(f"lang={lang}: {allowed(lang, self.task.languages)}")
        return lang or langs[0]

    def _examples(self, texts: Sequence[Text], name: str) -> list[Example]:
        found = []
        for i, given in enumerate(texts):
            fields = (given,) if isinstance(given, str) else tuple(given)
            if len(fields) != len(self.task.fields) or not all(
                isinstance(text, str) for text in fields
            ):
                raise UserError(
                    f"{name}[{i}]: give {' and '.join(self.task.fields)} as text, not {given!r}"
                )
            # the label is not looked at
            label = 0 if self.task.labels else None
            found.append(Example(f"{self.task.name}/given/given/{i}", str(i), fields, label))
        return found


def load(folder: str | Path) -> LoadedRun:
    """Load a finished run.

    The pre-trained model comes from where the run had it: the hub or its folder. An embedded one
    (model=tiny...) comes from the run's cache, and is built again where the cache lost it.

    Args:
        folder: the run folder.

    Raises:
        UserError: there is no finished run, or it was made by a version with other options.
    """
    folder = Path(folder).expanduser()
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder}: there is no finished run (metrics.json) in this folder")
    if problems := damage(folder):
        raise UserError(
            f"{folder} is damaged: {', '.join(problems[:5])}; the run's own command makes it again"
        )
    given = stored_config(folder)
    given.trainer.enable_progress_bar = False
    quiet(given)
    if given.method.name == ENSEMBLE:
        raise UserError(
            f"{folder} is an ensemble of {', '.join(given.method.of)}: it has no model of its own; "
            "load the run of a member"
        )
    cfg = pipeline.resolve_hardware(given)
    store = ArtifactStore(cfg.cache_dir)
    task, backbone = pipeline.load_task(cfg), prepare_backbone(cfg, store)
    run = pipeline.make_context(cfg, store, task, backbone, Tracker(folder, {}))
    english, method = saved(folder, "english"), METHODS[cfg.method.name]
    with isolate_rng():  # loading seeds the generators, and the caller's stay as they are
        if method.trains and not method.full:
            return LoadedRun(run, *trained_model(run, saved(folder, "adapter"), english))
        model = saved(folder, "model") if method.full else english
        return LoadedRun(run, *trained_model(run, model, None))


def saved(folder: Path, name: str) -> Artifact:
    """Return the weights that a run folder keeps: `english`, `adapter` or `model`."""
    return Artifact(folder / name, name, "", {}, 0.0, True)


def stored_config(folder: Path) -> Config:
    """Return the configuration of a run folder, also if an earlier version wrote it.

    Raises:
        UserError: it cannot be read, or has options that this version does not have.
    """
    try:
        stored: Any = OmegaConf.load(folder / "config.yaml")
        for key in RETIRED:  # options of earlier versions
            section, _, name = key.rpartition(".")
            stored.get(section, {}).pop(name, None)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), stored))  # type: ignore[return-value]
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{folder / 'config.yaml'} cannot be used: {first_line(error)}") from error
