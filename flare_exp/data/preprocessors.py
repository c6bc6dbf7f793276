"""Find the preprocessor of a task type by its name."""

from __future__ import annotations

from flare_exp.data.classification import ClassificationPreprocessor
from flare_exp.data.generation import GenerationPreprocessor
from flare_exp.data.preprocessing import Preprocessor
from flare_exp.data.question_answering import ExtractiveQAPreprocessor

PREPROCESSORS: dict[str, type[Preprocessor]] = {
    "label": ClassificationPreprocessor,
    "span": ExtractiveQAPreprocessor,
    "prompt": GenerationPreprocessor,
}
