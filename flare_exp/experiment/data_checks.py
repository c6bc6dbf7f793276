"""Check the data of a run and its translations before any model is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from flare_exp.config.methods import ENSEMBLE, answering, members_of
from flare_exp.config.schema import Config
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.errors import UserError
from flare_exp.tasks import Example, Task, fingerprint
from flare_exp.tasks.base import check_labels, doubts
from flare_exp.translation.base import Translator
from flare_exp.translation.machine import MachineTranslator


def check_data(task: Task, *langs: str) -> dict[str, dict[str, Any]]:
    """Load every split before any model; returns sizes, fingerprints and doubts.

    Args:
        task: the benchmark.
        *langs: the languages that are tested.

    Raises:
        UserError: unreadable data, or (in a parallel benchmark) test examples among the training
            examples, or labels that differ between translations of one another.
    """
    english = [(task.english, role) for role in (*task.training_roles, "test")]
    needed = [*english, *((lang, "test") for lang in langs)]
    loaded = {f"{own}/{role}": task.load(own, role) for own, role in needed}
    if task.parallel:
        for lang in langs:
            _check_parallel(task, loaded, f"{lang}/test")
    facts: dict[str, dict[str, Any]] = {
        name: {"examples": len(rows), "fingerprint": fingerprint(rows), **doubts(task, rows)}
        for name, rows in loaded.items()
    }
    if left_out := len(task.shared(task.english)):
        facts[f"{task.english}/train"]["left_out"] = left_out
    train, tests = (repeatable(loaded[f"{task.english}/{role}"]) for role in ("train", "test"))
    for name, rows in loaded.items():
        if name != f"{task.english}/train" and (
            repeated := len([e for e in rows if e.texts in train])
        ):
            facts[name]["trained"] = repeated
    for name in (f"{lang}/test" for lang in langs):
        if same := len([e for e in loaded[name] if e.texts in tests]):
            facts[name]["english"] = same
    return facts


def _check_parallel(task: Task, loaded: Mapping[str, Sequence[Example]], name: str) -> None:
    """Check one test set of a parallel benchmark against its English data.

    Raises:
        UserError: a test example translates a training example, or labels differ.
    """
    trained = {
        (e.split, e.key) for role in task.training_roles for e in loaded[f"{task.english}/{role}"]
    }
    if leaked := [e.id for e in loaded[name] if (e.split, e.key) in trained]:
        raise UserError(
            f"{len(leaked)} test examples are translations of training or validation "
            f"examples, e.g. {leaked[0]}"
        )
    check_labels(task, loaded[name], loaded[f"{task.english}/test"])


def repeatable(examples: Sequence[Example]) -> set[tuple[str, ...]]:
    """Return the texts of some examples, without empty ones.

    That another example has an empty text too means nothing.
    """
    return {e.texts for e in examples if any(text.strip() for text in e.texts)}


def needed_translations(cfg: Config, task: Task) -> list[str]:
    """Return the roles whose examples a run translates: of the training data, and "test"."""
    methods = members_of(cfg.method).values()
    roles = [*task.training_roles] if any(m.trains for m in methods) else []
    if cfg.method.name == ENSEMBLE and cfg.method.weights != "equal":
        roles.append("validation")
    if any(m.reads_translated_tests for m in answering(cfg.method).values()):
        roles.append("test")
    return list(dict.fromkeys(roles))


def read_languages(cfg: Config, task: Task) -> list[str]:
    """Return the languages of the sources, which test texts are translated into."""
    if not cfg.source.langs:
        return [task.english]
    modes = {m.mode for m in answering(cfg.method).values() if m.reads_translated_tests}
    # translate_test and input_fusion read English, whatever flare reads
    english = [task.english] if modes - {PairingMode.PAIRED} else []
    return list(dict.fromkeys([*english, *cfg.source.langs]))


def check_every_translation(
    cfg: Config, task: Task, maker: Translator, *systems: Translator
) -> None:
    """Find out whether all translations of a run can be had; of unseen languages, those of tests.

    Args:
        cfg: the configuration.
        task: the benchmark.
        maker: translates.
        *systems: translate the tests, too (`source.systems`).

    Raises:
        UserError: they cannot.
    """
    roles, others = needed_translations(cfg, task), read_languages(cfg, task)
    for lang in cfg.task.langs:
        check_translations(maker, task, lang, roles, others)
    for lang in cfg.task.unseen:
        tests = [role for role in roles if role == "test"]
        check_translations(maker, task, lang, tests, others)
    modes = [method.mode for method in answering(cfg.method).values()]
    if PairingMode.LATENT in modes and isinstance(maker, MachineTranslator):
        # its encoder reads test texts themselves, and a code that it lacks as an unknown token
        maker.model.check(*map(maker.model.code, cfg.task.tested))
    for system, lang in itertools.product(systems, cfg.task.tested):
        try:
            check_translations(system, task, lang, ["test"])
        except UserError as error:
            names = ",".join(cfg.source.systems)
            raise UserError(f"source.systems=[{names}]: {error}") from error


def check_translations(
    maker: Translator,
    task: Task,
    lang: str,
    roles: Sequence[str],
    sources: Sequence[str] | None = None,
) -> None:
    """Find out before any model is loaded whether the translations of some roles can be had.

    Args:
        maker: translates.
        task: the benchmark.
        lang: a target language.
        roles: roles whose examples are translated.
        sources: languages of the sources of test texts; None: English. Training texts are
            translated into those but English, too.

    Raises:
        UserError: they cannot.
    """
    directions = {}
    read = [task.english] if sources is None else sources
    others = [other for other in read if other != task.english]
    for role in roles:
        own = lang if role == "test" else task.english
        for other in read if role == "test" else (lang, *others):
            maker.identity(task.load(own, role), other)
            directions[own, other] = role
    for (own, other), role in directions.items():
        maker.try_out(task.load(own, role), other)
