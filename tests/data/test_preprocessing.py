"""Forms: what a model reads, and what it says as text.

Truncation, offsets and answers that are cut off.
"""

import random

import pytest
import torch
from random_models import random_backbone, rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from flare_exp.data import (
    classification,
    generation,
    preprocessing,
    preprocessors,
    question_answering,
)
from flare_exp.errors import UserError
from flare_exp.tasks import NusaX, TyDiQA
from flare_exp.tasks.examples import Answer, Example
from flare_exp.toy.tokenizers import t5_tokenizer, train_tokenizer
from flare_exp.toy.world import World
from flare_exp.training.generation import AnswerDecoding, GenerationModule
from flare_exp.training.heads import ClassificationModule, SpanModule

WORDS = (
    "the soup was good and bad in rome on monday where when who ? . answer context question "
    "sentiment :"
).split()


def wordpiece():
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({c for w in WORDS for c in (w[0], f"##{w[-1]}")}),
        *WORDS,
    ]
    return BertTokenizerFast(vocab={p: i for i, p in enumerate(dict.fromkeys(pieces))})


def byte_level():
    """Like Llama 3's: byte-level pieces, the space belongs to the word, BOS, no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyz("]
    vocab = {c: i for i, c in enumerate(["<bos>", "<eos>", *alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
            ),
        ]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    made.pad_token = made.eos_token
    return made


TOKENIZERS = {
    "wordpiece": wordpiece,
    "sentencepiece": lambda: train_tokenizer(World().corpus(200), 300, 512),
    "byte-level": byte_level,
}


def question(context, answer, start=None, asked="who was it ?"):
    answers = (Answer(answer, context.index(answer) if start is None else start),) if answer else ()
    return Example("tydiqa/en/train/0", "0", (context, asked), answers=answers)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_offsets_lead_back_to_the_answers_text(name):
    """For every word, and run of words, of contexts with odd spaces and punctuation."""
    rng, words = (
        random.Random(0),
        ["soup", "rome", "good.", "(bad)", "'monday'", "and", "7", "naïve", "été", "мир", "是的"],
    )
    preprocessor = question_answering.ExtractiveQAPreprocessor(TyDiQA(), TOKENIZERS[name](), 512)
    examples = []
    for _ in range(60):
        chosen = rng.choices(words, k=rng.randint(3, 12))
        context = "".join(word + rng.choice([" ", " ", "  ", "\n"]) for word in chosen)
        first = rng.randrange(len(chosen))
        start = sum(len(w) for w in chosen[:first])
        start = context.index(chosen[first], start)
        answer = " ".join(context[start:].split(" ")[: rng.randint(1, 3)]).strip()
        examples.append(question(context, answer, start))
    items = preprocessor.encode(examples)
    for example, item in zip(examples, items, strict=True):
        first, last = item["span"]
        found = example.texts[0][item["offsets"][first][0] : item["offsets"][last][1]]
        assert found == example.answers[0].text, (found, example)
        assert not item["cut_off"]
    # and the model's best span of these logits is that text again
    batch = preprocessor.collate(items)
    start, end = (
        torch.nn.functional.one_hot(batch["span"][:, i], batch["offsets"].shape[1]).float()
        for i in (0, 1)
    )
    texts = [
        found.text
        for found in question_answering.best_spans(
            start, end, batch["offsets"], batch["contexts"], longest=200
        )
    ]
    assert texts == [e.answers[0].text for e in examples]


@pytest.mark.parametrize(
    ("context", "token", "text"),
    [
        ("\u200bគឺ ជា", (0, 3), "គឺ"),
        ("a \ufeff\u200e", (2, 4), None),
        ("in \u200eRome\u200f.", (2, 9), "Rome"),
        ("ന്\u200d x", (0, 3), "ന്\u200d"),  # a word that ends in a joiner
        ("cafe\u0301 is", (0, 4), "cafe\u0301"),
    ],
)
def test_a_token_has_neither_invisible_signs_at_its_ends_nor_a_letter_without_its_marks(
    context, token, text
):
    """As tokenizers give them: the space of zero width is the word's, the accent is no one's."""
    ((start, end),) = question_answering.context_offsets([token], [1], context)
    assert (None if start < 0 else context[start:end]) == text


def test_best_span_is_the_best_of_all_legal_ones():
    """Against every pair of tokens, written out."""
    generator = torch.Generator().manual_seed(0)
    start, end = (torch.randn(8, 12, generator=generator) for _ in range(2))
    offsets = torch.stack([torch.arange(12) * 2, torch.arange(12) * 2 + 1], -1).repeat(8, 1, 1)
    offsets[:, :4] = -1  # question and special tokens
    offsets[:, 11] = -1
    context = "a b c d e f g h i j k l "
    found = question_answering.best_spans(start, end, offsets, [context] * 8, longest=3)
    for row in range(8):
        legal = [(i, j) for i in range(4, 11) for j in range(i, min(i + 3, 11))]
        i, j = max(legal, key=lambda span: float(start[row, span[0]] + end[row, span[1]]))
        assert found[row].text == context[2 * i : 2 * j + 1]
        assert found[row].score == pytest.approx(float(start[row, i] + end[row, j]))
    nothing = question_answering.best_spans(
        start, end, torch.full_like(offsets, -1), [context] * 8, 3
    )
    assert {(found.text, found.score) for found in nothing} == {("", float("-inf"))}


def test_an_answer_that_is_cut_off_is_counted_and_teaches_nothing():
    tokenizer = wordpiece()
    context = " ".join(["the soup was good and"] * 10) + " monday"
    examples = [question(context, "monday"), question(context, "soup")]
    preprocessor = question_answering.ExtractiveQAPreprocessor(TyDiQA(), tokenizer, 24)
    items = preprocessor.encode(examples)
    assert [item["cut_off"] for item in items] == [True, False]
    assert all(item["cut"] for item in items)
    assert items[0]["span"] == (-1, -1)
    # an answer over the window's edge is cut off as well
    edge = items[0]["offsets"][len(items[0]["offsets"]) - 2][1]
    across = question(context, context[edge - 6 : edge + 6], edge - 6)
    assert preprocessor.encode([across])[0]["cut_off"]
    assert not preprocessor.encode([question(context, context[edge - 6 : edge], edge - 6)])[0][
        "cut_off"
    ]
    # lost in translation is not cut off
    assert not preprocessor.encode([question(context, "")])[0]["cut_off"]
    batch = preprocessor.collate(items)
    module = SpanModule(random_backbone(("bert", "span")).model.float())
    batch["target"] = {
        k: v.clamp(max=39) for k, v in batch["target"].items() if k != "token_type_ids"
    }
    alone = preprocessor.collate(items[1:])
    alone["target"] = {
        k: v.clamp(max=39) for k, v in alone["target"].items() if k != "token_type_ids"
    }
    torch.testing.assert_close(module.loss(batch), module.loss(alone))
    nothing = preprocessor.collate(items[:1])
    nothing["target"] = {
        k: v.clamp(max=39) for k, v in nothing["target"].items() if k != "token_type_ids"
    }
    assert float(module.loss(nothing)) == 0
    assert len(module.predict(batch)) == 2


def test_a_window_without_room_for_question_and_context_is_a_users_error():
    with pytest.raises(UserError, match=r"data\.max_length=4: .* does not fit"):
        question_answering.ExtractiveQAPreprocessor(TyDiQA(), wordpiece(), 4).encode(
            [question("the soup", "soup", asked="who was in rome ?")]
        )
    with pytest.raises(UserError, match=r"data\.max_length=12: .* does not fit"):
        generation.GenerationPreprocessor(TyDiQA(), byte_level(), 12).encode(
            [question("the soup", "soup")]
        )


LONG = " ".join(["the soup was good and bad in rome"] * 6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("long", ["context", "question", "both"])
def test_the_longest_field_of_a_prompt_is_cut(side, long):
    """Whichever it is: a long question never ends a run."""
    tokenizer = byte_level()
    tokenizer.truncation_side = side
    preprocessor = generation.GenerationPreprocessor(TyDiQA(), tokenizer, 90)
    context = LONG if long != "question" else "the soup"
    asked = LONG if long != "context" else "who was it ?"
    (item,) = preprocessor.encode([question(context, "soup", asked=asked)])
    assert item["cut"]
    ids = item["inputs"]["input_ids"]
    assert 85 < len(ids) <= 90, "no more is cut than must be"
    said = tokenizer.decode(ids, skip_special_tokens=True)
    kept_context, kept_question = (
        said.removeprefix("Context: ").removesuffix("\nAnswer:").split("\nQuestion: ")
    )
    assert (kept_context == context) == (long == "question")
    assert (kept_question == asked) == (long == "context")
    for kept, text in ((kept_context, context), (kept_question, asked)):
        assert text.startswith(kept) if side == "right" else text.endswith(kept)
    if long == "both":
        counts = [
            len(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (kept_context, kept_question)
        ]
        assert abs(counts[0] - counts[1]) <= 1, "both are cut to one length"


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_question_leaves_room_for_the_context(side):
    tokenizer = wordpiece()
    tokenizer.truncation_side = side
    (item,) = question_answering.ExtractiveQAPreprocessor(TyDiQA(), tokenizer, 43).encode(
        [question(LONG + " on monday", "monday", asked=LONG)]
    )
    ids, types = item["inputs"]["input_ids"], item["inputs"]["token_type_ids"]
    assert len(ids) == 43
    assert sum(types) - 1 == 20, "half of the 40 tokens beside the special ones"
    assert item["cut"]
    assert item["cut_off"] == (side == "right")
    (whole,) = question_answering.ExtractiveQAPreprocessor(TyDiQA(), tokenizer, 60).encode(
        [question("the soup on monday", "soup", asked=LONG)]
    )
    assert sum(whole["inputs"]["token_type_ids"]) - 1 == 4, (
        "a short context leaves the question more than half"
    )
    assert len(whole["inputs"]["input_ids"]) == 4 + 48 + 3


@pytest.mark.parametrize("side", ["right", "left"])
def test_long_texts_are_cut_on_the_side_that_the_tokenizer_says(side):
    tokenizer = wordpiece()
    tokenizer.truncation_side = side
    (item,) = classification.ClassificationPreprocessor(NusaX(), tokenizer, 6).encode(
        [Example("nusax/eng/train/0", "0", ("soup was good and bad",), 0)]
    )
    said = tokenizer.decode(item["inputs"]["input_ids"], skip_special_tokens=True)
    assert said == ("soup was good and" if side == "right" else "was good and bad")


def test_a_text_that_spells_the_end_token_is_read_by_mt5s_head():
    tokenizer = t5_tokenizer([" ".join(WORDS)] * 5, 100)
    made = classification.ClassificationPreprocessor(NusaX(), tokenizer, 20)
    texts = ("the soup was good", "the soup</s> was </s>good")
    items = made.encode(
        [Example(f"nusax/eng/train/{i}", "0", (t,), 0) for i, t in enumerate(texts)]
    )
    assert items[1]["inputs"] == items[0]["inputs"]
    model = random_backbone(("mt5", "label")).model
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    assert model(**made.collate(items)["target"]).logits.shape == (2, 3)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("text", ["cafe\u0301 " * 9, "e\u0301" * 9, "\u05d0\u05b8\u05bc" * 9])
def test_no_letter_is_cut_from_its_marks_and_a_cut_question_fits(side, text):
    tokenizer = byte_level()
    tokenizer.truncation_side = side
    made = question_answering.ExtractiveQAPreprocessor(TyDiQA(), tokenizer, 20, stride=2)
    for keep in range(len(tokenizer(text)["input_ids"])):
        cut = made._shortened(text, keep)
        kept = text.startswith(cut) if side == "right" else text.endswith(cut)
        rest = text[len(cut) :] if side == "right" else cut
        assert kept, (cut, keep)
        assert preprocessing.after_marks(rest, 0) == 0, (cut, keep)
    for context in ("soup", "the soup was good"):
        assert made.encode([question(context, "soup", asked=text)])[0]["cut"]


@pytest.mark.parametrize("name", ["span", "prompt", "label"])
def test_a_translation_encoder_reads_the_fields_in_the_targets_order(name):
    """And of a text that is too long the longest field is cut, not what stands last."""
    from flare_exp.tasks import XNLI

    tokenizer = wordpiece() if name != "prompt" else byte_level()
    task = XNLI() if name == "label" else TyDiQA()
    preprocessor = preprocessors.PREPROCESSORS[name](task, tokenizer, 512)
    asked, context = "who was in rome ?", LONG
    example = (
        Example("xnli/en/train/0", "0", (context, asked), 0)
        if name == "label"
        else question(context, "soup", asked=asked)
    )
    source = preprocessing.SourceTextPreprocessor(task, wordpiece(), 20, preprocessor.order)
    (item,) = source.encode([example])
    said = (
        source.tokenizer.decode(item["inputs"]["input_ids"], skip_special_tokens=True)
        .replace("?", " ?")
        .replace("  ", " ")
    )
    assert item["cut"]
    assert len(item["inputs"]["input_ids"]) == 20
    kept = "the soup was good and bad in rome the soup was good and"
    assert said == (f"{asked} {kept}" if name == "span" else f"{kept} {asked}")


@pytest.mark.parametrize("name", ["span", "prompt"])
def test_an_answer_is_cut_off_only_where_no_accepted_one_fits(name):
    """`cut_off` is not set by a first answer alone, nor by one whose place nobody knows."""
    tokenizer = wordpiece() if name == "span" else byte_level()
    preprocessor = preprocessors.PREPROCESSORS[name](
        TyDiQA(), tokenizer, 24 if name == "span" else 90
    )
    context = LONG + " on monday"
    soup, monday, nowhere = (
        Answer("soup", 4),
        Answer("monday", context.index("monday")),
        Answer("congo", -1),
    )
    accepted = [(monday,), (monday, soup), (monday, nowhere), (nowhere,), ()]
    items = preprocessor.encode(
        [
            Example(f"tydiqa/en/train/{i}", str(i), (context, "who ?"), answers=a)
            for i, a in enumerate(accepted)
        ]
    )
    assert all(item["cut"] for item in items)
    assert [item["cut_off"] for item in items] == [True, False, False, False, False]
    if name == "span":  # the one that fits is learned
        first, last = items[1]["span"]
        assert context[items[1]["offsets"][first][0] : items[1]["offsets"][last][1]] == "soup"
    else:
        assert items[1]["answer"] == preprocessor.answer("soup")


def test_prompts_keep_question_and_frame_when_the_context_is_cut():
    tokenizer = byte_level()
    preprocessor = generation.GenerationPreprocessor(TyDiQA(), tokenizer, 60)
    context = "the soup was good and the soup was bad in rome on monday"
    late, early, short = preprocessor.encode(
        [question(context, "monday"), question(context, "soup"), question("soup", "soup")]
    )
    for item in (late, early):
        text = tokenizer.decode(item["inputs"]["input_ids"], skip_special_tokens=True)
        assert text.startswith("Context: the soup")
        assert text.endswith("\nQuestion: who was it ?\nAnswer:")
        assert len(item["inputs"]["input_ids"]) <= 60
    assert (late["cut_off"], early["cut_off"], early["cut"], short["cut"]) == (
        True,
        False,
        True,
        False,
    )
    # the answer continues the text as running text does, and ends
    assert tokenizer.decode(short["inputs"]["input_ids"] + short["answer"]) == (
        "<bos>Context: soup\nQuestion: who was it ?\nAnswer: soup<eos>"
    )


def test_prompt_batches_are_left_padded_and_answers_right_padded():
    preprocessor = generation.GenerationPreprocessor(NusaX(), byte_level(), 100)
    items = preprocessor.encode(
        [
            Example(f"nusax/eng/train/{i}", str(i), (text,), i)
            for i, text in enumerate(["good", "so bad"])
        ]
    )
    batch = preprocessor.collate(items)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["target"]["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["target"]["attention_mask"][0, 0] == 0
    lengths = batch["answer"]["attention_mask"].sum(1).tolist()
    assert lengths == [len(item["answer"]) for item in items]
    assert [batch["answer"]["input_ids"][i, n - 1].item() for i, n in enumerate(lengths)] == [
        preprocessor.tokenizer.eos_token_id
    ] * 2


def test_predictions_are_texts():
    """A classifier says labels; a generative one chooses among them, or writes freely."""
    batch = {
        "target": {
            "input_ids": torch.tensor([[5, 6, 3], [7, 8, 3]]),
            "attention_mask": torch.ones(2, 3).long(),
        },
        "index": torch.tensor([0, 1]),
    }
    labels = ("negative", "neutral", "positive")
    bert = random_backbone(("bert", "label")).model
    with torch.no_grad():
        logits = bert(**batch["target"]).logits
    for found, row in zip(ClassificationModule(bert, labels).predict(batch), logits, strict=True):
        assert found.text == labels[row.argmax()]
        assert found.probabilities == pytest.approx((row.exp() / row.exp().sum()).tolist())
    tokenizer, llama = byte_level(), random_backbone(("llama", "prompt")).model
    encode = {label: [4 + i, 9, 3] for i, label in enumerate(labels)}.__getitem__
    for found in GenerationModule(llama, tokenizer, encode, AnswerDecoding(labels)).predict(batch):
        best = max(range(3), key=found.probabilities.__getitem__)
        assert found.text == labels[best]
        assert sum(found.probabilities) == pytest.approx(1)
    free = GenerationModule(llama, tokenizer, encode, AnswerDecoding(max_new_tokens=4)).predict(
        batch
    )
    assert len(free) == 2
    assert all(isinstance(found.text, str) for found in free)


# --- overlapping windows -------------------------------------------------------------------------

NUMBERED = " ".join(
    f"{letter}{letter} {word}" for letter in "abdegimnorstuw" for word in ("the soup", "in rome")
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_windows_are_those_of_the_published_scripts(name):
    """Every window is the question and a run of the context's tokens, `stride` of them again in the
    next; none is lost.
    """
    tokenizer = TOKENIZERS[name]()
    preprocessor = question_answering.ExtractiveQAPreprocessor(TyDiQA(), tokenizer, 60, stride=20)
    example = question(NUMBERED, "mm", asked="who ?")
    items = preprocessor.encode([question("the soup", "soup"), example])
    assert [item["example"] for item in items] == [0, *[1] * (len(items) - 1)]
    assert len(items) > 2
    assert not any(item["cut"] for item in items)
    whole = [
        span
        for span in question_answering.ExtractiveQAPreprocessor(TyDiQA(), tokenizer, 1000).encode(
            [example]
        )[0]["offsets"]
        if span[0] >= 0
    ]
    read = [[span for span in item["offsets"] if span[0] >= 0] for item in items[1:]]
    assert all(len(item["inputs"]["input_ids"]) <= 60 for item in items)
    at = 0
    for window in read:
        assert window == whole[at : at + len(window)]
        at += len(window) - 20
    assert at + 20 == len(whole)
    # the answer is learned in every window that holds it, and the others are trained to point at
    # the first special token
    start = NUMBERED.index("mm")
    for item, window in zip(items[1:], read, strict=True):
        holds = window[0][0] <= start and start + 2 <= window[-1][1]
        first, last = item["span"]
        if holds:
            assert example.texts[0][item["offsets"][first][0] : item["offsets"][last][1]] == "mm"
        else:
            assert first == last == item["null"]
            assert item["inputs"]["input_ids"][first] in tokenizer.all_special_ids
        assert item["cut_off"] == (not holds)
    assert {item["cut_off"] for item in items[1:]} == {True, False}


def test_a_window_of_an_unknown_answer_teaches_nothing():
    preprocessor = question_answering.ExtractiveQAPreprocessor(TyDiQA(), wordpiece(), 24, stride=8)
    items = preprocessor.encode([question(LONG, ""), question(LONG, "congo", -1)])
    assert len(items) > 4
    assert {item["span"] for item in items} == {(-1, -1)}
    assert {item["cut_off"] for item in items} == {False}


def test_in_windows_the_first_special_token_competes_with_the_context():
    """Without windows it does not."""
    start = torch.tensor([[1.0, 5.0, 2.0, 3.0]])
    module = SpanModule(torch.nn.Identity())
    batch = {
        "target": {"input_ids": torch.ones(1, 4)},
        "offsets": torch.tensor([[[-1, -1], [-1, -1], [0, 1], [2, 3]]]),
    }

    def loss(span, null):
        return float(
            module.loss_from_output(
                (start, start),
                {**batch, "span": torch.tensor([span]), "null": torch.tensor([null])},
            )
        )

    def expected(seen, at):
        return float(-torch.tensor(seen).log_softmax(0)[at])

    assert loss([3, 3], -1) == pytest.approx(expected([2.0, 3.0], 1))
    assert loss([3, 3], 0) == pytest.approx(expected([1.0, 2.0, 3.0], 2))
    assert loss([0, 0], 0) == pytest.approx(expected([1.0, 2.0, 3.0], 0))


def test_a_stride_that_leaves_no_room_is_a_users_error():
    with pytest.raises(
        UserError, match=r"task\.doc_stride=20: windows of 24 tokens have room for 21"
    ):
        question_answering.ExtractiveQAPreprocessor(TyDiQA(), wordpiece(), 24, stride=20)


def test_the_same_part_of_another_text():
    source = Example("x", "0", ("one two three four", "who ?"), answers=(Answer("two", 4),))
    target = Example("x", "0", ("ein zwei drei vier", "wer ?"))
    found = preprocessing.same_part(source, target, 0, (4, 8))
    assert found == Example("x", "0", ("two three", "who ?")), "whole words, and no answers"
    assert preprocessing.same_part(source, target, 0, (0, 18)).texts == source.texts
    unspaced = Example("x", "0", ("甲" * 600, "?"))
    spaced = Example("x", "0", ("wort " * 300, "?"))
    for window, length in (((0, 400), 160), ((700, 1100), 160), ((1400, 1500), 40)):
        (part, _) = preprocessing.same_part(unspaced, spaced, 0, window).texts
        assert len(part) == pytest.approx(length, abs=1), "no word to widen it to"
    assert preprocessing.same_part(target, target, 0, (5, 8)).texts == ("wei", "wer ?"), (
        "of the text itself just that part"
    )


@pytest.mark.parametrize("family", ["llama", "mt5"])
@pytest.mark.parametrize(
    ("limit", "passes"), [(None, [6]), (4, [4, 2]), (2, [2, 2, 2]), (1, [2, 2, 2])]
)
def test_candidates_are_scored_in_passes_of_at_most_so_many_rows(family, limit, passes):
    """Three candidates of two prompts."""
    model, seen = random_backbone((family, "prompt")).model, []
    batch = {
        "target": {
            "input_ids": torch.tensor([[5, 6, 3], [7, 8, 3]]),
            "attention_mask": torch.ones(2, 3).long(),
        }
    }
    module = GenerationModule(model, None, lambda text: [], AnswerDecoding(), rows=limit)
    answers = generation.padded_answers([[5, 3], [6, 9, 3], [3], [5, 3], [6, 9, 3], [3]])
    alone = [
        module({"target": rows(batch["target"], i // 3)}, rows(answers, i))[0] for i in range(6)
    ]
    expected = torch.cat(alone)
    model.register_forward_hook(lambda *hooked: seen.append(len(hooked[-1].logits)))
    torch.testing.assert_close(module(batch, answers)[0], expected)
    assert seen == passes


def test_with_sharded_weights_all_processes_score_in_equally_many_passes(monkeypatch):
    """Each pass gathers weights together, and a process may have fewer prompts."""
    monkeypatch.setattr(GenerationModule, "device_mesh", object())
    model, seen = random_backbone(("llama", "prompt")).model, []
    module = GenerationModule(model, None, lambda text: [], AnswerDecoding(), rows=3)
    model.register_forward_hook(lambda *hooked: seen.append(len(hooked[-1].logits)))
    answers = [[5, 3], [6, 9, 3], [3]]
    for prompts in (1, 2):
        ids = torch.tensor([[5, 6, 3], [7, 8, 3]])[:prompts]
        batch = {"target": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
        module(batch, generation.padded_answers(answers * prompts))
    assert seen == [1, 1, 1, 2, 2, 2]


def test_a_checkpoints_own_settings_of_generation_do_not_count():
    model = random_backbone(("llama", "prompt")).model
    model.generation_config.repetition_penalty = 1.3
    module = GenerationModule(model, None, lambda text: [], AnswerDecoding())
    found = module.model.generation_config
    assert found.repetition_penalty in (None, 1.0)
    assert found.eos_token_id == model.config.eos_token_id is not None, "it is saved, too"


@pytest.mark.shared
@pytest.mark.parametrize("name", TOKENIZERS)
def test_offsets_on_real_questions(name, shared_data):
    """No answer of TyDiQA is missed; where a token reaches over an answer's edge, the span holds it
    still. WordPiece has no token for format characters: one answer begins with such a one.
    """
    task = TyDiQA(
        data_dir=str(shared_data / "tydiqa"),
        limit=300,
        splits={"test": "train", "english_test": "validation"},
    )
    for lang in ("en", "sw"):
        examples = task.load(lang, "test")
        items = question_answering.ExtractiveQAPreprocessor(
            task, TOKENIZERS[name](), 100_000
        ).encode(examples)
        found = [
            e.texts[0][i["offsets"][i["span"][0]][0] : i["offsets"][i["span"][1]][1]]
            for e, i in zip(examples, items, strict=True)
        ]
        gold = [e.answers[0].text.strip(" \u200e") for e in examples]
        assert all(g in f for f, g in zip(found, gold, strict=True))
        same = sum(f.strip(" \u200e") == g for f, g in zip(found, gold, strict=True)) / len(gold)
        assert same == 1 if name == "byte-level" else same > 0.75


def test_a_token_that_ends_where_an_answer_begins_is_no_part_of_it():
    """In "(1997)" nothing stands between the bracket and the year."""
    assert question_answering.token_span([(-1, -1), (0, 1), (1, 5), (5, 6)], Answer("1997", 1)) == (
        2,
        2,
    )


def joint(preprocessor, target, source):
    return preprocessor.joint(preprocessor.encode([target])[0], preprocessor.encode([source])[0])


def test_an_encoder_reads_the_target_and_then_its_source():
    tokenizer = wordpiece()
    preprocessor = classification.ClassificationPreprocessor(NusaX(), tokenizer, 6)
    target, source = (
        Example("nusax/jav/test/0", "0", (text,), 1) for text in ("the soup was good", "bad soup")
    )
    item = joint(preprocessor, target, source)
    expected = tokenizer("the soup was good", "bad soup")  # as two segments of one input
    assert item["inputs"] == dict(expected)
    assert (item["label"], item["cut"]) == (1, False)
    # each of the two has the room that it has alone
    long = Example("nusax/jav/test/1", "1", ("the soup was good in rome",), 1)
    cut = joint(preprocessor, target, long)
    assert cut["cut"]
    assert len(cut["inputs"]["input_ids"]) == 6 + 5


def test_a_decoder_reads_the_source_before_the_prompt():
    tokenizer = byte_level()
    preprocessor = generation.GenerationPreprocessor(NusaX(), tokenizer, 100)
    target, source = (
        Example("nusax/jav/test/0", "0", (text,), 1) for text in ("enak tenan", "very good")
    )
    item = joint(preprocessor, target, source)
    assert tokenizer.decode(item["inputs"]["input_ids"]) == (
        "<bos>very good\nSentiment:\n\nenak tenan\nSentiment:"
    )
    assert item["answer"] == preprocessor.encode([target])[0]["answer"]


@pytest.mark.parametrize("stride", [None, 4])
def test_the_answer_of_a_joint_input_is_in_the_target(stride):
    """The source has the answer's word too, and no place of it counts."""
    tokenizer = wordpiece()
    room = 64 if stride is None else 20
    preprocessor = question_answering.ExtractiveQAPreprocessor(TyDiQA(), tokenizer, room, stride)
    context = "the soup was good and bad in rome on monday . " * (1 if stride is None else 3)
    target = question(context, "monday")
    source = question("on monday the soup was bad in rome .", "rome")
    alone = preprocessor.encode([target])
    beside = preprocessor.encode_sources([source])[0]
    for item in alone:
        both = preprocessor.joint(item, beside)
        ids, offsets = both["inputs"]["input_ids"], both["offsets"]
        assert len(ids) == len(offsets) > len(item["offsets"])
        for i in range(len(ids)):  # every token of the context is the word at its place
            first, last = offsets[i]
            if first >= 0:
                word = tokenizer.convert_ids_to_tokens(ids[i])
                assert context[first:last].startswith(word.removeprefix("##")[:1])
        assert sum(o[0] >= 0 for o in offsets) == sum(o[0] >= 0 for o in item["offsets"])
        if item["span"][0] >= 0 and item["span"][0] != item["null"]:
            first, last = both["span"]
            assert context[offsets[first][0] : offsets[last][1]] == "monday"
        if stride is not None:
            assert ids[both["null"]] == tokenizer.cls_token_id
