"""check-data: what it counts, what it warns of, what makes it fail, and mistyped commands."""

import shlex

import pytest
import yaml
from small_checkpoints import tiny_checkpoint
from tables import own_data

from flare_exp.cli import main


@pytest.fixture
def check(capsys):
    """(words) -> exit code, cells of the printed tables, and all that was printed."""

    def run(*words):
        code = main.main(["check-data", *map(str, words)])
        said = capsys.readouterr()
        rows = [line.strip("│ ").split("│") for line in said.out.splitlines() if "│" in line]
        return code, [[cell.strip() for cell in row] for row in rows], said.out + said.err

    return run


def test_good_data_are_counted(check, tmp_path):
    code, rows, said = check(own_data(tmp_path))
    assert code == 0
    assert ["en/train", str(tmp_path / "train.csv"), "3", "0", "1 (33%)", "2 (67%)"] in rows
    assert ["far/test", "LATIN 100%", "3.0", "3", "0"] in rows
    assert "Tokens were not counted: no model is given" in said
    assert "No errors, 0 warnings: a run takes these data." in said
    assert (
        f"Next: python -m flare_exp task=custom task.spec={tmp_path}/mine.yaml task.lang=far"
        in said
    )


def test_a_test_row_among_the_training_rows_of_its_own_language_is_found(check, tmp_path):
    splits = ("train", "validation", "test")
    files = {lang: {s: f"{lang}_{s}.csv" for s in splits} for lang in ("en", "far")}
    folder = tmp_path / "my data"
    folder.mkdir()
    path = own_data(folder, files=files, id="id", parallel="true")
    for lang in ("en", "far"):
        for first, split in enumerate(splits):
            lines = [
                f"{2 * first + i},{lang} {split} {i},{'positive negative'.split()[i]}"
                for i in (0, 1)
            ]
            if (lang, split) == ("far", "test"):
                lines[1] = "5,far train 1,negative"
            (folder / f"{lang}_{split}.csv").write_text("\n".join(["id,text,label", *lines]) + "\n")
    code, rows, said = check(path)
    assert code == 0
    assert ["far/test", "2", "en/train", "0", "0"] in rows
    assert ["far/test", "2", "far/train", "1", "0"] in rows
    assert "is row 2 of" in said
    words = shlex.split(said.rstrip().splitlines()[-1])
    assert words[-3:] == [f"task.spec={path}", "task.lang=far", "mt=gold"]

    lines = (folder / "far_train.csv").read_text().splitlines()
    (folder / "far_train.csv").write_text("\n".join(lines[:-1]) + "\n")
    code, _, said = check(path)
    assert code == 0
    assert "1 rows of en have no translation here, e.g. mine/en/train/1; mt=gold takes none" in said
    assert "not tested" not in said, "training data are not"
    (command,) = [line for line in said.splitlines() if line.startswith("Next: ")]
    assert "mt=gold" not in command


def test_what_a_run_would_still_miss_is_said(check, tmp_path):
    english = {split: f"{split}.csv" for split in ("train", "validation", "test")}
    path = own_data(tmp_path, files={"en": english, "zumi": {"test": "far.csv"}})
    code, _, said = check(path)
    assert code == 0
    assert "first: mt=nllb_3b3 with task.lang=zumi: no FLORES-200 code is known for it" in said


def test_a_split_that_a_run_needs_is_missed(check, tmp_path):
    english = {split: f"{split}.csv" for split in ("train", "test")}
    code, _, said = check(own_data(tmp_path, files={"en": english, "far": {"dev": "far.csv"}}))
    assert code == 0
    assert "en has no validation; a run needs another one: task.validation_split=..." in said
    assert "far has no test; a run needs another one: task.test_split=..." in said


def test_an_english_test_set_that_is_missed_has_an_option_of_its_own(check, tmp_path):
    """That of the target language has the split that task.test_split names."""
    english = {split: f"{split}.csv" for split in ("train", "validation")}
    code, _, said = check(own_data(tmp_path, files={"en": english, "far": {"test": "far.csv"}}))
    assert code == 0
    assert "en has no test; a run needs another one: task.english_test_split=..." in said
    assert "e.g. task.english_test_split='train[800:]'" in " ".join(said.split())


def test_a_wrong_english_row_is_no_error_of_its_translation(check, tmp_path):
    files = {"en": {"test": "test.csv", "train": "train.csv"}, "far": {"test": "far.csv"}}
    path = own_data(tmp_path, files=files, id="id", parallel="true")
    english = (tmp_path / "test.csv").read_text()
    (tmp_path / "test.csv").write_text(english.replace("2,test 2 day,positive", "2,test,bad"))
    code, _, said = check(path)
    assert code == 1
    assert "1 error, " in said


def test_errors_come_first_with_file_row_line_and_column(check, tmp_path):
    path = own_data(tmp_path)
    (tmp_path / "far.csv").write_text("id,text,label\n0,,positive\n1,a b,good\n2,c d,negative\n")
    code, rows, said = check(path)
    assert code == 1
    found = [row for row in rows if row[0] in ("error", "warning")]
    place = str(tmp_path / "far.csv")
    assert found[0] == ["error", place, "2", "3", "label", "'good' is none of negative, positive"]
    assert ["warning", place, "1", "2", "text", "is empty"] in found
    assert "1 error, 1 warning: a run refuses these data." in said


def test_doubtful_data_are_warned_of_and_taken(check, tmp_path):
    long = "word " * 200
    texts = [
        "the camera was rather good on monday evening",
        "The camera  was rather good on Monday evening!",
        "train 0 day",
        "добрый день товарищи",
        long,
        long,
    ]
    rows = "".join(
        f"{i},{text},{'positive' if i < 5 else 'mixed'}\n" for i, text in enumerate(texts)
    )
    path = own_data(tmp_path, labels=["negative", "positive", "mixed"])
    (tmp_path / "far.csv").write_text(f"id,text,label\n{rows}")
    with (tmp_path / "train.csv").open("a") as file:
        file.write(f"3,{texts[0]},positive\n4,{texts[0]},negative\n")
    code, found, said = check(path)
    assert code == 0
    assert ["far/test", "6", "en/train", "2", "1"] in found
    for row, line, told in (
        ("1", "2", f"is row 4 of {tmp_path}/train.csv, a training row"),
        ("2", "3", f"is almost row 4 of {tmp_path}/train.csv, a training row (similarity 0.98)"),
        ("3", "4", f"is row 1 of {tmp_path}/train.csv, a training row"),
        ("5", "6", "has 200 words; data.max_length=128 tokens are read"),
    ):
        assert ["warning", f"{tmp_path}/far.csv", row, line, "-", told] in found
    assert "has the text of row 4, but the label negative instead of positive" in said
    assert "has the text of row 5, but the label mixed instead of positive" in said
    assert "no row has the label mixed, though far/test has it: it is not learned" in said
    assert "no row has the label negative: it is not tested" in said


def test_a_file_in_another_script_is_doubted(check, tmp_path):
    english = {split: f"{split}.csv" for split in ("train", "validation", "test")}
    path = own_data(tmp_path, files={"en": english, "ru": {"test": "far.csv"}})
    code, _, said = check(path)
    assert code == 0
    assert "0% of the letters are of the script of ru (Cyrl); is it the right file?" in said
    (tmp_path / "far.csv").write_text("id,text,label\n0,ᱥᱟᱱᱛᱟᱲᱤ ᱯᱟᱹᱨᱥᱤ,positive\n", "utf-8")
    files = {"en": english, "sat": {"test": "far.csv"}}
    given = yaml.safe_load(path.read_text()) | {"files": files, "languages": {"sat": "sat_Beng"}}
    path.write_text(yaml.safe_dump(given))
    assert "is it the right file" not in check(path)[2]


def test_single_files_need_no_description(check, tmp_path):
    own_data(tmp_path)
    code, rows, _ = check(
        tmp_path / "train.csv", tmp_path / "far.csv", "--text", "text", "--label", "label"
    )
    assert code == 0
    assert ["far.csv", str(tmp_path / "far.csv"), "3", "0", "1 (33%)", "2 (67%)"] in rows
    code, _, said = check(
        tmp_path / "train.csv", "--text", "label", "--label", "label", "--labels", "a,b"
    )
    assert code == 1
    assert "'positive' is none of a, b" in said
    (tmp_path / "qa.csv").write_text("c,q,a\nThe Nile,Which?,Congo\n")
    code, _, said = check(tmp_path / "qa.csv", "--context=c", "--question=q", "--answers=a")
    assert code == 1
    assert "the context does not hold the answer 'Congo'" in said


def test_labels_may_be_truth_values_or_have_any_character(check, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"t":"good","l":true}\n{"t":"bad","l":false}\n')
    code, rows, said = check(tmp_path / "a.jsonl", "--text", "t", "--label", "l")
    assert code == 0, said
    assert ["a.jsonl", str(tmp_path / "a.jsonl"), "2", "0", "1 (50%)", "1 (50%)"] in rows
    (tmp_path / "f.jsonl").write_text('{"t":"good","l":1.0}\n{"t":"bad","l":0.0}\n')
    code, rows, said = check(tmp_path / "f.jsonl", "--text", "t", "--label", "l")
    assert code == 0, said
    assert ["f.jsonl", str(tmp_path / "f.jsonl"), "2", "0", "1 (50%)", "1 (50%)"] in rows
    (tmp_path / "f.jsonl").write_text('{"t":"good","l":0.5}\n{"t":"bad","l":[0]}\n')
    code, _, said = check(tmp_path / "f.jsonl", "--text", "t", "--label", "l")
    assert code == 1
    assert "0.5 instead of text or a whole number" in said
    (tmp_path / "b.csv").write_text("t,l\ngood,C#\nbad,a|b\n")
    _, _, said = check(tmp_path / "b.csv", "--text", "t", "--label", "l")
    assert "C#" in said
    assert "a|b" in said


def test_tokens_are_counted_with_the_tokenizer_of_a_model(check, tmp_path):
    path, model = own_data(tmp_path), tmp_path / "model"
    tiny_checkpoint(model, "xlm-roberta")
    folder = ("model=custom", f"model.path={model}")
    code, rows, said = check(path, *folder, "data.max_length=4")
    assert code == 0
    (head,) = [line for line in said.splitlines() if "tokens per word" in line]
    assert "unknown" in head
    (row,) = [row for row in rows if row[0] == "far/test" and row[1].startswith("LATIN")]
    assert float(row[5]) >= 1
    assert row[7] == "3"
    assert "3 of 3 rows have more tokens than data.max_length=4 and are cut" in said
    (tmp_path / "far.csv").write_text("text,label\n是的,positive\n不是,negative\n")
    code, _, said = check(path, *folder)
    assert code == 1, "a run refuses it, too"
    assert "of the tokens (at most 25%): it is not made for this language or script" in said


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (["model=tiny"], "model=tiny is built by its first run"),
        (
            ["model=xlmr_base"],
            "model.path=FacebookAI/xlm-roberta-base: missing all of it; fetch it",
        ),
    ],
)
def test_without_a_tokenizer_the_reason_is_said(model, said, check, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, _, told = check(own_data(tmp_path), *model, f"cache_dir={tmp_path}")
    assert code == 0
    assert said in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a description (my_data.yaml), or files"),
        (["no.yaml"], "task.spec=no.yaml: there is no such file"),
        (["no.csv"], "no.csv: there is no file no.csv"),
        (["sheet.xlsx"], "sheet.xlsx: its name must end in .csv, .tsv, .jsonl, .parquet; save"),
        (["{}/far.csv"], "--text COLUMN --label COLUMN, or --context, --question and --answers; "),
        (["{}/far.csv"], "/far.csv has id, text, label"),
        (["{}/mine.yaml", "--text", "text"], "a description comes alone"),
        (["{}/far.csv", "--text=text", "--label=label", "--context=text"], "not both"),
        (["{}/far.csv", "--txt=text", "--label=label"], "--txt=text: there is no such flag"),
        (["{}/far.csv", "--text=text", "--label=label", "--delimiter=::"], "one character"),
        (["{}/mine.yaml", "task=nusax"], "task=nusax: only model=..., model.path=... and"),
        (["{}/mine.yaml", "model=tinny"], "model=tinny: choose one of"),
    ],
)
def test_mistyped_commands_are_refused(words, said, check, tmp_path):
    own_data(tmp_path)
    code, _, told = check(*(word.format(tmp_path) for word in words))
    assert code == 2
    assert said in told


def test_too_many_labels_are_no_labels(check, tmp_path):
    rows = "".join(f"{i},text {i}\n" for i in range(60))
    (tmp_path / "a.csv").write_text(f"id,text\n{rows}")
    code, _, said = check(tmp_path / "a.csv", "--text", "id", "--label", "text")
    assert code == 2
    assert (
        "the column has 60 different values, e.g. 'text 0'; is it the column of the labels?" in said
    )


def test_rows_whose_english_ones_cannot_be_used_have_no_problem_of_their_own(check, tmp_path):
    path = own_data(tmp_path, id="id", parallel="true")
    (tmp_path / "test.csv").write_text("id,text,label\n0,good day,unknown\n")
    code, _, said = check(path)
    assert code == 1
    assert "1 error," in said


def test_a_file_of_lists_has_no_columns_to_suggest(check, tmp_path):
    (tmp_path / "a.jsonl").write_text('[{"t": "a"}]\n')
    code, _, said = check(tmp_path / "a.jsonl")
    assert code == 2
    assert "a.jsonl has none that can be read" in said


def test_every_problem_of_a_description_is_said(check, tmp_path):
    path = own_data(tmp_path)
    spec = yaml.safe_load(path.read_text()) | {"lable": "x", "metric": "bleu"}
    path.write_text(yaml.safe_dump(spec))
    code, _, said = check(path)
    assert code == 2
    assert "there is no key 'lable'; did you mean label?" in said
    assert "metric: bleu must be one of macro_f1, accuracy" in said
