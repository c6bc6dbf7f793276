"""Embedded tasks on generated data, which need no network (see flare_exp.toy.world)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from flare_exp.errors import UserError
from flare_exp.tasks.base import Task
from flare_exp.tasks.examples import Answer, Example
from flare_exp.toy.meaning import LABELS, RELATIONS, Inference, Inquiry, Review
from flare_exp.toy.world import SPLITS, World


class ToyTask(Task):
    """A task on the trees of a generated world, in English and three constructed languages.

    The languages are parallel row by row.
    """

    english = "en"
    languages = ("near", "half", "far")
    parallel = True

    def __init__(self, world_seed: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.world = World(world_seed)

    @abstractmethod
    def trees(self, split: str) -> Sequence[Any]:
        """Return the trees of a split."""
        ...

    @abstractmethod
    def content(self, tree: Any, lang: str) -> dict[str, Any]:
        """Return an example's texts, and its label or answers."""

    def read(self, lang: str, split: str) -> list[Example]:
        """Return every example of one split, in the order of its trees.

        Raises:
            UserError: there is no such split.
        """
        if split not in SPLITS:
            raise UserError(f"task {self.name} has no split {split}; it has {', '.join(SPLITS)}")
        return [
            Example(f"{self.name}/{lang}/{split}/{i}", str(i), **self.content(tree, lang))
            for i, tree in enumerate(self.trees(split))
        ]


class ToySentiment(ToyTask):
    """Sentiment of generated reviews."""

    name = "toy_sentiment"
    fields = ("text",)
    prompt = "{text}\nSentiment:"
    labels = LABELS
    metric = "macro_f1"

    def trees(self, split: str) -> list[Review]:
        """Return the reviews of a split."""
        return self.world.reviews(split)

    def content(self, tree: Review, lang: str) -> dict[str, Any]:
        """Return the text of a review and its sentiment."""
        return {"texts": (self.world.render(tree, lang),), "label": tree.label}


class ToyNLI(ToyTask):
    """Natural language inference between two generated reviews."""

    name = "toy_nli"
    fields = ("premise", "hypothesis")
    prompt = "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:"
    labels = RELATIONS
    metric = "accuracy"

    def trees(self, split: str) -> list[Inference]:
        """Return the pairs of reviews of a split."""
        return self.world.inferences(split)

    def content(self, tree: Inference, lang: str) -> dict[str, Any]:
        """Return the premise, the hypothesis and their relation."""
        return {
            "texts": tuple(self.world.render(r, lang) for r in (tree.premise, tree.hypothesis)),
            "label": tree.label,
        }


class ToyQA(ToyTask):
    """Questions about when, where or with whom something happens.

    The answer is one word of the story, inflected as it stands there.
    """

    name = "toy_qa"
    fields = ("context", "question")
    prompt = "Context: {context}\nQuestion: {question}\nAnswer:"
    metric = "exact_match"

    def trees(self, split: str) -> list[Inquiry]:
        """Return the questions of a split."""
        return self.world.inquiries(split)

    def content(self, tree: Inquiry, lang: str) -> dict[str, Any]:
        """Return the context, the question and the answer."""
        context, question, answer, start = self.world.ask(tree, lang)
        return {"texts": (context, question), "answers": (Answer(answer, start),)}
