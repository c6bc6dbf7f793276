"""The embedded tasks: generated, so that a first look needs no network (see flare_exp.tiny.world)."""

from __future__ import annotations

from flare_exp.errors import UserError
from flare_exp.tasks.base import Example, Task
from flare_exp.tiny.world import LABELS, SPLITS, World


class ToySentiment(Task):
    """Sentiment of generated reviews in English and the two constructed languages, row by row parallel."""

    name = "toy_sentiment"
    english = "en"
    languages = ("near", "far")
    labels = LABELS
    metric = "macro_f1"
    parallel = True

    def __init__(self, world_seed: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.world = World(world_seed)

    def read(self, lang: str, split: str) -> list[Example]:
        if split not in SPLITS:
            raise UserError(f"task {self.name} has no split {split}; it has {', '.join(SPLITS)}")
        return [
            Example(f"{self.name}/{lang}/{split}/{i}", str(i), (self.world.render(review, lang),), review.label)
            for i, review in enumerate(self.world.reviews(split))
        ]
