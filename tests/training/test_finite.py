"""NaN and infinity: a training stops at once, and no file of weights has them."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from random_models import random_backbone
from safetensors.torch import load_file, save_file
from small_checkpoints import tiny_checkpoint
from torch.utils.data import DataLoader
from transformers import M2M100Config, M2M100ForConditionalGeneration

from flare_exp.errors import UserError
from flare_exp.flare import adapter
from flare_exp.models import backbones
from flare_exp.toy.pretrain import pretrain
from flare_exp.training import divergence
from flare_exp.training.divergence import StopIfNotFinite
from flare_exp.translation import nllb
from flare_exp.utils.finite import check_finite


class Diverging(pl.LightningModule):
    """Its loss, or its gradient alone, is `value` at one step."""

    def __init__(self, what, value, at):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.what, self.value, self.at = what, value, at

    def training_step(self, batch, number):
        self.trained = self.global_step + 1
        loss = (self.weight * batch).sum()
        if number != self.at:
            return loss
        if self.what == "loss":
            return loss * self.value
        return (
            loss.detach() + torch.sqrt(self.weight - self.weight.detach()).sum()
        )  # finite, with an infinite slope

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train(model, *callbacks, **options):
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, DataLoader([torch.ones(2)] * 12, batch_size=1))


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize(
    ("what", "value", "said"),
    [
        ("loss", math.nan, "the loss is nan"),
        ("loss", math.inf, "the loss is inf"),
        ("gradient", None, "the norm of the gradient is inf"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_training_stops_at_the_first_step_that_is_not_finite(
    what, value, said, lag, tmp_path, monkeypatch
):
    look = StopIfNotFinite._look
    monkeypatch.setattr(
        StopIfNotFinite, "_look", lambda self, given: look(self, lag)
    )  # as on a GPU
    model = Diverging(what, value, at=4)
    with pytest.raises(
        UserError,
        match=rf"transfer: {said} at step 5, .*nothing of it is kept. "
        r"Likely causes: transfer.lr=1$",
    ):
        train(model, StopIfNotFinite("transfer", "transfer.lr=1"), gradient_clip_val=1.0)
    assert model.trained == 5 + lag


@pytest.mark.filterwarnings("ignore")
def test_no_state_is_saved_after_a_step_that_is_not_finite(tmp_path, monkeypatch):
    """Where steps are looked at later, a state that is due looks at all of them before."""
    look = StopIfNotFinite._look
    monkeypatch.setattr(
        StopIfNotFinite, "_look", lambda self, given: look(self, given or 0) if given == 0 else None
    )
    monkeypatch.setattr(
        StopIfNotFinite,
        "on_train_batch_end",
        lambda self, trainer, module, outputs, *_: self.pending.append(
            (trainer.global_step, outputs["loss"], None, ~torch.isfinite(outputs["loss"]))
        ),
    )

    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "state.ckpt")

    with pytest.raises(UserError, match="the loss is nan at step 3"):
        train(Diverging("loss", math.nan, at=2), StopIfNotFinite("transfer", ""), Saver())
    assert torch.load(tmp_path / "state.ckpt", weights_only=True)["global_step"] == 2


def test_weights_that_are_not_finite_are_named():
    good = {
        "a": torch.ones(3),
        "b": torch.tensor([1]),
        "c": torch.ones(0),
        "d": torch.full((2,), 6e4, dtype=torch.float16),
    }
    check_finite(good.items(), "here")
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(
            UserError,
            match=r"here: 1 weights hold NaN or infinite numbers \(e\); they cannot be used",
        ):
            check_finite(
                [*good.items(), ("e", torch.tensor([0.0, bad, 1.0], dtype=torch.bfloat16))], "here"
            )


def spoil(path):
    weights = load_file(path)
    name = next(n for n in weights if ".layer." in n or ".layers." in n)
    weights[name].view(-1)[0] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    return name


def test_no_loader_takes_weights_that_are_not_finite(tmp_path):
    backbone = random_backbone(("xlm-roberta", "label"))
    model = adapter.add_adapter(backbone, r=2, alpha=2, dropout=0.0, fusion="add")
    model.save_pretrained(tmp_path / "adapter")
    spoil(tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter: 1 weights hold NaN"):
        adapter.load_adapter(random_backbone(("xlm-roberta", "label")), str(tmp_path / "adapter"))
    whole = tiny_checkpoint(tmp_path / "model")
    backbones.load(str(whole), "label", num_labels=3)
    spoil(whole / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.path=.*: 1 weights hold NaN"):
        backbones.load(str(whole), "label", num_labels=3)
    size = {
        "d_model": 8,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
        "vocab_size": 20,
    }
    M2M100ForConditionalGeneration(M2M100Config(**size)).save_pretrained(tmp_path / "mt")
    nllb.load_model(str(tmp_path / "mt"), None, "cpu")
    spoil(tmp_path / "mt/model.safetensors")
    with pytest.raises(UserError, match=r"mt\.path=.*: 1 weights hold NaN"):
        nllb.load_model(str(tmp_path / "mt"), None, "cpu")


def test_no_embedded_model_is_saved_that_is_not_finite(tmp_path):
    with pytest.raises(
        UserError, match=r"the embedded model, after 9 steps \(too high .*\): \d+ weights hold NaN"
    ):
        pretrain(
            tmp_path,
            architecture="llama",
            documents=500,
            steps=9,
            batch_size=4,
            lr=1e30,
            vocab_size=300,
            hidden_size=32,
            layers=1,
            heads=2,
            target_share=0.5,
            world_seed=0,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_diverges_exits_2_and_keeps_nothing(tmp_path, capsys):
    from flare_exp.cli.main import main

    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    words = [
        "model=custom",
        f"model.path={checkpoint}",
        "task.limit=40",
        "trainer=cpu",
        "trainer.enable_progress_bar=false",
        "finetune.epochs=1",
        "transfer.epochs=9",
        "data.batch_size=8",
        "transfer.lr=1e30",
        "trainer.checkpoint_minutes=1e-6",
        f"cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'out'}",
    ]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "flare_exp: transfer: the " in said
    assert "Likely causes: transfer.lr=1e+30" in said
    assert list((tmp_path / "cache/finetune").glob("*/manifest.json"))
    assert not [p for p in (tmp_path / "cache/transfer").glob("*") if p.is_dir()]
    assert not (tmp_path / "out/metrics.json").exists()
    assert (
        json.loads((tmp_path / "out/states.jsonl").read_text().splitlines()[-1])["state"]
        == "failed"
    )
    assert divergence.LAG > 0


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_comes_in_eval_mode_is_trained_with_dropout():
    """from_pretrained gives eval mode, and Lightning leaves it."""
    from flare_exp.training.modules import FusionModule

    class Watched(FusionModule):
        def training_step(self, batch, number):
            assert self.model.training
            return self.model(batch).sum()

    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout(0.5)).eval()
    train(Watched(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), warmup=0.0))
