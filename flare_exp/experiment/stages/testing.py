"""Stage 4: predict the test split, and score the predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flare_exp.artifacts import Artifact
from flare_exp.code import code_of
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.dataset import PairedDataset
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Prediction
from flare_exp.experiment import fitting
from flare_exp.experiment.building import saved_weights
from flare_exp.experiment.context import RunContext, pairs_digest
from flare_exp.flare import adapter
from flare_exp.flare.source_encoders import SourceEncoder
from flare_exp.training.checkpointing import Interruptible
from flare_exp.training.distributed import all_gather_dict
from flare_exp.utils import files


def evaluate(
    run: RunContext,
    trained: Artifact,
    mode: PairingMode,
    english: Artifact | None = None,
    role: str = "test",
    sources: bool = True,
    lang: str | None = None,
) -> Artifact:
    """Predict and score a split.

    Args:
        trained: the model, or the adapter, that is tested.
        mode: pairing mode of the test data.
        english: the English model below the adapter `trained`; None: `trained` is a model itself.
        role: "test", or "validation" to choose the weights of an ensemble.
        sources: False leaves all sources out.
        lang: the target language that is tested; None: that of a run with one.
    """
    data, back = run.data(mode, sources, lang), run.answers_back(mode)
    key: dict[str, Any] = {
        "stage": "test",
        "model": trained.digest,
        "data": pairs_digest(data, role),
        **run.reading_of(mode),
    }
    if data.source_codes:
        key["codes"] = data.source_codes
    if back:
        identity = back.texts_identity(run.task.english, data.langs[0])
        key["back"] = {**identity, "code": code_of("translation")}

    def build(folder: Path) -> dict[str, Any]:
        best = predictions(run, trained, english, data, role)
        if not run.distributed.is_main:
            return {}
        said = [prediction.text for prediction in best]
        predicted = back.texts(said, run.task.english, data.langs[0]) if back else said
        rows = _rows(run, data.dataset(role), predicted, best, said if back else None)
        files.write_parquet(folder / "predictions.parquet", rows)
        return _facts(run, data.dataset(role), predicted)

    return run.store.get("test", key, build, collective=True)


def predictions(
    run: RunContext,
    trained: Artifact,
    english: Artifact | None,
    data: PairedDataModule,
    role: str,
) -> list[Prediction]:
    """Predict a split, and return the best prediction of each pair (on all ranks).

    Args:
        trained: the model, or the adapter.
        english: the English model below the adapter `trained`; None: `trained` is a model itself.
        data: has the split.
        role: name of the split.
    """
    run.release_models()
    module = fitting.make_module(run, *trained_model(run, trained, english))
    options = {"enable_checkpointing": False, "logger": False}
    trainer = fitting.make_trainer(run, "test", [Interruptible(run.distributed)], **options)
    outputs: Sequence[Any] = trainer.predict(module, data.in_order(role)) or ()
    found = all_gather_dict({row: text for output in outputs for row, text in output.items()})
    return data.dataset(role).best(found)


def _rows(
    run: RunContext,
    dataset: PairedDataset,
    predicted: Sequence[str],
    best: Sequence[Prediction],
    said: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """Return the rows of predictions.parquet. `said`: the English answers before translation."""
    rows = []
    for i, (pair, text) in enumerate(zip(dataset.pairs, predicted, strict=True)):
        probabilities = [*best[i].probabilities]
        gold = run.task.gold(pair.scored)
        rows.append(
            {
                "id": pair.target.id,
                "gold": gold[0] if run.task.labels else list(gold),
                "prediction": text,
                **({"english_prediction": said[i]} if said is not None else {}),
                **({"probabilities": probabilities} if probabilities else {}),
                "target": "\n".join(pair.target.texts),
                "source": None if pair.source is None else "\n".join(pair.source.texts),
            }
        )
    return rows


def _facts(run: RunContext, dataset: PairedDataset, predicted: Sequence[str]) -> dict[str, Any]:
    """Return scores and counts for the manifest."""
    labels = run.task.labels
    return {
        "metrics": run.task.score(predicted, [p.scored for p in dataset.pairs]),
        "examples": len(predicted),
        "truncated": dataset.truncated,
        "cut_off": dataset.cut_off,
        "unparsable": sum(text not in labels if labels else not text for text in predicted),
    }


def trained_model(
    run: RunContext, trained: Artifact, english: Artifact | None
) -> tuple[nn.Module, SourceEncoder | None]:
    """Load the model of an artifact in eval mode, with its source encoder when it fuses."""
    if english is None:
        return run.models.english_model(trained).model.eval(), None
    below, folder = run.models.english_model(english), str(saved_weights(trained.path))
    model = adapter.load_adapter(below, folder).eval()
    fuses = getattr(model.peft_config["default"], "fusion", None) is not None
    return model, run.source(model) if fuses else None
