"""Count the tokens of texts where there is no tokenizer to ask."""

from __future__ import annotations

from collections.abc import Sequence

from flare_exp.config.schema import Config
from flare_exp.data.generation import GenerationPreprocessor
from flare_exp.data.preprocessing import Item, Preprocessor
from flare_exp.errors import UserError
from flare_exp.experiment.context import preprocessor_of, stride_of, wanted_length
from flare_exp.models import backbones, families
from flare_exp.tasks import Example, Task

CHARACTERS = 4  # per token, where there is no tokenizer to ask


class CountingPreprocessor(GenerationPreprocessor):
    """Count the tokens of texts without a tokenizer: CHARACTERS to a token.

    Args:
        unknown: tokens of an example without text.
        stride: tokens that two windows share (`flare_exp.data.question_answering`); the question,
            which every window repeats, is not counted.
    """

    def __init__(self, task: Task, max_length: int, unknown: int, stride: int | None):
        Preprocessor.__init__(self, task, None, max_length)  # type: ignore[arg-type]
        self.unknown, self.stride = unknown, stride

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        """Encode texts as ranges, which have lengths and no content."""
        return [
            {
                "inputs": {"input_ids": range(stop - start)},
                "cut": False,
                "example": i,
                "window": (start * CHARACTERS, stop * CHARACTERS),
            }
            for i, example in enumerate(examples)
            for start, stop in self._windows(self._length(example))
        ]

    def encode_sources(self, examples: Sequence[Example]) -> list[Item]:
        """Encode sources as ranges, which have lengths and no content."""
        return [
            {"inputs": {"input_ids": range(min(self._length(e), self.max_length))}, "cut": False}
            for e in examples
        ]

    def joint(self, target: Item, source: Item) -> Item:
        """Return a target that is as long as it is together with its source."""
        tokens = sum(len(item["inputs"]["input_ids"]) for item in (target, source))
        return {**target, "inputs": {"input_ids": range(tokens)}}

    def _windows(self, length: int) -> list[tuple[int, int]]:
        """Return first and last token of each window of a text, or of what a cut text keeps."""
        if self.stride is None or length <= self.max_length:
            return [(0, min(length, self.max_length))]
        starts = range(0, length - self.stride, self.max_length - self.stride)
        return [(start, min(start + self.max_length, length)) for start in starts]

    def _length(self, example: Example) -> int:
        if not any(example.texts):
            return self.unknown
        return 2 + len(self.prompt(example.texts)) // CHARACTERS

    def answer(self, text: str) -> list[int]:
        """Encode an answer as zeros, with one token more for its end."""
        return [0] * (1 + -(-len(text) // CHARACTERS))


def counting_preprocessor(cfg: Config, task: Task, path: str, task_type: str) -> Preprocessor:
    """Make the preprocessing of a checkpoint that is not here, with its tokenizer if that is."""
    wanted = wanted_length(cfg, task_type)
    wanted = min(wanted, families.longest_input(path) or wanted)
    counted = CountingPreprocessor(task, wanted, cfg.data.max_length, stride_of(cfg, task_type))
    if task.assumed:  # type: ignore[attr-defined]
        return counted
    try:
        tokenizer = backbones.load_tokenizer(str(cfg.model.path), cfg.model.revision)
    except UserError:
        return counted
    return preprocessor_of(cfg, task, task_type, tokenizer, wanted)
