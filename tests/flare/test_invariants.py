"""The invariants of the method, for every family and task type, in float64 (I1-I8, I10; I3's
functions are in test_fusion.py, I13 in test_pipeline.py).
"""

import itertools

import processes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from random_models import BUILDERS, dtype_of, outputs, random_backbone, rows, token_batch
from torch import nn

from flare_exp.flare import adapter, fusion, peft_method
from flare_exp.flare.peft_method import FlareConfig
from flare_exp.flare.source_encoders import BackboneSourceEncoder
from flare_exp.flare.source_states import (
    ANSWER_SOURCES,
    SOURCE_LAYERS,
    SOURCE_STATES,
    align,
    positions,
)
from flare_exp.models.backbones import Precision, load, parameter_counts
from flare_exp.models.families import FAMILIES
from flare_exp.training.generation import AnswerDecoding, GenerationModule

FUSIONS = list(fusion.FUSIONS)
ALPHA = 12  # alpha / r = 3: no power of two, so that bit-for-bit tests see the order of operations
ENCODERS = [kind for kind in BUILDERS if kind[1] != "prompt" and kind[0] != "mt5"]
DECODERS = [kind for kind in BUILDERS if kind[1] == "prompt" and kind[0] != "mt5"]


def tolerance(kind) -> dict[str, float]:
    """Encoders compute in float64 throughout; the others' norms are 32-bit inside."""
    return {"rtol": 1e-9, "atol": 1e-9} if kind in ENCODERS else {"rtol": 1e-4, "atol": 1e-5}


def side(kind) -> str:
    return "left" if kind in DECODERS else "right"


def batches(kind, target_width=None, source_width=None):
    """A target and a source batch of unequal lengths."""
    return token_batch([7, 4, 6], 1, target_width, side(kind)), token_batch(
        [5, 9, 3], 2, source_width, side(kind)
    )


@pytest.fixture
def target(kind):
    return batches(kind)[0]


@pytest.fixture
def source(kind):
    return batches(kind)[1]


def fused(make_model, name="add_relu", trained=True, **options):
    """A FLARE model and its source stream.

    `trained` gives B (and learned fusions) random values.
    """
    backbone = make_model()
    torch.manual_seed(3)
    model = (
        adapter.add_adapter(backbone, r=4, alpha=ALPHA, fusion=name, **options)
        .to(backbone.model.dtype)
        .eval()
    )
    if trained:
        randomise(model)
    return model, BackboneSourceEncoder(model)


def randomise(model, *more):
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("lora_B", "flare_fusion", *more)):
            torch.nn.init.normal_(parameter, std=0.3)


def said(model, stream, target, source):
    stream.encode(source)
    return outputs(model, target)


def real(out, batch):
    """Outputs of each row, without padding."""
    return [
        o[m.bool()] if out.ndim == 3 and out.shape[1] == len(m) else o
        for o, m in zip(out, batch["attention_mask"], strict=True)
    ]


def fused_blocks(model):
    """(stack, index) -> the projections of a block that fuse."""
    found = {}
    for module in model.modules():
        for variant in getattr(module, "lora_variant", {}).values():
            if variant.block is not None:
                found.setdefault(variant.block, []).append(module)
    return found


@pytest.mark.parametrize("name", FUSIONS)
def test_i1_at_init_output_equals_backbone(make_model, target, source, name):
    expected = outputs(make_model().model, target)
    model, stream = fused(make_model, name, trained=False)
    assert torch.equal(said(model, stream, target, source), expected)
    # and the test is not blind: with B != 0 it differs
    model, stream = fused(make_model, name)
    assert not torch.allclose(said(model, stream, target, source), expected)


def test_i2_add_without_source_equals_peft_lora_bit_for_bit(make_model, target, source):
    flare, stream = fused(make_model, "add")
    backbone = make_model()
    names = [*backbone.family.fused, *backbone.family.plain]
    config = LoraConfig(
        r=4, lora_alpha=ALPHA, target_modules=names, modules_to_save=list(backbone.head) or None
    )
    lora = get_peft_model(backbone.model, config).to(backbone.model.dtype).eval()
    weights = {k: v for k, v in flare.state_dict().items() if "lora_" in k}
    missing, unexpected = lora.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [k for k in missing if "lora_" in k]
    assert torch.equal(said(flare, stream, target, None), outputs(lora, target))
    assert not torch.allclose(said(flare, stream, target, source), outputs(lora, target))


def english_pass(model, source, source_state="layer_input"):
    """What the backbone's fused projections read (or its blocks, with "block_output"), block by
    block, and each stack's final state, with PEFT switched off.
    """
    base, seen, final = model.get_base_model(), {}, {}
    readers = {block: modules[0] for block, modules in fused_blocks(model).items()}
    if source_state == "block_output":
        stacks = FAMILIES[base.config.model_type].stacks
        readers = {
            (stack, index): base.base_model.get_submodule(stacks[stack])[index]
            for stack, index in readers
        }

    def keep(block, args, kwargs):
        seen[block] = args[0] if args else kwargs["hidden_states"]

    handles = [
        reader.register_forward_pre_hook(
            lambda m, args, kwargs, block=block: keep(block, args, kwargs), with_kwargs=True
        )
        for block, reader in readers.items()
    ]
    with model.disable_adapter(), torch.no_grad():
        if base.config.is_encoder_decoder:
            encoded = base.base_model.encoder(**source).last_hidden_state
            shifted = torch.cat(
                [torch.ones_like(source["input_ids"][:, :1]), source["input_ids"][:, :-1]], 1
            )
            mask = source["attention_mask"]
            decoder = base.base_model.decoder
            decoded = decoder(
                input_ids=shifted,
                encoder_hidden_states=encoded,
                encoder_attention_mask=mask,
                use_cache=False,
            )
            final = {"encoder": encoded, "decoder": decoded.last_hidden_state}
        else:
            where = (
                {"position_ids": positions(source["attention_mask"])}
                if "decoder" in {b[0] for b in fused_blocks(model)}
                else {}
            )
            final = dict.fromkeys(
                ("encoder", "decoder"), base.base_model(**source, **where).last_hidden_state
            )
    for handle in handles:
        handle.remove()
    return seen, final


@pytest.mark.parametrize("source_layer", SOURCE_LAYERS)
@pytest.mark.parametrize("source_state", SOURCE_STATES)
def test_i3_whole_layer_equals_the_papers_equation(
    make_model, kind, target, source, source_layer, source_state
):
    """h = W0 v^T + (a/r) B phi(A v^S, A v^T) for every fused projection and each option of v^S."""
    model, stream = fused(
        make_model, "add_relu", source_layer=source_layer, source_state=source_state
    )
    read, final = english_pass(model, source, source_state)
    seen, blocks = {}, fused_blocks(model)
    for modules in blocks.values():
        for module in modules:
            module.register_forward_hook(lambda m, args, out: seen.__setitem__(m, (args[0], out)))
    said(model, stream, target, source)
    assert len(blocks) == (6 if kind in [("mt5", "label"), ("mt5", "span")] else 3)
    assert all(len(modules) == 2 for modules in blocks.values())
    for (stack, index), modules in blocks.items():
        v_source = read.get((stack, index + {"same": 0, "ahead": 1}[source_layer]), final[stack])
        for module in modules:
            v_target, h = seen[module]
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            bias = 0 if module.base_layer.bias is None else module.base_layer.bias
            shift = source["input_ids"].shape[1] - v_target.shape[1] if side(kind) == "left" else 0
            for row, (v, own) in enumerate(zip(v_target, h, strict=True)):
                for t in torch.nonzero(target["attention_mask"][row]).flatten().tolist():
                    phi = (a @ v[t]).relu()
                    if (
                        0 <= t + shift < source["attention_mask"].shape[1]
                        and source["attention_mask"][row, t + shift]
                    ):
                        phi = phi + (a @ v_source[row, t + shift]).relu()
                    expected = module.base_layer.weight @ v[t] + bias + (ALPHA / 4) * b @ phi
                    torch.testing.assert_close(own[t], expected, **tolerance(kind))


@pytest.mark.parametrize("answer_source", ANSWER_SOURCES)
def test_i3_answer_tokens_attend_to_the_source_or_stand_alone(answer_source):
    """cross_attn takes any lengths, so that alignment does not keep answers from the source."""
    kind = ("llama", "prompt")
    model, stream = fused(lambda: random_backbone(kind), "cross_attn", answer_source=answer_source)
    target, source = batches(kind)
    prompt = target["input_ids"].shape[1] - 2  # the last two tokens are an answer
    seen = {}
    for modules in fused_blocks(model).values():
        modules[0].register_forward_hook(lambda m, args, out: seen.__setitem__(m, (args[0], out)))
    stream.encode(source, prompt=prompt)
    outputs(model, target)
    for module, (v, h) in seen.items():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        alone = v @ module.base_layer.weight.T + (ALPHA / 4) * v @ a.T @ b.T
        equal = (
            torch.isclose(h, alone, **tolerance(kind)).all(-1) | ~target["attention_mask"].bool()
        )
        assert equal[:, prompt:].all() == (answer_source == "none")
        assert not equal[:, :prompt].all()


@pytest.mark.parametrize("name", FUSIONS)
def test_i4_source_pass_builds_no_graph_and_gradients_are_right(
    make_model, kind, target, source, name
):
    model, stream = fused(make_model, name)
    model.double()
    target, source = (
        {k: v[[0]][:, b["attention_mask"][0].bool()] for k, v in b.items()}
        for b in (target, source)
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(True)  # even then
    stream.encode(source)
    assert not any(
        stream.states.states_for(block)[0].requires_grad for block in fused_blocks(model)
    )
    model.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    weight = next(p for k, p in model.named_parameters() if "lora_A" in k)
    direction = torch.randn_like(weight)

    def loss():
        stream.states.allow_pass()
        return outputs(model, target).tanh().sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    exact = kind in ENCODERS  # see `tolerance`
    step = 1e-6 if exact else 1e-4
    with torch.no_grad():
        weight += step * direction
        up = loss()
        weight -= 2 * step * direction
        down = loss()
        weight += step * direction
    torch.testing.assert_close(
        (gradient * direction).sum(),
        (up - down) / (2 * step),
        rtol=1e-5 if exact else 1e-2,
        atol=1e-6 if exact else 1e-3,
    )
    assert gradient.abs().max() > 0


def test_i4_source_pass_is_the_backbone_without_adapter_and_without_dropout(make_model, source):
    model, stream = fused(make_model, "add")
    read, final = english_pass(model, source)
    model.train()
    stream.encode(source)
    assert all(m.training for m in model.modules()), (
        "the source pass must put every module back into train mode"
    )
    for stack, index in fused_blocks(model):
        assert torch.equal(
            stream.states.states_for((stack, index))[0], read.get((stack, index + 1), final[stack])
        )


@pytest.mark.parametrize("name", FUSIONS)
def test_i5_padding_and_batch_composition_never_change_outputs(
    make_model, kind, target, source, name
):
    model, stream = fused(make_model, name)
    whole = real(said(model, stream, target, source), target)
    wide_target, wide_source = batches(kind, 12, 14)
    for own, wide in zip(
        whole, real(said(model, stream, wide_target, wide_source), wide_target), strict=True
    ):
        torch.testing.assert_close(wide, own, **tolerance(kind))
    for row in range(3):
        alone = [
            {k: v[[row]][:, b["attention_mask"][row].bool()] for k, v in b.items()}
            for b in (target, source)
        ]
        torch.testing.assert_close(
            real(said(model, stream, *alone), alone[0])[0], whole[row], **tolerance(kind)
        )


@pytest.mark.parametrize("name", FUSIONS)
def test_i5_a_row_without_source_equals_no_source(make_model, kind, target, source, name):
    model, stream = fused(make_model, name)
    source["attention_mask"][1] = 0
    mixed = said(model, stream, target, source)
    assert torch.isfinite(mixed).all()
    torch.testing.assert_close(
        mixed[[1]], said(model, stream, rows(target, 1), None), **tolerance(kind)
    )


@pytest.mark.parametrize("name", FUSIONS)
def test_i6_source_changes_output_and_swapping_changes_both(make_model, kind, target, source, name):
    """Every pair of a family, a fusion function and the two options of the source states occurs."""
    options = list(itertools.product(SOURCE_LAYERS, SOURCE_STATES))
    source_layer, source_state = options[
        (FUSIONS.index(name) + list(BUILDERS).index(kind)) % len(options)
    ]
    model, stream = fused(make_model, name, source_layer=source_layer, source_state=source_state)
    own = said(model, stream, target, source)
    assert not torch.allclose(own, said(model, stream, target, None))
    swapped = said(model, stream, target, rows(source, 1, 0, 2))
    assert not torch.allclose(swapped[0], own[0])
    assert not torch.allclose(swapped[1], own[1])
    torch.testing.assert_close(swapped[2], own[2], **tolerance(kind))


def test_a_source_belongs_to_one_forward(make_model, target, source):
    """A forgotten or stale source would give plausible answers."""
    model, stream = fused(make_model)
    forgotten = "none was read for this forward"
    with pytest.raises(ValueError, match=forgotten):
        outputs(model, target)
    said(model, stream, target, source)
    with pytest.raises(ValueError, match=forgotten):
        outputs(model, target)
    said(model, stream, target, None)  # no source, asked for
    with pytest.raises(ValueError, match=forgotten):
        outputs(model, target)
    with pytest.raises(ValueError, match="has 2 rows, and the target has 3"):
        said(model, stream, target, rows(source, 0, 1))
    with model.disable_adapter():
        outputs(model, target)  # nothing fuses


# --- I7: decoders generate what they were trained to say -----------------------------------------


@pytest.fixture(params=DECODERS, ids=lambda kind: kind[0])
def decoder(request):
    return request.param


NEVER = 9999  # a token that no model says, so that every answer has all six


def generate(model, stream, target, source, eos=NEVER, **options):
    stream.encode(source)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 1,
        "eos_token_id": eos,
        "disable_compile": True,
    }
    return model.generate(
        **target, **settings, return_dict_in_generate=True, output_logits=True, **options
    )


def forced(model, stream, target, source, written):
    """Logits [B, A, V] of a full forward over prompts and what was written after them."""
    stream.encode(source, prompt=target["input_ids"].shape[1])
    mask = torch.cat([target["attention_mask"], torch.ones_like(written)], 1)
    ids = torch.cat([target["input_ids"], written], 1)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
    ).logits
    return logits[:, target["input_ids"].shape[1] - 1 : -1]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("answer_source", ANSWER_SOURCES)
def test_i7_generation_with_cache_equals_the_full_forward(decoder, answer_source, cache):
    """Every decoder with every fusion function here, and with every pair of options.

    Every triple of these three occurs.
    """
    number = (
        DECODERS.index(decoder)
        + 2 * ANSWER_SOURCES.index(answer_source)
        + ("dynamic", "static").index(cache)
    )
    name = ("add_relu", "cross_attn", "gated")[number % 3]
    model, stream = fused(lambda: random_backbone(decoder), name, answer_source=answer_source)
    target, source = batches(decoder)
    done = generate(
        model, stream, target, source, cache_implementation=None if cache == "dynamic" else cache
    )
    written = done.sequences[:, target["input_ids"].shape[1] :]
    expected = forced(model, stream, target, source, written)
    assert written.shape == (3, 6)
    torch.testing.assert_close(
        torch.stack(done.logits, 1), expected.to(done.logits[0].dtype), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(expected.argmax(-1), written)
    # each alone writes the same
    for row in range(3):
        alone = [
            {k: v[[row]][:, b["attention_mask"][row].bool()] for k, v in b.items()}
            for b in (target, source)
        ]
        single = generate(model, stream, *alone).sequences[0, alone[0]["input_ids"].shape[1] :]
        assert torch.equal(single, written[row])
    # with a token of the answers as EOS, they stop there
    eos = int(written[0, 2])
    stopped = generate(model, stream, target, source, eos=eos).sequences[
        :, target["input_ids"].shape[1] :
    ]
    for short, whole in zip(stopped.tolist(), written.tolist(), strict=True):
        end = whole.index(eos) + 1 if eos in whole else len(whole)
        assert short[:end] == whole[:end]
        assert set(short[end:]) <= {1}
    # and the answers depend on the source as the option says
    without = forced(model, stream, target, None, written)
    assert not torch.allclose(without[:, -1], expected[:, -1])


@pytest.mark.parametrize("answer_source", ANSWER_SOURCES)
@pytest.mark.parametrize("name", ["add", "cross_attn"])
def test_answer_tokens_fuse_the_last_source_state_or_none(name, answer_source):
    """Of the layer, against the equation: add fuses S of the source's last token, cross_attn
    attends to the whole source.
    """
    kind = ("llama", "prompt")
    model, stream = fused(lambda: random_backbone(kind), name, answer_source=answer_source)
    target, source = batches(kind)
    module = fused_blocks(model)["decoder", 0][0]
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    forced(model, stream, target, source, torch.tensor([[7, 8]] * 3))
    (v, h), width = seen[-1], target["input_ids"].shape[1]
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    t = v[:, width:] @ a.T
    if answer_source == "none":
        phi = t
    elif name == "add":
        phi = t + stream.states.states_for(("decoder", 0))[0][:, -1:] @ a.T
    else:
        states, mask = stream.states.states_for(("decoder", 0))
        phi = module.flare_fusion["default"](states @ a.T, t, mask)
    expected = v[:, width:] @ module.base_layer.weight.T + (ALPHA / 4) * phi @ b.T
    torch.testing.assert_close(h[:, width:], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["add_relu", "cross_attn"])
def test_i7_beams_score_what_the_full_forward_says(decoder, name):
    model, stream = fused(lambda: random_backbone(decoder), name)
    target, source = batches(decoder)
    done = generate(
        model,
        stream,
        target,
        source,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.0,
        output_scores=True,
    )
    width = target["input_ids"].shape[1]
    double_target, double_source = (rows(b, 0, 0, 1, 1, 2, 2) for b in (target, source))
    written = done.sequences[:, width:]
    logp = forced(model, stream, double_target, double_source, written).log_softmax(-1)
    logp = logp.gather(-1, written[..., None]).squeeze(-1)
    torch.testing.assert_close(
        logp.sum(1).float(), done.sequences_scores.float(), rtol=1e-4, atol=1e-4
    )
    greedy = generate(model, stream, target, source).sequences
    assert greedy.shape[0] == 3


@pytest.mark.parametrize("family", ["llama", "gemma2", "mt5"])
def test_candidates_are_scored_as_one_at_a_time(family):
    """Scoring B x K rows at once equals a forward for every prompt and candidate."""

    class Tokenizer:
        pad_token_id, eos_token_id = 1, 3

    kind = (family, "prompt")
    model, stream = fused(lambda: random_backbone(kind))
    texts = {"short": [7, 3], "long": [8, 9, 10, 3], "other": [8, 11, 3]}
    module = GenerationModule(
        model, Tokenizer(), texts.__getitem__, AnswerDecoding(tuple(texts)), source=stream
    )
    target, source = batches(kind)
    batch = {"target": target, "source": source, "index": torch.arange(3)}
    chosen = [found.text for found in module.choose(batch)]
    found, _ = module(batch, {name: x.repeat(3, 1) for name, x in module.candidates.items()})
    for row in range(3):
        alone = [
            {k: v[[row]][:, b["attention_mask"][row].bool()] for k, v in b.items()}
            for b in (target, source)
        ]
        scores = []
        for ids in texts.values():
            written = torch.tensor([ids])
            if family == "mt5":
                stream.encode(alone[1])
                logits = model(**alone[0], decoder_input_ids=torch.tensor([[1, *ids[:-1]]])).logits
            else:
                logits = forced(model, stream, *alone, written)
            scores.append(logits.log_softmax(-1).gather(-1, written[..., None]).sum().item())
        torch.testing.assert_close(
            found.sum(1)[3 * row : 3 * row + 3].float(), torch.tensor(scores), rtol=1e-4, atol=1e-4
        )
        assert list(texts)[max(range(3), key=scores.__getitem__)] == chosen[row]


def test_an_encoder_decoder_generates_what_its_full_forward_says():
    kind = ("mt5", "prompt")
    model, stream = fused(lambda: random_backbone(kind))
    target, source = batches(kind)
    for beams in (1, 3):
        done = generate(
            model,
            stream,
            target,
            source,
            num_beams=beams,
            decoder_start_token_id=1,
            length_penalty=0.0,
            output_scores=True,
        )
        stream.encode(source)
        logits = model(**target, decoder_input_ids=done.sequences[:, :-1]).logits
        if beams == 1:
            torch.testing.assert_close(
                torch.stack(done.logits, 1), logits.to(done.logits[0].dtype), rtol=1e-4, atol=1e-4
            )
        else:
            written = done.sequences[:, 1:]
            logp = logits.log_softmax(-1).gather(-1, written[..., None]).squeeze(-1)
            torch.testing.assert_close(
                logp.sum(1).float(), done.sequences_scores.float(), rtol=1e-4, atol=1e-4
            )


# --- I8, I10, structure --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["add_relu", "cross_attn", "gated"])
def test_i8_gradient_checkpointing_changes_no_gradient(make_model, target, source, name):
    gradients = []
    for checkpointing in (False, True):
        model, stream = fused(make_model, name)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(5)  # for dropout
        seen, hook = [], next(iter(fused_blocks(model).values()))[0]
        hook.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        said(model, stream, target, source).tanh().sum().backward()
        # source pass, target pass, and the target pass again where activations were thrown away
        assert len(seen) == (3 if checkpointing else 2)
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-10, atol=1e-12)


def test_i13_the_same_seed_trains_the_same_adapter_and_another_seed_another_one(
    make_model, kind, target, source
):
    def train(seed):
        torch.manual_seed(seed)
        model = (
            adapter.add_adapter(make_model(seed=0), r=4, alpha=ALPHA, dropout=0.1, fusion="gated")
            .to(dtype_of(kind))
            .train()
        )
        torch.manual_seed(seed)  # of A and the head, then of dropout
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.1)
        optimizer, stream = (
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
            BackboneSourceEncoder(model),
        )
        for _ in range(2):
            said(model, stream, target, source).tanh().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    first, again, other = train(1), train(1), train(2)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert not any(torch.equal(other[name], tensor) for name, tensor in first.items())


def save_outputs_of_what_is_loaded(folder):
    """Load the models of the next test, in a process that has not made them."""
    made = {}
    for number, (family, task_type) in enumerate(BUILDERS):
        place = folder / str(number)
        precision = Precision("float32" if family == "gemma2" else "float64")
        base = load(str(place / "base"), task_type, num_labels=3, precision=precision).model
        model = PeftModel.from_pretrained(base, str(place / "adapter"), adapter_name="renamed")
        model = model.to(base.dtype).eval()
        batch = torch.load(place / "batch.pt", weights_only=True)
        BackboneSourceEncoder(model).encode(batch["source"])
        made[str(number)] = outputs(model, batch["target"]).detach()
    torch.save(made, folder / "made.pt")


@pytest.mark.slow
def test_i10_saved_and_loaded_in_a_fresh_process_gives_the_same_outputs(tmp_path):
    kept = {}
    for number, kind in enumerate(BUILDERS):
        folder, name = tmp_path / str(number), ["add_relu", "gated", "cross_attn"][number % 3]
        model, stream = fused(lambda kind=kind: random_backbone(kind), name)
        randomise(model, "modules_to_save")
        target, source = batches(kind)
        random_backbone(kind).model.save_pretrained(folder / "base")
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        torch.save({"target": target, "source": source}, folder / "batch.pt")
        kept[str(number)] = said(model, stream, target, source)
        # a model without the learned weights would say something else
        assert not torch.allclose(kept[str(number)], outputs(random_backbone(kind).model, target))
    loading = processes.CONTEXT.Process(
        target=save_outputs_of_what_is_loaded, args=(tmp_path,), daemon=True
    )
    loading.start()
    loading.join(120)
    assert loading.exitcode == 0
    made = torch.load(tmp_path / "made.pt", weights_only=True)
    for number, expected in kept.items():
        torch.testing.assert_close(
            made[number], expected.detach(), **tolerance(list(BUILDERS)[int(number)])
        )


def test_merging_a_fusion_adapter_is_refused_and_plain_lora_merges_exactly(
    make_model, kind, target
):
    model, _ = fused(make_model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    plain = adapter.add_adapter(make_model(), r=4, alpha=ALPHA).to(dtype_of(kind)).eval()
    randomise(plain, "modules_to_save")
    expected = outputs(plain, target)
    torch.testing.assert_close(
        outputs(plain.merge_and_unload(), target), expected, **tolerance(kind)
    )


def test_a_frozen_english_adapter_equals_the_merged_one(make_model, kind, target, source, tmp_path):
    """What 4-bit backbones do gives, in exact weights, the same model: at the start, in the source
    pass and after training.
    """
    from dataclasses import replace

    english = adapter.add_adapter(make_model(), r=4, alpha=ALPHA).to(dtype_of(kind)).eval()
    randomise(english, "modules_to_save")
    english.save_pretrained(tmp_path / "english")
    merged = make_model()
    merged = replace(
        merged,
        model=adapter.load_adapter(merged, str(tmp_path / "english"))
        .to(dtype_of(kind))
        .merge_and_unload(),
    )
    models = [merged, adapter.add_frozen(make_model(), str(tmp_path / "english"))]
    found = []
    for backbone in models:
        torch.manual_seed(3)
        model = (
            adapter.add_adapter(backbone, r=4, alpha=ALPHA, fusion="gated")
            .to(dtype_of(kind))
            .eval()
        )
        trained = {k for k, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert not any(".english." in key for key in trained)
        weights = {
            k: v
            for k, v in model.state_dict().items()
            if ".default." in k or k.endswith(".default")
        }
        torch.manual_seed(4)
        for key in sorted(weights):
            if "lora" in key or "fusion" in key:
                weights[key].copy_(torch.randn_like(weights[key]) * 0.3)
        found.append(said(model, BackboneSourceEncoder(model), target, source))
    torch.testing.assert_close(found[1], found[0], **tolerance(kind))
    model.save_pretrained(tmp_path / "flare", selected_adapters=["default"])
    english_again = adapter.add_frozen(make_model(), str(tmp_path / "english"))
    again = adapter.load_adapter(english_again, str(tmp_path / "flare")).to(dtype_of(kind)).eval()
    torch.testing.assert_close(
        said(again, BackboneSourceEncoder(again), target, source), found[0], **tolerance(kind)
    )
    with pytest.raises(ValueError, match="cannot be merged"):
        again.merge_and_unload()
    unmerged = said(again, BackboneSourceEncoder(again), target, source)
    torch.testing.assert_close(unmerged, found[0], **tolerance(kind))


def test_a_fusion_adds_its_own_parameters_to_every_fused_projection_and_nothing_else(make_model):
    lora = parameter_counts(adapter.add_adapter(make_model(), r=4, alpha=ALPHA))
    for name in FUSIONS:
        model = fused(make_model, name)[0]
        own = sum(p.numel() for p in fusion.build(name, 4).parameters())
        assert parameter_counts(model)["trainable"] - lora["trainable"] == own * sum(
            map(len, fused_blocks(model).values())
        )


def test_all_linear_adapts_every_linear_layer_of_the_blocks_and_fuses_the_same(make_model, source):
    model, stream = fused(make_model, "add", targets="all_linear")
    inside = [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and ("layers." in n or "layer." in n or "block." in n)
    ]
    assert {n.removesuffix(".base_layer") for n in inside if n.endswith(".base_layer")} == {
        n.removesuffix(".base_layer")
        for n in inside
        if "lora_" not in n and "flare_fusion" not in n
    }
    assert fused_blocks(model).keys() == fused_blocks(fused(make_model, "add")[0]).keys()
    read, final = english_pass(model, source)
    stream.encode(source)  # plain LoRA layers stand aside in the source pass as well
    for stack, index in fused_blocks(model):
        assert torch.equal(
            stream.states.states_for((stack, index))[0], read.get((stack, index + 1), final[stack])
        )


def test_fusion_is_a_variant_in_pefts_registry():
    """PEFT itself finds it by the configuration, and says so where a layer cannot fuse."""
    model, stream = fused(lambda: random_backbone(("llama", "prompt")), targets="all_linear")
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    config = model.peft_config["default"]
    assert all(
        isinstance(layer.lora_variants["fusion",](), peft_method.FlareVariant) for layer in layers
    )
    assert all(layer.lora_variant["default"].states is stream.states for layer in layers)
    assert layers[0].resolve_lora_variant(config=FlareConfig(fusion=None)) is None
    with pytest.raises(ValueError, match="unsupported variant combination"):
        get_peft_model(
            nn.Sequential(nn.Conv1d(1, 1, 1)), FlareConfig(target_modules=["0"], fusion="add")
        )
    assert config.fusion == "add_relu"


def test_only_adapter_and_head_train(make_model):
    model, _ = fused(make_model, "gated")
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in k or "flare_fusion" in k or "modules_to_save" in k for k in trained)
    assert any("flare_fusion" in k for k in trained)


def test_align():
    states, mask = torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[True, True, False]])
    longer, longer_mask = align(states, mask, torch.arange(5))
    assert longer.tolist()[0][:3] == states.tolist()[0]
    assert longer_mask.tolist() == [[True, True, False, False, False]]
    assert align(states, mask, torch.arange(2))[0].tolist() == [[[0, 1], [2, 3]]]
    mask = torch.tensor([[False, True, True]])
    left, left_mask = align(states, mask, torch.arange(5), "left", prompt=5)
    assert left.tolist()[0][2:] == states.tolist()[0]
    assert left_mask.tolist() == [[False, False, False, True, True]]
    assert align(states, mask, torch.arange(2), "left", prompt=2)[0].tolist() == [[[2, 3], [4, 5]]]
    # after the prompt: the last source state, or none
    answer, answer_mask = align(states, mask, torch.arange(4), "left", prompt=2)
    assert answer.tolist() == [[[2, 3], [4, 5], [4, 5], [4, 5]]]
    assert answer_mask.all()
    assert align(states, mask, torch.arange(4), "left", 2, "none")[1].tolist() == [
        [True, True, False, False]
    ]
    # a later piece of a cached generation
    assert align(states, mask, torch.arange(3, 4), "left", prompt=2)[0].tolist() == [[[4, 5]]]
