"""Name what a model reads and fuses. Without torch: a command line is checked with it."""

from __future__ import annotations

from enum import Enum


class PairingMode(str, Enum):
    """Text that the model reads, and text that it fuses."""

    ENGLISH = "english"  # English text (fine-tuning on English)
    TARGET = "target"  # target-language text alone (zero_shot, lora)
    TRANSLATED = "translated"  # English translation of the target text (translate_test)
    PAIRED = "paired"  # target-language text; fuses its English counterpart (flare)
    JOINT = "joint"  # target-language text and its English counterpart as one text (input_fusion)
    LATENT = "latent"  # target-language text; fuses itself, read by an MT encoder (flare_mt)

    __str__ = str.__str__

    @property
    def reads_english(self) -> bool:
        """Return whether the model reads English, or a translation into English."""
        return self in (PairingMode.ENGLISH, PairingMode.TRANSLATED)

    @property
    def fuses(self) -> bool:
        """Return whether the model fuses a source."""
        return self in (PairingMode.PAIRED, PairingMode.LATENT)

    @property
    def translates_tests(self) -> bool:
        """Return whether the target's test data are translated into English."""
        return self in (PairingMode.TRANSLATED, PairingMode.PAIRED, PairingMode.JOINT)

    @property
    def pairs(self) -> bool:
        """Return whether every text has a source, fused or in the same input."""
        return self.fuses or self is PairingMode.JOINT
