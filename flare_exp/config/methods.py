"""Define the properties of the methods.

Without torch, so that a command line can be checked before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Properties of a method.

    Args:
        view: what an example is read from, one of `flare_exp.data.pairing.VIEWS`.
        trains: whether an adapter is trained on the target language.
        fuses: whether that adapter fuses source and target.
    """

    view: str
    trains: bool
    fuses: bool = False

    @property
    def reads_translated_tests(self) -> bool:
        """Return whether the method reads translations of the target's test data."""
        return self.view in ("paired", "translated")

    @property
    def translates(self) -> bool:
        """Return whether the method needs any translation.

        This is either English training data or the target's test data.
        """
        return self.trains or self.reads_translated_tests


METHODS = {
    "zero_shot": Method("target", trains=False),
    "translate_test": Method("translated", trains=False),
    "lora": Method("target", trains=True),
    "flare": Method("paired", trains=True, fuses=True),
    "flare_mt": Method("latent", trains=True, fuses=True),
}
