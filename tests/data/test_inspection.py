"""The exact search for near-duplicates, beside a comparison of all pairs."""

import random

from flare_exp.data.inspection import NEAR, near_duplicates, scripts_of


def grams(text):
    plain = " ".join(text.lower().split())
    return {plain[i : i + 5] for i in range(max(1, len(plain) - 4))}


def test_near_duplicates_are_those_of_all_pairs():
    rng = random.Random(0)
    words = ["good", "camera", "monday", "rather", "hardly", "room", "vase", "and"]
    first = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(60)]
    second = [*(" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(40)), "", "ab"]
    for text in rng.sample(first, 20):  # with one letter changed, and in another case
        at = rng.randrange(len(text))
        second += [f"{text[:at]}x{text[at + 1 :]}", text.upper().replace(" ", "  ")]
    expected = {}
    for j, text in enumerate(second):
        scored = [len(grams(text) & grams(t)) / len(grams(text) | grams(t)) for t in first]
        if max(scored) >= NEAR:
            expected[j] = max(scored)
    found = near_duplicates(first, second)
    assert {j: similarity for _, j, similarity in found} == expected
    assert len(expected) >= 20
    for i, j, similarity in found:
        both = grams(first[i]), grams(second[j])
        assert len(both[0] & both[1]) / len(both[0] | both[1]) == similarity


def test_scripts_are_shares_of_letters():
    assert scripts_of(["ab 12!", "жи"]) == {"LATIN": 0.5, "CYRILLIC": 0.5}
    assert scripts_of(["12 !"]) == {}
