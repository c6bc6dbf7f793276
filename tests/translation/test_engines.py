"""The translation engine, on a tiny NLLB checkpoint that has learned to copy, not to perfection."""

# ruff: noqa: RUF001 (texts in many scripts)

from __future__ import annotations

import itertools
import re

import pytest
import rich
import torch
import transformers as hf
from copying_nllb import SHORT, texts, translate
from hypothesis import given, settings
from hypothesis import strategies as st

from flare_exp.errors import UserError
from flare_exp.translation import engines, nllb, quality, segmentation
from flare_exp.translation.base import FLAGS
from flare_exp.translation.engines import CTranslate2Engine, TransformersEngine
from flare_exp.translation.nllb import MTDecoding
from flare_exp.translation.segmentation import Translation
from flare_exp.utils import progress

# one worker builds the checkpoint
pytestmark = pytest.mark.xdist_group("mt")
exhaustive = settings(deadline=None, derandomize=True, max_examples=200)


# --- the engine ----------------------------------------------------------------------------------


def test_the_checkpoint_of_these_tests_tells_orders_and_ends_apart(engine):
    found = translate(engine, texts(60))
    copied = sum(one.text == own for one, own in zip(found, texts(60), strict=True))
    assert copied > 5, copied  # machines round differently in its training: 10 on one of them
    assert len({one.text for one in found}) > 50


@pytest.mark.parametrize(
    "decoding",
    [SHORT, MTDecoding(3, 48), MTDecoding(1, 48, 2)],
    ids=["greedy", "beams", "no repeats"],
)
def test_a_text_is_translated_the_same_whatever_is_beside_it(nllb_folder, decoding):
    engine = TransformersEngine(nllb_folder, decoding=decoding, batch_tokens=1024)
    these = texts(24)
    together = translate(engine, these)
    engine.batch_tokens = 30
    assert translate(engine, these) == together
    assert [translate(engine, [one])[0] for one in these] == together
    assert translate(engine, these[::-1]) == together[::-1]


def rows_of(engine, monkeypatch) -> list[list[int]]:
    """The token rows that the engine decodes from now on."""
    seen: list[list[int]] = []
    decode = engine._decode
    monkeypatch.setattr(
        engine, "_decode", lambda rows, *rest: seen.extend(rows) or decode(rows, *rest)
    )
    return seen


def test_equal_texts_are_translated_once(engine, monkeypatch):
    seen = rows_of(engine, monkeypatch)
    found = translate(engine, ["ab c.", "fg.", "ab c.", "ab c."])
    assert len(seen) == 2
    assert found[0] == found[2] == found[3] != found[1]


def test_languages_are_told_by_their_tokens(engine, monkeypatch):
    seen, made = rows_of(engine, monkeypatch), []
    generate = engine.model.generate
    monkeypatch.setattr(
        engine.model, "generate", lambda *a, **k: made.append(generate(*a, **k)) or made[-1]
    )
    engine.translate(["ab c."], "zho_Hans", "quy_Latn")
    engine.translate(["ab c."], "quy_Latn", "eng_Latn")
    ids = engine.tokenizer.convert_tokens_to_ids
    assert [row[0] for row in seen] == ids(["zho_Hans", "quy_Latn"])
    assert [int(tokens[0, 1]) for tokens in made] == ids(["quy_Latn", "eng_Latn"])


@pytest.mark.parametrize("code", ["que_Latn", "a", "<unk>", "</s>", ""])
def test_an_unknown_language_is_named(engine, code):
    for direction in ((code, "eng_Latn"), ("eng_Latn", code)):
        with pytest.raises(UserError, match=f"does not know the language '{code}'.*_"):
            engine.translate(["ab."], *direction)


def test_a_similar_code_is_proposed(engine):
    with pytest.raises(UserError, match="such as quy_Latn"):
        engine.translate(["ab."], "quz_Latn", "eng_Latn")


def test_habits_of_the_checkpoint_do_not_count(engine):
    settings = engine.model.generation_config
    assert settings.num_beams in (None, 1)
    assert settings.max_length is None
    assert not engine.model.training
    assert (
        engine.model.model.decoder.layerdrop
        == engine.model.model.encoder.layerdrop
        == engine.model.model.encoder.dropout
        == 0
    )
    assert max(len(one.text) for one in translate(engine, texts(20))) > 10  # its max_length is 7


def test_a_long_text_is_translated_to_its_end(nllb_folder):
    engine = TransformersEngine(nllb_folder, decoding=MTDecoding(max_length=12))
    long = " ".join(texts(30, seed=3, words=2)) + "\nab c."
    parts = segmentation.segments(long, lambda part: engine._length(part) <= 12)
    assert len(parts) > 15
    alone = translate(engine, [part for part, _ in parts])
    expected = "".join(
        one.text + separator for one, (_, separator) in zip(alone, parts, strict=True)
    )
    assert translate(engine, [long])[0].text == expected
    copied = sum(one.text == part for one, (part, _) in zip(alone, parts, strict=True))
    assert copied > len(parts) / 2
    assert expected.endswith("\nab c.")


def test_what_is_protected_stays_in_one_segment(engine, monkeypatch):
    seen = rows_of(engine, monkeypatch)
    long = " ".join(texts(12, seed=3, words=4)).replace(" ", "")
    start = len(segmentation.segments(long, lambda part: engine._length(part) <= 48)[0][0]) - 5
    translate(engine, [long], protect=lambda _: (start, start + 10))
    inside = [engine.tokenizer.decode(row, skip_special_tokens=True) for row in seen]
    assert sum(long[start : start + 10] in part for part in inside) == 1
    assert "".join(sorted("".join(inside))) == "".join(sorted(long))


def test_blank_texts_stay_blank(engine):
    assert translate(engine, ["", " \n", "ab."])[:2] == [Translation("", False)] * 2
    assert translate(engine, []) == []


def test_a_translation_without_an_end_is_cut_at_its_limit(nllb_folder):
    engine = TransformersEngine(nllb_folder, decoding=MTDecoding(max_length=60))
    engine.model.generation_config.suppress_tokens = [engine.tokenizer.eos_token_id]
    these = ["ab.", "ab c " * 4 + "."]
    assert [one.truncated for one in translate(engine, these)] == [True, True]
    target = nllb.language_id(engine.tokenizer, "quy_Latn")
    for own in these:
        length = engine._length(own)
        (row,) = engine._decode(
            [engine.tokenizer(own)["input_ids"]], target, engine.decoding.limit(length)
        )
        assert len(row) == engine.decoding.limit(length) == (60 if length > 12 else 64 - 4)


def test_progress_adds_up(engine):
    these = [*texts(30), *texts(10), "", " "]
    told: list[int] = []
    engine.batch_tokens = 60
    translate(engine, these, progress=told.append)
    engine.batch_tokens = 2048
    assert sum(told) == len(these)
    assert len(told) > 5
    assert min(told) > 0


def test_a_progress_bar_moves(capsys, monkeypatch):
    rich.get_console()  # somebody asked for it before, elsewhere than on a terminal
    for key, value in {
        "FORCE_COLOR": "1",
        "TERM": "xterm",
    }.items():  # as on a terminal, wherever the tests run
        monkeypatch.setenv(key, value)
    with progress.bar("translating", 3) as moved:
        moved(1)
        moved(2)
    said = "".join(capsys.readouterr())
    assert "translating" in said
    assert re.search("3/.*3", said)


def test_too_little_memory_is_said(engine, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(engine, "_decode", full)
    with pytest.raises(UserError, match=r"mt\.batch_tokens=2048.*choose less"):
        translate(engine, ["ab."])


# --- batches and limits --------------------------------------------------------------------------


@exhaustive
@given(st.lists(st.integers(3, 256)), st.integers(1, 5), st.integers(16, 4096))
def test_batches_hold_every_row_once_within_the_budget(lengths, beams, budget):
    decoding = MTDecoding(beams)
    found = list(engines.batches(lengths, decoding, budget))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        widest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * widest * beams <= budget
        assert len({decoding.limit(lengths[i]) for i in batch}) == 1
    widths = [lengths[batch[0]] for batch in found]
    assert widths == sorted(widths, reverse=True)


@given(st.integers(1, 300), st.integers(8, 512))
@exhaustive
def test_a_limit_leaves_room_and_has_an_end(source, longest):
    limit = MTDecoding(max_length=longest).limit(source)
    assert min(longest, 3 * source + 32) <= limit <= min(longest, 3 * source + 64)


# --- segments ------------------------------------------------------------------------------------

CHARACTERS = st.text("ab .。！\n的กี่?\u0301", max_size=60)


@given(CHARACTERS, st.integers(1, 20), st.tuples(st.integers(0, 60), st.integers(0, 60)))
@exhaustive
def test_nothing_is_lost_all_fits_and_what_is_kept_is_whole(text, longest, ends):
    keep = (min(ends), min(max(ends), len(text)))
    found = segmentation.segments(
        text, lambda part: len(part) <= longest, keep if keep[0] < keep[1] else None
    )
    assert "".join(segment + separator for segment, separator in found) == text
    assert all(len(segment) <= longest for segment, _ in found)
    assert not any(separator.strip() for _, separator in found)
    if keep[1] - keep[0] <= longest:
        cuts, at = set(), 0
        for segment, separator in found:
            at += len(segment) + len(separator)
            cuts.add(at)
        assert not any(keep[0] < cut < keep[1] for cut in cuts)


@given(CHARACTERS, st.randoms())
@exhaustive
def test_nothing_is_lost_where_lengths_make_no_sense(text, rng):
    found = segmentation.segments(text, lambda part: rng.random() < 0.5)
    assert "".join(segment + separator for segment, separator in found) == text


@given(st.lists(st.sampled_from(["a b. ", "c? ", "的。", "ab\n", "ü! "]), min_size=1, max_size=20))
@exhaustive
def test_sentences_that_fit_are_not_broken(sentences):
    found = segmentation.segments("".join(sentences), lambda part: len(part) <= 8)
    rest = list(sentences)
    for segment, separator in found:
        taken = ""
        while len(taken) < len(segment + separator):
            taken += rest.pop(0)
        assert taken == segment + separator
    # greedily: the next sentence would not have fitted
    for (one, space), (two, _) in itertools.pairwise(found):
        first = segmentation.SENTENCE_END.search(two + "\n")
        assert len((one + space + two[: first.end()]).rstrip()) > 8


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        ("One two. Three (four.) Five", ["One two. ", "Three (four.) ", "Five"]),
        (
            "第一句话在这里。第二句话！「第三。」第四",
            ["第一句话在这里。第二句话！", "「第三。」第四"],
        ),
        ("سؤال أول؟ جواب ثان۔ آخر ما", ["سؤال أول؟ ", "جواب ثان۔ ", "آخر ما"]),
        ("3.5 and 4.25 and\n\nnew", ["3.5 and 4.25 ", "and\n\nnew"]),
        ("aaaaaaaaaaaaaaaaaaaa", ["aaaaaaaaaaaaa", "aaaaaaa"]),
    ],
)
def test_where_texts_are_split(whole, expected):
    assert [
        "".join(pair) for pair in segmentation.segments(whole, lambda part: len(part) <= 13)
    ] == expected


def test_segments_are_joined_as_the_target_is_written():
    parts = [
        (Translation("One.", False), ""),
        (Translation("Two.", True), "\n"),
        (Translation("Three.", False), " "),
    ]
    assert segmentation.joined(parts, "eng_Latn") == Translation("One. Two.\nThree.", True)
    assert segmentation.joined(parts, "jpn_Jpan").text == "One.Two.\nThree."


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "translation", "expected"),
    [
        ("Good morning.", "Buenos días.", set()),
        ("Good morning.", " ", {"empty"}),
        ("", "", set()),
        ("Good  Morning", "good morning", {"copy"}),
        ("Go on.", "the same the same the same the same the same", {"repetitive"}),
        ("走吧", "的的的的的的的的", {"repetitive"}),
        ("Nice", "very very nice", set()),
        ("ha ha ha ha ha ha!", "ja ja ja ja ja ja!", set()),
        ("ha ha ha ha ha ha!", "ja" * 40, {"repetitive"}),
        ("ha, ha, ha, ha, ha!", "ja ja ja ja ja", set()),
        ("A ..........", "B ..............", set()),
        ("1 000 000 000 000 000", "1 000 000 000 000 000 000", set()),
    ],
)
def test_signs_of_bad_translations(source, translation, expected):
    found = quality.flags(source, Translation(translation, False), "spa_Latn")
    assert {name for name, is_so in found.items() if is_so} == expected
    assert set(found) == {*FLAGS}
    assert quality.flags(source, Translation(translation, True), "spa_Latn")["truncated"]


# --- checkpoints ---------------------------------------------------------------------------------


def test_check_accepts_nllb(nllb_folder):
    assert nllb.language_id(nllb.check(nllb_folder, decoding=SHORT), "quy_Latn") > 0


def test_check_names_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"mt\.path=.*nowhere: there is no checkpoint"):
        nllb.check(str(tmp_path / "nowhere"))


def test_check_names_an_unknown_hub_id():
    with pytest.raises(
        UserError, match=r"mt\.path=no-such/checkpoint: its configuration could not be read"
    ):
        nllb.check("no-such/checkpoint")


def test_check_refuses_other_architectures(tmp_path):
    hf.BertConfig(vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'bert' is not NLLB's"):
        nllb.check(str(tmp_path))


def test_check_refuses_other_tokenizers(tmp_path):
    hf.M2M100Config(vocab_size=8).save_pretrained(tmp_path)
    hf.XLMRobertaTokenizer(
        vocab=[("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer is XLMRobertaTokenizer"):
        nllb.check(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"mt\.path=.*tokenizer"):
        nllb.check(str(tmp_path))


def test_weights_that_are_missing_or_damaged_are_named(nllb_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tokenizer = hf.AutoTokenizer.from_pretrained(nllb_folder)
    tokenizer.save_pretrained(tmp_path)
    hf.AutoConfig.from_pretrained(nllb_folder).save_pretrained(tmp_path)
    weights = load_file(f"{nllb_folder}/model.safetensors")
    weights.pop("model.decoder.layer_norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        TransformersEngine(str(tmp_path), decoding=SHORT)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="its weights could not be read"):
        TransformersEngine(str(tmp_path), decoding=SHORT)


def test_lengths_that_the_positions_do_not_reach_are_refused(nllb_folder):
    with pytest.raises(UserError, match=r"mt\.max_length=63.*64 positions"):
        nllb.check(nllb_folder, decoding=MTDecoding(max_length=63))


def test_the_encoder_alone_gives_the_states_of_the_full_model(nllb_folder, engine):
    encoder, tokenizer = nllb.load_encoder(nllb_folder)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.layerdrop == 0
    assert not encoder.training
    assert not [name for name, _ in encoder.named_parameters() if "decoder" in name]
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in encoder.parameters()
    }
    assert sum(held.values()) == sum(
        p.nbytes for p in encoder.parameters()
    )  # no view into the whole checkpoint
    batch = tokenizer(texts(5), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = encoder(**batch).last_hidden_state
        encoder.train()
        dropped = encoder(**batch).last_hidden_state
        full = engine.model(
            **batch, decoder_input_ids=batch["input_ids"][:, :1]
        ).encoder_last_hidden_state
    assert found.shape == (*batch["input_ids"].shape, engine.model.config.d_model)
    torch.testing.assert_close(found, full, rtol=0, atol=0)
    torch.testing.assert_close(dropped, full, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_translates_in_16_bits(nllb_folder, engine):
    on_gpu = TransformersEngine(nllb_folder, decoding=SHORT, device="cuda")
    assert next(on_gpu.model.parameters()).dtype in (torch.bfloat16, torch.float16)
    same = sum(
        a == b
        for a, b in zip(translate(on_gpu, texts(40)), translate(engine, texts(40)), strict=True)
    )
    assert same > 20


def test_a_gpu_that_is_not_there_is_said(nllb_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds none"):
        TransformersEngine(nllb_folder, decoding=SHORT, device="cuda")


# --- CTranslate2 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("no_repeat_ngram", [0, 3])
def test_ctranslate2_translates_as_transformers_does(
    nllb_folder, converted, beams, no_repeat_ngram
):
    decoding = MTDecoding(beams, 48, no_repeat_ngram)
    other = CTranslate2Engine(converted["float32"], decoding)
    these = [*texts(40), " ".join(texts(12, words=4)), "", "ab."]
    ours = translate(TransformersEngine(nllb_folder, decoding=decoding), these)
    # beam search ranks hypotheses that are cut at the limit in its own way
    told = [i for i, one in enumerate(ours) if beams == 1 or not one.truncated]
    assert len(told) > 35
    theirs = translate(other, these)
    assert [theirs[i] for i in told] == [ours[i] for i in told]
    other.batch_tokens = 30
    assert translate(other, these) == theirs


def test_ctranslate2_cuts_at_the_same_limit(nllb_folder, converted):
    decoding = MTDecoding(max_length=40)
    code, end = "quy_Latn", "</s>"
    engine = CTranslate2Engine(converted["float32"], decoding)
    result = engine.model.translate_batch(
        [[*engine.tokenizer.tokenize("ab."), end]],
        [[code]],
        max_decoding_length=41,
        suppress_sequences=[[end]],
        beam_size=1,
    )
    assert len(result[0].hypotheses[0]) == 41  # the code and the limit


def test_eight_bits_are_near(engine, converted):
    small = CTranslate2Engine(converted["int8"], SHORT)
    same = sum(
        a == b
        for a, b in zip(translate(small, texts(40)), translate(engine, texts(40)), strict=True)
    )
    assert same > 20


def test_what_ctranslate2_cannot_use_is_named(nllb_folder, converted):
    with pytest.raises(UserError, match="there is no converted model"):
        CTranslate2Engine(nllb_folder)
    with pytest.raises(UserError, match=r"mt\.max_length=63"):
        CTranslate2Engine(converted["int8"], MTDecoding(max_length=63))
    with pytest.raises(UserError, match="CTranslate2 cannot use it"):
        CTranslate2Engine(converted["int8"], SHORT, dtype="float16")  # on a CPU


def test_ctranslate2_is_asked_for_by_name_when_it_is_missing(nllb_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ctranslate2", None)
    for use in (
        lambda: engines.convert(nllb_folder, None, tmp_path, "int8"),
        lambda: CTranslate2Engine(str(tmp_path)),
    ):
        with pytest.raises(UserError, match=r"flare_exp\[ct2\].*mt\.backend=transformers"):
            use()
