"""TyDiQA-GoldP: questions and answer spans in nine languages (arXiv 2003.05002).

They were collected in each language, without translation.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar

from flare_exp.tasks.base import Benchmark, warn_once
from flare_exp.tasks.examples import Example, read_answers
from flare_exp.tasks.tables import ANSWERS, ID, TEXT

# language -> prefix of its ids on the hub
PREFIXES = {
    "en": "english",
    "ar": "arabic",
    "bn": "bengali",
    "fi": "finnish",
    "id": "indonesian",
    "ko": "korean",
    "ru": "russian",
    "sw": "swahili",
    "te": "telugu",
}


class TyDiQA(Benchmark):
    """TyDiQA-GoldP, from the hub's one table or from a data_dir with one folder per language.

    The prefix of `id` gives the language of a row in the hub's table. Some of the hub's answer
    offsets count bytes or are wrong; an answer whose text is in the context is moved to its place.
    """

    name = "tydiqa"
    english = "en"
    languages = tuple(PREFIXES)[1:]
    fields = ("context", "question")
    prompt = "Context: {context}\nQuestion: {question}\nAnswer:"
    metric = "exact_match"

    hub_id = "google-research-datasets/tydiqa"
    # the commit that several public projects pin; not loaded live when this was written
    revision = "da78f23f9119363459acbaf46bf89426ff26c259"
    columns: ClassVar = {"id": ID, "context": TEXT, "question": TEXT, "answers": ANSWERS}
    sizes: ClassVar = {
        "train": {
            "en": 3696,
            "ar": 14805,
            "bn": 2390,
            "fi": 6855,
            "id": 5702,
            "ko": 1625,
            "ru": 6490,
            "sw": 2755,
            "te": 5563,
        },
        "validation": {
            "en": 440,
            "ar": 921,
            "bn": 113,
            "fi": 782,
            "id": 565,
            "ko": 276,
            "ru": 812,
            "sw": 499,
            "te": 669,
        },
    }

    @classmethod
    def hub_config(cls, lang: str) -> str:
        """Return the hub's configuration of GoldP, which holds all languages."""
        return "secondary_task"

    def hub_rows(self, lang: str, split: str) -> list[dict[str, Any]]:
        """Read the rows of a split from the hub, and keep those of the language."""
        return [
            row
            for row in super().hub_rows(lang, split)
            if str(row["id"]).startswith(f"{PREFIXES[lang]}-")
        ]

    def read(self, lang: str, split: str) -> list[Example]:
        """Return every example of one split, in file order.

        A warning counts the contexts that do not hold their answer.
        """
        examples = super().read(lang, split)
        if lost := [e for e in examples if any(a.start < 0 for a in e.answers)]:
            warn_once(
                f"{self.name}/{lang}/{split}: {len(lost)} of {len(examples)} contexts do not hold "
                "their answer, e.g. that of "
                f"{lost[0].key}; kept, but no span can be learned from them"
            )
        return examples

    def example(self, id: str, row: dict[str, Any]) -> Example:
        """Convert one row to an example, and correct the offsets of its answers."""
        context = row["context"]
        answers = tuple(
            replace(a, start=locate(context, a.text, a.start)) for a in read_answers(row["answers"])
        )
        return Example(id, str(row["id"]), (context, row["question"]), answers=answers)


def locate(context: str, text: str, start: int) -> int:
    """Return the place of `text` in `context`, or -1 if the context does not hold it.

    That is `start` if the text is there, and otherwise the nearest place, where `start` counts
    characters or UTF-8 bytes.
    """
    if start >= 0 and context.startswith(text, start):
        return start
    characters = len(context.encode()[: max(start, 0)].decode(errors="ignore"))
    places = (match.start() for match in re.finditer(re.escape(text), context))
    return min(places, key=lambda at: min(abs(at - start), abs(at - characters)), default=-1)
