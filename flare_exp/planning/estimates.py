"""What the stages of a run will cost: timed in a short probe where the weights are here, counted from shapes where they are not.

Either way the models, batches and passes are those of flare_exp.experiment.stages and flare_exp.training.modules.
"""

from __future__ import annotations

import functools
import gc
import math
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForSeq2SeqLM

from flare_exp.artifacts import Artifact, digest_of
from flare_exp.config.methods import METHODS
from flare_exp.config.schema import Config, StageConfig
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.dataset import PairedDataset
from flare_exp.data.generation import PromptForm
from flare_exp.data.sampling import BucketSampler
from flare_exp.experiment import provenance
from flare_exp.experiment.stages import save_model
from flare_exp.flare.source_encoders import Source
from flare_exp.models import backbones
from flare_exp.planning.preview import CHARACTERS, CountedForm, Preview, Sketch, config_of, pretraining, preview
from flare_exp.toy.translation_model import train_mt

GPU = ("an A100 (bf16)", 312e12)  # the device of plans for a GPU that is not here: name, peak FLOP/s
SHARE = 0.35  # of the peak that training reaches
DECODING = 0.1  # of that, when tokens are written one by one


@dataclass
class Estimate:
    """Of a run, or of what is left of it. `seconds`, `disk`: name of an artefact (as in `pipeline.through`; of a translation that
    is not there, its digest) -> time to build it, its bytes; `memory`: most bytes of the process (CPU) or of the device (GPU);
    `states`: bytes of cached source states; `parameters`: training stage -> how many are `trainable`, and how many there are in
    `total`; `notes`: what it rests on."""

    notes: list[str]
    parameters: dict[str, dict[str, int]] = field(default_factory=dict)
    memory: int = 0
    states: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Parameters of the model that is trained last."""
        return list(self.parameters.values())[-1]["total"]


def estimate(cfg: Config, scratch: Path, todo: set[str]) -> Estimate:
    """The cost of those artefacts of a settled configuration that are in `todo`. Best called in a process of its own, whose peak
    memory is then that of a run."""
    torch.manual_seed(0)
    stages = preview(cfg, scratch)
    found = _arithmetic(stages, todo) if isinstance(stages, Sketch) else _probe(stages, todo)
    for digest, (examples, times) in stages.untranslated.items():
        found.seconds[digest] = times * _translating(stages, [text for e in examples for text in e.texts])
        found.disk[digest] = round(times * 2 * sum(len(text.encode()) for e in examples for text in e.texts))
    if "backbone" in todo:
        found.disk["backbone"] = 4 * found.total
    if stages.cfg.source.cache == "disk" and "transfer" in todo:
        found.disk["transfer"] += found.states
    found.notes += _notes(stages)
    return found


def _saved(stages: Preview, name: str, counts: Mapping[str, int]) -> int:
    """Bytes of what a training stage leaves, and of the two checkpoints that it has on the way."""
    full = name == "finetune" and stages.cfg.finetune.tuning == "full"
    copies = 3 if stages.cfg.task.select == "best" else 1
    return 4 * (copies - 1) * counts["trainable"] + 4 * (counts["total"] if full else counts["trainable"])


def _notes(stages: Preview) -> list[str]:
    """What an estimate rests on."""
    cfg, task = stages.cfg, stages.task
    if isinstance(stages, Sketch):
        device, peak = throughput(cfg.trainer.accelerator)
        found = [
            f"arithmetic: {cfg.model.name} or its data is not here. Its passes are counted on tensors without content: every "
            "matrix product (the source's pass too, and no gradient of frozen weights), and every tensor that is alive at once, "
            "weights as they are kept, optimiser states and source states; in batches as long as the longest text."
            + ("" if cfg.trainer.accelerator == "gpu" else " A process on a CPU may hold twice that."),
            f"time: {device}, {peak / 1e12:.3g} TFLOP/s, {SHARE:.0%} of it used in training, {SHARE * DECODING:.1%} where tokens "
            f"are written one by one"
            + (f"; {CHARACTERS} characters to a token." if isinstance(stages.form, CountedForm) else "."),
        ]
    else:
        whose = "the device" if cfg.trainer.accelerator == "gpu" else "the whole process, its libraries included"
        found = [f"probe: a few real batches of every stage on this machine; memory is that of {whose}."]
    if task.assumed:  # type: ignore[attr-defined]
        found.append(
            f"data: {task.name} is not here, so its sizes are the published ones and every text is as long as "
            f"data.max_length={cfg.data.max_length}: time and memory are upper bounds; what was built from it is not recognised."
        )
    if stages.untranslated:
        found.append(
            f"translations by mt={cfg.mt.name} are not there yet: the texts themselves stand in for them, and what is trained "
            "on them counts as to do; the time of translating is arithmetic."
        )
    return found


def downloads(stages: Preview, reads_mt: bool) -> int:
    """Bytes of the checkpoints that are not here."""
    found, m, form = 0, stages.cfg.model, stages.form_name
    if stages.backbone.kind == "hub" and not stages.backbone.reused:
        found += _published(str(m.path), m.revision, backbones._auto_class(form, config_of(str(m.path)).is_encoder_decoder))
    if reads_mt and stages.mt.absent:
        found += _published(str(stages.cfg.mt.path), stages.cfg.mt.revision, AutoModelForSeq2SeqLM)
    return found


def _published(path: str, revision: str | None, auto: Any) -> int:
    """Bytes of a checkpoint's weights, as they are on the hub."""
    return _parameters(path, revision, auto) * (2 if "16" in str(config_of(path, revision).dtype) else 4)


@functools.cache
def _parameters(path: str, revision: str | None, auto: Any) -> int:
    """How many parameters a checkpoint has, by its configuration."""
    with torch.device("meta"):
        return auto.from_config(config_of(path, revision)).num_parameters()


# --- what both do ----------------------------------------------------------------------------------------------------


def _walk(stages: Preview, todo: set[str]) -> Iterator[tuple[str, nn.Module, Source | None, PairedDataModule, dict[str, str]]]:
    """The models of the stages in `todo`: name, model, source, data to train on, and artefact -> view that it is tested on."""
    method = METHODS[stages.cfg.method.name]
    tests = {"english_test": "english", "zero_shot": "target"}
    adapted = {"test": method.view} if method.trains else {}
    tests |= {} if method.trains else {"test": method.view}
    trains, transfers = bool(todo & {"finetune", *tests}), bool(todo & {"transfer", *adapted})
    saves = transfers and not isinstance(stages, Sketch)
    model = _english(stages) if trains or saves else None
    if trains:
        yield "finetune", model, None, stages.data("english"), {k: v for k, v in tests.items() if k in todo}  # type: ignore[misc]
    if transfers:
        english = Artifact(stages.store.scratch / "english" / stages.backbone.digest.replace("/", "--"), "", "", {}, 0.0, False)
        if saves:
            assert model is not None
            english.path.mkdir(parents=True, exist_ok=True)
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            lora = stages.cfg.finetune.tuning == "lora"
            save_model(model, trained, english.path / ("adapter" if lora else "model"))
        del model
        adapted_model, source = _adapted(stages, english)
        yield "transfer", adapted_model, source, stages.data(method.view), {k: v for k, v in adapted.items() if k in todo}


def _english(stages: Preview) -> nn.Module:
    """Build the model that is fine-tuned on English."""
    backbone = stages.fresh_backbone()
    return stages.add_adapter(backbone) if stages.cfg.finetune.tuning == "lora" else backbone.model


def _adapted(stages: Preview, english: Artifact) -> tuple[nn.Module, Source | None]:
    """Build the model that is trained in the transfer, and its source if it fuses."""
    method = METHODS[stages.cfg.method.name]
    fusion = stages.fusion_options(method.view) if method.fuses else None
    model = stages.add_adapter(stages.english_model(english), **(fusion or {}))
    return model, stages.source(model) if fusion else None


def _note_sizes(found: Estimate, stages: Preview, name: str, model: nn.Module, data: PairedDataModule) -> None:
    """Parameters, and bytes of source states and of what the stage leaves."""
    counts = found.parameters[name] = backbones.parameter_counts(model)
    found.states = _states(stages, model, data)
    found.disk[name] = _saved(stages, name, counts)


def _states(stages: Preview, model: Any, data: PairedDataModule) -> int:
    """Bytes of the cached source states of training."""
    o = stages.cfg.source
    if o.cache == "off" or data.view not in ("paired", "latent"):
        return 0
    config = model.peft_config["default"]
    parts, roles = stages.parts(data.view), stages.task.training_roles
    tokens = sum(parts[role] * sum(len(i["inputs"]["input_ids"]) for i in data.dataset(role).source or ()) for role in roles)
    width = config.source_width or len(stages.source(model).states.blocks) * _width(model)
    return round(tokens * width * getattr(torch, o.dtype or _read_dtype(stages, data.view)).itemsize)


def _read_dtype(stages: Preview, view: str) -> str:
    """The precision in which a source pass gives its states."""
    mixed = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}.get(str(stages.cfg.trainer.precision))
    if view == "latent":
        return mixed or ("bfloat16" if stages.mt.device == "cuda" else "float32")
    return mixed or ("float64" if stages.cfg.trainer.precision == "64-true" else stages.cfg.model.dtype)


def _width(model: Any) -> int:
    config = model.config
    return getattr(config, "hidden_size", None) or config.d_model


def _batches(stages: Preview, dataset: PairedDataset, role: str) -> list[list[int]]:
    size = stages.cfg.data.batch_size
    if role == "train":
        return list(BucketSampler(dataset.lengths, size, stages.cfg.seed))
    return [list(range(i, min(i + size, len(dataset)))) for i in range(0, len(dataset), size)]


def _steps(stages: Preview, rows: int) -> int:
    """Optimiser steps of an epoch."""
    steps = -(-rows // stages.cfg.data.batch_size)
    return min(steps, stages.cfg.trainer.limit_train_batches or steps)


def _stage(stages: Preview, name: str) -> StageConfig:
    return stages.capped(stages.cfg.finetune if name == "finetune" else stages.cfg.transfer)


# --- the probe -------------------------------------------------------------------------------------------------------


def _probe(stages: Preview, todo: set[str]) -> Estimate:
    """A few real batches of every stage: the costliest, for memory, then some that are typical, for time."""
    found = Estimate([])
    if "backbone" in todo:
        from flare_exp.toy.pretrain import pretrain

        found.seconds["backbone"] = _building(stages, pretrain, pretraining(stages.cfg), {"documents": 2000})
    if "mt" in todo:
        found.seconds["mt"] = _building(stages, train_mt, stages.mt.options, {"pairs": 2000})
    started = time.perf_counter()
    for name, model, source, data, tests in _walk(stages, todo):
        _note_sizes(found, stages, name, model, data)
        stage, dataset, parts = _stage(stages, name), data.dataset("train"), stages.parts(data.view)
        clock = _Clock(data.passes)
        module = stages.module(
            model, source, score=lambda _: {stages.task.metric: 0.0}, optimizer=stages.optimizer(stage.lr), warmup=stage.warmup
        )
        loaders = {role: _loader(stages, data, role) for role in stages.task.training_roles}
        ready = time.perf_counter() - started  # loading and tokenising
        if name in todo:
            stages.trainer(
                max_epochs=1, callbacks=[clock], logger=False, enable_checkpointing=False,
                accumulate_grad_batches=data.passes, gradient_clip_val=stages.cfg.trainer.gradient_clip_val,
            ).fit(module, loaders["train"], loaders.get("validation"))  # fmt: skip
            epoch = _steps(stages, round(parts["train"] * len(dataset))) * clock.mean("train")
            if "validation" in loaders:
                batches = parts["validation"] * len(_batches(stages, data.dataset("validation"), "validation"))
                epoch += batches * clock.mean("validation")
            found.seconds[name] = ready + stage.epochs * epoch
        for test, view in tests.items():
            clock = _Clock(data.passes)
            trainer = stages.trainer(callbacks=[clock], logger=False, enable_checkpointing=False)
            trainer.predict(module.eval(), _loader(stages, stages.data(view), "test"))
            batches = stages.parts(view)["test"] * len(_batches(stages, stages.data(view).dataset("test"), "test"))
            found.seconds[test] = batches * clock.mean("test")
        del module, model, source
        started = time.perf_counter()
    gpu = stages.cfg.trainer.accelerator == "gpu"
    found.memory = torch.cuda.max_memory_allocated() if gpu else provenance.peak_memory()
    return replace(found, memory=found.memory + (found.states if stages.cfg.source.cache == "memory" and not gpu else 0))


def _loader(stages: Preview, data: PairedDataModule, role: str) -> Any:
    """The costliest batch first, as a warm-up, then two rounds of three that are typical."""
    dataset = data.dataset(role)
    batches = _batches(stages, dataset, role)
    full = [rows for rows in batches if len(rows) == max(map(len, batches))]
    full.sort(key=lambda rows: max(dataset.costs[i] for i in rows))
    typical = [full[len(full) * sixth // 6] for sixth in (1, 3, 5)]
    return data.loader(dataset, [full[-1], *typical, *typical])


class _Clock(Callback):
    """Time between the ends of batches, the first left out. Args: passes: that read one."""

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.at: dict[str, list[float]] = {}

    def mean(self, role: str) -> float:
        """Seconds of a batch."""
        ends = self.at[role][self.passes - 1 :: self.passes]
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def _tick(self, role: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.at.setdefault(role, []).append(time.perf_counter())

    def on_train_batch_end(self, *_, **__) -> None:
        self._tick("train")

    def on_validation_batch_end(self, *_, **__) -> None:
        self._tick("validation")

    def on_predict_batch_end(self, *_, **__) -> None:
        self._tick("test")


def _building(stages: Preview, build: Callable[..., Any], options: Mapping[str, Any], little: Mapping[str, Any]) -> float:
    """Seconds to train an embedded model: its text and first step, and the others by the time of some on `little` text."""
    taken = []
    for changes in ({"steps": 1}, {"steps": 1, **little}, {"steps": 31, **little}):
        with tempfile.TemporaryDirectory(dir=stages.store.scratch) as folder:
            start = time.perf_counter()
            build(Path(folder), **{**options, **changes})
            taken.append(time.perf_counter() - start)
    whole, first, more = taken
    return whole + options["steps"] * max(0.0, more - first) / 30


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _arithmetic(stages: Sketch, todo: set[str]) -> Estimate:
    """The stages' own passes over tensors that have shapes and no content: every allocation and every product is counted."""
    found = Estimate([])
    speed = throughput(stages.cfg.trainer.accelerator)[1] * SHARE
    for name, model, source, data, tests in _walk(stages, todo):
        _note_sizes(found, stages, name, model, data)
        stage, parts = _stage(stages, name), stages.parts(data.view)
        work = _work(stages, model, source, data, functools.partial(_of_depth, stages, name))
        if name in todo:
            tokens = {role: parts[role] * sum(data.dataset(role).costs) for role in stages.task.training_roles}
            rows = round(parts["train"] * len(data.dataset("train")))
            taken = _steps(stages, rows) / max(1, -(-rows // stages.cfg.data.batch_size))
            epoch = taken * work.train * tokens["train"] + work.evaluate * tokens.get("validation", 0.0)
            found.seconds[name] = stage.epochs * epoch / speed
            found.memory = max(found.memory, work.training)
        for test, view in tests.items():
            found.memory = max(found.memory, work.testing)
            tested, part = stages.data(view).dataset("test"), stages.parts(view)["test"]
            found.seconds[test] = part * (work.evaluate * sum(tested.costs) + work.written * len(tested) / DECODING) / speed
    base = provenance.peak_memory() if stages.cfg.trainer.accelerator == "cpu" else 0
    return replace(found, memory=found.memory + base)


_WORK: dict[str, Work] = {}


Build = Callable[[int], tuple[nn.Module, "Source | None"]]


def _work(stages: Sketch, model: nn.Module, source: Source | None, data: PairedDataModule, build: Build) -> Work:
    """The `Work` of a model, counted once for all jobs that have the same model and the same batches."""
    cfg, (batch, _) = stages.cfg, _batch(stages, data, 1)
    parameters = [[name, list(p.shape), str(p.dtype), p.requires_grad] for name, p in model.named_parameters()]
    shapes = [[list(x.shape), str(x.dtype)] for x in tree_leaves(batch)]
    options = [cfg.model, cfg.decode, cfg.optim, cfg.trainer.precision, cfg.data, cfg.fusion if source else None]
    same = digest_of([parameters, shapes, stages.form_name, stages.task.labels, repr(options)])
    if same not in _WORK:
        _WORK[same] = Work(stages, model, source, data, build)
    return _WORK[same]


def _of_depth(stages: Sketch, name: str, depth: int) -> tuple[nn.Module, Source | None]:
    """Build the model of a training, and its source, with `depth` blocks in each stack."""
    stages.depth = depth
    try:
        return (_english(stages), None) if name == "finetune" else _adapted(stages, Artifact(Path(), "", "", {}, 0.0, False))
    finally:
        stages.depth = None


class Work:
    """Count what the largest passes take, with as many rows as a pass has at most, all as long as the longest text.

    Bytes of a process that takes a `step`, that is `testing`, and that is `training`, which includes validation. FLOPs per token
    (source included) to `train` and to `evaluate`, and per example for tokens that are `written` one by one.

    Args:
        build: number of blocks -> the model with so many in each stack, and its source. Deep models are then counted by two
            shallow ones (`_counted`); None: every block is counted.
    """

    def __init__(
        self, stages: Sketch, model: nn.Module, source: Source | None, data: PairedDataModule, build: Build | None = None
    ):
        kept, cfg = _weights(stages, model), stages.cfg
        free = stages.form_name == "prompt" and not stages.decoding.candidates
        begun = sum(p.nbytes for p in model.parameters() if p.requires_grad) if data.passes > 1 else 0
        states = _optimizer_states(model, cfg.optim._target_)
        total = backbones.parameter_counts(model)["total"]
        counts, tokens = _counted(stages, model, source, data, build)

        def peak(kind: str) -> int:
            return max(count for name, count in counts.items() if name.startswith(f"{kind} bytes"))

        # gradients of earlier micro-batches
        self.step = kept + peak("training") + begun + states
        written = peak("writing") + counts["cached token"] * stages.decoding.max_new_tokens if free else 0
        self.testing = kept + max(peak("reading"), written)
        self.training = max(self.step, self.testing + states)
        self.train, self.evaluate = counts["training flops"] / tokens, counts["reading flops"] / tokens
        self.written = 2.0 * total * stages.decoding.max_new_tokens if free else 0.0


SHALLOW = (3, 4)  # from the third block on, each one adds what the one before it did


def _counted(
    stages: Sketch, model: nn.Module, source: Source | None, data: PairedDataModule, build: Build | None
) -> tuple[dict[str, int], int]:
    """Count the passes of a model: name -> bytes or FLOPs, and the tokens of the batch.

    The blocks of a model are alike, so every count is an affine function of their number: it is known from two shallow models.
    That holds phase by phase, for most bytes are alive at the phase's end (source, forward) or at its beginning (backward,
    where each block gives up what it has saved). Where a block's gradients could be larger than what it has saved, most bytes
    may be alive at the end of the backward pass instead, and all blocks are counted.
    """
    stacks = backbones.stacks(model)
    depths = {len(blocks) for blocks in stacks}
    (depth,) = depths if len(depths) == 1 else (0,)
    rows = min(stages.cfg.data.batch_size, stages.cfg.data.micro_batch_size or stages.cfg.data.batch_size)
    # the first block may hold FLARE MT's map, too, which is one whatever the depth
    later = [block for blocks in stacks for block in blocks[1:]]
    gradients = max((sum(p.nbytes for p in block.parameters() if p.requires_grad) for block in later), default=0)
    saved = 2 * rows * _batch(stages, data, 1)[0]["target"]["input_ids"].shape[1] * _width(model)  # a block's input in 16 bits
    if build is None or depth <= sum(SHALLOW) or gradients > saved:
        return _passes(stages, model, source, data)
    (less, tokens), (more, _) = (_passes(stages, *build(n), data) for n in SHALLOW)
    fewer, further = SHALLOW
    return {name: less[name] + (more[name] - less[name]) * (depth - fewer) // (further - fewer) for name in less}, tokens


def _passes(stages: Sketch, model: nn.Module, source: Source | None, data: PairedDataModule) -> tuple[dict[str, int], int]:
    """Count the passes of a model as it is: name -> bytes or FLOPs, and the tokens of the batch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    cfg = stages.cfg
    module = stages.module(model, source)
    reads_source = (lambda: source.states.recording) if source else (lambda: False)
    with FakeTensorMode(), _autocast(cfg.trainer.precision):
        storages = _without_content(module)
        rows = min(cfg.data.batch_size, cfg.data.micro_batch_size or cfg.data.batch_size)
        batch, tokens = _batch(stages, data, rows)
        model.train()
        with Counter(storages, reads_source) as training:
            _sum(_passed(module, batch, batch.get("answer"))).backward()
        model.zero_grad()
        model.eval()
        candidates = max(1, len(stages.decoding.candidates))
        answers = {k: x.repeat(candidates, 1) for k, x in batch.get("answer", {}).items()}
        with torch.no_grad(), Counter(storages, reads_source) as reading:
            _passed(module, batch, answers)
        counts = {"training flops": training.flops, "reading flops": reading.flops}
        if stages.form_name == "prompt" and not stages.decoding.candidates:
            with torch.no_grad(), Counter(storages, reads_source) as writing:
                counts["cached token"] = _written(stages, module, batch)
            counts |= {f"writing bytes, {phase}": count for phase, count in writing.peaks.items()}
    counts |= {f"training bytes, {phase}": count for phase, count in training.peaks.items()}
    return counts | {f"reading bytes, {phase}": count for phase, count in reading.peaks.items()}, tokens


def _autocast(precision: str | None) -> torch.autocast:
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast("cpu", half, enabled=precision in ("bf16-mixed", "16-mixed"))


def _written(stages: Sketch, module: Any, batch: dict[str, Any]) -> int:
    """Begin to write freely, with the prompts' pass; returns the bytes of the key-value cache for each token."""
    answers, length = stages.decoding, batch["target"]["input_ids"].shape[1]
    module.read_source(batch)
    inputs = {name: x.repeat_interleave(answers.beams, 0) for name, x in batch["target"].items()}
    if module.model.config.is_encoder_decoder:
        encoded = module.model.get_encoder()(**batch["target"]).last_hidden_state
        inputs["encoder_outputs"] = (encoded.repeat_interleave(answers.beams, 0),)
        inputs["decoder_input_ids"] = inputs.pop("input_ids")[:, :1]
        length = 1
    else:
        inputs["logits_to_keep"] = 1
    cache = module.model(**inputs, use_cache=True).past_key_values
    layers = getattr(cache, "self_attention_cache", cache).layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // length


def _batch(stages: Sketch, data: PairedDataModule, rows: int) -> tuple[dict[str, Any], int]:
    """As many rows as long as the longest, and how many tokens these are."""

    def ids(length: int) -> dict[str, Tensor]:
        return {name: torch.ones(rows, length, dtype=torch.long) for name in ("input_ids", "attention_mask")}

    dataset = data.dataset("train")
    longest = max(len(item["inputs"]["input_ids"]) for item in dataset.target)
    batch = {"target": ids(longest)}
    if stages.form_name == "prompt":
        assert isinstance(stages.form, PromptForm)
        texts = stages.task.labels or ("x" * 8 * CHARACTERS,)
        batch["answer"] = ids(max(len(stages.form.answer(text)) for text in texts))
    if dataset.source is None:
        return batch, rows * longest
    batch["source"] = ids(length := max(len(item["inputs"]["input_ids"]) for item in dataset.source))
    if data.view == "latent":
        batch["source"] = {"attention_mask": batch["source"]["attention_mask"],
                           "states": torch.zeros(rows, length, 1, stages.mt.encoder_config.d_model)}  # fmt: skip
    return batch, rows * (longest + length)


def _passed(module: Any, batch: dict[str, Any], answers: Mapping[str, Tensor] | None) -> Any:
    """The pass of a batch; without the heads of labels and spans, which are small, and which look at content."""
    if answers:
        return module(batch, answers)
    module.read_source(batch)
    whole = module.model.get_base_model() if hasattr(module.model, "peft_config") else module.model
    inputs = batch["target"]
    if whole.config.is_encoder_decoder:  # heads on the decoder, which reads the input again
        inputs = {**inputs, "decoder_input_ids": inputs["input_ids"], "use_cache": False}
    return whole.base_model(**inputs)


def _sum(outputs: Any) -> Tensor:
    return sum(x.float().sum() for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad)  # type: ignore[return-value]


def _weights(stages: Sketch, model: nn.Module) -> int:
    """Bytes of a model's weights as they are kept, and of the largest 4-bit one while it is multiplied with."""
    precision, total, largest = stages.precision, 0, 0
    packed = set()
    if precision.quantize:
        skipped = ("lm_head", *backbones.FAMILIES[model.config.model_type].heads[stages.form_name], "lora_")  # type: ignore[union-attr, index]
        packed = {id(m.weight) for name, m in model.named_modules()
                  if isinstance(m, nn.Linear) and not any(part in name for part in (*skipped, "flare_"))}  # fmt: skip
    for p in model.parameters():
        if id(p) in packed:
            # half a byte, and a scale for every 64: 32 bits, or 8 with a scale of 32 bits for every 256 of them
            total += int(p.numel() * (0.5 + (1 + 4 / 256 if precision.double_quant else 4) / 64))
            largest = max(largest, p.numel() * getattr(torch, precision.compute_dtype).itemsize)
        else:
            total += p.numel() * p.element_size()
    return total + largest


def _optimizer_states(model: nn.Module, name: str) -> int:
    """Two moments of every trained weight: 8 bits each with a scale of 32 bits for every 256, small tensors in 32 bits."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not name.endswith("8bit"):
        return sum(2 * p.numel() * p.element_size() for p in trained)
    return sum(2 * p.numel() * 4 if p.numel() < 4096 else int(2 * p.numel() * (1 + 4 / 256)) for p in trained)


def _without_content(model: nn.Module) -> set[int]:
    """Turn a model's weights into those of the present FakeTensorMode; returns their storages. Tied weights stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones are kept, for their ids
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    made[id(old)] = (new, old)
                held[name] = made[id(old)][0] if old is not None else None  # type: ignore[assignment]
    return {new.untyped_storage()._cdata for new, _ in made.values()}


class Counter(TorchDispatchMode):
    """Count the bytes of the tensors that are alive at once, at most, and the FLOPs of the products.

    Args:
        known: storages that are not counted.
        reads_source: tells whether the source is being read.
    """

    def __init__(self, known: set[int], reads_source: Callable[[], bool] = lambda: False):
        super().__init__()
        self.sizes: dict[int, int] = dict.fromkeys(known, 0)
        self.reads_source = reads_source
        self.now = self.flops = 0
        self.peaks: dict[str, int] = {}

    @property
    def peak(self) -> int:
        """Return the most bytes of all phases."""
        return max(self.peaks.values(), default=0)

    @property
    def phase(self) -> str:
        """Return what is being computed."""
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        return "source" if self.reads_source() else "forward"

    def __enter__(self):
        gc.freeze()  # so that the collections below look at what the passes leave only
        return super().__enter__()

    def __exit__(self, *error):
        gc.unfreeze()
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        if formula := flop_registry.get(operation._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=outputs)
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                phase = self.phase
                if self.now > self.peaks.get(phase, 0):
                    if phase == "backward":
                        gc.collect()  # what checkpointing computes again hangs in cycles here
                    self.peaks[phase] = max(self.peaks.get(phase, 0), self.now)
                weakref.finalize(storage, self._freed, key)
        return outputs

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@functools.cache
def throughput(accelerator: str) -> tuple[str, float]:
    """The device of an estimate and its peak FLOP/s: measured with a matrix product where it is here."""
    gpu = accelerator == "gpu"
    if gpu and not torch.cuda.is_available():
        return GPU
    size, kind = (8192, {"device": "cuda", "dtype": torch.bfloat16}) if gpu else (1024, {})
    a = torch.randn(size, size, **kind)  # type: ignore[call-overload]
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return (torch.cuda.get_device_name() if gpu else "this CPU"), 2 * size**3 / best


def _translating(stages: Preview, texts: Sequence[str]) -> float:
    """Seconds of a translation model for texts: two FLOPs per parameter and token, in the encoder at once, in the decoder one by
    one. Texts that are not known are as long as data.max_length."""
    o, unknown = stages.cfg.mt, stages.cfg.data.max_length
    tokens = sum(len(text) / CHARACTERS if text else unknown for text in texts)
    half = mt_parameters(stages.cfg) / 2
    speed = throughput(stages.cfg.trainer.accelerator)[1] * SHARE
    return 2 * half * tokens * (1 + o.beams / DECODING) / speed


def mt_parameters(cfg: Config) -> int:
    """How many parameters the translation model has."""
    if cfg.mt.path is None:
        p = cfg.mt.pretrain
        assert p is not None
        return p.vocab_size * p.hidden_size + p.layers * 28 * p.hidden_size**2
    return _parameters(cfg.mt.path, cfg.mt.revision, AutoModelForSeq2SeqLM)
