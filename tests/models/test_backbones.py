"""Loading checkpoints: strict about what is missing, clear about what is wrong."""

import json
from dataclasses import fields, replace

import pytest
import torch
from random_models import SMALL, random_backbone
from small_checkpoints import tiny_checkpoint
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from flare_exp.config.schema import PROMPTED, PretrainConfig
from flare_exp.errors import UserError
from flare_exp.flare import adapter
from flare_exp.models import backbones, families


def bert(cls, folder):
    torch.manual_seed(0)
    model = cls(BertConfig(**SMALL, num_labels=3))
    model.save_pretrained(folder)
    return model


def test_only_the_head_may_be_new_and_a_missing_pooler_joins_it(tmp_path):
    saved = bert(BertForMaskedLM, tmp_path)  # has no pooler
    backbone = backbones.load(str(tmp_path), "label", num_labels=5)
    model = backbone.model
    assert backbone.head == ("classifier", "pooler")
    assert model.classifier.out_features == 5
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight, saved.bert.embeddings.word_embeddings.weight
    )
    trained = {
        n
        for n, p in adapter.add_adapter(backbone, r=2, alpha=4).named_parameters()
        if p.requires_grad
    }
    assert any("pooler" in n for n in trained)


@pytest.mark.parametrize("task_type", ["label", "span"])
def test_what_is_trained_in_full_is_not_quantized(task_type, tmp_path):
    bert(BertForMaskedLM, tmp_path)
    backbone = backbones.load(
        str(tmp_path), task_type, num_labels=3, precision=backbones.Precision(quantize="nf4")
    )
    own = {n for n, p in backbone.model.named_parameters() if set(n.split(".")) & {*backbone.head}}
    packed = {n for n, p in backbone.model.named_parameters() if not p.is_floating_point()}
    assert own
    assert packed
    assert not own & packed


def test_a_pretrained_pooler_stays_frozen(tmp_path):
    bert(BertForSequenceClassification, tmp_path)
    backbone = backbones.load(str(tmp_path), "label", num_labels=3)
    trained = {
        n
        for n, p in adapter.add_adapter(backbone, r=2, alpha=4).named_parameters()
        if p.requires_grad
    }
    assert not any("pooler" in n for n in trained)
    assert any("classifier" in n for n in trained)


def test_missing_backbone_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    bert(BertForSequenceClassification, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "layer.1.attention" not in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d+ weights of the backbone"):
        backbones.load(str(tmp_path), "label", num_labels=3)


def test_a_head_for_other_labels_is_refused(tmp_path):
    bert(BertForSequenceClassification, tmp_path)
    with pytest.raises(
        UserError, match="another shape, as those of a head for another number of labels"
    ):
        backbones.load(str(tmp_path), "label", num_labels=5)


def test_truncated_weights_missing_folder_and_unknown_family(tmp_path):
    bert(BertForSequenceClassification, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="its weights could not be read"):
        backbones.load(str(tmp_path), "label", num_labels=3)
    with pytest.raises(UserError, match="no checkpoint"):
        backbones.load(str(tmp_path / "nothing"), "label", num_labels=3)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(
        UserError, match=r"'gpt2' is not known here; known: bert, .*gemma3_text.*\n.*FAMILIES"
    ):
        families.family_of(str(tmp_path))


def test_quantized_weights_are_refused(tmp_path):
    """Those of the English LoRA would be merged into 4 bits."""
    bert(BertForSequenceClassification, tmp_path)
    config = tmp_path / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"quantization_config": settings})
    )
    with pytest.raises(UserError, match=r"quantized already; .* with model\.quantize=nf4"):
        backbones.load(str(tmp_path), "label", num_labels=3)


class Harmful:
    """An object whose unpickling would make a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return type(self.place).touch, (self.place,)


def test_pickled_weights_that_would_run_code_are_refused(tmp_path):
    bert(BertForSequenceClassification, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weights": Harmful(tmp_path / "made")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UserError,
        match="its weights could not be read: they are pickled and hold more than tensors",
    ):
        backbones.load(str(tmp_path), "label", num_labels=3)
    assert not (tmp_path / "made").exists()


def test_unreachable_hub_checkpoint_is_a_user_error():
    with pytest.raises(
        UserError,
        match=r"model\.path=no-such-owner/no-such-model: its configuration could not be read",
    ):
        families.family_of("no-such-owner/no-such-model")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"value": "query"}, "query and value are both 'query'"),
        ({"value": "valu"}, r"encoder\.layer\.0 has 0 layers called 'valu' instead of one"),
        ({"query": "dense"}, r"has 3 layers called 'dense' instead of one"),
        ({"linear": ("key", "up_proj")}, "no layer is called 'up_proj'"),
        (
            {"stacks": {"encoder": "encoder.block"}},
            r"there are no blocks at 'bert\.encoder\.block'",
        ),
    ],
)
def test_a_family_row_that_does_not_fit_is_refused(wrong, message):
    model = random_backbone(("bert", "label")).model
    with pytest.raises(
        UserError, match=f"the row of bert in FAMILIES of families.py does not fit: .*{message}"
    ):
        backbones.wrap(model, replace(families.FAMILIES["bert"], **wrong), "label")


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path / "whole")
    tokens = len(backbones.load_tokenizer(str(folder)))

    def of(rows):
        (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | {"vocab_size": rows})
        )
        return backbones.load_tokenizer(str(folder))

    assert len(of(2 * tokens)) == len(of(tokens)) == tokens  # embeddings may be padded
    with pytest.raises(
        UserError, match=rf"its tokenizer has {tokens} tokens, and its model {2 * tokens + 1}; are"
    ):
        of(2 * tokens + 1)
    with pytest.raises(
        UserError,
        match=rf"2 tokens of its tokenizer, e.g. '.*', are none of its model's {tokens - 3}; are",
    ):
        of(tokens - 3)  # the last one is special
    of(tokens)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(
        UserError,
        match=rf"its tokenizer has \d tokens, and its model {tokens}; are the tokenizer's files",
    ):
        backbones.load_tokenizer(str(folder))


def test_the_command_line_knows_which_embedded_models_have_no_head():
    (known,) = (f.metadata["choices"] for f in fields(PretrainConfig) if f.name == "architecture")
    assert tuple(name for name in known if "label" not in families.FAMILIES[name].heads) == PROMPTED
