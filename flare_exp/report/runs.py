"""Read run folders."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from flare_exp.config import composition, validation
from flare_exp.config.languages import as_list, joined
from flare_exp.config.methods import DISTIL, ENSEMBLE, METHODS, Method, members_of
from flare_exp.config.mt_schema import MtConfig
from flare_exp.config.options import flat
from flare_exp.errors import first_line
from flare_exp.experiment import run_state
from flare_exp.experiment.checksums import CHECKSUMS, damage
from flare_exp.experiment.runs import VOLATILE
from flare_exp.tasks import TASKS

GROUPS = ("model", "task", "mt", "fusion", "method", "decode")
# options that the first columns of a table show
NAMED = {
    *(f"{group}.name" for group in GROUPS if group != "decode"),
    *("task.lang", "task.unseen", "mt.noise", "mt.noise_in", "method.of"),
}
# option of mt -> names or kinds of the translation systems that have it
MT_OPTIONS = {f.name: f.metadata["only"] for f in fields(MtConfig) if "only" in f.metadata}
ABLATIONS = ("shuffle", "empty")
READING = "reading.json"  # of an export, which has the files of its run, too
TIMED = ("transfer", "test")  # stages whose seconds are shown


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run: its folder, metrics.json, and config.yaml with dotted keys.

    A run with several languages is divided into one for each (`by_language`).
    """

    folder: Path
    metrics: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> tuple[str, str, str, str]:
        """Return model, language, translation and method, as a table shows them."""
        given = self.options
        noise = f", {100 * given['mt.noise']:g}% noise" if given.get("mt.noise") else ""
        if noise and (where := given.get("mt.noise_in", "all")) != "all":
            noise += f" in {where}"
        others = [name for name in self.members if name != self.method]
        details = [" + ".join(others)] if others else []
        if self.fuses:
            details.append(str(given["fusion.name"]))
        details += [f"{n} source" for n in ABLATIONS if given.get(f"source.{n}")]
        details += [f"trained on {'+'.join(self.trained_on)}"] if self.trained_on else []
        method = self.method + (f" ({', '.join(details)})" if details else "")
        return given["model.name"], self.lang, f"{given['mt.name']}{noise}", method

    @property
    def lang(self) -> str:
        """Return the language that the scores are on."""
        return joined(self.metrics["lang"])

    @property
    def trained_on(self) -> tuple[str, ...]:
        """Return the languages that were trained on; empty: that of the scores alone, or none."""
        langs = as_list(self.options["task.lang"])
        return tuple(langs) if self.mixes_languages and langs != [self.lang] else ()

    @property
    def mixes_languages(self) -> bool:
        """Return whether scores on a language depend on the others of the run.

        That is by a training on all of them, or by an ensemble's weights.
        """
        weighs = self.method == ENSEMBLE and self.options.get("method.weights") != "equal"
        return self.trains or weighs

    @property
    def metric(self) -> str:
        """Return the task's main metric. Results on a user's own data (task=custom) hold it."""
        return str(self.metrics.get("metric") or TASKS[self.metrics["task"]].metric)

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names of the task's labels. Results on a user's own data hold them."""
        given = self.metrics.get("labels")
        return TASKS[self.metrics["task"]].labels if given is None else tuple(given)

    @property
    def method(self) -> str:
        """Return the name of the method."""
        return str(self.options["method.name"])

    @property
    def trains(self) -> bool:
        """Return whether the method, or a member of an ensemble, trains on target languages."""
        return any(method.trains for method in self.members.values())

    @property
    def members(self) -> dict[str, Method]:
        """Return name -> method (`flare_exp.config.methods.members_of`)."""
        return members_of(SimpleNamespace(name=self.method, of=self.options.get("method.of") or []))

    @property
    def fuses(self) -> bool:
        """Return whether the method fuses source and target."""
        return any(method.fuses for method in self.members.values())

    @functools.cached_property
    def changed(self) -> dict[str, str]:
        """Return the options that differ from the shipped ones, without those in `name`."""
        groups = (g for g in GROUPS if g != "decode")  # whose name is an option like others
        chosen = [(g, str(self.options.get(f"{g}.name"))) for g in groups]
        shipped = defaults(
            *(f"{g}={name}" for g, name in chosen if name in composition.groups()[g])
        )
        ignored = VOLATILE | NAMED | {"seed", *(f"source.{name}" for name in ABLATIONS)}
        return {
            key: str(self.options.get(key, shipped.get(key)))
            for key in {**shipped, **self.options}
            if key not in ignored and self.has(key)
            if self.options.get(key, shipped.get(key)) != shipped.get(key)
        }

    def unused_options_differ(self, other: Run) -> bool:
        """Return whether two runs of one method differ in an option that the method lacks."""
        keys = {key for key in {**self.options, **other.options} if not self.has(key)}
        return any(self.options.get(key) != other.options.get(key) for key in keys)

    def has(self, key: str) -> bool:
        """Return whether an option can change a run of this method.

        A method without a source has no options of it, and one that trains nothing on the target
        language none of that training. Its scores on a language do not depend on the others. A
        translation system has no options of other ones.
        """
        methods = self.members.values()
        several = len(as_list(self.options["task.lang"])) > 1
        languages = {
            "task.lang": self.mixes_languages,
            "task.unseen": False,
            "task.temperature": self.trains and several,
        }
        if key in languages:
            return languages[key]
        if key in ("method.of", "method.weights"):
            return self.method in ((ENSEMBLE, DISTIL) if key == "method.of" else (ENSEMBLE,))
        section, _, option = key.partition(".")
        if section == "mt" and (owners := MT_OPTIONS.get(option)):
            name = str(self.options["mt.name"])
            return bool({name, MtConfig(name=name).kind} & {*owners})
        return {
            "fusion": self.fuses,
            "predict": self.fuses,
            "source": any(method.mode.pairs for method in methods),
            "distil": self.method == DISTIL,
            "mixup": any(method.mixes for method in methods),
            "transfer": self.trains,
        }.get(section, True)

    @property
    def chrf(self) -> float | None:
        """Return chrF++ of the translated training data, or else of the translated test data.

        Of several languages, it is that of the training data in this one. Further systems
        ("<language> by <system>") do not count.
        """
        scores = (self.metrics.get("translation") or {}).get("chrf++") or {}
        own = [score for name, score in scores.items() if " by " not in name]
        others = () if "languages" in self.metrics else own
        ordered = [scores.get(self.lang), *others]
        return next((score for score in ordered if score is not None), None)

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """Return provenance.json; empty if it is missing, unreadable or damaged."""
        try:
            if damage(self.folder, only=["provenance.json"]):
                return {}
            found = json.loads((self.folder / "provenance.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def trained_parameters(self) -> int | None:
        """Return the number of parameters that the transfer trained; None: unknown."""
        if not (training := self.provenance.get("training")):
            return None
        # a distillation's teachers ("transfer flare") do not answer
        found = [
            facts
            for name, facts in training.items()
            if name == "transfer" or (name.startswith("transfer ") and self.method == ENSEMBLE)
        ]
        if not found:
            return None if self.trains else 0
        return sum(int(facts["parameters"]["trainable"]) for facts in found)

    @property
    def peak_memory(self) -> int | None:
        """Return the peak memory of the run in bytes, of the GPU if it used one; None: unknown.

        It is unknown, too, if the run took its transfer from the cache: then the peak is that of
        testing alone.
        """
        facts = self.provenance
        made = facts.get("artefacts", {})
        if any(made[name].get("reused") for name in made if name.startswith("transfer")):
            return None
        return facts.get("peak_gpu_memory_bytes") or facts.get("peak_memory_bytes")


@functools.cache
def defaults(*groups: str) -> dict[str, Any]:
    """Return the shipped configuration of some groups' options, with dotted keys."""
    from omegaconf import OmegaConf

    (job,), problems = validation.validate(groups, multirun=False)
    if job is None:
        raise ValueError(problems[0])
    return flat(OmegaConf.to_container(job, resolve=True))


def run_folders(folders: Sequence[str]) -> list[Path]:
    """Return the folders below `folders` that a run has begun, each once."""
    found, seen = set(), set()
    for folder in folders:
        for name, inside, files in os.walk(Path(folder), followlinks=True):
            place = Path(name).resolve()
            if {"metrics.json", "config.yaml"}.intersection(files):
                found.add(place)
            if place in seen or place in found:  # a link may lead back to where it is
                inside.clear()  # files inside a run, such as W&B's config.yaml, are no runs
            seen.add(place)
    return sorted(found)


def read(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        ValueError: the run has no result, a file is damaged (the message names it), or this version
            lacks its method or task.
    """
    if not (folder / "metrics.json").is_file():
        state = run_state.read(folder)
        raise ValueError(f"no result ({', '.join(filter(None, (state.state, state.reason)))})")
    sealed = ["provenance.json"] if (folder / CHECKSUMS).is_file() else []
    if problems := damage(folder, only=["metrics.json", "config.yaml", *sealed]):
        raise ValueError(f"damaged: {problems[0]}")
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        _ = metrics["task"], metrics["lang"]
        _ = {**metrics["test"]}, {**metrics["english"]}, {**metrics["zero_shot"]}
        _ = [float(metrics["seconds"][stage]) for stage in TIMED], int(metrics["seed"])
        _ = [({**own["test"]}, {**own["zero_shot"]}) for own in _languages(metrics).values()]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"metrics.json is damaged ({type(error).__name__}: {error})") from None
    try:
        run = Run(folder, metrics, flat(yaml.safe_load((folder / "config.yaml").read_text())))
        _ = run.name, run.changed
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = first_line(error)
        raise ValueError(f"config.yaml is damaged ({type(error).__name__}: {reason})") from None
    if run.method not in (*METHODS, ENSEMBLE):
        raise ValueError(f"this version has no method {run.method}")
    if metrics["task"] not in TASKS and not {"metric", "labels"} <= metrics.keys():
        raise ValueError(f"this version has no task {metrics['task']}")
    return run


def _languages(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return language -> its own scores, of a run with several."""
    return metrics.get("languages", {})


def by_language(run: Run) -> list[Run]:
    """Divide a run with several languages into one for each; another one is returned as it is."""
    return [
        replace(run, metrics={**run.metrics, **own, "lang": lang})
        for lang, own in _languages(run.metrics).items()
    ] or [run]


def mean_of_languages(run: Run) -> Run | None:
    """Return the mean over the languages that a run trained on; None: it has one language."""
    langs = run.metrics["lang"]
    if isinstance(langs, str):
        return None
    return replace(run, metrics={**run.metrics, "lang": f"mean of {'+'.join(langs)}"})
