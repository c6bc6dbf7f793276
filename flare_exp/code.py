"""Hash the code that decides an artifact's content, so that changed code never reuses it.

Comments, docstrings and formatting do not count, nor does the version of Python that computes the
hash.
"""

from __future__ import annotations

import ast
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flare_exp.artifacts import digest_of

WORLD = ("toy.grammar", "toy.meaning", "toy.world", "toy.lexicon")
PRETRAINING = (
    "toy.architectures",
    "toy.objectives",
    "toy.pretrain",
    "toy.tokenizers",
    "toy.training",
)
# kind of content -> modules of this package that decide it. These are not the kinds of the store:
# finetune, transfer and test all have "model" in their keys. `module:name` is one function or
# class, where the rest of the module has no influence.
CODE = {
    "backbone": (*PRETRAINING, *WORLD),
    "mt": ("toy.translation_model", "languages", *PRETRAINING, *WORLD),
    "ctranslate2": ("translation.engines:convert", "translation.nllb:load_model"),
    "engine": (
        "translation.engines",
        "translation.nllb",
        "translation.quality",
        "translation.segmentation",
    ),
    "command": ("translation.command", "translation.quality"),
    "marks": ("translation.projection",),
    "translation": (
        "experiment.stages.translation:quality",
        "tasks.metrics:translation",
        "translation.base",
        "translation.lookup",
        "translation.machine",
        "translation.projection",
    ),
    "noise": ("translation.noise",),
    "ensemble": (
        "experiment.stages.ensemble",
        "experiment.stages.similarity:reliability",
        "experiment.stages.similarity:trust",
        "tasks.examples",
        "tasks.metrics",
    ),
    "similarity": ("experiment.stages.similarity",),
    "distil": ("experiment.stages.distillation", "training.distillation"),
    # preparation of examples, training, answers and scores; the row of the model's family is a part
    # of the key
    "model": (
        "data.classification",
        "data.datamodule",
        "data.dataset",
        "data.generation",
        "data.pairing",
        "data.pairing_mode",
        "data.preprocessing",
        "data.preprocessors",
        "data.question_answering",
        "data.sampling",
        "data.temperature",
        "experiment.building",
        "experiment.context",
        "experiment.fitting",
        "experiment.stages.finetune",
        "experiment.stages.testing",
        "experiment.stages.transfer",
        "flare.adapter",
        "flare.peft_method",
        "flare.source_states:positions",
        "models.backbones:Precision",
        "models.backbones:_head",
        "models.backbones:_pretrained",
        "models.backbones:_quantization",
        "models.backbones:auto_class",
        "models.backbones:load",
        "models.backbones:load_tokenizer",
        "models.backbones:wrap",
        "models.families:longest_input",
        "tasks.base",
        "tasks.examples",
        "tasks.metrics",
        "tasks.reading",
        "training.consistency",
        "training.distributed:all_gather_dict",
        "training.generation",
        "training.global_batch",
        "training.heads",
        "training.modules",
    ),
    "fusion": (
        "flare.fusion",
        "flare.mixup",
        "flare.source_encoders",
        "flare.source_states",
        "data.source_augmentation",
        "data.source_cache",
    ),
    "states": (
        "flare.adapter",
        "flare.peft_method",
        "flare.source_encoders",
        "flare.source_states",
        "data.source_cache",
    ),
    "encoder": (
        "translation.nllb:_dtype",
        "translation.nllb:load_encoder",
        "translation.nllb:load_model",
    ),
}

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_of(*kinds: str, task: str | None = None) -> str:
    """Return the hash of the code behind some kinds of content.

    Args:
        *kinds: keys of CODE.
        task: module of a task, which is hashed, too; None: no task.

    Raises:
        LookupError: CODE names a module, function or class that does not exist.
    """
    names = sorted({f"{__package__}.{name}" for kind in kinds for name in CODE[kind]})
    found = {}
    for name in [*names, *([task] if task else [])]:
        module, _, member = name.partition(":")
        found[name] = _hash(module, source_of(module), member)
    return digest_of(found)[:16]


def remember(*modules: str) -> None:
    """Read the sources of all kinds of content, and of `modules`, as they are now.

    A run calls it when it begins. Otherwise code that is edited while the run goes on would give
    its hash to what the code in memory makes.
    """
    for names in CODE.values():
        for name in names:
            source_of(f"{__package__}.{name.partition(':')[0]}")
    for module in modules:
        source_of(module)


@functools.cache
def source_of(module: str) -> str:
    """Return the source of a module.

    Raises:
        LookupError: there is no such module.
    """
    try:
        spec = find_spec(module)
    except ValueError:  # __main__
        spec = None
    if spec is None or spec.origin is None:
        raise LookupError(f"flare_exp/code.py: there is no module {module}")
    return Path(spec.origin).read_text(encoding="utf-8")


@functools.cache
def _hash(module: str, source: str, member: str) -> str:
    """Return the hash of a module, or of one function or class of it."""
    tree: ast.AST = ast.parse(source)
    if member:
        found = [node for node in tree.body if getattr(node, "name", None) == member]  # type: ignore[attr-defined]
        if not found:
            raise LookupError(f"flare_exp/code.py: {module} has no {member}")
        tree = found[0]
    return digest_of(_structure(tree))


def _structure(node: Any) -> Any:
    """Return a syntax tree as nested lists and strings, without docstrings.

    The output of `ast.dump` and `ast.unparse` depends on the version of Python: new versions add
    empty fields and quote strings in another way.
    """
    if isinstance(node, list):
        return [_structure(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {
        name: value for name, value in ast.iter_fields(node) if value is not None and value != []
    }
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    return [type(node).__name__, *([name, _structure(value)] for name, value in fields.items())]
