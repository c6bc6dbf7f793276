"""Translate texts that are in no benchmark, by the translator of a run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from flare_exp.config.schema import Config
from flare_exp.errors import UserError
from flare_exp.experiment.context import RunContext
from flare_exp.toy.world import SPLITS
from flare_exp.translation.machine import MachineTranslator

Texts = tuple[str, ...]  # in the order of Task.fields


class UnknownText(UserError):
    """Error for a text that cannot be translated, while others can."""


class TextTranslator:
    """Translate the texts of users, as a run translates its test data.

    A translation model or a program is called directly: unlike in a run, texts are not kept in the
    cache. mt=toy looks texts of the generated world up. Wrong words (`mt.noise`) are a condition of
    an experiment and are not put in.

    Args:
        run: gives the translator, the task and its languages.
    """

    def __init__(self, run: RunContext):
        self.run, self.task, self.lang = run, run.task, run.cfg.task.lang

    @property
    def machine(self) -> MachineTranslator | None:
        """Return what translates any text; None: the run's translations were looked up."""
        translator = self.run.translator
        return translator if isinstance(translator, MachineTranslator) else None

    def check(self, langs: Sequence[str]) -> None:
        """Check early that texts can be translated into some languages.

        Raises:
            UnknownText: there is no translator: texts that come with their sources need none.
            UserError: it does not have the languages.
        """
        if problem := translator_problem(self.run.cfg):
            raise UnknownText(problem)
        if self.machine is not None:
            self.machine.model.check(*map(self.machine.model.code, (self.lang, *langs)))

    def into(self, lang: str, rows: Sequence[Texts]) -> list[Texts]:
        """Translate all fields of some rows into a language of the sources.

        Raises:
            UserError: there is no translator, or it fails.
            UnknownText: it does not know a text.
        """
        self.check([lang])
        if self.machine is None:
            return [self._looked_up(row, lang) for row in rows]
        every = [text for row in rows for text in row]
        made = iter(self._translated(self.machine, every, self.lang, lang))
        return [tuple(next(made) for _ in row) for row in rows]

    def into_target(self, answers: Sequence[str]) -> list[str]:
        """Translate English answers into the target language.

        Raises:
            UserError: the translator fails.
        """
        assert self.machine
        return self._translated(self.machine, answers, self.task.english, self.lang)

    def _translated(
        self, machine: MachineTranslator, texts: Sequence[str], own: str, lang: str
    ) -> list[str]:
        model = machine.model
        made = model.engine.translate(texts, model.code(own), model.code(lang))
        return [one.text for one in made]

    @functools.cached_property
    def _worlds(self) -> dict[str, Mapping[Texts, Texts]]:
        """Return language -> texts of the generated world -> their texts in it, as asked for."""
        return {}

    def _looked_up(self, row: Texts, lang: str) -> Texts:
        if lang not in self._worlds:
            read = [[self.task.read(one, split) for one in (self.lang, lang)] for split in SPLITS]
            self._worlds[lang] = {
                own.texts: other.texts for part in read for own, other in zip(*part, strict=True)
            }
        if row not in self._worlds[lang]:
            said = " / ".join(row)
            raise UnknownText(
                f"mt=toy knows the generated texts alone, and {said[:60]!r} is none of "
                f"{self.task.name} in {self.lang}; give its source, or choose a translator, for "
                "example mt=toy_nllb"
            )
        return self._worlds[lang][row]


def translator_problem(cfg: Config) -> str | None:
    """Return why the translator of a configuration has no translation of a new text, or None."""
    if cfg.mt.kind == "model" and cfg.mt.path is None and cfg.mt.pretrain is None:
        return (
            f"mt={cfg.mt.name}: the run's translation model was a folder, which is not here; give "
            "it as mt.path, give the source beside each text, or choose a translator, for example "
            "mt=nllb_600m"
        )
    if cfg.mt.translates or cfg.mt.name == "toy":
        return None
    return (
        f"mt={cfg.mt.name}: the run's translations were looked up, so nothing translates new "
        "texts; give the source beside each text, or choose a translator, for example "
        "mt=nllb_600m"
    )
