"""Find the preprocessor of a task type by its name.

A task type is how a model takes a task: `label` and `span` by a head, `prompt` as text that it
continues. XNLI is `label` for XLM-R and `prompt` for Llama. The option task.form (auto, head,
generative) chooses among the types of the model's family (`families.choose_task_type`).
"""

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
