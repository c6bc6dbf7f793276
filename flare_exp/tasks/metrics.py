"""Score predicted texts, as fractions in 0..1, and translations.

Validation during training and the test use the same functions.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchmetrics.classification import MulticlassF1Score

from flare_exp.tasks.examples import INVISIBLE


def classification(
    predictions: Sequence[str], gold: Sequence[str], labels: Sequence[str]
) -> dict[str, float]:
    """Compute the accuracy and the macro F1.

    Macro F1 is the unweighted mean over the classes that occur in predictions or gold. A prediction
    that is not a label (an unparsable generation) is wrong: it lowers the recall of its gold class
    and the precision of no class.
    """
    number = {label: i for i, label in enumerate(labels)}
    guess = torch.tensor([number.get(p, len(labels)) for p in predictions])
    truth = torch.tensor([number[g] for g in gold])
    f1 = MulticlassF1Score(len(labels) + 1, average=None)(guess, truth)
    present = torch.cat([guess, truth]).unique()
    macro = f1[present[present < len(labels)]].mean()
    return {
        "accuracy": round(float((guess == truth).float().mean()), 6),
        "macro_f1": round(float(macro), 6),
    }


def answers(predictions: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compute SQuAD's exact match and token F1 (arXiv 1606.05250).

    Each prediction is compared with the best of its gold answers. An example without gold answer
    (lost in translation) counts as wrong.
    """
    pairs = list(zip(predictions, gold, strict=True))
    exact = [
        max((float(normalize(p) == normalize(g)) for g in golds), default=0.0) for p, golds in pairs
    ]
    f1 = [max((token_f1(p, g) for g in golds), default=0.0) for p, golds in pairs]
    return {"exact_match": round(sum(exact) / len(exact), 6), "f1": round(sum(f1) / len(f1), 6)}


def squad(predictions: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compute SQuAD v1.1's exact match and F1 as its script does (torchmetrics).

    Its normalization is made for English. Published tables of question answering show these scores.
    An example without gold answer counts as wrong.
    """
    from torchmetrics.functional.text import squad as score

    known = [i for i, golds in enumerate(gold) if golds]
    if not known:
        return {"squad_exact_match": 0.0, "squad_f1": 0.0}
    found = score(
        [{"prediction_text": predictions[i], "id": str(i)} for i in known],
        [
            {"answers": {"answer_start": [0] * len(gold[i]), "text": list(gold[i])}, "id": str(i)}
            for i in known
        ],
    )
    return {
        f"squad_{name}": round(float(value) / 100 * len(known) / len(gold), 6)
        for name, value in found.items()
    }


def mean_of(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over languages, which count the same whatever their size."""
    return {name: round(sum(one[name] for one in scores) / len(scores), 6) for name in scores[0]}


def normalize(text: str) -> str:
    """Normalize a text as SQuAD does, for any script.

    The result is in NFC and lower case, with no punctuation (ASCII's, and Unicode's category P), no
    invisible signs, no English articles, and single spaces. An article is a whole word here;
    SQuAD's regular expression also finds one before a combining mark.
    """
    kept = "".join(
        c
        for c in unicodedata.normalize("NFC", text).lower()
        if c not in string.punctuation and unicodedata.category(c)[0] != "P" and c not in INVISIBLE
    )
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))


def token_f1(prediction: str, gold: str) -> float:
    """Compute the F1 of the multisets of white-space separated tokens after `normalize`.

    Two texts without tokens are equal, as in SQuAD v2.0's script and torchmetrics; v1.1's gives
    such an exact match F1 = 0.
    """
    guess, truth = normalize(prediction).split(), normalize(gold).split()
    if not guess or not truth:
        return float(guess == truth)
    common = sum((Counter(guess) & Counter(truth)).values())
    return 2 * common / (len(guess) + len(truth))


def translation(made: Sequence[str], human: Sequence[str]) -> dict[str, Any]:
    """Compute chrF++ and BLEU (0..100) against human translations, with sacrebleu's signatures."""
    from sacrebleu.metrics import BLEU, CHRF

    found: dict[str, Any] = {}
    for name, metric in (("chrf++", CHRF(word_order=2)), ("bleu", BLEU())):
        score = metric.corpus_score(list(made), [list(human)])
        found[name] = round(score.score, 2)
        found[f"{name}_signature"] = str(metric.get_signature())
    return found
