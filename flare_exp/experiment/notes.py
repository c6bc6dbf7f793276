"""Say what a reader of a run's results has to know.

Nothing heavy is imported here, so that a stored result is shown at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flare_exp.config.languages import joined
from flare_exp.config.methods import ENSEMBLE, answering
from flare_exp.config.schema import Config
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.experiment.tested import name_of_test
from flare_exp.translation.base import FLAGS

# share of test texts that are English from which on that is said; a few are names, or words of
# both languages
MANY = 0.1
# separation of translations from other texts below which similarities say little
SEPARATES = 0.9


def notes(cfg: Config, folder: Path) -> list[str]:
    """Return the notes below the table of a finished run."""
    facts = json.loads((folder / "provenance.json").read_text())
    counts = facts["parameters"]
    trained = f"{counts['trainable']:,} of {counts['total']:,} parameters trained"
    found = [f"{trained} ({100 * counts['trainable'] / counts['total']:.1f} %)"]
    if kept := [
        stage
        for stage in ("finetune", "transfer", "test")
        if _reused(facts["artefacts"], stage, cfg.task.tested)
    ]:
        found.append(f"found in the cache: {', '.join(kept)}")
    found += _test_notes(cfg, facts["test"])
    found += data_notes(facts["data"])
    said = (translation_note(name, info) for name, info in facts["translations"].items())
    found += [note for note in said if note]
    return [*found, *_option_notes(cfg, facts["test"])]


def _test_notes(cfg: Config, test: Mapping[str, Any]) -> Iterator[str]:
    """Yield the notes about a test. `test`: its facts in provenance.json."""
    yield from dict.fromkeys(  # what is the same in every language is said once
        note for lang, own in _by_language(test).items() for note in _weights_notes(cfg, lang, own)
    )
    if test["cut_off"]:
        yield (
            f"{test['cut_off']} of {test['examples']} gold answers are beyond what the model reads"
        )
    if test["unparsable"]:
        yield (
            f"{test['unparsable']} of {test['examples']} predictions are no answer: counted as "
            "wrong"
        )


def _by_language(test: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return language -> facts of its test; "" is the only one."""
    return test.get("languages", {"": test})


def _weights_notes(cfg: Config, lang: str, test: Mapping[str, Any]) -> Iterator[str]:
    """Yield the notes about the weights of what a test combines. `lang`: "" for the only one."""
    if "weights" not in test:
        return
    given = ", ".join(f"{name} {weight:.2g}" for name, weight in test["weights"].items())
    combined = "passes" if cfg.method.name != ENSEMBLE else f"members ({cfg.method.weights})"
    by_text = cfg.method.name == ENSEMBLE and cfg.method.weights == "similarity"
    where = f" in {lang}" if lang and by_text else ""
    yield f"weights of the {combined}{where}: {given}"
    if (separation := test.get("separation")) is not None:
        yield (
            f"{'warning: ' if separation < SEPARATES else ''}a validation text is more similar to "
            f"its own translation than to another text's with probability {separation:.2f}"
        )


def _option_notes(cfg: Config, test: Mapping[str, Any]) -> Iterator[str]:
    """Yield the notes about options by which the scores of a test mean something else."""
    methods = answering(cfg.method).values()
    if cfg.mt.name == "gold" and any(m.reads_translated_tests for m in methods):
        yield "mt=gold: the test sources are human English, so this is an upper bound"
    if "gold" in cfg.source.systems:
        yield (
            "source.systems names gold: a test source is human English, so this is an upper bound"
        )
    answers = any("exact_match" in own.get("metrics", ()) for own in _by_language(test).values())
    if answers and any(m.mode is PairingMode.TRANSLATED for m in methods):
        yield (
            f"answers were translated back into {joined(cfg.task.tested)} by mt={cfg.mt.name} and "
            "compared with the original ones"
            if cfg.mt.translates
            else f"mt={cfg.mt.name}: predictions were compared with the English answers, which "
            "makes this an upper bound"
        )
    if cfg.mt.fallback == "gold":
        yield (
            "mt.fallback=gold: the benchmark's own translations stand in where a file is "
            "missing (see provenance.json)"
        )
    if cfg.source.shuffle or cfg.source.empty:
        yield f"ablation: source.{'shuffle' if cfg.source.shuffle else 'empty'}=true"


def _reused(artifacts: Mapping[str, Any], stage: str, tested: Sequence[str]) -> bool:
    """Return whether a stage was found in the cache, with its tests of all languages."""
    names = {stage, *(name_of_test(stage, lang, tested) for lang in tested)}
    own = [artifact for name, artifact in artifacts.items() if name in names]
    return bool(own) and all(artifact["reused"] for artifact in own)


def data_notes(data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one warning for each kind of doubtful data, with counts.

    `data` is what `pipeline.check_data` returns.
    """

    def where(key: str, above: float = 0.0) -> list[str]:
        many = [
            (name, facts)
            for name, facts in data.items()
            if facts.get(key, 0) > above * facts["examples"]
        ]
        return [f"{facts[key]:,} of {facts['examples']:,} in {name}" for name, facts in many]

    said = {
        "examples with an empty text": where("empty"),
        "examples without an answer": where("unanswered"),
        "texts of the training data, so that the score is too high": where("trained"),
        "texts that are the English ones (are the files of the right language?)": where(
            "english", MANY
        ),
        "a single example, which says nothing": [
            name for name, facts in data.items() if facts["examples"] == 1
        ],
        "classes without an example": [
            f"{', '.join(facts['missing'])} in {name} (0 of {facts['examples']:,})"
            for name, facts in data.items()
            if facts.get("missing")
        ],
    }
    return [f"warning: {kind}: {'; '.join(places)}" for kind, places in said.items() if places]


def translation_note(name: str, info: Mapping[str, Any]) -> str | None:
    """Return quality and losses of one translation in a line; None: nothing to say."""
    by = info.get("by")
    if by in ("human", "file") and "chrf++" not in info:
        return None
    said = [f"{info['examples']:,} examples"]
    if by == "machine (benchmark)":
        said.append("the benchmark's own machine translation, not a human one")
    if "chrf++" in info:
        said.append(f"chrF++ {info['chrf++']:.1f}, BLEU {info['bleu']:.1f} against human ones")
    if "answers" in info:
        exact = (
            f" ({info['answers']['exact']:,} as in the human one)"
            if "exact" in info["answers"]
            else ""
        )
        said.append(
            f"{info['answers']['kept']:,} of {info['answers']['of']:,} answers carried over{exact}"
        )
    said += [f"{info[flag]} {flag.replace('_', ' ')}" for flag in FLAGS if info.get(flag)]
    return f"{name}: {', '.join(said)}"
