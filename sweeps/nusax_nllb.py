"""Trains a tiny NLLB for a few minutes on NusaX's human translations, English and back, so that
speed can be measured on real text with a checkpoint that ends its sentences as translators do:
`python sweeps/nusax_nllb.py DATA/nusax FOLDER`. Its quality is poor.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from flare_exp.tasks import NusaX
from flare_exp.toy.translation_model import learn

LANGS = ("eng", "ace", "ban", "ind", "jav", "min", "sun")


def main(data: str, folder: str) -> None:
    task, pairs = NusaX(data_dir=data), []
    english = {e.key: e.texts[0] for e in task.load("eng", "train")}
    for lang in LANGS[1:]:
        for e in task.load(lang, "train"):
            sides = (("eng", english[e.key]), (lang, e.texts[0]))
            pairs += [sides, sides[::-1]]
    recipe = {
        "steps": 3000,
        "batch_size": 16,
        "lr": 2e-3,
        "vocab_size": 1500,
        "hidden_size": 128,
        "layers": 2,
        "heads": 4,
    }
    print(learn(Path(folder), pairs, LANGS, **recipe))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(*sys.argv[1:])
