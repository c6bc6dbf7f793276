"""Define the properties of the methods.

Without torch, so that a command line can be checked before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from flare_exp.data.pairing_mode import PairingMode


@dataclass(frozen=True)
class Method:
    """Properties of a method.

    Args:
        mode: what the model reads and fuses.
        trains: whether an adapter is trained on the target language.
    """

    mode: PairingMode
    trains: bool

    @property
    def fuses(self) -> bool:
        """Return whether the adapter fuses source and target."""
        return self.mode.fuses

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
    "flare": Method(PairingMode.PAIRED, trains=True),
    "flare_mt": Method(PairingMode.LATENT, trains=True),
}
