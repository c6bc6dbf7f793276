"""Inspect a data set before anything is trained on it: labels, scripts, repeated rows, lengths."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flare_exp.languages import LANGUAGES
from flare_exp.tasks import Example
from flare_exp.tasks.records import Problem
from flare_exp.translation.quality import is_of, scripts_of_language

NEAR = 0.8  # Jaccard similarity from which on two texts are near-duplicates
GRAM = 5  # characters of an n-gram
MOST = 20_000  # rows of a split that are compared
LISTED = 5  # repeated rows of a split that are listed
UNKNOWN = 0.01  # share of unknown tokens from which on that is said


@dataclass
class Part:
    """One split of a data set.

    Args:
        name: `<language>/<split>`, or the name of a single file.
        place: the file or data set.
        examples: the rows that can be read.
        lang: its language; None: unknown.
        problems: what is wrong or doubtful.
        lines: number of a row -> its line in a text file.
        column: the column of the labels or answers, for messages.
    """

    name: str
    place: str
    examples: Sequence[Example]
    lang: str | None = None
    problems: list[Problem] = field(default_factory=list)
    lines: Mapping[int, int | None] = field(default_factory=dict)
    column: str | None = None

    @property
    def texts(self) -> list[str]:
        """Return all texts that have words."""
        return [text for e in self.examples for text in e.texts if text.strip()]

    def doubt(self, text: str, example: Example | None = None, column: str | None = None) -> None:
        """Add a warning, about one row if an example is given."""
        row = None if example is None else example.row + 1
        line = None if row is None else self.lines.get(row)
        self.problems.append(Problem(self.place, text, row, line, column, fatal=False))


@dataclass(frozen=True)
class Repeated:
    """Rows of a split that are training rows, too.

    Args:
        train: the training data.
        part: the split.
        exact: (row, training row) with the same texts.
        near: (row, training row, similarity) with almost the same texts.
        compared: rows that were compared for near-duplicates.
    """

    train: Part
    part: Part
    exact: list[tuple[Example, Example]]
    near: list[tuple[Example, Example, float]]
    compared: int


@dataclass(frozen=True)
class Lengths:
    """Lengths of the texts of a split under a tokenizer.

    Args:
        words: words, separated by white space.
        tokens: tokens, without special ones.
        longest: most tokens of one example.
        cut: examples with more tokens than are read.
        unknown: share of the tokens that stand for something unknown.
    """

    words: int
    tokens: int
    longest: int
    cut: int
    unknown: float


def balance(examples: Sequence[Example], labels: Sequence[str]) -> dict[str, int]:
    """Return the name of each label -> the number of its examples."""
    counts = Counter(example.label for example in examples)
    return {name: counts[number] for number, name in enumerate(labels)}


def scripts_of(texts: Iterable[str]) -> dict[str, float]:
    """Return script -> share of the letters, the most frequent first.

    The script is the first word of a letter's Unicode name, e.g. LATIN.
    """
    letters = _letters(texts)
    found: Counter[str] = Counter()
    for letter, count in letters.items():
        found[unicodedata.name(letter, "UNNAMED").partition(" ")[0]] += count
    total = found.total()
    return {name: count / total for name, count in found.most_common()}


def _letters(texts: Iterable[str]) -> Counter[str]:
    """Count each letter of some texts."""
    return Counter(c for text in texts for c in text if unicodedata.category(c)[0] == "L")


def repeated_rows(train: Part, part: Part) -> Repeated:
    """Find the rows of a split whose texts are, exactly or almost, those of a training row."""
    known = {e.texts: e for e in reversed(train.examples)}
    exact = [(e, known[e.texts]) for e in part.examples if e.texts in known and _says(e)]
    rest = [e for e in part.examples[:MOST] if e.texts not in known and _says(e)]
    own = [e for e in train.examples[:MOST] if _says(e)]
    pairs = near_duplicates([_joined(e) for e in own], [_joined(e) for e in rest])
    return Repeated(train, part, exact, [(rest[j], own[i], how) for i, j, how in pairs], len(rest))


def near_duplicates(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int, float]]:
    """Find the most similar text of `first` for each text of `second`.

    Texts are compared by the Jaccard similarity of their sets of character n-grams, in lower case
    and with single spaces. The search is exact: with its n-grams ordered from rare to frequent, a
    text shares one of its first |A| - ceil(NEAR |A|) + 1 with every text that is so similar
    (prefix filtering, Chaudhuri et al. 2006).

    Returns:
        (number in `first`, number in `second`, similarity), for similarities from NEAR on.
    """
    sets = [[_grams(text) for text in texts] for texts in (first, second)]
    frequency = Counter(gram for grams in (*sets[0], *sets[1]) for gram in grams)

    def prefix(grams: frozenset[str]) -> list[str]:
        kept = len(grams) - math.ceil(NEAR * len(grams)) + 1
        return sorted(grams, key=lambda gram: (frequency[gram], gram))[:kept]

    index: dict[str, list[int]] = defaultdict(list)
    for i, grams in enumerate(sets[0]):
        for gram in prefix(grams):
            index[gram].append(i)
    found = []
    for j, grams in enumerate(sets[1]):
        candidates = {i for gram in prefix(grams) for i in index.get(gram, ())}
        scored = [(len(grams & sets[0][i]) / len(grams | sets[0][i]), -i) for i in candidates]
        if scored and (best := max(scored))[0] >= NEAR:
            found.append((-best[1], j, best[0]))
    return found


def _grams(text: str) -> frozenset[str]:
    plain = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return frozenset(plain[i : i + GRAM] for i in range(max(1, len(plain) - GRAM + 1)))


def _joined(example: Example) -> str:
    return "\n".join(example.texts)


def _says(example: Example) -> bool:
    return any(text.strip() for text in example.texts)


def lengths(part: Part, tokenizer: Any, max_length: int) -> Lengths:
    """Count words and tokens of a split; the texts of an example are read together."""
    from flare_exp.data.dataset import unknown_share  # torch is only needed with a tokenizer

    counts = [0] * len(part.examples)
    fields = range(len(part.examples[0].texts)) if part.examples else ()
    rows: list[list[int]] = []
    for number in fields:
        texts = [e.texts[number] for e in part.examples]
        for i, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
            counts[i] += len(ids)
            rows.append(ids)
    special = tokenizer.num_special_tokens_to_add(pair=len(fields) > 1)
    return Lengths(
        sum(len(text.split()) for text in part.texts),
        sum(counts),
        max(counts, default=0),
        sum(count + special > max_length for count in counts),
        unknown_share(rows, tokenizer),
    )


# --- warnings ----------------------------------------------------------------------------------


def doubt_labels(train: Part, others: Sequence[Part], labels: Sequence[str]) -> None:
    """Warn of labels that cannot be learned, or are not tested, and of contradictory rows."""
    known = {e.label for e in train.examples}
    for number, name in enumerate(labels):
        if number not in known:
            there = [p.name for p in others if any(e.label == number for e in p.examples)]
            where = f", though {' and '.join(there)} has it" if there else ""
            train.doubt(
                f"no row has the label {name}{where}: it is not learned", None, train.column
            )
    for part in (p for p in others if not p.name.endswith(("/train", "/validation"))):
        for number, name in enumerate(labels):
            if number in known and not any(e.label == number for e in part.examples):
                part.doubt(f"no row has the label {name}: it is not tested", None, part.column)


def doubt_repetitions(part: Part, labels: Sequence[str]) -> None:
    """Warn of texts that come several times in a split, and of those with different labels."""
    first: dict[tuple[str, ...], Example] = {}
    again, differing = [], []
    for e in part.examples:
        other = first.setdefault(e.texts, e)
        if other is not e and _says(e):
            again.append(e)
            if e.label != other.label:
                differing.append((e, other))
    for e, other in differing[:LISTED]:
        part.doubt(
            f"has the text of row {other.row + 1}, but the label {labels[e.label or 0]} instead of "
            f"{labels[other.label or 0]}",
            e,
            part.column,
        )
    if len(differing) > LISTED:
        part.doubt(f"{len(differing)} rows in all have a text of another row and another label")
    if again:
        part.doubt(f"{len(again)} of {len(part.examples)} rows have the text of an earlier row")


def training_pairs(parts: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
    """Yield training data and a split that must not repeat them.

    The first part is trained on. So is the split `train` of every other language, where rows are
    translations of one another (mt=gold).
    """
    for part in parts[1:]:
        yield parts[0], part
        yield from (
            (train, part)
            for train in parts[1:]
            if train is not part and train.name == f"{part.lang}/train"
        )


def doubt_repeated(found: Repeated) -> None:
    """Warn of rows that are training rows, too."""
    train = found.train
    for e, other in found.exact[:LISTED]:
        found.part.doubt(f"is row {other.row + 1} of {train.place}, a training row", e)
    for e, other, how in found.near[:LISTED]:
        found.part.doubt(
            f"is almost row {other.row + 1} of {train.place}, a training row (similarity "
            f"{how:.2f})",
            e,
        )
    total = len(found.exact) + len(found.near)
    if total > min(len(found.exact), LISTED) + min(len(found.near), LISTED):
        found.part.doubt(f"{total} rows in all are training rows, or almost")


def untranslated(parts: Sequence[Part]) -> Iterator[tuple[Part, list[Example]]]:
    """Yield the training and validation parts that lack rows of the English ones, with these rows.

    The first part is English; rows are translations of one another.
    """
    by_name = {part.name: part for part in parts}
    for part in parts:
        split = part.name.rpartition("/")[2]
        original = by_name.get(f"{parts[0].lang}/{split}")
        if part is not original and original and split in ("train", "validation"):
            there = {e.key for e in part.examples}
            if lacking := [e for e in original.examples if e.key not in there]:
                yield part, lacking


def doubt_untranslated(parts: Sequence[Part]) -> None:
    """Warn of English rows that have no translation, which mt=gold would refuse."""
    for part, lacking in untranslated(parts):
        part.doubt(
            f"{len(lacking)} rows of {parts[0].lang} have no translation here, e.g. "
            f"{lacking[0].id}; mt=gold takes none of these data"
        )


def doubt_script(part: Part) -> None:
    """Warn if most letters of a split are not of its language's script."""
    if part.lang not in LANGUAGES:
        return
    flores = LANGUAGES[part.lang].flores
    script, known = flores.rpartition("_")[2], scripts_of_language(flores)
    letters = _letters(part.texts)
    ours = sum(count for letter, count in letters.items() if is_of(letter, known))
    own = ours / max(1, letters.total())
    if part.texts and known and own < 0.5:
        part.doubt(
            f"{own:.0%} of the letters are of the script of {part.lang} ({script}); is it the "
            "right file?"
        )


def doubt_words(part: Part, max_length: int) -> None:
    """Warn of texts that have more words than tokens are read, so that they are surely cut."""
    long = [e for e in part.examples if sum(len(text.split()) for text in e.texts) > max_length]
    for e in long[:LISTED]:
        words = sum(len(text.split()) for text in e.texts)
        part.doubt(f"has {words} words; data.max_length={max_length} tokens are read", e)
    if len(long) > LISTED:
        part.doubt(f"{len(long)} rows in all have more than {max_length} words and are cut")


def doubt_tokens(part: Part, found: Lengths, max_length: int) -> None:
    """Warn of texts that are cut, and of a tokenizer that does not know some of them.

    One that knows so few that a run refuses it is an error.
    """
    from flare_exp.data.dataset import UNKNOWN as MOST_UNKNOWN

    if found.cut:
        part.doubt(
            f"{found.cut} of {len(part.examples)} rows have more tokens than "
            f"data.max_length={max_length} and are cut"
        )
    if found.unknown > MOST_UNKNOWN:
        said = (
            f"the tokenizer does not know {found.unknown:.0%} of the tokens (at most "
            f"{MOST_UNKNOWN:.0%}): it is not made for this language or script"
        )
        part.problems.append(Problem(part.place, said))
    elif found.unknown >= UNKNOWN:
        part.doubt(f"the tokenizer does not know {found.unknown:.0%} of the tokens")
