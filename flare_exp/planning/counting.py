"""Count the FLOPs and bytes of the passes of a model from its shapes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flare_exp.artifacts import digest_of
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.generation import GenerationPreprocessor
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.experiment.context import RunContext
from flare_exp.experiment.fitting import make_module
from flare_exp.flare.source_encoders import SourceEncoder
from flare_exp.models import backbones, families
from flare_exp.planning.lengths import CHARACTERS
from flare_exp.planning.walk import width_of

_WORK: dict[str, Work] = {}


Build = Callable[[int], tuple[nn.Module, "SourceEncoder | None"]]


def work_of(
    run: RunContext,
    model: nn.Module,
    source: SourceEncoder | None,
    data: PairedDataModule,
    build: Build,
) -> Work:
    """Return the `Work` of a model, counted once for all jobs with the same model and batches."""
    cfg, (batch, _) = run.cfg, _batch(run, data, 1)
    parameters = [
        [name, list(p.shape), str(p.dtype), p.requires_grad] for name, p in model.named_parameters()
    ]
    shapes = [[list(x.shape), str(x.dtype)] for x in tree_leaves(batch)]
    options = [
        cfg.model,
        cfg.decode,
        cfg.optim,
        cfg.trainer.precision,
        cfg.data,
        cfg.fusion if source else None,
    ]
    same = digest_of([parameters, shapes, run.task_type, run.task.labels, repr(options)])
    if same not in _WORK:
        _WORK[same] = Work(run, model, source, data, build)
    return _WORK[same]


class Work:
    """Count what the largest passes take: all their rows are as long as the longest text.

    Bytes of a process: `step` in a training step, `testing`, and `training` with validation. FLOPs
    per token (source included): `train` and `evaluate`; per example, for tokens that are generated
    one by one: `written`.

    Args:
        build: number of blocks -> the model with so many in each stack, and its source. Deep models
            are then counted by two shallow ones (`_counted`); None: every block is counted.
    """

    def __init__(
        self,
        run: RunContext,
        model: nn.Module,
        source: SourceEncoder | None,
        data: PairedDataModule,
        build: Build | None = None,
    ):
        kept, cfg = _weights(run, model), run.cfg
        free = run.task_type == "prompt" and not run.decoding.candidates
        begun = (
            sum(p.nbytes for p in model.parameters() if p.requires_grad) if data.passes > 1 else 0
        )
        states = _optimizer_states(model, cfg.optim._target_)
        total = backbones.parameter_counts(model)["total"]
        counts, tokens = _counted(run, model, source, data, build)

        def peak(kind: str) -> int:
            return max(count for name, count in counts.items() if name.startswith(f"{kind} bytes"))

        # gradients of earlier micro-batches
        self.step = kept + peak("training") + begun + states
        written = (
            peak("writing") + counts["cached token"] * run.decoding.max_new_tokens if free else 0
        )
        self.testing = kept + max(peak("reading"), written)
        self.training = max(self.step, self.testing + states)
        self.train, self.evaluate = (
            counts["training flops"] / tokens,
            counts["reading flops"] / tokens,
        )
        answers = run.decoding
        self.written = 2.0 * total * answers.max_new_tokens * answers.beams if free else 0.0


SHALLOW = (3, 4)  # from the third block on, each one adds what the one before it did


def _counted(
    run: RunContext,
    model: nn.Module,
    source: SourceEncoder | None,
    data: PairedDataModule,
    build: Build | None,
) -> tuple[dict[str, int], int]:
    """Count the passes of a model: name -> bytes or FLOPs, and the tokens of the batch.

    The blocks of a model are alike, so every count is an affine function of their number and
    follows from two shallow models. That holds phase by phase, because most bytes are alive at the
    phase's end (source, forward) or at its beginning (backward, where each block frees what it has
    saved). Two cases count all blocks. One is that a block's gradients could be larger than what it
    has saved: most bytes may then be alive at the end of the backward pass. The other is that the
    shallow models lack a kind of block (`layer_types`).
    """
    stacks = families.stacks(model)
    depths = {len(blocks) for blocks in stacks}
    (depth,) = depths if len(depths) == 1 else (0,)
    rows = min(run.cfg.data.batch_size, run.cfg.data.micro_batch_size or run.cfg.data.batch_size)
    # the first block may hold FLARE MT's map, too, which is one whatever the depth
    later = [block for blocks in stacks for block in blocks[1:]]
    gradients = max(
        (sum(p.nbytes for p in block.parameters() if p.requires_grad) for block in later), default=0
    )
    saved = (
        2 * rows * _batch(run, data, 1)[0]["target"]["input_ids"].shape[1] * width_of(model)
    )  # a block's input in 16 bits
    # Gemma 3's first blocks are all of one kind, and another kind brings masks and rotations of
    # its own
    kinds = getattr(model.config, "layer_types", None) or []
    unlike = set(kinds) - set(kinds[: SHALLOW[0]])
    if build is None or depth <= sum(SHALLOW) or gradients > saved or unlike:
        return _passes(run, model, source, data)
    (less, tokens), (more, _) = (_passes(run, *build(n), data) for n in SHALLOW)
    fewer, further = SHALLOW
    return {
        name: less[name] + (more[name] - less[name]) * (depth - fewer) // (further - fewer)
        for name in less
    }, tokens


def _passes(
    run: RunContext, model: nn.Module, source: SourceEncoder | None, data: PairedDataModule
) -> tuple[dict[str, int], int]:
    """Count the passes of a model as it is: name -> bytes or FLOPs, and the tokens of the batch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    cfg = run.cfg
    module = make_module(run, model, source)
    reads_source = (lambda: source.states.recording) if source else (lambda: False)
    with FakeTensorMode(), _autocast(cfg.trainer.precision):
        storages = _without_content(module)
        rows = min(cfg.data.batch_size, cfg.data.micro_batch_size or cfg.data.batch_size)
        batch, tokens = _batch(run, data, rows)
        model.train()
        with Counter(storages, reads_source) as training:
            _sum(_passed(module, batch, batch.get("answer"))).backward()
        model.zero_grad()
        model.eval()
        candidates = max(1, len(run.decoding.candidates))
        answers = {k: x.repeat(candidates, 1) for k, x in batch.get("answer", {}).items()}
        with torch.no_grad(), Counter(storages, reads_source) as reading:
            _passed(module, batch, answers)
        counts = {"training flops": training.flops, "reading flops": reading.flops}
        if run.task_type == "prompt" and not run.decoding.candidates:
            with torch.no_grad(), Counter(storages, reads_source) as writing:
                counts["cached token"] = _written(run, module, batch)
            counts |= {f"writing bytes, {phase}": count for phase, count in writing.peaks.items()}
    counts |= {f"training bytes, {phase}": count for phase, count in training.peaks.items()}
    return counts | {
        f"reading bytes, {phase}": count for phase, count in reading.peaks.items()
    }, tokens


def _autocast(precision: str | None) -> torch.autocast:
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast("cpu", half, enabled=precision in ("bf16-mixed", "16-mixed"))


def _written(run: RunContext, module: Any, batch: dict[str, Any]) -> int:
    """Begin to generate, with the prompts' pass; returns the cache's bytes for each token."""
    answers, length = run.decoding, batch["target"]["input_ids"].shape[1]
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


def _batch(run: RunContext, data: PairedDataModule, rows: int) -> tuple[dict[str, Any], int]:
    """Return a batch whose rows are all as long as the longest text, and its tokens."""

    def ids(length: int) -> dict[str, Tensor]:
        return {
            name: torch.ones(rows, length, dtype=torch.long)
            for name in ("input_ids", "attention_mask")
        }

    dataset = data.dataset("train")
    longest = max(len(item["inputs"]["input_ids"]) for item in dataset.target)
    batch = {"target": ids(longest)}
    if run.task_type == "prompt":
        assert isinstance(run.preprocessor, GenerationPreprocessor)
        texts = run.task.labels or ("x" * 8 * CHARACTERS,)
        batch["answer"] = ids(max(len(run.preprocessor.answer(text)) for text in texts))
    if dataset.source is None:
        return batch, rows * longest
    batch["source"] = ids(
        length := max(len(item["inputs"]["input_ids"]) for item in dataset.source)
    )
    if data.mode is PairingMode.LATENT:
        batch["source"] = {
            "attention_mask": batch["source"]["attention_mask"],
            "states": torch.zeros(rows, length, 1, run.mt.encoder_config.d_model),
        }
    if dataset.count > 1:
        batch["source"] = {
            name: x.expand(dataset.count, *x.shape) for name, x in batch["source"].items()
        }
    return batch, rows * (longest + dataset.count * length)


def _passed(module: Any, batch: dict[str, Any], answers: Mapping[str, Tensor] | None) -> Any:
    """Pass a batch through the model, without the heads of labels and spans.

    These heads are small, and they look at content.
    """
    if answers:
        return module(batch, answers)
    module.read_source(batch)
    whole = module.model.get_base_model() if hasattr(module.model, "peft_config") else module.model
    inputs = batch["target"]
    if whole.config.is_encoder_decoder:  # heads on the decoder, which reads the input again
        inputs = {**inputs, "decoder_input_ids": inputs["input_ids"], "use_cache": False}
    return whole.base_model(**inputs)


def _sum(outputs: Any) -> Tensor:
    return sum(
        x.float().sum() for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad
    )  # type: ignore[return-value]


def _weights(run: RunContext, model: nn.Module) -> int:
    """Return the bytes of a model's weights as they are kept.

    The largest 4-bit weight is counted unpacked too, as it is while it is multiplied.
    """
    precision, total, largest = run.models.precision, 0, 0
    packed = set()
    if precision.quantize:
        family = families.FAMILIES[model.config.model_type]  # type: ignore[union-attr, index]
        skipped = ("lm_head", *family.heads[run.task_type], "lora_")
        packed = {
            id(m.weight)
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and not any(part in name for part in (*skipped, "flare_"))
        }
    for p in model.parameters():
        if id(p) in packed:
            # half a byte, and a scale for every 64: 32 bits, or 8 with a scale of 32 bits for
            # every 256 of them
            total += int(p.numel() * (0.5 + (1 + 4 / 256 if precision.double_quant else 4) / 64))
            largest = max(largest, p.numel() * getattr(torch, precision.compute_dtype).itemsize)
        else:
            total += p.numel() * p.element_size()
    return total + largest


def _optimizer_states(model: nn.Module, name: str) -> int:
    """Return the bytes of two moments of every trained weight.

    In 8 bits, 256 of them share a scale of 32 bits, and small tensors have 32 bits.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not name.endswith("8bit"):
        return sum(2 * p.numel() * p.element_size() for p in trained)
    return sum(
        2 * p.numel() * 4 if p.numel() < 4096 else int(2 * p.numel() * (1 + 4 / 256))
        for p in trained
    )


def _without_content(model: nn.Module) -> set[int]:
    """Turn a model's weights into those of the present FakeTensorMode; returns their storages.

    Tied weights stay tied.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones are kept, for their ids
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    new = (
                        nn.Parameter(new, old.requires_grad)
                        if isinstance(old, nn.Parameter)
                        else new
                    )
                    made[id(old)] = (new, old)
                held[name] = made[id(old)][0] if old is not None else None  # type: ignore[assignment]
    return {new.untyped_storage()._cdata for new, _ in made.values()}


class Counter(TorchDispatchMode):
    """Count FLOPs of products, and the most bytes of tensors that are alive at once.

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
            if (
                isinstance(tensor, Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self.sizes
            ):
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
