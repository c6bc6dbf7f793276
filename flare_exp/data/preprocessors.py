"""Find the preprocessor of a task type by its name."""

from __future__ import annotations

from flare_exp.data.classification import LabelForm
from flare_exp.data.generation import PromptForm
from flare_exp.data.preprocessing import Form
from flare_exp.data.question_answering import SpanForm

FORM_CLASSES: dict[str, type[Form]] = {"label": LabelForm, "span": SpanForm, "prompt": PromptForm}
