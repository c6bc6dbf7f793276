"""Check that a task's data are there: folders, and the files of a description."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flare_exp.config.schema import Config
from flare_exp.languages import FLORES, language
from flare_exp.tasks import ROLES, Benchmark, CustomTask, XQuAD
from flare_exp.utils.files import folder_problem


def data_problems(cfg: Config, task) -> Iterator[str]:
    """Check the folders of a task's data."""
    own, train = cfg.task.data_dir, cfg.task.train_data_dir
    if issubclass(task, CustomTask):
        if own is not None:
            yield (
                f"task.data_dir={own}: task=custom reads the files that task.spec names; leave it "
                "out"
            )
        for lang in cfg.task.tested:
            if lang in task.languages:
                yield from _own_data_problems(cfg, task, lang)
    elif own is not None and cfg.task.name.startswith("toy_"):
        yield f"task.data_dir={own}: {cfg.task.name} is generated and reads no files"
    elif own is not None:
        targets = [lang for lang in cfg.task.langs if lang in task.languages]
        yield from _folder_problems("task.data_dir", own, [task.english, *targets])
    elif issubclass(task, Benchmark) and not hasattr(task, "hub_id"):
        yield (
            f"task.data_dir=<folder of <language>/<split>.parquet> is missing: "
            f"task={cfg.task.name} is not on the hub"
        )
    if not issubclass(task, XQuAD):  # _check_variants refuses its option elsewhere
        return
    if train is not None:
        yield from _folder_problems("task.train_data_dir", train, [task.english])
    if (own is None) != (train is None):
        given, other, of = "train_data_dir", "data_dir", "XQuAD"
        if train is None:
            given, other, of = other, given, "TyDiQA"
        yield (
            f"task.{given}={own or train}: {task.name} tests on its own files and trains on "
            f"TyDiQA's; give task.{other}=<folder of {of}> too, or neither of them"
        )


def _own_data_problems(cfg: Config, task: type[CustomTask], lang: str) -> Iterator[str]:
    """Check that a user's data set has the splits of the run, and a name for translation models.

    Args:
        lang: one of the languages that are tested.
    """
    files = task.spec.files
    english = "test" if cfg.task.english_test_split is None else "english_test"
    for own, roles in ((task.english, (*ROLES[:2], english)), (lang, ("test",))):
        for role in dict.fromkeys(roles):
            given = getattr(cfg.task, f"{role}_split")
            if given is None or (split := given.partition("[")[0]) in files[own]:
                continue
            # the target has its test split, which task.test_split would change, too
            key = "english_test" if role == "test" and split in files[lang] else role
            parts = f"; one file can have several parts, e.g. task.{key}_split='train[800:]'"
            yield (
                f"task.{role}_split={given}: {cfg.task.spec} names no {split} of {own}, only "
                f"{', '.join(files[own])}{parts if own == task.english else ''}"
            )
    row = language(lang)
    nameless = row.proxy and row.flores == lang
    if cfg.mt.kind != "model" or not (
        nameless or (cfg.mt.name.startswith("nllb_") and row.flores not in FLORES)
    ):
        return
    lacking = "no FLORES-200 code is known for it" if nameless else f"NLLB lacks {row.flores}"
    yield (
        f"mt={cfg.mt.name} with task.lang={lang}: {lacking}; name its code, or that of a related "
        f"language, in {cfg.task.spec} (languages: {{{lang}: ind_Latn}}), or choose mt=file, "
        "mt=command, or mt=gold where rows are parallel"
    )


def _folder_problems(key: str, folder: str, languages: Sequence[str]) -> Iterator[str]:
    """Check that a folder has the folders of some languages; the first problem is named."""
    if problem := folder_problem(folder):
        yield f"{key}={folder}: {problem}"
        return
    for lang in languages:
        if folder_problem(f"{folder}/{lang}"):
            yield (
                f"{key}={folder}: it has no folder {lang}/ (expected <language>/<split>.parquet)"
            )
            return
