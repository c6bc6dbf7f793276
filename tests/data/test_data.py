"""Pairs and batches: views, padding, order, windows, micro-batches."""

import copy
import functools

import pytest
import torch
from random_models import random_backbone

from flare_exp.data.classification import ClassificationPreprocessor
from flare_exp.data.datamodule import PairedDataModule
from flare_exp.data.dataset import PairedCollator, PairedDataset, check_known
from flare_exp.data.pairing import Pair, make_pairs, shuffled_sources
from flare_exp.data.pairing_mode import PairingMode
from flare_exp.data.preprocessing import Prediction, SourceTextPreprocessor
from flare_exp.data.preprocessors import PREPROCESSORS
from flare_exp.data.question_answering import ExtractiveQAPreprocessor
from flare_exp.data.sampling import LengthBucketedBatchSampler
from flare_exp.data.source_augmentation import KINDS, SourceAugmentation
from flare_exp.errors import UserError
from flare_exp.flare import adapter
from flare_exp.flare.source_encoders import BackboneSourceEncoder
from flare_exp.tasks import Example, ToyQA, ToySentiment
from flare_exp.toy.tokenizers import train_tokenizer
from flare_exp.toy.world import World
from flare_exp.training.generation import AnswerDecoding, GenerationModule
from flare_exp.training.heads import ClassificationModule, SpanModule
from flare_exp.translation.lookup import ParallelTranslator
from flare_exp.translation.noise import ERRORS, corrupt_examples


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(World().corpus(200), 300, 64)


@pytest.fixture(scope="module")
def task():
    return ToySentiment(limit=40)


def module(task, tokenizer, mode, **options):
    def translate(examples, lang):
        return corrupt_examples(
            ParallelTranslator(task).translate(examples, lang), lang, 0.1, ERRORS[:3], 0
        )

    preprocessor = ClassificationPreprocessor(task, tokenizer, max_length=128)
    return PairedDataModule(
        task, "far", preprocessor, translate, mode=mode, batch_size=8, **options
    )


def texts(examples):
    return [e.texts for e in examples]


def test_pairing_modes(task, tokenizer):
    english, far = texts(task.load("en", "test")), texts(task.load("far", "test"))
    by_mode = {mode: module(task, tokenizer, mode).pairs("test") for mode in PairingMode}
    read = {mode: texts(p.target for p in pairs) for mode, pairs in by_mode.items()}
    assert read["english"] == english
    assert read["target"] == read["paired"] == read["joint"] == far
    assert texts(p.source for p in by_mode["paired"]) == read["translated"] != english
    assert by_mode["joint"] == by_mode["paired"]
    assert all(p.source is None for mode in PairingMode if not mode.pairs for p in by_mode[mode])
    assert read["latent"] == texts(p.source for p in by_mode["latent"]) == far  # it reads itself
    # training pairs: the English original as source, its imperfect translation as target
    train = module(task, tokenizer, "paired").pairs("train")
    assert texts(p.source for p in train) == texts(task.load("en", "train"))
    wrong = sum(
        p.target.texts != t for p, t in zip(train, texts(task.load("far", "train")), strict=True)
    )
    assert 0 < wrong < len(train)


def test_ids_are_unique_and_name_their_row(task):
    ids = [
        e.id for lang in ("en", "far") for role in ("train", "test") for e in task.load(lang, role)
    ]
    assert len(set(ids)) == len(ids)
    assert ids[3] == "toy_sentiment/en/train/3"


def test_batches_pad_each_side_to_its_own_longest(task, tokenizer):
    batch = next(iter(module(task, tokenizer, "paired").train_dataloader()))
    assert batch["labels"].shape == batch["index"].shape == (8,)
    for side in ("target", "source"):
        assert batch[side]["attention_mask"].sum(1).max() == batch[side]["input_ids"].shape[1]


BACKBONES_BY_TYPE = {
    "label": ("xlm-roberta", "label"),
    "span": ("xlm-roberta", "span"),
    "prompt": ("llama", "prompt"),
}


def learner(task_type, tokenizer, fused):
    """The DataModule of 40 examples of a task type, some answers of which are cut off, and a module
    that reads them.
    """
    task = {"label": ToySentiment, "span": ToyQA, "prompt": ToyQA}[task_type](limit=40)
    backbone = random_backbone(BACKBONES_BY_TYPE[task_type])
    backbone.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = adapter.add_adapter(
        backbone, r=4, alpha=8, fusion="add_relu" if fused else None
    ).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    source = BackboneSourceEncoder(model) if fused else None
    own = copy.deepcopy(tokenizer)
    own.padding_side = "left" if task_type == "prompt" else "right"
    reading = PREPROCESSORS[task_type](task, own, 200 if task_type == "prompt" else 38)
    modules = {
        "label": lambda: ClassificationModule(model, task.labels, source=source),
        "span": lambda: SpanModule(model, source=source),
        "prompt": lambda: GenerationModule(
            model, own, reading.answer, AnswerDecoding(), source=source
        ),
    }
    make = functools.partial(
        PairedDataModule,
        task,
        "far",
        reading,
        ParallelTranslator(task).translate,
        mode="paired" if fused else "target",
    )
    return make, modules[task_type]()


@pytest.mark.parametrize("task_type", BACKBONES_BY_TYPE)
@pytest.mark.parametrize("fused", [True, False], ids=["flare", "lora"])
def test_micro_batches_have_the_loss_and_gradient_of_the_whole_batch(task_type, fused, tokenizer):
    """Against batches that no sampler split, whose terms the module counts itself."""
    make, module = learner(task_type, tokenizer, fused)
    dataset, trained = (
        make().dataset("validation"),
        [p for p in module.parameters() if p.requires_grad],
    )
    collate = PairedCollator(make().preprocessor)
    for batch in LengthBucketedBatchSampler(dataset.lengths, 32, 0):  # one of 32 rows and one of 8
        whole = module.loss(collate([dataset[row] for row in batch]))
        expected = torch.autograd.grad(whole, trained)
        assert sum(dataset.terms[row] for row in batch) > 0
        for size in (None, 32, 8, 1):
            data = make(micro_batch_size=size)
            losses, gradients = [], [torch.zeros_like(p) for p in trained]
            for part in data.loader(dataset, [batch]):
                assert len(part["index"]) <= (size or 32)
                losses.append(module.loss(part))
                found = torch.autograd.grad(losses[-1] / data.passes, trained)
                gradients = [before + new for before, new in zip(gradients, found, strict=True)]
            assert len(losses) == data.passes == 32 // (size or 32)
            torch.testing.assert_close(sum(losses) / len(losses), whole, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradients, list(expected), rtol=1e-10, atol=1e-12)
    if task_type == "span":
        assert 0 in dataset.terms, "rows without an answer"
    else:
        assert (len({*dataset.terms}) > 1) == (task_type == "prompt")


def test_bucket_sampler_is_a_seeded_permutation_of_similar_lengths():
    lengths = [(7 * i) % 50 + 1 for i in range(101)]
    sampler = LengthBucketedBatchSampler(lengths, 8, seed=1)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert sorted(i for b in first for i in b) == list(range(101))
    assert len(first) == len(sampler) == 13
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthBucketedBatchSampler(lengths, 8, seed=2)) != first
    padding = sum(max(lengths[i] for i in b) * len(b) for b in first) / sum(lengths)
    assert padding < 1.15, "batches of similar length hardly pad"


def test_a_source_does_not_change_the_order_of_the_batches(task, tokenizer):
    """lora (target) and flare (paired) with one seed are compared pair by pair."""
    alone, paired = (module(task, tokenizer, mode) for mode in ("target", "paired"))
    orders = [[b["index"].tolist() for b in data.train_dataloader()] for data in (alone, paired)]
    assert orders[0] == orders[1]
    lengths, costs = (getattr(paired.dataset("train"), name) for name in ("lengths", "costs"))
    assert lengths == alone.dataset("train").costs != costs
    sources = paired.dataset("train").source
    assert [c - n for c, n in zip(costs, lengths, strict=True)] == [
        len(s["inputs"]["input_ids"]) for s in sources
    ]


def test_shuffled_sources_have_no_fixed_point_and_keep_the_sources(task, tokenizer):
    pairs = module(task, tokenizer, "paired").pairs("train")
    shuffled = shuffled_sources(pairs, seed=0)
    assert sorted(texts(p.source for p in shuffled)) == sorted(texts(p.source for p in pairs))
    assert [p.target for p in shuffled] == [p.target for p in pairs]
    assert all(s.source is not p.source for s, p in zip(shuffled, pairs, strict=True))
    assert shuffled_sources(pairs, seed=0) == shuffled != shuffled_sources(pairs, seed=1)
    with pytest.raises(UserError, match="at least two"):
        shuffled_sources(pairs[:1], 0)


def test_empty_source_and_loader_seed(task, tokenizer):
    assert "source" not in next(
        iter(module(task, tokenizer, "paired", empty_source=True).train_dataloader())
    )
    orders = [
        [b["index"].tolist() for b in module(task, tokenizer, "target", seed=s).train_dataloader()]
        for s in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_sources_are_drawn_in_the_stated_shares():
    examples = [row // 2 for row in range(2000)]

    def drawn(epoch=0, **options):
        draw = SourceAugmentation(0.2, 0.4, **{"kinds": KINDS, "seed": 1, **options})
        return [draw.source_of(row, epoch, examples) for row in range(2000)]

    both, other = drawn(), drawn(kinds=("other",))
    words = [(row, n) for row, n in enumerate(both) if n is not None and n >= 2000]
    swapped = [(row, n) for row, n in enumerate(both) if n is not None and row != n < 2000]
    shares = both.count(None), len(words), len(swapped)
    assert [n / 2000 for n in shares] == pytest.approx([0.2, 0.2, 0.2], abs=0.03)
    assert all(examples[row] != examples[n] for row, n in swapped)
    assert all(n % 2000 == row for row, n in words)
    assert {n // 2000 for _, n in words} == {1, 2, 3}
    assert max(n for n in other if n is not None) < 2000
    assert both == drawn()
    assert both != drawn(epoch=1)
    assert both != drawn(seed=2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_batches_have_the_drawn_sources(task, tokenizer, ranks):
    """In every epoch anew, and whatever the number of processes."""
    draw, seen = SourceAugmentation(0.3, 0.5, KINDS, errors=ERRORS, seed=3), {}
    for rank in range(ranks):
        data = module(task, tokenizer, "paired", augmentation=draw, share=(rank, ranks))
        train = data.dataset("train")
        loader = data.train_dataloader()
        for epoch in (0, 1):
            loader.batch_sampler.set_epoch(epoch)
            for batch in loader:
                rows = zip(*batch["source"].values(), strict=True)
                for index, source in zip(batch["index"].tolist(), rows, strict=True):
                    seen[epoch, index] = dict(zip(batch["source"], source, strict=True))
        assert all((b["source"]["attention_mask"].sum(1) > 0).all() for b in data.val_dataloader())
    for (epoch, row), read in seen.items():
        drawn = draw.source_of(row, epoch, train.examples)
        ids = read["input_ids"][read["attention_mask"].bool()].tolist()
        assert ids == ([] if drawn is None else train.source[drawn]["inputs"]["input_ids"])
    assert len(seen) == 2 * len(train)


def test_sources_with_wrong_words_are_versions_of_the_own_one(task, tokenizer):
    plain = module(task, tokenizer, "paired").dataset("train")
    drawn = SourceAugmentation(noise=0.5, kinds=("words",), errors=("drop",), seed=4)
    train = module(task, tokenizer, "paired", augmentation=drawn).dataset("train")
    assert train.source[: len(train)] == plain.source
    assert (train.costs, train.truncated) == (plain.costs, plain.truncated)
    lengths = [[len(s["inputs"]["input_ids"]) for s in train.source[i::40]] for i in range(40)]
    assert all(len(found) == 4 and max(found) == found[0] for found in lengths)
    kept = [sum(found[v] for found in lengths) / sum(x[0] for x in lengths) for v in (1, 2, 3)]
    assert all(0.4 < share < 0.75 for share in kept)  # half of the words, and special tokens
    for options in ({"noise": 0.5}, {"dropout": 0.5, "kinds": KINDS}):
        draw = SourceAugmentation(errors=("drop",), **options)
        assert (
            len(module(task, tokenizer, "paired", augmentation=draw).dataset("train").source) == 40
        )


def test_wrong_words_are_those_of_the_sources_language(task, tokenizer, monkeypatch):
    seen = []

    def versions(self, pairs, lang):
        seen.append(lang)
        return []

    monkeypatch.setattr(SourceAugmentation, "versions", versions)
    drawn = SourceAugmentation(noise=0.5, kinds=("words",), errors=("drop",))
    for sources in ((), [(ParallelTranslator(task).translate, "near")]):
        module(task, tokenizer, "paired", augmentation=drawn, sources=sources).dataset("train")
    assert seen == ["en", "near"]


def test_another_ones_source_needs_another_example(task, tokenizer):
    pairs = module(task, tokenizer, "paired").pairs("train")[:1]
    with pytest.raises(UserError, match=r"source\.noise=0\.5: needs at least two examples"):
        PairedDataset(
            pairs,
            ClassificationPreprocessor(task, tokenizer, 32),
            augmentation=SourceAugmentation(noise=0.5),
        )


@pytest.mark.slow
def test_workers_do_not_change_the_random_numbers_of_a_training(task, tokenizer):
    """Dropout draws them; a loader has a generator of its own."""

    def drawn(workers):
        torch.manual_seed(3)
        data, found = module(task, tokenizer, "paired", workers=workers), []
        train, validation = data.train_dataloader(), data.val_dataloader()
        for _ in range(2):
            for loader in (train, validation):
                for batch in loader:
                    found.append((torch.rand(()).item(), batch["index"].tolist()))
        return found

    assert drawn(0) == drawn(1)


def test_ablations_can_change_test_data_alone(task, tokenizer):
    plain, empty, shuffled = (
        module(task, tokenizer, "paired", ablate_in="test", **options)
        for options in ({}, {"empty_source": True}, {"shuffle_source": True})
    )
    for role in ("train", "validation"):
        assert plain.pairs(role) == empty.pairs(role) == shuffled.pairs(role)
    assert not any(p.source for p in empty.pairs("test"))
    assert shuffled.pairs("test") == shuffled_sources(plain.pairs("test"), seed=0)


def test_truncation_is_counted(task, tokenizer):
    pairs = module(task, tokenizer, "paired").pairs("train")
    short, full = (
        PairedDataset(pairs, ClassificationPreprocessor(task, tokenizer, length))
        for length in (10, 1000)
    )
    assert full.truncated == 0
    longer = sum(
        len(side[i]["inputs"]["input_ids"]) > 10
        for side in (full.target, full.source)
        for i in range(len(pairs))
    )
    assert short.truncated == longer > 0
    assert max(len(t["inputs"]["input_ids"]) for t in short.target) == 10


@pytest.mark.parametrize("name", ["span", "prompt"])
def test_nothing_is_learned_from_answers_that_are_cut_off(tokenizer, name, caplog):
    """They are left out of training, and kept wherever a model is judged."""
    task = ToyQA(limit=40)

    def module(longest, *langs):
        preprocessor = PREPROCESSORS[name](task, tokenizer, longest)
        translate = ParallelTranslator(task).translate
        sources = [(translate, lang) for lang in langs]
        return PairedDataModule(task, "far", preprocessor, translate, batch_size=8, sources=sources)

    whole, short = module(1000), module(70)
    assert [len(whole.dataset(role)) for role in ("train", "validation")] == [40, 40]
    assert [whole.dataset(role).cut_off for role in ("train", "validation")] == [0, 0]
    train, validation = short.dataset("train"), short.dataset("validation")
    assert 0 < train.cut_off == 40 - len(train) < 40
    assert not any(item["cut_off"] for item in train.target)
    assert len(train.pairs) == len(train.target) == len(train.source) == len(train)
    assert len(validation) == 40
    assert validation.cut_off == sum(item["cut_off"] for item in validation.target) > 0
    assert f"{train.cut_off} examples lost their answer by that: left out" in caplog.text
    least = {"span": 10, "prompt": 32}[name]
    for langs in ((), ("en", "near")):
        with pytest.raises(
            UserError,
            match=rf"data\.max_length={least}: every training example's answer is cut off",
        ):
            module(least, *langs).dataset("train")


def test_what_is_scored_when_translations_are_read(tokenizer):
    """The translation, or the original: a model's translation of a test example has no answers."""
    task = ToyQA(limit=5)
    far = task.load("far", "test")

    def pairs(**options):
        preprocessor = PREPROCESSORS["span"](task, tokenizer, 200)
        return PairedDataModule(
            task,
            "far",
            preprocessor,
            ParallelTranslator(task).translate,
            mode="translated",
            **options,
        ).pairs("test")

    human, machine = pairs(), pairs(scores_originals=True)
    assert [p.scored for p in human] == [p.target for p in human]
    assert [p.target for p in human] == [p.target for p in machine]
    assert [p.scored for p in machine] == far != [p.target for p in machine]


def test_an_example_in_windows_has_one_prediction_and_every_window_its_part_of_the_source(
    tokenizer,
):
    task = ToyQA(limit=12)

    def data(mode, longest=48, **options):
        preprocessor = ExtractiveQAPreprocessor(task, tokenizer, longest, stride=16)
        source_preprocessor = (
            SourceTextPreprocessor(task, tokenizer, 200, preprocessor.order)
            if mode == "latent"
            else None
        )
        translate = ParallelTranslator(task).translate
        return PairedDataModule(
            task,
            "far",
            preprocessor,
            translate,
            mode=mode,
            source_preprocessor=source_preprocessor,
            batch_size=8,
            **options,
        )

    dataset = data("paired").dataset("test")
    assert len(dataset.pairs) == 12 < len(dataset) == len(dataset.target) == len(dataset.source)
    assert dataset.cut_off == 0, "every answer is in some window"
    assert len(data("paired").dataset("train").pairs) == 12
    # the best of an example's windows is its prediction
    found = {row: Prediction(f"row {row}", row % 5) for row in range(len(dataset))}
    for number, text in enumerate(dataset.texts(found)):
        rows = [row for row, example in enumerate(dataset.examples) if example == number]
        assert text == f"row {max(rows, key=lambda row: (row % 5, -row))}"
    # sources are read beside their windows: the question, and what stands at the same place
    latent = data("latent").dataset("test")
    for seen, same in ((dataset, False), (latent, True)):
        for row, example in enumerate(seen.examples):
            pair, (first, last) = seen.pairs[example], seen.target[row]["window"]
            said = tokenizer.decode(
                seen.source[row]["inputs"]["input_ids"], skip_special_tokens=True
            )
            context = said.replace(pair.source.texts[1], "", 1).strip()
            assert context in pair.source.texts[0]
            if same:
                assert context == pair.target.texts[0][first:last].strip()
    assert (
        max(len(item["inputs"]["input_ids"]) for item in data("paired").dataset("test").source)
        <= 48
    )


def test_pairs_must_be_the_same_examples(task):
    with pytest.raises(ValueError, match="not the same examples"):
        make_pairs(task.load("en", "test"), task.load("far", "test")[::-1], "paired")


def test_lightning_gives_every_epoch_another_order():
    import lightning.pytorch as pl

    class Watcher(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), [[], [], []]

        def training_step(self, batch, _):
            self.seen[self.current_epoch] += batch.flatten().tolist()
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    def seen():
        data = torch.arange(40.0)[:, None]
        loader = torch.utils.data.DataLoader(
            data, batch_sampler=LengthBucketedBatchSampler([1] * 40, 4, seed=3)
        )
        module = Watcher()
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        pl.Trainer(accelerator="cpu", max_epochs=3, **quiet).fit(module, loader)
        return module.seen

    epochs = seen()
    assert [sorted(order) for order in epochs] == [list(range(40))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert seen() == epochs


class Letters:
    """The output of a tokenizer that knows some characters."""

    unk_token_id, unk_token, all_special_ids, name_or_path = 0, "[UNK]", [0, 1, 2], "letters"
    bos_token_id = eos_token_id = pad_token_id = 1

    @staticmethod
    def items(unknown, known):
        return [{"inputs": {"input_ids": [1, *[0] * unknown, *[7] * known, 2]}}]


@pytest.mark.parametrize(
    ("unknown", "known", "share"), [(0, 0, None), (1, 3, None), (2, 5, "28.6"), (3, 0, "100.0")]
)
def test_texts_that_the_tokenizer_does_not_know_are_refused(unknown, known, share):
    items = Letters.items(unknown, known)
    if share is None:
        check_known(items, Letters(), "nusax/ace/test (target)")
        return
    said = (
        rf"nusax/ace/test \(target\): {share} % of the tokens are \[UNK\], unknown to the "
        r"tokenizer of letters \(at most 25 %\)"
    )
    with pytest.raises(UserError, match=said):
        check_known(items, Letters(), "nusax/ace/test (target)")
    fallback = Letters()
    fallback.unk_token_id = None  # of characters or bytes
    check_known(items, fallback, "")
    fallback.unk_token_id = fallback.eos_token_id  # GPT-2
    check_known(items, fallback, "")


def test_shuffled_sources_keep_those_of_one_pair_together():
    def example(key, lang):
        return Example(f"t/{lang}/x/{key}", key, (f"{lang} {key}",), 0)

    pairs = [Pair(example(k, "a"), example(k, "en"), more=(example(k, "id"),)) for k in "123"]
    for pair in shuffled_sources(pairs, 0):
        assert pair.source.key == pair.more[0].key != pair.target.key


def test_a_wrong_source_is_of_another_example_not_of_another_window():
    drawn = SourceAugmentation(noise=1.0)
    found = {drawn.source_of(0, epoch, [0, 0, 1]) for epoch in range(20)}
    assert found == {2}
