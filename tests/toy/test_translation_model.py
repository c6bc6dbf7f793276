"""The embedded NLLB: its tokenizer's and checkpoint's form are NLLB's, and its text is parallel,
marked and no task's.
"""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from flare_exp.languages import language
from flare_exp.tasks.toy import ToyNLI, ToyQA, ToySentiment
from flare_exp.toy.translation_model import LANGS, MARKS, encoded, parallel, train_mt
from flare_exp.toy.world import SPLITS, World

CODES = {lang: language(lang).flores for lang in LANGS}
OPTIONS = {
    "world_seed": 0,
    "pairs": 1500,
    "steps": 4,
    "batch_size": 4,
    "lr": 1e-3,
    "vocab_size": 500,
    "hidden_size": 16,
    "layers": 2,
    "heads": 2,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mt")
    return folder, train_mt(folder, **OPTIONS)


@pytest.fixture(scope="module")
def texts():
    return list(parallel(World(), 3000))


def marked(text):
    """What is marked in a text and how, if anything, and the text without the mark."""
    for mark in MARKS:
        before, after = mark.split("{}")
        if before in text:
            head, _, rest = text.partition(before)
            word, tail = rest.split(after)
            return (mark, word), head + word + tail
    return (None, None), text


def translate(folder, texts, source, target, **options):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, src_lang=language(source).flores)
    forced = tokenizer.convert_tokens_to_ids(language(target).flores)
    ids = model.generate(
        **tokenizer(texts, return_tensors="pt", padding=True), forced_bos_token_id=forced, **options
    )
    return ids, tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_tokenizer_has_the_form_of_nllb(built):
    tokenizer = AutoTokenizer.from_pretrained(built[0], src_lang="eng_Latn", tgt_lang="far_Latn")
    both = tokenizer("the soup was good", text_target="the soup was good")
    source, target = (tokenizer.convert_ids_to_tokens(both[key]) for key in ("input_ids", "labels"))
    assert type(tokenizer).__name__ == "NllbTokenizer"
    assert (source[0], source[-1], target[0], target[-1]) == (
        "eng_Latn",
        "</s>",
        "far_Latn",
        "</s>",
    )
    assert source[1:-1] == target[1:-1] == tokenizer.tokenize("the soup was good")
    assert len(
        {tokenizer.convert_tokens_to_ids(code) for code in CODES.values()}
        - {tokenizer.unk_token_id}
    ) == len(CODES)


def test_training_rows_are_what_the_tokenizer_makes(built, texts):
    tokenizers = {
        lang: AutoTokenizer.from_pretrained(built[0], src_lang=code) for lang, code in CODES.items()
    }
    for pair, row in zip(texts[:50], encoded(tokenizers["en"], texts[:50]), strict=True):
        for (lang, text), ids in zip(pair, row, strict=True):
            assert tokenizers[lang](text)["input_ids"] == ids


def test_every_text_and_mark_survives_the_tokenizer(built):
    tokenizer = AutoTokenizer.from_pretrained(built[0])
    for task in (ToySentiment(limit=50), ToyNLI(limit=50), ToyQA(limit=50)):
        for lang in ("en", "near", "far"):
            for example in task.load(lang, "validation"):
                for text in example.texts:
                    assert (
                        tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
                        == text
                    )
    first, *rest = tokenizer.tokenize("frainten")
    for mark in MARKS:
        text = f"daflu {mark.format('frainten')} dimi"
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
        before, after = mark.split("{}")
        assert tokenizer.tokenize(mark.format("frainten")) == [
            f"▁{before}",
            first.strip("▁"),
            *rest,
            after,
        ]


def test_checkpoint_loads_and_generates_with_a_forced_language(built):
    folder, facts = built
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    config = model.config
    assert type(model).__name__ == "M2M100ForConditionalGeneration"
    assert (model.num_parameters(), config.vocab_size) == (facts["parameters"], facts["vocabulary"])
    assert (
        model.generation_config.decoder_start_token_id
        == config.decoder_start_token_id
        == config.eos_token_id
    )
    assert (config.encoder_layerdrop, config.decoder_layerdrop, config.max_position_embeddings) == (
        0,
        0,
        1024,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for lang, code in CODES.items():
        ids, _ = translate(
            folder,
            ["the soup was good", "i love the room"],
            "en",
            lang,
            num_beams=2,
            max_new_tokens=5,
        )
        assert (
            ids[:, :2].tolist()
            == [[config.eos_token_id, tokenizer.convert_tokens_to_ids(code)]] * 2
        )


def test_the_seed_determines_the_weights(built, tmp_path):
    folder, facts = built
    assert train_mt(tmp_path / "again", **OPTIONS) == facts
    train_mt(tmp_path / "other", **OPTIONS, seed=1)
    weights = load_file(folder / "model.safetensors")
    for name, equal in (("again", True), ("other", False)):
        loaded = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(weights[key], loaded[key]) for key in weights) == equal
    assert (folder / "tokenizer.json").read_bytes() == (
        tmp_path / "again" / "tokenizer.json"
    ).read_bytes()


def test_no_tree_of_a_task_is_trained_on(texts):
    """Neither as a text nor as the opinion in a story."""
    world, tasks, opinions = World(), set(), set()
    for split in SPLITS:
        held = [r for pair in world.inferences(split) for r in (pair.premise, pair.hypothesis)]
        held += [inquiry.opinion for inquiry in world.inquiries(split)]
        for lang in CODES:
            tasks |= {world.render(review, lang) for review in world.reviews(split)}
            tasks |= {world.ask(inquiry, lang)[0] for inquiry in world.inquiries(split)}
            opinions |= {world.render(review, lang) for review in held}
    for lang, text in (side for pair in texts for side in pair):
        plain, were = marked(text)[1], world.grammars[lang].stems["were"]
        (setting, _, second), (first, _, other_setting) = (
            plain.partition(" , "),
            plain.rpartition(" , "),
        )
        assert plain not in tasks
        assert plain not in opinions
        assert were not in setting.split() or second not in opinions
        assert were not in other_setting.split() or first not in opinions


def test_texts_are_parallel_and_go_in_all_directions(texts):
    stems = World().grammars["near"].stems
    directions = Counter((source[0], target[0]) for source, target in texts)
    assert set(directions) == {("en", "near"), ("near", "en"), ("en", "far"), ("far", "en")}
    assert min(directions.values()) > 0.22 * len(texts)
    for sides in map(dict, texts):
        if "near" in sides:
            for word in ("not", "said", "but", "who"):
                assert sides["en"].split().count(word) == sides["near"].split().count(stems[word])


def test_marks_are_on_corresponding_words(texts):
    """A marked word is a slot of the story or its speaker, and the same one on both sides, in the
    same mark.
    """
    world, seen = World(), Counter()
    for sides in map(dict, texts):
        (mark, word), _ = marked(sides.pop("en"))
        ((lang, text),) = sides.items()
        (other_mark, other), _ = marked(text)
        assert mark == other_mark
        if mark:
            assert other.startswith(world.grammars[lang].stems[word])
            seen.update([mark, word])
    assert set(MARKS) < set(seen)
    assert len(seen) > 70
    assert 0.2 < sum(seen[mark] for mark in MARKS) / len(texts) < 0.3


@pytest.mark.slow
def test_learns_to_translate(tmp_path):
    """Translations of short questions have more words in common with their own references than with
    one another's.
    """
    size = {
        "pairs": 4000,
        "steps": 400,
        "batch_size": 16,
        "lr": 4e-3,
        "vocab_size": 1000,
        "hidden_size": 64,
    }
    assert train_mt(tmp_path, **{**OPTIONS, **size})["translation_loss"] < 3
    world = World()
    asked = [
        [world.ask(inquiry, lang)[1] for lang in ("far", "en")]
        for inquiry in world.inquiries("validation")[:50]
    ]
    far, english = map(list, zip(*asked, strict=True))
    _, translated = translate(tmp_path, far, "far", "en", max_new_tokens=20)

    def known(references):
        common = (
            Counter(a.split()) & Counter(b.split())
            for a, b in zip(translated, references, strict=True)
        )
        return sum(map(Counter.total, common)) / sum(len(text.split()) for text in english)

    assert known(english) > 0.5
    assert known(english) > known(english[1:] + english[:1]) + 0.1
