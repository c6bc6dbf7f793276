"""Define the properties of the methods.

Without torch, so that a command line can be checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flare_exp.data.pairing_mode import PairingMode


@dataclass(frozen=True)
class Method:
    """Properties of a method.

    Args:
        mode: what the model reads and fuses.
        trains: whether a model is trained on the target language.
        full: whether all weights are trained there; otherwise an adapter is.
        mixes: whether blocks mix source and target (X-Mixup), instead of the adapter.
    """

    mode: PairingMode
    trains: bool
    full: bool = False
    mixes: bool = False

    @property
    def fuses(self) -> bool:
        """Return whether the adapter fuses source and target by a fusion function."""
        return self.mode.fuses and not self.mixes

    @property
    def reads_translated_tests(self) -> bool:
        """Return whether the method reads translations of the target's test data."""
        return self.mode.translates_tests

    @property
    def translates(self) -> bool:
        """Return whether the method needs any translation.

        This is either English training data or the target's test data.
        """
        return self.trains or self.reads_translated_tests


METHODS = {
    "zero_shot": Method(PairingMode.TARGET, trains=False),
    "translate_test": Method(PairingMode.TRANSLATED, trains=False),
    "lora": Method(PairingMode.TARGET, trains=True),
    "full": Method(PairingMode.TARGET, trains=True, full=True),
    "input_fusion": Method(PairingMode.JOINT, trains=True),
    "x_mixup": Method(PairingMode.PAIRED, trains=True, mixes=True),
    "flare": Method(PairingMode.PAIRED, trains=True),
    "flare_mt": Method(PairingMode.LATENT, trains=True),
    "distil": Method(PairingMode.TARGET, trains=True),
}
ENSEMBLE = "ensemble"  # combines the probabilities of other methods; has no model of its own
DISTIL = "distil"  # trains on the probabilities of other methods, its teachers


class Chosen(Protocol):
    """The method section of a configuration."""

    name: str
    of: list[str]


def members_of(chosen: Chosen) -> dict[str, Method]:
    """Return name -> method for the methods that a run trains and tests.

    That is one method, or the members of an ensemble, or the teachers of a distillation and their
    student. Unknown names are left out.
    """
    several: dict[str, Sequence[str]] = {ENSEMBLE: chosen.of, DISTIL: [*chosen.of, DISTIL]}
    names = several.get(chosen.name, [chosen.name])
    return {name: METHODS[name] for name in names if name in METHODS}


def answering(chosen: Chosen) -> dict[str, Method]:
    """Return name -> method for the methods that answer test texts: of `members_of`, no teacher."""
    members = members_of(chosen)
    return {DISTIL: members[DISTIL]} if chosen.name == DISTIL else members


def modes_of(chosen: Chosen) -> list[PairingMode]:
    """Return what each of `members_of` reads and fuses."""
    return [method.mode for method in members_of(chosen).values()]


def fuses(chosen: Chosen) -> bool:
    """Return whether one of `members_of` has a fusion adapter."""
    return any(method.fuses for method in members_of(chosen).values())
