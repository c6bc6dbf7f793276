"""The embedded models: every architecture is built, loads like any checkpoint and reads every
prompt.
"""

import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from flare_exp.tasks.toy import ToyNLI, ToyQA, ToySentiment
from flare_exp.toy.architectures import ARCHITECTURES
from flare_exp.toy.pretrain import pretrain
from flare_exp.toy.tokenizers import SENTINELS
from flare_exp.toy.training import STATE, kept_state
from flare_exp.toy.world import World
from flare_exp.utils import signals

OPTIONS = {
    "world_seed": 0,
    "documents": 1500,
    "steps": 4,
    "batch_size": 4,
    "lr": 1e-3,
    "vocab_size": 700,
    "hidden_size": 16,
    "layers": 2,
    "heads": 2,
    "target_share": 0.1,
}
CLASSES = {
    "xlm-roberta": (AutoModelForMaskedLM, "XLMRobertaForMaskedLM", "XLMRobertaTokenizer"),
    "llama": (AutoModelForCausalLM, "LlamaForCausalLM", "LlamaTokenizer"),
    "gemma2": (AutoModelForCausalLM, "Gemma2ForCausalLM", "GemmaTokenizer"),
    "mt5": (AutoModelForSeq2SeqLM, "MT5ForConditionalGeneration", "T5Tokenizer"),
}


@pytest.mark.parametrize("architecture", ["xlm-roberta", "mt5"])
def test_pre_training_that_is_stopped_goes_on_to_the_same_weights(
    architecture, tmp_path, monkeypatch
):
    options = {**OPTIONS, "architecture": architecture, "documents": 300}
    whole = pretrain(tmp_path, **options)
    looks, stops = 0, {5, 10}  # three looks before the steps, then one after each

    def asked():
        nonlocal looks
        looks += 1
        return signal.SIGTERM if looks in stops else None

    folder = tmp_path / "parts"
    folder.mkdir()
    monkeypatch.setattr(signals, "pending_signal", asked)
    for steps in (2, 4):
        with pytest.raises(
            signals.StopRequested, match=f"stopped by SIGTERM after {steps} steps of pre-training"
        ):
            pretrain(folder, **options)
    assert pretrain(folder, **options) == whole
    assert (folder / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()
    assert not (folder / STATE).exists()


def test_a_damaged_state_of_pre_training_is_named_and_removed(tmp_path, caplog):
    (tmp_path / STATE).write_bytes(b"half a state")
    assert kept_state(tmp_path / STATE) is None
    assert f"damaged state {tmp_path / STATE}" in caplog.text
    assert not (tmp_path / STATE).exists()


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def built(request, tmp_path_factory):
    """An architecture's name, its checkpoint, the facts of its pre-training, and a function that
    builds it again.
    """

    def build(**options):
        folder = tmp_path_factory.mktemp("model")
        recall = 0.0 if request.param == "xlm-roberta" else 0.6
        return folder, pretrain(
            folder, architecture=request.param, **{**OPTIONS, "recall": recall, **options}
        )

    return request.param, *build(), build


def test_loads_with_the_auto_classes(built):
    name, folder, facts, _ = built
    auto, model_class, tokenizer_class = CLASSES[name]
    model, tokenizer = auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (type(model).__name__, type(tokenizer).__name__) == (model_class, tokenizer_class)
    assert model.num_parameters() == facts["parameters"]
    assert len(tokenizer) == facts["vocabulary"] == model.config.vocab_size
    assert facts[f"{ARCHITECTURES[name].objective}_loss"] > 0
    if name in ("llama", "gemma2"):
        assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == model.config.bos_token_id
        assert (tokenizer.pad_token is None) == (name == "llama")


def test_text_survives_the_tokenizer(built):
    name, folder, *_ = built
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for task in (ToySentiment(limit=30), ToyNLI(limit=30), ToyQA(limit=30)):
        for lang in ("en", "near", "far"):
            for example in task.load(lang, "test"):
                prompt = task.prompt.format(**dict(zip(task.fields, example.texts, strict=True)))
                texts = (
                    example.texts
                    if name == "xlm-roberta"
                    else (*example.texts, f"{prompt} {task.gold(example)[0]}")
                )
                for text in texts:
                    back = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
                    assert back == (
                        text.replace("\n", " ") if name == "mt5" else text
                    )  # as the real T5's
    if name in ("llama", "gemma2"):  # an answer continues its prompt's tokens
        ids = tokenizer(prompt)["input_ids"]
        assert tokenizer(f"{prompt} neutral")["input_ids"][: len(ids)] == ids


def test_the_seed_determines_the_weights(built):
    _, folder, facts, build = built
    weights = load_file(folder / "model.safetensors")
    again, same_facts = build()
    other, _ = build(seed=1)
    assert same_facts == facts
    for path, equal in ((again, True), (other, False)):
        loaded = load_file(path / "model.safetensors")
        assert all(torch.equal(weights[key], loaded[key]) for key in weights) == equal


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_decoders_learn_to_end(name):
    """The end of a document is a target although it also fills up the batch."""
    tokenizer = ARCHITECTURES[name].tokenizer(World().corpus(50), 300)
    batch = ARCHITECTURES[name].collate(tokenizer)([[5, 6], [5, 6, 7, 8]])
    end = tokenizer.eos_token_id
    assert batch["labels"].tolist() == [[5, 6, end, -100, -100], [5, 6, 7, 8, end]]


def test_spans_move_behind_their_sentinels():
    tokenizer = ARCHITECTURES["mt5"].tokenizer(World().corpus(500), 500)
    sentinels = set(tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(SENTINELS)]))
    row = tokenizer(" ".join(["the soup was good"] * 10))["input_ids"]
    torch.manual_seed(0)
    batch = ARCHITECTURES["mt5"].collate(tokenizer)([row])
    spans: list[list[int]] = []
    for token in batch["labels"][0, :-1].tolist():
        if token in sentinels:
            spans.append([])
        else:
            spans[-1].append(token)
    rest = iter(spans)
    assert [
        t
        for token in batch["input_ids"][0].tolist()
        for t in (next(rest) if token in sentinels else [token])
    ] == row
    assert len(spans) > 2
