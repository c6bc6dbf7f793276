"""Scores against references written another way: per-character loops and merged lists, no Counter,
no tensors.
"""

import random
import unicodedata

import pytest
from torchmetrics.functional.text import squad

from flare_exp.tasks import XNLI, Answer, Example, TyDiQA, metrics

LABELS = ("entailment", "neutral", "contradiction")

# (letters, punctuation): words of 1 to 4 letters are drawn, so that answers share tokens
SCRIPTS = {
    "latin": ("abéñoü", ".,!?'\"-()“”…¿"),
    "cyrillic": ("абвёйжЯ", ".,«»—№"),
    "greek": ("αβγςΣΩά", ".,·;«»"),
    "arabic": ("ابتثجح", "،؛؟٪."),
    "bengali": ("কখগঘািী", "।॥,."),
    "hangul": ("가나다라마", ".,「」·"),
    "telugu": ("తెలుగుక", "।.,!"),
    "thai": ("กขคงาิ่", "ฯ๏.,"),
    "han": ("北京上海市", "。，、《》（）"),  # noqa: RUF001
}
ARTICLES = ("a", "an", "the", "The", "AN", "then", "data")
# combining: some compose with a Latin letter, the last with none of ours
MARKS = "\u0301\u0308\u0327\u0331"


def word(rng, letters):
    if rng.random() < 0.2:
        return rng.choice(ARTICLES)
    made = "".join(rng.choice(letters) for _ in range(rng.randint(1, 2)))
    made = made.upper() if rng.random() < 0.2 else made
    return made + rng.choice(MARKS) if rng.random() < 0.1 else made


def pair(rng, letters, punctuation):
    """A gold answer and a prediction that repeats, drops, reorders and decorates its words."""

    def decorated(words):
        spaces = [" ", "  ", "\t", "\u00a0", "\u3000"]
        text = "".join(
            w + rng.choice(["", rng.choice(punctuation)]) + rng.choice(spaces) for w in words
        )
        return unicodedata.normalize("NFD", text) if rng.random() < 0.3 else text

    gold = [word(rng, letters) for _ in range(rng.randint(0, 5))]
    guess = [w.swapcase() if rng.random() < 0.3 else w for w in gold if rng.random() < 0.8]
    guess += [word(rng, letters) for _ in range(rng.choice([0, 0, 1, 3]))] + guess[:1] * rng.choice(
        [0, 0, 2]
    )
    if rng.random() < 0.3:
        rng.shuffle(guess)
    return decorated(guess), decorated(gold)


def reference_tokens(text):
    tokens, current = [], ""
    for c in unicodedata.normalize("NFC", text).lower() + " ":
        if c.isspace():
            if current and current != "a" and current != "an" and current != "the":
                tokens.append(current)
            current = ""
        elif not (33 <= ord(c) < 127 and not c.isalnum()) and not unicodedata.category(
            c
        ).startswith("P"):
            current += c
    return tokens


def reference(prediction, gold):
    """(exact match, F1), the overlap counted by merging sorted lists."""
    ours, theirs = reference_tokens(prediction), reference_tokens(gold)
    exact = float(ours == theirs)
    if not ours or not theirs:
        return exact, exact
    left, right, shared = sorted(ours), sorted(theirs), 0
    while left and right:
        if left[-1] == right[-1]:
            left.pop()
            right.pop()
            shared += 1
        elif left[-1] > right[-1]:
            left.pop()
        else:
            right.pop()
    precision, recall = shared / len(ours), shared / len(theirs)
    return exact, 2 * precision * recall / (precision + recall) if shared else 0.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_answers_equal_the_reference(script):
    rng, seen = random.Random(script), set()
    for _ in range(60):
        prediction, gold = pair(rng, *SCRIPTS[script])
        exact, f1 = reference(prediction, gold)
        scores = metrics.answers([prediction], [[gold]])
        assert scores == pytest.approx({"exact_match": exact, "f1": f1}, abs=1e-6), (
            prediction,
            gold,
        )
        seen.add((exact, 0 < f1 < 1))
    assert len(seen) == 3, "right, partly right and wrong answers all occur"


def test_answers_equal_torchmetrics_on_ascii():
    rng, total = random.Random(0), []
    for i in range(200):
        prediction, gold = pair(rng, "abcxyz", ".,!?'-()$%_")
        prediction, gold = (
            unicodedata.normalize("NFD", t).encode("ascii", "ignore").decode()
            for t in (prediction, gold)
        )
        theirs = squad(
            [{"prediction_text": prediction, "id": str(i)}],
            [{"answers": {"answer_start": [0], "text": [gold]}, "id": str(i)}],
        )
        ours = metrics.answers([prediction], [[gold]])
        assert ours["exact_match"] == pytest.approx(float(theirs["exact_match"]) / 100, abs=1e-6), (
            prediction,
            gold,
        )
        assert ours["f1"] == pytest.approx(float(theirs["f1"]) / 100, abs=1e-6), (prediction, gold)
        total.append(ours["f1"])
    assert 0.2 < sum(total) / len(total) < 0.9


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("The Cat!", "cat"),
        ("«Москва».", "москва"),
        ("ঢাকা।", "ঢাকা"),
        ("القاهرة؟", "«القاهرة»"),
        ("서울,", "서울"),
        ("హైదరాబాద్.", "హైదరాబాద్"),
        ("《北京》。", "北京"),
        ("cafe\u0301", "CAFÉ"),
        ("ΑΘΗΝΑ", "αθηνα"),
        ("", " ... "),
        ("the", ""),
    ],
)
def test_equal_answers(prediction, gold):
    assert metrics.answers([prediction], [[gold]]) == {"exact_match": 1.0, "f1": 1.0}


@pytest.mark.parametrize(
    ("prediction", "gold"), [("", "x"), ("কি", "ক"), ("a\u0331 b", "b"), ("then", "n"), ("5", "५")]
)
def test_different_answers(prediction, gold):
    """Combining marks are part of a word, not punctuation.

    Nothing is an article but a whole word.
    """
    assert metrics.answers([prediction], [[gold]])["exact_match"] == 0.0


def test_best_gold_counts_and_a_lost_answer_is_wrong():
    assert metrics.answers(["red car"], [["blue", "the red car"]]) == {
        "exact_match": 1.0,
        "f1": 1.0,
    }
    assert metrics.answers(["x", "y"], [["x"], []]) == {"exact_match": 0.5, "f1": 0.5}
    assert metrics.answers(["b b c"], [["b c c"]])["f1"] == pytest.approx(2 / 3, abs=1e-6)
    with pytest.raises(ValueError, match="zip"):
        metrics.answers(["x"], [])


def test_squad_is_torchmetrics_over_all_examples_and_a_lost_answer_is_wrong():
    predictions, gold = (
        ["red car", "the blue", "", ""],
        [["blue", "the red car"], ["blue house"], [], ["x"]],
    )
    assert metrics.squad(predictions, gold) == pytest.approx(
        {"squad_exact_match": 0.25, "squad_f1": (1 + 2 / 3) / 4}, abs=1e-6
    )
    assert metrics.squad([""], [[]]) == {"squad_exact_match": 0.0, "squad_f1": 0.0}


def reference_classification(predictions, gold):
    present, scores = [], []
    for name in LABELS:
        hits = wrong = missed = 0
        for p, g in zip(predictions, gold, strict=True):
            hits += p == g == name
            wrong += p == name != g
            missed += g == name != p
        if hits + wrong + missed:
            present.append(name)
            scores.append(2 * hits / (2 * hits + wrong + missed))
    accuracy = sum(p == g for p, g in zip(predictions, gold, strict=True)) / len(gold)
    return {"accuracy": accuracy, "macro_f1": sum(scores) / len(present)}


@pytest.mark.parametrize("seed", range(20))
def test_classification_equals_the_reference(seed):
    rng = random.Random(seed)
    classes = LABELS if seed % 3 else LABELS[:2]  # sometimes a class never occurs
    gold = [rng.choice(classes) for _ in range(rng.choice([1, 7, 60]))]
    answers = [*classes, "", "Entailment.", "I do not know"]
    predictions = [g if rng.random() < 0.5 else rng.choice(answers) for g in gold]
    assert metrics.classification(predictions, gold, LABELS) == pytest.approx(
        reference_classification(predictions, gold), abs=1e-6
    )


def test_nothing_but_unparsable_predictions_score_zero():
    assert metrics.classification(["?", ""], LABELS[:2], LABELS) == {
        "accuracy": 0.0,
        "macro_f1": 0.0,
    }


def test_a_task_scores_by_what_it_is():
    labeled = [
        Example("xnli/en/test/0", "0", ("p", "h"), 2),
        Example("xnli/en/test/1", "1", ("p", "h"), 0),
    ]
    assert XNLI().score(["contradiction", "neutral"], labeled)["accuracy"] == 0.5
    asked = [
        Example(
            "tydiqa/sw/test/0", "0", ("c", "q"), answers=(Answer("Mto Nile", 0), Answer("Nile", 4))
        )
    ]
    assert TyDiQA().score(["nile."], asked) == {
        "exact_match": 1.0,
        "f1": 1.0,
        "squad_exact_match": 1.0,
        "squad_f1": 1.0,
    }
    # SQuAD's own script knows ASCII's punctuation alone
    quoted = [Example("tydiqa/ru/test/0", "0", ("c", "q"), answers=(Answer("Москва", 0),))]
    assert TyDiQA().score(["«Москва»"], quoted) == {
        "exact_match": 1.0,
        "f1": 1.0,
        "squad_exact_match": 0.0,
        "squad_f1": 0.0,
    }
    assert XNLI.metric in XNLI().score(["neutral"], labeled[:1])
    assert TyDiQA.metric in TyDiQA().score([""], asked)


def test_invisible_signs_do_not_decide_whether_an_answer_is_right():
    """TyDiQA has an answer that begins with a mark of direction."""
    assert metrics.answers(["Rome"], [["\u200eRome"]]) == {"exact_match": 1.0, "f1": 1.0}
    assert metrics.answers(["a\u200cb"], [["ab"]])["exact_match"] == 0, "another word in Persian"
