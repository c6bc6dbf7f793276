"""Define what a translator of benchmark texts does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from flare_exp.tasks import Example

BENCHMARK = ("toy", "gold")  # names of mt whose translations are the benchmark's own
# signs of a bad translation (flare_exp.translation.quality.flags)
FLAGS = ("truncated", "empty", "repetitive", "copy", "wrong_script", "wrong_language")
Flagged = list[tuple[Example, dict[str, bool]]]


class Translator(ABC):
    """Translates examples of one language and split; ids, keys and labels stay the same.

    An answer becomes the matching span of the translated context. An example whose answer is lost
    has none.
    """

    @abstractmethod
    def translate(self, examples: Sequence[Example], lang: str) -> list[Example]:
        """Return the examples in `lang`, in their order."""

    def flagged(self, examples: Sequence[Example], lang: str) -> Flagged:
        """Translate the examples and add FLAGS of each translation, if the translator has any."""
        return [(example, {}) for example in self.translate(examples, lang)]

    @abstractmethod
    def identity(self, examples: Sequence[Example], lang: str) -> dict[str, Any]:
        """Return all that the translation depends on besides the examples.

        `by` says who translated: "human", "file", "machine" or a name; it is only shown. The call
        also checks at once that the translation can be obtained.

        Raises:
            UserError: the translation cannot be obtained.
        """

    def try_out(self, examples: Sequence[Example], lang: str) -> None:  # noqa: B027
        """Translate one example now, if only that shows whether the translation can be obtained.

        Raises:
            UserError: it cannot be obtained.
        """


def has_span(example: Example) -> bool:
    """Return True if the example has an answer with a place in its context."""
    return bool(example.answers) and example.answers[0].start >= 0
