"""Change the options of a finished run that its model does not depend on, to predict with it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from flare_exp.config import validation
from flare_exp.config.methods import answering
from flare_exp.config.quoting import quoted
from flare_exp.config.schema import Config
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.errors import UserError
from flare_exp.utils.suggestions import allowed

# places that may have moved, and how the model runs
KEYS = (
    "cache_dir",
    "data.batch_size",
    "data.micro_batch_size",
    "model.path",
    "offline",
    "predict.sources",
    "task.data_dir",
    "task.lang",
    "task.spec",
    "task.train_data_dir",
    "trainer.accelerator",
)


def is_allowed(word: str) -> bool:
    """Return whether a key=value word names an option that may be changed."""
    key = word.partition("=")[0]
    return key in KEYS or key.split(".")[0] == "mt"


def overridden(cfg: Config, words: Sequence[str]) -> Config:
    """Return a stored configuration with other options.

    With `task.lang`, the configuration has that language alone: the one of the texts.

    Args:
        cfg: the configuration of a run.
        words: overrides: `mt=...`, `mt.*=...` and those of KEYS, with paths and texts as they are.

    Raises:
        UserError: an option may not be changed, does not exist, or has a wrong value; one message
            names all mistakes.
    """
    if not words:
        return cfg
    words = [quoted(word, several=False) for word in words]
    problems = list(_refused(cfg, words))
    base = [f"task={cfg.task.name}", f"method={cfg.method.name}"]
    (lang, *more) = [w.partition("=")[2] for w in words if w.startswith("task.lang=")] or [""]
    unseen = lang in cfg.task.unseen and not more
    if unseen:  # only its test data are needed
        words = [word for word in words if word != f"task.lang={lang}"]
    if not any(word.startswith("mt=") for word in words):
        base.append(f"mt={cfg.mt.name}")
    (job, *_), found = validation.validate([*base, *words], multirun=False, rules=False)
    if problems := [*problems, *found]:
        raise UserError("; ".join(problems))
    made = _with_values(cfg, job, words)
    if problems := list(_contradictions(made, cfg, [lang] if unseen else [])):
        raise UserError("; ".join(problems))
    if unseen:
        made.task.lang, made.task.unseen = lang, []
    return made


def _contradictions(made: Config, stored: Config, unseen: list[str]) -> Iterator[str]:
    """Yield what is wrong in a configuration, and not in the stored one that it was made of.

    Args:
        made: the configuration with the new values.
        stored: the run's own. It may name places that are not on this machine.
        unseen: the language that is tested, if the run was not trained on it.
    """
    checked = copy.deepcopy(made)
    if checked.task.lang == stored.task.lang:  # no other one is given
        checked.task.lang = checked.task.langs[0]
    checked.task.unseen = unseen
    known = list(validation.check_config(stored, [], multirun=False))
    found = validation.check_config(checked, [], multirun=False)
    yield from (problem for problem in found if problem not in known)


def _refused(cfg: Config, words: Sequence[str]) -> Iterator[str]:
    """Yield a message for each option that may not be changed."""
    latent = PairingMode.LATENT in [one.mode for one in answering(cfg.method).values()]
    for word in words:
        key = word.partition("=")[0]
        if not is_allowed(word):
            yield f"{word}: the run has this option already; {allowed(key, ['mt', 'mt.*', *KEYS])}"
        elif key.startswith("mt") and latent:
            yield f"{word}: method={cfg.method.name} was trained with the encoder of its own mt"


def _with_values(cfg: Config, job: Any, words: Sequence[str]) -> Config:
    """Put the values of a composed configuration in place of those that the words name."""
    from omegaconf import OmegaConf

    composed: Config = OmegaConf.to_object(job)  # type: ignore[assignment]
    made = copy.deepcopy(cfg)
    keys = [word.partition("=")[0] for word in words]
    if "mt" in keys:
        made.mt, keys = composed.mt, [key for key in keys if key.split(".")[0] != "mt"]
    for key in keys:
        *sections, name = key.split(".")
        given, own = (functools.reduce(getattr, sections, whole) for whole in (composed, made))
        setattr(own, name, getattr(given, name))
    if "task.lang" in keys:
        made.task.unseen = []
    return made
