"""Write the model card of an exported folder: README.md with the hub's metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flare_exp.config.methods import METHODS
from flare_exp.config.schema import Config, StageConfig
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.experiment.run_page import label_of
from flare_exp.export.loading_code import code_of_lora, code_of_run, imports_of_lora
from flare_exp.export.portable import Origin
from flare_exp.report.cells import Cell
from flare_exp.report.runs import Run
from flare_exp.report.tables import spread
from flare_exp.tasks import Task
from flare_exp.tasks.toy import ToyTask

if TYPE_CHECKING:
    from peft import LoraConfig

READS = {
    PairingMode.TARGET: "a text in the target language",
    PairingMode.TRANSLATED: "the English translation of a text",
    PairingMode.PAIRED: "a text in the target language; its English translation is fused",
    PairingMode.JOINT: "a text in the target language and its English translation as one input",
    PairingMode.LATENT: "a text in the target language; a translation model's encoder reads it "
    "too, and its states are fused",
}
PIPELINES = {"label": "text-classification", "span": "question-answering"}
PAPER = "https://arxiv.org/abs/2501.06892"


@dataclass(frozen=True)
class Card:
    """Hold what a model card is about.

    Args:
        name: name of the exported folder.
        repository: hub repository that it is meant for, or None.
        license: identifier of the license.
        cell: the runs whose results are reported.
        run: the run whose model is exported.
        cfg: its portable configuration.
        task: its task.
        reading: what reading.json holds.
        base: origin of the backbone.
        translation: origin of the translation system.
        lora: configuration of the plain LoRA; None: the folder is a run for `flare_exp.load`.
    """

    name: str
    repository: str | None
    license: str
    cell: Cell
    run: Run
    cfg: Config
    task: Task
    reading: Mapping[str, Any]
    base: Origin
    translation: Origin
    lora: LoraConfig | None

    @property
    def label(self) -> str:
        """Return the method with its fusion."""
        return label_of(self.run.metrics)

    @property
    def own_base(self) -> bool:
        """Return whether the model below a plain LoRA is in the folder."""
        return self.lora is not None and self.lora.base_model_name_or_path is None

    @property
    def title(self) -> str:
        """Return the title of the page."""
        return f"{self.label} on {self.task.name}, {self.cfg.task.lang}"


def model_card(card: Card) -> str:
    """Return the model card in Markdown, with YAML front matter."""
    sections = {
        "How to load it": ["```python", *_code(card), "```"],
        "Results": list(_results(card)),
        "What it reads": list(_reading(card)),
        "Data": list(_data(card)),
        "Translation": list(_translation(card)),
        "How it was made": list(_making(card)),
    }
    body = [line for name, lines in sections.items() for line in ("", f"## {name}", "", *lines)]
    head = ["---", _metadata(card), "---", "", f"# {card.title}", "", *_summary(card)]
    return "\n".join([*head, *body, ""])


def _code(card: Card) -> Iterator[str]:
    """Yield the code that loads the folder, and predicts."""
    from_hub = card.repository is not None
    task_type = str(getattr(card.lora, "task_type", ""))
    yield from (
        ["import flare_exp"] if card.lora is None else imports_of_lora(card.reading, task_type)
    )
    if from_hub:
        yield "from huggingface_hub import snapshot_download"
    yield ""
    yield (
        f'folder = snapshot_download("{card.repository}")'
        if from_hub
        else f'folder = "{card.name}"  # where this folder is'
    )
    if card.lora is None:
        yield from code_of_run(card.reading)
    else:
        yield from code_of_lora(card.reading, task_type, None if card.own_base else card.base)


def _metadata(card: Card) -> str:
    """Return the metadata as YAML, in the terms of the hub."""
    from huggingface_hub import EvalResult, ModelCardData

    task, lang = card.task, card.cfg.task.lang
    hub_id = None if card.run.options.get("task.data_dir") else getattr(task, "hub_id", None)
    pipeline = PIPELINES.get("label" if task.labels else "span")
    test = card.run.provenance.get("data", {}).get(f"{lang}/test", {})
    results = [
        EvalResult(
            task_type=str(pipeline),
            dataset_type=hub_id or task.name,
            dataset_name=f"{task.name}, {lang}",
            dataset_config=lang,
            dataset_split=card.cfg.task.test_split,
            dataset_revision=getattr(task, "revision", None) if hub_id else None,
            dataset_args={"fingerprint": test.get("fingerprint")},
            metric_type=name,
            metric_name=f"{name}, seed {card.run.metrics['seed']}",
            metric_value=round(value, 6),
        )
        for name, value in card.run.metrics["test"].items()
    ]
    made = "finetune" if METHODS[card.run.method].full else "adapter"
    relation: dict[str, Any] = {"base_model_relation": made} if card.base.hub_id else {}
    data = ModelCardData(
        base_model=card.base.hub_id,
        datasets=[hub_id] if hub_id else None,
        language=_languages(card),
        library_name="flare_exp" if card.lora is None else "peft",
        license=card.license,
        pipeline_tag=pipeline,
        tags=["cross-lingual-transfer", "lora", card.run.method, "arxiv:2501.06892"],
        metrics=list(card.run.metrics["test"]),
        model_name=card.name,
        eval_results=results,
        **relation,
    )
    return data.to_yaml()


def _languages(card: Card) -> list[str]:
    """Return ISO 639 codes; the constructed languages of the generated world have none."""
    if isinstance(card.task, ToyTask):
        return ["en"]
    iso = re.fullmatch(r"([a-z]{2,3})(_[A-Z]\w+)?", card.cfg.task.lang)
    return ["en", *([iso[1]] if iso else [])]


def _summary(card: Card) -> list[str]:
    """Return the first lines of the page."""
    base = f"`{card.base.name}`, a tiny model that flare_exp itself builds from generated text"
    if (hub_id := card.base.hub_id) is not None:
        base = f"[{hub_id}](https://huggingface.co/{hub_id}) at commit `{card.base.commit}`"
    kind = (
        f"A plain LoRA of rank {card.lora.r}, which PEFT alone can load. {_contents(card)}"
        if card.lora is not None
        else f"A model of flare_exp, a framework for [FLARE]({PAPER}). What was trained on English "
        "is in `english/`, and what was trained for the target language beside it."
    )
    return [kind, "", f"- Base model: {base}", f"- License: {card.license}"]


def _contents(card: Card) -> str:
    """Return what is in a plain LoRA, and where the model below it is."""
    trains = METHODS[card.run.method].trains
    if trains and card.cfg.finetune.tuning == "full":
        return "It was trained on an English model, which is in `base/`."
    what = "The updates of English fine-tuning and of the target language" if trains else ""
    what = what or "The update of English fine-tuning is in it"
    where = " The base model is in `base/`." if card.own_base else ""
    return f"{what}{' are added up in it' if trains else ''}.{where}"


def _results(card: Card) -> Iterator[str]:
    """Yield the table of scores of all seeds, in percent."""
    metrics = list(card.run.metrics["test"])
    yield f"Scores in %, on {_examples(card)} test examples in {card.cfg.task.lang}:"
    yield ""
    yield from _table(["seed", *metrics], [
        [_seed(card, seed), *(f"{100 * run.metrics['test'][m]:.1f}" for m in metrics)]
        for seed, run in sorted(card.cell.runs.items())
    ] + _means(card, metrics))  # fmt: skip
    yield ""
    own = card.run.metrics
    yield "The English model of this seed, without transfer:"
    yield ""
    rows = {"on English": own["english"], f"on {card.cfg.task.lang} (zero-shot)": own["zero_shot"]}
    yield from _table(
        ["tested", *metrics],
        [[name, *(f"{100 * values[m]:.1f}" for m in metrics)] for name, values in rows.items()],
    )


def _examples(card: Card) -> str:
    return f"{card.run.provenance['test']['examples']:,}"


def _seed(card: Card, seed: int) -> str:
    return f"{seed} (this model)" if seed == card.run.metrics["seed"] else str(seed)


def _means(card: Card, metrics: Sequence[str]) -> list[list[str]]:
    """Return the row of means and sample standard deviations, if there are several seeds."""
    if len(card.cell.runs) < 2:
        return []
    cells = [spread(card.cell.values("test", metric)).text for metric in metrics]
    return [["mean ± standard deviation", *cells]]


def _reading(card: Card) -> Iterator[str]:
    """Yield the table of what is needed to read texts in the same way."""
    read = card.reading
    rows = {
        "input": _input(card),
        "fields": ", ".join(read["fields"]),
        "labels": ", ".join(read["labels"]) or "none: the answer is a text",
        "languages": f"from {read['source_language']} to {read['target_language']}, in the "
        "benchmark's codes",
        "longest input": f"{read['max_length']} tokens; longer ones are cut on the "
        f"{read['truncation_side']}",
    }
    if read["doc_stride"] is not None:
        rows["windows"] = (
            f"long contexts are read in windows that share {read['doc_stride']} tokens"
        )
    if read["prompt"]:
        rows["prompt"] = f"`{read['prompt']!r}`"
    yield from _table(["", ""], [list(row) for row in rows.items()])
    yield ""
    yield "`reading.json` has the same for programs."


def _input(card: Card) -> str:
    """Return what the model reads of a text."""
    mode = METHODS[card.run.method].mode
    what, langs = READS[mode], card.cfg.source.langs
    if langs and mode is PairingMode.PAIRED:
        what = f"a text in the target language; its translations are fused ({', '.join(langs)})"
    if len(card.reading["passes"]) > 1:
        what += "; read twice, with the source and without, and the probabilities are averaged"
    return what


def _data(card: Card) -> Iterator[str]:
    """Yield the table of data sets with their fingerprints."""
    hub_id, revision = (getattr(card.task, name, None) for name in ("hub_id", "revision"))
    if isinstance(card.task, ToyTask):
        origin = "generated by flare_exp"
    elif hub_id and not card.run.options.get("task.data_dir"):
        origin = f"from `{hub_id}` at `{revision}`"
    else:
        origin = "read from files" + (f" with the columns of `{hub_id}`" if hub_id else "")
    yield f"{card.task.name}, {origin}:"
    yield ""
    rows = [
        [name, f"{facts['examples']:,}", f"`{facts['fingerprint']}`"]
        for name, facts in card.run.provenance.get("data", {}).items()
    ]
    yield from _table(["split", "examples", "fingerprint"], rows)


def _translation(card: Card) -> Iterator[str]:
    """Yield who made the translations that training and testing read."""
    made = card.run.provenance.get("translations", {})
    if not made:
        yield "Nothing was translated."
        return
    mt = card.cfg.mt
    system = f"`{card.translation}`"
    if mt.command:
        system += f", the program `{mt.command}`"
    if mt.kind == "command" and mt.revision:
        system += f", revision {mt.revision}"
    checkpoint = next((f["checkpoint"] for f in made.values() if "checkpoint" in f), None)
    if isinstance(checkpoint, str) and card.translation.hub_id is None:
        system += f", a checkpoint with the content `{checkpoint}`"
    if mt.kind == "model" and mt.backend != "transformers":
        system += f", run by {mt.backend}"
    yield f"System: {system}. Wrong words put in afterwards: {mt.noise:.0%} ({mt.noise_in})."
    yield ""
    rows = [
        [
            name.removeprefix("translation of "),
            str(facts.get("by", "")),
            str(facts.get("chrf++", "-")),
        ]
        for name, facts in made.items()
    ]
    yield from _table(["translation of", "by", "chrF++"], rows)


def _making(card: Card) -> Iterator[str]:
    """Yield options of the training, versions and the paper."""
    cfg, facts = card.cfg, card.run.provenance
    counts = facts["parameters"]
    trained = f"{counts['trainable']:,} of {counts['total']:,} parameters trained"
    yield f"- Method: {card.label}; {trained}"
    yield f"- Adapter: r {cfg.adapter.r}, alpha {cfg.adapter.alpha}, {cfg.adapter.targets}"
    yield (
        f"- English: {cfg.finetune.tuning}, {_epochs(cfg, cfg.finetune)} epochs, learning rate "
        f"{cfg.finetune.lr:g}"
    )
    if METHODS[card.run.method].trains:
        lr = cfg.distil.lr or cfg.transfer.lr
        yield f"- Transfer: {_epochs(cfg, cfg.transfer)} epochs, learning rate {lr:g}"
    if cfg.model.quantize or cfg.model.dtype != "float32":
        yield f"- Weights of the base model: {cfg.model.quantize or cfg.model.dtype}"
    commit = facts.get("commit")
    made_by = f"flare_exp {facts['packages']['flare-exp']}"
    made_by += f", commit `{commit['hash']}`" if commit else ""
    made_by += " with local changes" if commit and commit["dirty"] else ""
    versions = ", ".join(
        f"{name} {facts['packages'][name]}" for name in ("torch", "transformers", "peft")
    )
    yield f"- Software: {made_by}; {versions}"
    yield f"- Paper: [{PAPER}]({PAPER})"


def _epochs(cfg: Config, stage: StageConfig) -> int:
    """Return the epochs of a training, which `trainer.max_epochs` may limit."""
    return min(stage.epochs, cfg.trainer.max_epochs or stage.epochs)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines]
