"""XQuAD's test split, paired by id, and TyDiQA's English that it trains on."""

import pytest
from tables import write_rows

from flare_exp.config import validation
from flare_exp.errors import UserError
from flare_exp.experiment import data_checks
from flare_exp.experiment.downloads import hub_resources_of_jobs
from flare_exp.tasks import Answer, XQuAD
from flare_exp.translation.lookup import FileTranslator, ParallelTranslator

BOM = "\ufeff"


def row(id, context, text):
    start = context.index(text)
    return {
        "id": id,
        "context": context,
        "question": f"{id}?",
        "answers": {"text": [text], "answer_start": [start]},
    }


def problems(*overrides):
    return validation.validate(list(overrides), multirun=False)[1]


@pytest.fixture
def folders(tmp_path):
    """Options that name the two folders; XQuAD's files have their rows in another order."""
    tests, training = tmp_path / "xquad", tmp_path / "tydiqa"
    english = [row(f"q{i}", f"Story {i} is {i * 7}.", str(i * 7)) for i in range(3)]
    spanish = [row(f"q{i}", f"{BOM}El cuento {i} es {i * 7}.", str(i * 7)) for i in (2, 0, 1)]
    write_rows(tests / "en/test.parquet", english)
    write_rows(tests / "es/test.parquet", spanish)
    for split in ("train", "validation"):
        rows = [row(f"english-{split}-{i}", f"Tale {split} {i}.", str(i)) for i in range(4)]
        write_rows(training / f"en/{split}.parquet", rows)
    return [f"task.data_dir={tests}", f"task.train_data_dir={training}"]


@pytest.fixture
def task(folders):
    return XQuAD(**dict(folder.removeprefix("task.").split("=") for folder in folders))


def test_tests_are_paired_by_id_and_texts_stay_as_they_are(task):
    spanish = task.load("es", "test")
    assert (spanish[0].id, spanish[0].key) == ("xquad/es/test/0", "q2")
    assert [e.texts[0][0] for e in spanish] == [BOM] * 3
    for example in spanish:
        (answer,) = example.answers
        assert example.texts[0].startswith(answer.text, answer.start)
    english = ParallelTranslator(task).translate(spanish, "en")
    assert (english[0].texts[1], english[0].answers) == ("q2?", (Answer("14", 11),))


def test_training_data_are_tydiqas_english(task):
    facts = data_checks.check_data(task, "es")
    assert {name: fact["examples"] for name, fact in facts.items()} == {
        "en/train": 4,
        "en/validation": 4,
        "en/test": 3,
        "es/test": 3,
    }
    assert task.load("en", "train")[1].id == "tydiqa/en/train/1"


def test_a_split_that_a_language_lacks_is_named(task, tmp_path):
    with pytest.raises(UserError, match="xquad has no split train in es: test is its only split"):
        ParallelTranslator(task).translate(task.load("en", "train"), "es")
    files = FileTranslator(task, tmp_path, fallback=ParallelTranslator(task))
    with pytest.raises(UserError, match=r"no .*/mt_en-es/train\.parquet.* has no train in es that"):
        files.identity(task.load("en", "train"), "es")
    assert files.identity(task.load("es", "test"), "en")["by"] == "human"


def test_a_missing_file_names_its_option(task):
    with pytest.raises(UserError, match=r"task\.train_data_dir: there is no .*en/dev\.parquet"):
        task.read("en", "dev")
    with pytest.raises(UserError, match=r"task\.data_dir: there is no .*de/test\.parquet"):
        task.read("de", "test")


def test_both_folders_are_given_or_none(folders, tmp_path):
    assert problems("task=xquad", *folders) == []
    assert problems("task=xquad") == []
    for number, other in enumerate(("train_data_dir", "data_dir")):
        (problem,) = problems("task=xquad", folders[number])
        assert f"give task.{other}=<folder of " in problem
    (problem,) = problems("task=tydiqa", "task.lang=fi", folders[1])
    assert problem.endswith("only task=xquad has it, not tydiqa")
    (problem,) = problems("task=xquad", folders[0], f"task.train_data_dir={tmp_path}")
    assert f"task.train_data_dir={tmp_path}: it has no folder en/" in problem


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["method=flare"], True),
        (["method=flare", "task.validation_split=null", "task.select=last"], True),
        (["method=zero_shot"], False),
        (["method=translate_test"], False),
        (
            [
                "method=flare",
                "task.train_split='test[:800]'",
                "task.validation_split='test[800:900]'",
                "task.test_split='test[900:]'",
            ],
            False,
        ),
    ],
)
def test_human_translations_are_refused_where_training_needs_them(overrides, refused):
    found = problems("task=xquad", "mt=gold", *overrides)
    assert bool(found) == refused
    assert all("the benchmark has no train" in problem for problem in found)


def test_two_data_sets_are_prefetched():
    jobs, _ = validation.validate(["task=xquad", "model=tiny", "method=zero_shot"], False)
    assert [str(need.origin) for need in hub_resources_of_jobs(jobs)] == [
        "google/xquad (xquad.en)",
        "google/xquad (xquad.es)",
        "google-research-datasets/tydiqa (secondary_task)",
    ]


def test_the_hubs_split_has_another_name(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options["split"]))
        return datasets.Dataset.from_list([row("q0", "Uno.", "Uno")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert XQuAD().load("es", "test")[0].id == "xquad/es/test/0"
    assert calls == [(("google/xquad", "xquad.es"), "validation")]


@pytest.mark.shared
def test_the_real_files_are_read_and_paired(shared_data):
    if not (shared_data / "xquad").is_dir():
        pytest.skip("the shared data have no XQuAD")
    task = XQuAD(str(shared_data / "xquad"), str(shared_data / "tydiqa"))
    spanish = task.load("es", "test")
    english = ParallelTranslator(task).translate(spanish, "en")
    assert len(spanish) == XQuAD.sizes["test"]
    for example in (*spanish, *english):
        assert example.answers
        assert all(example.texts[0].startswith(a.text, a.start) for a in example.answers)
    assert sum(e.texts[0].startswith(BOM) for e in spanish) == 19
