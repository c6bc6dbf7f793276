"""Keys of artifacts: all that can change a result is in one, and nothing else is."""

import dataclasses
import pkgutil
import platform
import sys
import typing
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from small_checkpoints import COMMIT, put, tiny_checkpoint
from tables import own_data, write_rows

import flare_exp
from flare_exp import code
from flare_exp.config import composition, constraints, schema, validation
from flare_exp.config.methods import members_of
from flare_exp.errors import UserError
from flare_exp.experiment import checkpoints, pipeline
from flare_exp.models import backbones, families
from flare_exp.planning import preview, read_only, shapes
from flare_exp.tasks import TASKS
from flare_exp.toy.translation_model import train_mt
from flare_exp.translation import nllb

pytestmark = pytest.mark.xdist_group("keys")  # one worker: they share checkpoints
OTHER = "b" * 40
ARCHITECTURES = {"tiny": "xlm-roberta", "decoder": "llama", "seq2seq": "mt5"}

# Kinds of runs that have all options between them; {} is the folder of what they read.
RUNS = {
    "label": ["source.cache=memory", "source.dtype=bfloat16"],
    "span": [
        "task=toy_qa",
        "task.window=48",
        "task.doc_stride=8",
        "fusion=cross_attn",
        "mt=toy_nllb",
    ],
    "prompt": [
        "model=custom",
        "model.path={}/decoder",
        "model.quantize=nf4",
        "task=toy_nli",
        "decode=generate",
        "method=lora",
    ],
    "latent": [
        "model=custom",
        "model.path=org/model",
        f"model.revision={COMMIT}",
        "method=flare_mt",
        "fusion=gated",
        "mt=custom",
        "mt.path=org/mt",
        f"mt.revision={COMMIT}",
        "mt.backend=ctranslate2",
        "source.noise=0.2",
    ],
    "command": [
        "task=toy_qa",
        "mt=command",
        "mt.command='cat {from} {to}'",
        "source.shuffle=true",
    ],
    "data": [
        "model=custom",
        "model.path={}/seq2seq",
        "task=nusax",
        "task.data_dir={}/data",
        "mt=file",
        "mt.path={}/none",
        "mt.fallback=gold",
        "trainer=ddp_cpu",
        "task.form=generative",
    ],
    "training data": [
        "model=custom",
        "model.path={}/tiny",
        "task=xquad",
        "task.data_dir={}/qa",
        "task.train_data_dir={}/qa",
        "task.window=48",
        "task.doc_stride=8",
        "method=zero_shot",
    ],
    "own data": [
        "model=custom",
        "model.path={}/tiny",
        "task=custom",
        "task.spec={}/own/mine.yaml",
        "task.lang=far",
        "mt=toy_nllb",
        "method=zero_shot",
    ],
    "ensemble": ["method=ensemble"],
    "mixup": ["method=x_mixup"],
    "distil": ["method=distil", "method.of=[translate_test]"],
    "sources": ["source.langs=[en,near]"],
    "languages": ["task.lang=[near,far]", "method=lora", "task.temperature=2"],
}
# Another value of options whose type does not tell one; a list: overrides, where a name alone means
# nothing.
ANOTHER = {
    "task.name": ["task=toy_nli"],
    "method.name": ["method=translate_test"],
    "method.of": ["lora", "zero_shot"],
    "mixup.depths": [0.5],
    "distil.texts": "{}/texts.jsonl",
    "source.langs": ["near"],
    "source.systems": ["gold"],
    "fusion.name": ["fusion=mul"],
    "source.noise_kinds": ["words"],
    "predict.sources": ["given", "none"],
    "mt.name": ["mt=gold"],
    "decode.name": "score",
    "task.data_dir": "{}/other_data",
    "task.train_data_dir": "{}/other_qa",
    "task.spec": "{}/other_own/mine.yaml",
    "task.lang": "near",
    "task.unseen": ["near"],
    "task.train_split": "train[1:]",
    "task.validation_split": "validation[1:]",
    "task.test_split": "test[1:]",
    "task.english_test_split": "test[1:]",
    "model.path": "{}/tiny",
    "model.revision": OTHER,
    "model.attention": "eager",
    "mt.path": "{}/files",
    "mt.revision": OTHER,
    "mt.command": "sort {from} {to}",
    "mt.codes": {"far": "fr"},
    "mt.errors": ["drop"],
    "adapter.also_train": ["embeddings"],
    "logger.tags": ["other"],
    "data.max_length": 24,
    "trainer.precision": "64-true",
    "trainer.accelerator": "gpu",
}
REFUSED = ("mt.fallback",)  # without it there is no result at all


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make what runs read: tiny checkpoints, in folders and a hub cache, and a benchmark's data."""
    place = tmp_path_factory.mktemp("keys")
    for name, architecture in ARCHITECTURES.items():
        tiny_checkpoint(place / name, architecture)
    train_mt(
        place / "nllb",
        world_seed=0,
        pairs=300,
        steps=1,
        batch_size=4,
        lr=1e-3,
        vocab_size=400,
        hidden_size=16,
        layers=1,
        heads=2,
    )
    for commit in (COMMIT, OTHER):
        put(place / "hub", "org/model", place / "tiny", commit)
        put(place / "hub", "org/mt", place / "nllb", commit)
    (place / "texts.jsonl").write_text('{"text": "mo la", "source": "good film"}\n')
    for data, word in (("data", "good"), ("other_data", "fine")):
        for lang in ("eng", "ace", "ban"):
            for split in ("train", "validation", "test"):
                rows = [
                    {"id": str(i), "text": f"{lang} {split} {word} {i}", "label": i % 3}
                    for i in range(12)
                ]
                write_rows(place / data / lang / f"{split}.parquet", rows)
    for data, word in (("qa", "good"), ("other_qa", "fine")):
        for file in ("en/train", "en/validation", "en/test", "es/test"):
            answers = {"text": [word], "answer_start": [0]}
            rows = [
                {
                    "id": str(i),
                    "context": f"{word} test train validation {file[3:]} {i}",
                    "question": "test train",
                    "answers": answers,
                }
                for i in range(12)
            ]
            write_rows(place / data / f"{file}.parquet", rows)
    for own, other in (("eng", "ace"), ("ace", "eng")):
        for split in ("train", "validation", "test"):
            rows = [
                {"text": f"{own} {split} good {i}", "text_translated": f"{other} {i}"}
                for i in range(12)
            ]
            write_rows(place / "files" / f"mt_{own}-{other}" / f"{split}.parquet", rows)
    (place / "none").mkdir()
    for data, changes in (("own", {}), ("other_own", {"labels": ["positive", "negative"]})):
        (place / data).mkdir()
        own_data(place / data, **changes)
    return place


@pytest.fixture(scope="module")
def digests(place):
    """(configuration) -> name and digest of every artifact of that run, which is only looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
        for module, names in (
            (families, ("family_of", "longest_input")),
            (backbones, ("load_tokenizer",)),
            (nllb, ("check", "load_encoder")),
            (preview, ("load_task",)),
            (shapes, ("weights_here",)),
            (checkpoints, ("existing_checkpoint",)),
        ):
            for name in names:
                patch.setattr(module, name, cached(getattr(module, name)))
        make_task = preview.load_task  # already cached
        patch.setattr(preview, "load_task", lambda cfg: reading_once(make_task(cfg)))
        patch.setattr(
            read_only, "first_step", lambda folder, build, options: stand_in(place, options)
        )

        def digests(cfg):
            cfg = pipeline.pinned(
                pipeline.with_device_defaults(cfg, cfg.trainer.accelerator == "gpu")
            )
            dry = preview.preview(cfg, place / "scratch")
            made = pipeline.run_stages(dry.run, members_of(cfg.method))
            if dry.mt.missing:
                made["mt"] = dry.mt.missing
            # a translation that is not there goes by its digest
            return {
                name if name != a.digest else f"translation {i}": a.digest
                for i, (name, a) in enumerate(made.items())
            }

        yield digests


def cached(function):
    """`function`, which is asked the same again and again; configurations count by value."""
    known = {}

    def ask(*args, **options):
        key = repr([getattr(a, "task", a) for a in args]) + repr(options)
        if key not in known:
            known[key] = function(*args, **options)
        return known[key]

    return ask


def reading_once(task):
    """`task`, which generates or reads a split only once."""
    if not hasattr(task.read, "known"):
        task.read = cached(task.read)
        task.read.known = True
    return task


def stand_in(place: Path, options: dict) -> Path:
    """A checkpoint in the place of one that is built of `options`."""
    names = {architecture: name for name, architecture in ARCHITECTURES.items()}
    return place / (names[options["architecture"]] if "architecture" in options else "nllb")


def composed(overrides, place) -> schema.Config:
    given = [o.replace("{}", str(place)) for o in overrides]
    return OmegaConf.to_object(
        composition._compose(
            [*given, "task.limit=6", f"cache_dir={place}/cache", f"output_dir={place}/out"]
        )
    )


def allowed(cfg) -> bool:
    return not [*validation._check_rules(cfg), *constraints.cross_field_problems(cfg)]


@pytest.fixture(scope="module")
def base(place):
    found = {}
    for name, overrides in RUNS.items():
        trainer = [] if any(o.startswith("trainer=") for o in overrides) else ["trainer=cpu"]
        found[name] = composed([*overrides, *trainer], place)
        assert allowed(found[name])
    return found


@pytest.fixture(scope="module")
def before(digests, base):
    return {name: digests(cfg) for name, cfg in base.items()}


def differing(one, other) -> set[str]:
    """Names of artifacts that have another key."""
    return {name for name in one if one[name] != other.get(name)}


def perturbed(cfg, key, rules, place):
    """The configuration with another value of `key`; None: this run has no other."""
    other = ANOTHER.get(key)
    if isinstance(other, list) and "=" in str(other[0]):
        return composed([*RUNS["label"], "trainer=cpu", *other], place)
    *parents, name = key.split(".")
    owners = [cfg]
    for parent in parents:
        owners.append(getattr(owners[-1], parent))
        if owners[-1] is None:
            return None
    before = getattr(owners[-1], name)
    value = other.replace("{}", str(place)) if isinstance(other, str) else other
    value = (
        another(key, before, typing.get_type_hints(type(owners[-1]))[name], rules)
        if value is None
        else value
    )
    if value == before:
        return None
    for owner, part in zip(reversed(owners), reversed([*parents, name]), strict=True):
        value = dataclasses.replace(owner, **{part: value})
    return value if allowed(value) else None


def another(key, value, kind, rules):
    kinds = {kind, *typing.get_args(kind)}
    if "choices" in rules:
        optional = (None,) if type(None) in kinds else ()
        return next((choice for choice in (*rules["choices"], *optional) if choice != value), value)
    if bool in kinds:
        return not value
    if int in kinds:
        return rules.get("min", 0) if value is None else value + 1
    if float in kinds:
        return value * 0.5 if value else 0.5
    assert str in kinds, f"{key}: give another value of it in ANOTHER"
    return "other"


HINT = """{key}: no artifact's key has it, so another value of it would return an old result.
  It can change a result: put it into a key (context.py, stages/ and checkpoints.py of
  flare_exp/experiment, flare_exp/translation), and if no run of RUNS in this file
  uses it, add one.
  It cannot: say why in flare_exp/config/*schema.py, option(..., no_effect="...")."""


@pytest.mark.slow
def test_every_option_is_in_a_key_or_says_why_it_changes_nothing(digests, base, before, place):
    problems, unchanged, options = [], schema.no_effect(), schema.keys()
    for key in options:
        if any(other.startswith(f"{key}.") for other in options):
            continue  # a section
        tried, changed = [], []
        overrides = isinstance(ANOTHER.get(key), list) and "=" in str(ANOTHER[key][0])
        for name in RUNS if not overrides else ["label"]:
            if changed and key not in unchanged:
                break
            new = perturbed(base[name], key, options[key].metadata, place)
            if new is None:
                continue
            try:
                after = digests(new)
            except UserError:
                if key not in REFUSED:
                    continue
                after = {}
            tried.append(name)
            changed += [f"{what} ({name})" for what in differing(before[name], after)]
        if key in unchanged and changed:
            problems.append(
                f"{key} says no_effect={unchanged[key]!r}, and it changes the keys of "
                f"{', '.join(changed)}"
            )
        elif key not in unchanged and not changed:
            problems.append(
                HINT.format(key=key) if tried else f"{key}: no run of RUNS has another value of it"
            )
        elif not tried and options[key].metadata.get("choices", (0, 0))[1:]:
            problems.append(f"{key}: no run of RUNS has another value of it")
    assert not problems, "\n".join(problems)


def test_keys_hold_nothing_of_the_machine(digests, base, place, monkeypatch):
    keys = []
    identified = read_only.ReadOnlyStore._identified
    monkeypatch.setattr(
        read_only.ReadOnlyStore,
        "_identified",
        lambda *args: keys.append(args[2]) or identified(*args),
    )
    for cfg in base.values():
        digests(cfg)
    words = (str(place), str(Path.home()), platform.node(), sys.version.split()[0])
    text = repr(keys)
    assert len(keys) > 30
    assert not [word for word in words if word in text]


TESTED = {"english_test", "zero_shot", "test"}
LEARNED = {"finetune", "transfer", *TESTED}


@pytest.mark.parametrize(
    ("run", "key", "value", "expected"),
    [
        ("prompt", "decode.beams", 2, LEARNED),  # validation generates too
        ("prompt", "task.max_answer_length", 5, set()),  # it has no head
        ("span", "task.max_answer_length", 5, LEARNED),
        ("span", "decode.beams", 2, set()),
        (
            "label",
            "task.test_split",
            "test[1:]",
            TESTED | {"translation of toy_sentiment/far/test into en"},
        ),
        ("label", "fusion.source_layer", "same", {"transfer", "test"}),
        ("label", "source.systems", ["gold"], {"test"}),
    ],
)
def test_an_option_is_in_the_keys_of_what_it_changes(
    digests, base, before, run, key, value, expected
):
    section, _, name = key.partition(".")
    cfg = dataclasses.replace(
        base[run], **{section: dataclasses.replace(getattr(base[run], section), **{name: value})}
    )
    assert differing(before[run], digests(cfg)) == expected


@pytest.mark.parametrize(
    ("run", "attribute", "value", "expected"),
    [
        ("prompt", "prompt", "{premise}\n{hypothesis}\n", LEARNED),
        ("label", "prompt", "{text}\n", set()),
        ("label", "metric", "accuracy", LEARNED),
        ("label", "labels", ("bad", "fair", "good"), LEARNED),
        ("span", "fields", ("context", "query"), LEARNED),
    ],
)
def test_so_are_attributes_of_a_task(
    digests, base, before, monkeypatch, run, attribute, value, expected
):
    monkeypatch.setattr(TASKS[base[run].task.name], attribute, value)
    assert differing(before[run], digests(base[run])) == expected


@pytest.fixture
def append(monkeypatch):
    """(module, line): append a line of code to a module, as far as keys know."""
    original = code.source_of

    def append(module, line):
        monkeypatch.setattr(
            code,
            "source_of",
            lambda name: original(name) + (line if name == f"flare_exp.{module}" else ""),
        )

    return append


HUMAN = {
    f"translation of toy_sentiment/{of}"
    for of in ("en/train into far", "en/validation into far", "far/test into en")
}
MACHINE = {
    *(f"translation {i}" for i in range(4, 7)),
    "transfer",
    "test",
}  # what is to be translated is not known yet


@pytest.mark.parametrize(
    ("run", "module", "expected"),
    [
        ("label", "flare.fusion", {"transfer", "test"}),
        ("label", "flare.mixup", {"transfer", "test"}),
        ("label", "flare.source_encoders", {"transfer", "test"}),
        ("label", "flare.adapter", LEARNED),
        ("label", "flare.peft_method", LEARNED),
        ("label", "data.dataset", LEARNED),
        ("label", "data.classification", LEARNED),
        ("label", "tasks.metrics", LEARNED),
        ("label", "tasks.toy", LEARNED),
        ("label", "tasks.xnli", set()),
        ("label", "models.families", set()),  # a row of another family
        ("label", "translation.noise", HUMAN),
        ("label", "translation.engines", set()),
        ("label", "toy.world", {"backbone", *LEARNED}),
        ("label", "toy.grammar", {"backbone", *LEARNED}),
        ("span", "translation.engines", MACHINE),
        ("span", "translation.segmentation", MACHINE),
        ("span", "translation.projection", MACHINE),
        ("span", "toy.translation_model", {"mt", *MACHINE}),
        ("span", "translation.noise", set()),
        ("span", "translation.command", set()),
        ("command", "translation.command", MACHINE),
        ("command", "translation.quality", MACHINE),
        ("command", "translation.engines", set()),
        ("latent", "toy.translation_model", set()),
        ("prompt", "flare.fusion", set()),
    ],
)
def test_changed_code_is_in_the_keys_of_what_it_changes(
    digests, base, before, append, run, module, expected
):
    append(module, "\n# a comment\n\n\n")
    assert differing(before[run], digests(base[run])) == set()
    append(module, "\nCHANGED = 1\n")
    assert differing(before[run], digests(base[run])) == expected


def test_so_is_the_row_of_the_family(digests, base, before, monkeypatch):
    row = families.FAMILIES["xlm-roberta"]
    monkeypatch.setattr(
        families,
        "family_of",
        lambda *_: dataclasses.replace(row, query=row.value, value=row.query),
    )
    assert differing(before["label"], digests(base["label"])) == LEARNED


# --- the hash of code ----------------------------------------------------------------------------

SOURCE = '''"""A module."""
import math

def area(radius: float, *, unit=None, **more) -> str:
    """A docstring."""
    return f"{math.pi * radius ** 2:.{more['digits']}f} {unit!r}" if unit else ""
'''


def hash_of(source, monkeypatch):
    monkeypatch.setattr(code, "source_of", lambda name: source)
    monkeypatch.setitem(code.CODE, "sample", ("sample",))
    return code.code_of("sample")


def test_the_code_counts_as_it_was_when_the_run_began(tmp_path, monkeypatch):
    """Edited code is hashed in the next process, which runs it."""
    (tmp_path / "edited.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(code.CODE, "sample", ())
    code.remember("edited")
    before = code.code_of("sample", task="edited")
    (tmp_path / "edited.py").write_text("x = 2\n")
    assert code.code_of("sample", task="edited") == before
    code.source_of.cache_clear()
    assert code.code_of("sample", task="edited") != before


def test_the_hash_is_the_same_in_every_version_of_python(monkeypatch):
    assert hash_of(SOURCE, monkeypatch) == "387cf09f87d2e41e"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""A module."""', "# A module\n", True),
        ("A docstring.", "Another.", True),
        ("import math", "import math  # pi", True),
        ("radius ** 2", "(radius**2)", True),
        ("*, unit=None, **more", "*,\n    unit=None,\n    **more,\n", True),
        ("more['digits']", "more [ 'digits' ]", True),
        ("unit=None", "unit=0", False),
        ("radius **", "radius *", False),
        ('else ""', 'else " "', False),
        ("pi", "tau", False),
        (":.{", ":{", False),
        ("!r", "", False),
    ],
)
def test_the_hash_is_of_what_the_code_does(monkeypatch, old, new, same):
    assert old in SOURCE
    assert (hash_of(SOURCE.replace(old, new), monkeypatch) == hash_of(SOURCE, monkeypatch)) == same


# modules, or whole packages, whose code cannot change what an artifact holds -> why
NOT_HASHED = {
    "__main__, cli, cluster, export, report": "what is typed, shown and shared, and where it runs",
    "serving, experiment.predicting, experiment.predictor, experiment.mixing, "
    "experiment.source_texts, experiment.translating": "they use a finished run",
    "experiment.overriding": "it changes nothing that the model depends on",
    "planning": "it builds nothing",
    "config": "its values are in the keys",
    "utils, errors, artifacts, code": "how artifacts are written and found, and programs run",
    "hub": "what is read is known by commit",
    ", ".join({cls.__module__.removeprefix("flare_exp.") for cls in TASKS.values()}): (
        "the task of a run is hashed; TyDiQA's rows, which XQuAD reads, are in keys as data"
    ),
    "tasks.tables": "it refuses cells and changes none",
    "tasks.custom, tasks.records, tasks.spec, tasks.spec_reading": (
        "what is read of a user's files is in keys as data; the task of a run is hashed"
    ),
    "data.rows, data.unlabeled": "the texts that are read are in keys as data",
    "data.inspection, experiment.tokenizers": "they look at data before a run",
    "training.checkpointing, training.divergence, training.progress, training.tracking": (
        "how a training is kept, watched and shown"
    ),
    "experiment.checkpoints, experiment.pipeline": "they put parts together that are in the keys",
    "experiment.data_checks": "it refuses data and changes none",
    "experiment.tested": "it gathers finished tests",
    "experiment.checksums, experiment.curves, experiment.loading": "of a run folder",
    "experiment.notes, experiment.provenance, experiment.results": "of a run folder",
    "experiment.analysis, flare.measuring": "they read a finished run",
    "experiment.run_page, experiment.run_state": "of a run folder",
    "experiment.downloads, experiment.launch": "how a run starts",
    "experiment.runs, experiment.worker": "how a run starts",
}


def test_every_module_is_hashed_or_says_why_not():
    hashed = {name.partition(":")[0] for names in code.CODE.values() for name in names}
    spared = [name for names in NOT_HASHED for name in names.split(", ")]
    walked = pkgutil.walk_packages(flare_exp.__path__, "flare_exp.")
    modules = [m.name.removeprefix("flare_exp.") for m in walked if not m.ispkg]
    under = {name: [m for m in modules if m == name or m.startswith(f"{name}.")] for name in spared}
    assert [name for name, found in under.items() if not found] == []
    assert hashed.isdisjoint(m for found in under.values() for m in found)
    assert {*modules} - hashed == {m for found in under.values() for m in found}


def test_all_that_is_hashed_is_there(monkeypatch):
    for kind in code.CODE:
        assert len(code.code_of(kind)) == 16
    monkeypatch.setitem(code.CODE, "sample", ("translation.nllb:nothing",))
    with pytest.raises(LookupError, match=r"translation\.nllb has no nothing"):
        code.code_of("sample")
