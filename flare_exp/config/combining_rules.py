"""Check the methods that combine others: ensembles, and distillation from teachers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from flare_exp.config.methods import DISTIL, ENSEMBLE
from flare_exp.config.schema import PROMPTED, Config
from flare_exp.config.source_rules import similarity_problems
from flare_exp.data.rows import path_problem

HEADLESS = "soft labels are learned by a classification head, and a prompt has none"
COUNTS = {ENSEMBLE: (2, 4, "two to four methods"), DISTIL: (1, 4, "one to four teachers")}


def combining_problems(cfg: Config, task: Any) -> Iterator[str]:
    """Check `method.of`, the weights of an ensemble, and what a student learns from.

    Args:
        cfg: the configuration.
        task: the class of the task; None: it is not known.
    """
    name = cfg.method.name
    if name in COUNTS:
        yield from _members_problems(cfg, task)
    if name == ENSEMBLE:
        yield from _weights_problems(cfg)
    if name == DISTIL:
        yield from _texts_problems(cfg)
        yield from _prompt_problems(cfg, task)
        return
    for f in fields(cfg.distil):
        value = getattr(cfg.distil, f.name)
        if value != f.default:
            yield f"distil.{f.name}={value} with method={name}: only {DISTIL} has it"


def _members_problems(cfg: Config, task: Any) -> Iterator[str]:
    """Check the number of the methods in `method.of`, and that they give label probabilities."""
    name, of = cfg.method.name, cfg.method.of
    least, most, said = COUNTS[name]
    if not least <= len(of) <= most or len({*of}) < len(of):
        yield f"method.of=[{','.join(of)}]: method={name} has {said}, each once"
    if task is not None and not task.labels:
        yield (
            f"method={name} with task={cfg.task.name}: it reads the probabilities of labels, and "
            "answers have none; choose a task with labels"
        )
    elif cfg.decode.name == "generate":
        yield (
            f"method={name} with decode=generate: generated labels have no probabilities; choose "
            "decode=score"
        )


def _weights_problems(cfg: Config) -> Iterator[str]:
    """Check that there is something to choose the weights of an ensemble on."""
    weights = f"method.weights={cfg.method.weights}"
    if cfg.method.weights != "equal" and cfg.task.validation_split is None:
        yield (
            f"{weights} with task.validation_split=null: there is nothing to choose weights on; "
            "choose method.weights=equal"
        )
    if cfg.method.weights == "similarity":
        yield from similarity_problems(cfg, f"{weights} with method.of=[{','.join(cfg.method.of)}]")


def _prompt_problems(cfg: Config, task: Any) -> Iterator[str]:
    """Check that labels are given by a classification head, as far as that is known already.

    A checkpoint is looked at when it is loaded.
    """
    if task is None or not task.labels:
        return
    if cfg.task.form == "generative":
        yield f"method={DISTIL} with task.form=generative: {HEADLESS}; leave it out"
    pretrain = cfg.model.pretrain if cfg.model.path is None else None
    if pretrain is not None and pretrain.architecture in PROMPTED:
        yield (
            f"method={DISTIL} with model={cfg.model.name}: {HEADLESS}; choose an encoder, for "
            "example model=tiny"
        )


def _texts_problems(cfg: Config) -> Iterator[str]:
    """Check the file of texts without labels."""
    texts = cfg.distil.texts
    if texts is None:
        return
    if problem := path_problem(Path(texts)):
        yield f"distil.texts={texts}: {problem}"
    if len(cfg.task.langs) > 1:
        yield (
            f"distil.texts={texts} with task.lang=[{','.join(cfg.task.langs)}]: the texts are in "
            "one language; choose one"
        )
