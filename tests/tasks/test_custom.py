"""task=custom: what a description may say, what is read, and how bad data are refused."""

import json
from types import SimpleNamespace

import pytest
import yaml
from tables import own_data, write_rows

from flare_exp.config import validation
from flare_exp.config.schema import Config
from flare_exp.errors import UserError
from flare_exp.experiment import data_checks, downloads, pipeline
from flare_exp.languages import language
from flare_exp.tasks import CUSTOM, CustomTask, Example, SpecError, fingerprint, task_class
from flare_exp.tasks.examples import Answer

GOOD = "id,text,label\n1,good day,positive\n2,bad day,negative\n3,fine day,positive\n"
QA = {"text": None, "label": None, "labels": None}
QA |= {name: name for name in ("context", "question", "answers")}


def described(folder, **changes):
    """The class of a small data set with some other values in its description."""
    return CustomTask.described_by(str(own_data(folder, **changes)))


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def answer(text, start=None, context="The Nile is long. Nile."):
    answers = text if start is None else {"text": [text], "answer_start": [start]}
    return {"context": context, "question": "Which?", "answers": answers}


# name -> suffix, content and changes of the description; where the problem is; what is said
BAD = {
    "empty file": (".csv", "", {}, "", "is empty"),
    "white space alone": (".csv", " \n\n", {}, "", "is empty"),
    "header alone": (".csv", "id,text,label\n", {}, "", "has no rows"),
    "no header": (
        ".csv", "1,good,positive\n2,bad,negative\n", {}, "column text",
        "is missing; the file has '1', 'good', 'positive'; the first line must name the columns",
    ),
    "misspelt column": (
        ".csv", GOOD.replace("label", "lable"), {}, "column label", "did you mean 'lable'?",
    ),
    "column with a space": (
        ".csv", GOOD.replace(",label", ", label"), {}, "column label", "did you mean ' label'?",
    ),
    "semicolons": (
        ".csv", GOOD.replace(",", ";"), {}, "column text", "separated otherwise: delimiter: ';'",
    ),
    "column twice": (
        ".csv", "text,text,label\na,b,positive\n", {}, "column text", "several columns",
    ),
    "too many cells": (
        ".csv", GOOD.replace("bad day", "bad, day"), {}, "row 2 (line 3)",
        "has 4 cells where the header has 3; a text with ','",
    ),
    "too few cells": (".tsv", "text\tlabel\ngood\n", {}, "row 1 (line 2)", "a text with a tab"),
    "open quote": (
        ".csv", GOOD.replace("bad day", '"bad day'), {}, "row 2 (line 3)",
        'a quote (") opens a cell and is never closed',
    ),
    "quote inside a cell": (
        ".csv", GOOD.replace("bad day", '"bad" day'), {}, "row 2 (line 3)",
        "goes on after its closing quote",
    ),
    "a line break shifts lines": (
        ".csv", GOOD.replace("good day", '"good\nday"').replace("negative", "awful"), {},
        "row 2 (line 4), column label", "'awful' is none of negative, positive",
    ),
    "Latin-1": (
        ".csv", GOOD.replace("bad day", "b\xe4d day").encode("latin1"), {},
        "row 2 (line 3), column text", "the byte 0xE4 after 'b' is not UTF-8",
    ),
    "UTF-16": (".csv", GOOD.encode("utf-16"), {}, "", "looks like UTF-16"),
    "unknown label": (
        ".csv", GOOD.replace("negative", "mixed"), {}, "row 2 (line 3), column label",
        "'mixed' is none of negative, positive",
    ),
    "typo in a label": (
        ".csv", GOOD.replace("negative", "negtive"), {}, "row 2 (line 3), column label",
        "'negtive' is none of negative, positive; did you mean negative?",
    ),
    "label in another case": (
        ".csv", GOOD.replace("negative", "Negative"), {}, "row 2 (line 3), column label",
        "if it is negative: labels: {negative: [negative, 'Negative'], ...}",
    ),
    "number as label": (
        ".csv", GOOD.replace("negative", "0"), {}, "row 2 (line 3), column label",
        "if numbers stand for the labels: labels: {negative: 0, positive: 1, ...}",
    ),
    "NaN as label": (
        ".jsonl", lines({"text": "a", "label": float("nan")}), {}, "row 1 (line 1), column label",
        "has no label",
    ),
    "no label": (
        ".csv", GOOD.replace("negative", ""), {}, "row 2 (line 3), column label", "has no label",
    ),
    "number as text": (
        ".jsonl", lines({"text": "a", "label": "positive"}, {"text": 5, "label": "positive"}), {},
        "row 2 (line 2), column text", "5 instead of text",
    ),
    "null as text": (
        ".parquet", [{"text": "a", "label": "positive"}, {"text": None, "label": "positive"}], {},
        "row 2, column text", "null instead of text",
    ),
    "list as label": (
        ".jsonl", lines({"text": "a", "label": ["positive"]}), {}, "row 1 (line 1), column label",
        "['positive'] (list) is none of negative, positive",
    ),
    "cell that one row lacks": (
        ".jsonl", lines({"text": "a", "label": "positive"}, {"text": "b"}), {},
        "row 2 (line 2), column label", "is missing in this row",
    ),
    "no JSON": (
        ".jsonl", lines({"text": "a", "label": "positive"}) + "{'text': 'b'}\n", {},
        "row 2 (line 2)", "is no JSON: Expecting property name",
    ),
    "deep JSON": (
        ".jsonl", lines({"text": "a", "label": "positive"}) + '{"text": ' + "[" * 100_000, {},
        "row 2 (line 2)", "is no JSON: ",
    ),
    "JSON that is no object": (".jsonl", '"a"\n', {}, "row 1 (line 1)", "is no object {...}"),
    "one JSON list": (".jsonl", "[\n{}\n]\n", {}, "", "is one JSON list"),
    "damaged parquet": (".parquet", "PAR1", {}, "", "is not a readable parquet file"),
    "half a character": (
        ".jsonl", '{"text": "a \\ud83d", "label": "positive"}\n', {},
        "row 1 (line 1), column text", "\\ud83d after 'a ' is half of a character",
    ),
    "id twice": (
        ".csv", GOOD.replace("\n3,", "\n1,"), {"id": "id"}, "row 3 (line 4), column id",
        "'1' is the id of row 1 (line 2), too",
    ),
    "empty id": (
        ".csv", GOOD.replace("\n3,", "\n,"), {"id": "id"}, "row 3 (line 4), column id", "is empty",
    ),
    "id without a partner": (
        ".csv", GOOD.replace("\n3,", "\n4,"), {"id": "id", "parallel": "true"},
        "row 3 (line 4), column id", "'4' is no id of",
    ),
    "label unlike its partner's": (
        ".csv", GOOD.replace("negative", "positive"), {"id": "id", "parallel": "true"},
        "row 2 (line 3), column label", "is positive, but the row with the id '2' of",
    ),
    "answer not in the context": (
        ".jsonl", lines(answer("Congo")), QA, "row 1 (line 1), column answers",
        "the context does not hold the answer 'Congo'",
    ),
    "wrong answer_start": (
        ".jsonl", lines(answer("long", 11)), QA, "row 1 (line 1), column answers",
        "the answer 'long' does not start at 11, where the context has ' lon', but at 12",
    ),
    "column of wrong starts": (
        ".csv", "context,question,answers,at\nThe Nile,Which?,Nile,5\n",
        {**QA, "answer_start": "at"}, "row 1 (line 2), column at", "but at 4",
    ),
    "start that is no number": (
        ".csv", "context,question,answers,at\nThe Nile,Which?,Nile,four\n",
        {**QA, "answer_start": "at"}, "row 1 (line 2), column at", "'four' instead of",
    ),
    "no answer": (
        ".jsonl", lines({**answer(""), "answers": {"text": [], "answer_start": []}}), QA,
        "row 1 (line 1), column answers", "has no answer",
    ),
    "answers of another form": (
        ".jsonl", lines(answer(["Nile"])), QA, "row 1 (line 1), column answers",
        "instead of the answer's text, or {text:",
    ),
}  # fmt: skip


def write(path, content):
    if isinstance(content, list):
        write_rows(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_refused_with_file_row_and_column(name, tmp_path):
    suffix, content, changes, where, said = BAD[name]
    path = tmp_path / f"given{suffix}"
    write(path, content)
    files = {"en": {"test": "test.csv"}, "far": {"test": path.name}}
    task = described(tmp_path, files=files, **changes)()
    write(tmp_path / "test.csv", GOOD)
    with pytest.raises(UserError) as raised:
        task.read("far", "test")
    first, second = str(raised.value).split("\n  - ")[:2]
    assert first.startswith(f"{path} cannot be used: ")
    assert second.startswith(f"{path}{', ' if where else ''}{where}: ")
    assert said in second


@pytest.mark.parametrize(
    ("suffix", "content", "changes", "where", "said"),
    [
        (".csv", GOOD.replace("bad day", " "), {}, "row 2 (line 3), column text", "is empty"),
        (
            ".jsonl", lines(answer("Nile")), QA, "row 1 (line 1), column answers",
            "'Nile' is in the context 2 times and the first is taken",
        ),
        (
            ".tsv",
            'text\tlabel\na\tpositive\n"never\tpositive\nb\tnegative\na quote"\tnegative\n',
            {}, "row 2 (line 3)",
            "reads as 3 rows in quotes; if quotes are ordinary signs: quotes: no",
        ),
    ],
)  # fmt: skip
def test_doubtful_data_are_read_with_a_warning(suffix, content, changes, where, said, tmp_path):
    write(tmp_path / f"given{suffix}", content)
    files = {"en": {"test": "test.csv"}, "far": {"test": f"given{suffix}"}}
    task = described(tmp_path, files=files, **changes)()
    (problem,) = task.examine("far", "test").problems
    assert not problem.fatal
    assert where in str(problem)
    assert said in problem.text
    assert task.read("far", "test")


def test_lines_in_quotes_that_are_no_rows_are_a_text(tmp_path):
    task = described(tmp_path)()
    (tmp_path / "far.csv").write_text('text,label\n"good, really\nbought it",positive\n')
    found = task.examine("far", "test")
    assert (found.examples[0].texts, found.problems) == (("good, really\nbought it",), [])


def test_all_problems_of_a_file_are_in_one_message(tmp_path):
    task = described(tmp_path)()
    rows = "".join(f"{i},text,bad{i}\n" for i in range(12))
    (tmp_path / "far.csv").write_text(f"id,text,label\n{rows}")
    with pytest.raises(UserError, match=r"12 problems(.|\n)*bad9(.|\n)*\.\.\. and 2 more"):
        task.read("far", "test")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_examples(suffix, tmp_path):
    rows = [
        {"id": "7", "text": 'so "good", he said\nindeed', "label": "1"},
        {"id": "8", "text": "b\u00e4d", "label": "-1"},
    ]
    path = tmp_path / f"given{suffix}"
    if suffix == ".parquet":
        write_rows(path, [{**row, "label": int(row["label"])} for row in rows])
    elif suffix == ".jsonl":
        write(path, lines(*rows))
    else:
        sign = "," if suffix == ".csv" else "\t"
        quoted = [[r["id"], '"' + r["text"].replace('"', '""') + '"', r["label"]] for r in rows]
        table = "\n".join(map(sign.join, [["id", "text", "label"], *quoted]))
        write(path, ("\ufeff" + table + "\n").encode())  # as Excel writes it
    labels = {"negative": "-1", "positive": ["1", "good"]}
    files = {"en": {"test": "test.csv"}, "far": {"test": path.name}}
    task = described(tmp_path, files=files, labels=labels, id="id")()
    assert task.read("far", "test") == [
        Example("mine/far/test/0", "7", ('so "good", he said\nindeed',), 1),
        Example("mine/far/test/1", "8", ("b\u00e4d",), 0),
    ]


@pytest.mark.parametrize("labels", [[0, 1], ["0.0", "1.0"]])
def test_whole_numbers_that_are_floats_are_labels(labels, tmp_path):
    """Pandas writes the integers of a column that lacks a cell as floats."""
    write(tmp_path / "far.jsonl", lines({"text": "a", "label": 1.0}, {"text": "b", "label": 0.0}))
    files = {"en": {"test": "test.csv"}, "far": {"test": "far.jsonl"}}
    names = dict(zip(("negative", "positive"), labels, strict=True))
    task = described(tmp_path, files=files, labels=names)()
    assert [e.label for e in task.read("far", "test")] == [1, 0]


def test_a_whole_number_of_a_table_may_have_a_point(tmp_path):
    """As in a CSV file of pandas; a label that is called so comes first."""
    for labels in ({"no": 0, "yes": 1}, {"no": ["0", "0.00"], "yes": ["1", "1.0"]}):
        task = described(tmp_path, labels=labels)()
        write(tmp_path / "far.csv", "text,label\na,1.0\nb,0.00\n")
        assert [e.label for e in task.read("far", "test")] == [1, 0]
    write(tmp_path / "far.csv", "text,label\na,1.5\n")
    with pytest.raises(UserError, match=r"'1\.5' is none of 0, 0\.00, 1, 1\.0"):
        task_class(CUSTOM, str(tmp_path / "mine.yaml"))().read("far", "test")


def test_no_column_has_the_name_of_an_option_of_predict():
    from flare_exp.cli import predict
    from flare_exp.experiment import overriding
    from flare_exp.tasks.spec_reading import TAKEN

    assert {*predict.KEYS, "mt", *(k for k in overriding.KEYS if "." not in k)} <= {*TAKEN}


def test_answers_are_read_in_every_form(tmp_path):
    squad = json.dumps({"text": ["Nile", "The Nile"], "answer_start": [18, 0]})
    write(
        tmp_path / "far.tsv",
        "context\tquestion\tanswers\n"
        f'The Nile is long. Nile.\tWhich?\t"{squad.replace(chr(34), chr(34) * 2)}"\n'
        "The Nile\tWhich?\tNile\n",
    )
    files = {"en": {"test": "test.csv"}, "far": {"test": "far.tsv"}}
    task = described(tmp_path, files=files, **QA)()
    first, second = task.read("far", "test")
    assert first.answers == (Answer("Nile", 18), Answer("The Nile", 0))
    assert second.answers == (Answer("Nile", 4),)
    assert (task.fields, task.metric, task.labels) == (("context", "question"), "exact_match", ())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lable": "label"}, "there is no key 'lable'; did you mean label?"),
        ({"label": None}, "label: <column of the labels> is missing"),
        ({"text": None}, "text: must be one column, or a list of two"),
        ({"text": ["a", "b", "c"]}, "text: must be one column, or a list of two"),
        ({"text": "the text"}, "needs another name in prompts, one plain word; write e.g. text: {"),
        ({"text": "source"}, "needs another name in files of predictions, where that column is"),
        ({"text": "out"}, "needs another name on predict's command line, where it is another"),
        ({"text": "mt"}, "needs another name on predict's command line, where it is another"),
        ({"prompt": "{{text}}\nLabel:"}, "prompt: {text} is not in it, so it would not be read"),
        ({"labels": ["one"]}, "labels: must name two labels or more"),
        ({"labels": ["one", "two", "one"]}, "labels: a name is there twice"),
        ({"labels": {"a": 1, "b": [1, 2]}}, "labels: '1' stands for a and for b"),
        (
            {"labels": [{"negative": "Negative"}, {"positive": "Positive"}]},
            "write names and their values as a table: labels: {negative: Negative, positive: ",
        ),
        (
            {"text": [{"premise": "P"}, {"hypothesis": "H"}]},
            "write field and column as a table: text: {premise: P, hypothesis: H}",
        ),
        (
            {
                "files": {"en": {"test": "en.csv"}, "x": {"test": "en.csv"}},
                "languages": {"x": ["mad_Latn"]},
            },
            "languages: x: ['mad_Latn'] must be ISO 639-3 and script",
        ),
        (
            {"files": {"en": {"test": {"hub": "imdb"}}, "x": {"test": "en.csv"}}},
            "files: en: test: hub: imdb must be <owner>/<name>",
        ),
        ({"files": ["a.csv"]}, "files: must be language -> split -> file"),
        ({"files": {"en": {"train": "no.csv"}, "x": {"test": "x.xlsx"}}}, "save the sheet as CSV"),
        ({"files": {"en": {"train": "no.csv"}, "x": {"test": "x.xlsx"}}}, "there is no file"),
        ({"files": {"en": {"train": "en.csv"}}}, "en is the only language"),
        (
            {"files": {"fr": {"test": "en.csv"}, "x": {"test": "en.csv"}}},
            "english: <language> must",
        ),
        ({"files": {"en": {"test": {"hub": "a/b"}}, "x": {"test": "en.csv"}}}, "must be a commit"),
        ({"metric": "bleu"}, "metric: bleu must be one of macro_f1, accuracy"),
        ({"prompt": "{texts}"}, "prompt: 'texts' does not fit; its fields are {text}"),
        ({"prompt": "Label:"}, "prompt: {text} is not in it"),
        ({"parallel": "true"}, "parallel: true needs id: <column>"),
        ({"languages": {"far": "ind_Latn"}}, "flare_exp knows far as far_Latn"),
        ({"languages": {"fra": "fra_Latn"}}, "files has no such language"),
        ({"question": "q"}, "text beside context, question or answers"),
        ({"delimiter": "::"}, "delimiter: '::' must be one character, or tab"),
    ],
)
def test_a_wrong_description_is_refused(changes, said, tmp_path):
    with pytest.raises(SpecError) as raised:
        described(tmp_path, **changes)
    assert any(said in problem for problem in raised.value.problems)
    assert all(p.startswith(f"task.spec={tmp_path}/mine.yaml: ") for p in raised.value.problems)


def test_a_description_that_is_no_yaml_is_refused_with_its_line(tmp_path):
    path = own_data(tmp_path)
    path.write_text("text: review\nlabel: [a\n")
    with pytest.raises(SpecError, match=r"mine\.yaml, line 3: is no YAML"):
        task_class(CUSTOM, str(path))
    path.write_text("text: review\nlabel: a\ntext: b\n")
    with pytest.raises(SpecError, match="the key 'text' is there twice"):
        task_class(CUSTOM, str(path))


def test_words_of_yaml_stay_text(tmp_path):
    """`no` is a language and a label, not a truth value."""
    path = own_data(tmp_path)
    path.write_text(
        "files: {en: {test: test.csv}, no: {test: far.csv}}\ntext: text\nlabel: label\n"
        "labels: {no: [no, 0], yes: [yes, 1]}\n"
    )
    (tmp_path / "far.csv").write_text("text,label\na,no\nb,1\n")
    task = task_class(CUSTOM, str(path))()
    assert [task.labels[e.label] for e in task.read("no", "test")] == ["no", "yes"]


def test_a_language_of_no_benchmark_has_the_code_that_is_given(tmp_path):
    names = ("nobody", "mine_lang", "qaa_Thai")
    files = {"en": {"test": "test.csv"}, **{name: {"test": "far.csv"} for name in names}}
    described(tmp_path, files=files, languages={"mine_lang": "mad_Latn"})
    assert (language("mine_lang").flores, language("mine_lang").proxy) == ("mad_Latn", False)
    assert (language("qaa_Thai").flores, language("qaa_Thai").spaced) == ("qaa_Thai", False)
    assert language("nobody").proxy  # programs need its code in mt.codes


def check(*overrides):
    return validation.validate([f"task={CUSTOM}", *overrides], False)[1]


def test_the_command_line_is_checked_against_the_description(tmp_path):
    path = own_data(tmp_path)
    spec = f"task.spec={path}"
    assert check(spec, "task.lang=far", "mt=toy_nllb") == []
    assert check() == [f"task={CUSTOM}: task.spec=<file.yaml> is missing; it describes your data"]
    assert check(spec) == ["task.lang=<target language> is missing: choose one of far"]
    (problem,) = check(spec, "task.lang=far", "mt=gold")
    assert f"{path} does not say parallel: true" in problem
    (problem,) = check(spec, "task.lang=far")
    assert "mt=nllb_3b3 with task.lang=far: NLLB lacks far_Latn" in problem
    given = (
        "mt=toy_nllb",
        "task.lang=far",
        "task.train_split='big[:9]'",
        f"task.data_dir={tmp_path}",
    )
    problems = check(spec, *given)
    assert any(f"{path} names no big of en, only train, validation, test" in p for p in problems)
    assert any("task=custom reads the files that task.spec names" in p for p in problems)


def test_a_program_translates_a_language_without_a_code(tmp_path):
    files = {"en": {s: f"{s}.csv" for s in ("train", "validation", "test")}}
    path = own_data(tmp_path, files={**files, "nobody": {"test": "far.csv"}})
    given = [f"task.spec={path}", "task.lang=nobody", "mt=command", "mt.command='cat {from} {to}'"]
    assert "give it, e.g. mt.codes='{nobody: nobody}'" in check(*given)[0]
    assert check(*given, "mt.codes={nobody: mad}") == []
    assert "no FLORES-200 code is known for it" in check(*given[:2])[0]


def job(*overrides):
    from omegaconf import OmegaConf

    ((composed,), problems) = validation.validate([f"task={CUSTOM}", *overrides], False)
    assert not problems
    cfg: Config = OmegaConf.to_object(composed)
    return cfg


def test_a_hub_data_set_is_prefetched_at_its_commit(tmp_path):
    at = {"hub": "org/data", "revision": "c" * 40}
    split = {"train": at, "validation": at, "test": {**at, "config": "small", "split": "dev"}}
    path = own_data(tmp_path, files={"en": split, "far": {"test": "far.csv"}})
    cfg = job(f"task.spec={path}", "task.lang=far", "mt=toy_nllb")
    found = downloads.hub_resources(cfg)
    assert [(n.hub_id, n.config, n.revision) for n in dict.fromkeys(found)] == [
        ("org/data", config, "c" * 40) for config in ("default", "small")
    ]


def test_its_facts_are_those_of_every_task(tmp_path):
    """Sizes and fingerprints before a run; slices and limits as everywhere."""
    path = own_data(tmp_path)
    cfg = job(f"task.spec={path}", "task.lang=far", "mt=toy_nllb", "task.test_split='test[1:]'")
    task = pipeline.load_task(cfg)
    facts = data_checks.check_data(task, "far")
    assert {name: found["examples"] for name, found in facts.items()} == {
        "en/train": 3, "en/validation": 3, "en/test": 2, "far/test": 2,
    }  # fmt: skip
    assert facts["far/test"]["fingerprint"] == fingerprint(task.load("far", "test"))
    assert pipeline.own_facts(cfg, task) == {
        "metric": "macro_f1",
        "labels": ["negative", "positive"],
    }
    assert pipeline.own_facts(SimpleNamespace(task=SimpleNamespace(name="nusax")), task) == {}


def test_a_description_may_not_take_the_name_of_a_benchmark(tmp_path):
    path = own_data(tmp_path, name="nusax")
    assert yaml.safe_load(path.read_text())["name"] == "nusax"
    with pytest.raises(SpecError, match="name: nusax is a benchmark; choose another"):
        task_class(CUSTOM, str(path))
