"""What the methods need; without torch, so that a command line can be judged before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Say what a method reads, whether it trains an adapter on the target language, and whether that fuses.

    Args:
        view: one of `flare_exp.data.pairing.VIEWS`.
    """

    view: str
    trains: bool
    fuses: bool = False

    @property
    def reads_translated_tests(self) -> bool:
        return self.view in ("paired", "translated")

    @property
    def translates(self) -> bool:
        """Whether any text is translated for it: English training data, or the target's test data."""
        return self.trains or self.reads_translated_tests


METHODS = {
    "zero_shot": Method("target", trains=False),
    "translate_test": Method("translated", trains=False),
    "lora": Method("target", trains=True),
    "flare": Method("paired", trains=True, fuses=True),
    "flare_mt": Method("latent", trains=True, fuses=True),
}
