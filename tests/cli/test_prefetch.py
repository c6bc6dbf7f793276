"""What a command line needs from the hub, runs without network, and fetching, from a server that
speaks the hub's language.
"""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import string
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import datasets
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from datasets.arrow_writer import ArrowWriter
from omegaconf import OmegaConf
from random_models import SMALL
from rich.filesize import decimal
from safetensors.torch import load_file
from small_checkpoints import COMMIT, put
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from flare_exp import hub
from flare_exp.cli.main import main
from flare_exp.config import composition, validation
from flare_exp.errors import UserError
from flare_exp.experiment import downloads, pipeline
from flare_exp.experiment.checkpoints import existing_checkpoint
from flare_exp.tasks import XNLI

OTHER = "b" * 40
NLLB = "facebook/nllb-200-3.3B"
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


def needed(*overrides):
    jobs, problems = validation.validate(overrides, True)
    assert problems == []
    return [
        (need.what, need.origin, need.revision) for need in downloads.hub_resources_of_jobs(jobs)
    ]


def test_the_languages_of_the_sources_are_needed_too():
    found = needed("task=nusax", "task.lang=jav", "source.langs=[eng,ind]", "mt=gold")
    data = [str(origin) for what, origin, _ in found if what == "data set"]
    assert [origin.partition(" ")[2] for origin in data] == ["(eng)", "(jav)", "(ind)"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random XLM-R with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    characters = ("<s>", "<pad>", "</s>", "<unk>", *string.ascii_lowercase, *string.digits)
    tokenizer = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    options = SMALL | {"max_position_embeddings": 140}
    hf.XLMRobertaForMaskedLM(
        hf.XLMRobertaConfig(**options, type_vocab_size=1, pad_token_id=1)
    ).save_pretrained(folder)
    return folder


def launch(
    home: Path, *arguments: str, offline: bool = True, **env: str
) -> subprocess.CompletedProcess:
    """`python -m flare_exp` with its hub caches below `home`."""
    free = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    env = free | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | env
    words = [*arguments, "offline=true"] if offline else arguments
    return subprocess.run(
        [sys.executable, "-m", "flare_exp", *words], capture_output=True, text=True, env=env
    )


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache for this process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "hub"


# --- what is needed ------------------------------------------------------------------------------


def test_embedded_and_local_things_need_nothing(tmp_path, capsys):
    (tmp_path / "en").mkdir()
    (tmp_path / "sw").mkdir()
    assert needed() == needed("model=tiny_decoder", "mt=toy_nllb", "method=flare_mt") == []
    local = [
        "task=xnli",
        f"task.data_dir={tmp_path}",
        "mt=gold",
        "model=custom",
        f"model.path={tmp_path}",
    ]
    assert needed(*local) == []
    assert main(["prefetch", *local]) == 0
    assert "Nothing comes from the hub" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        (["method=zero_shot"], False),
        (["method=lora"], True),
        (["method=flare"], True),
        (["method=flare_mt"], True),
        (["method=translate_test"], True),
        (["method=flare", "mt=gold"], False),
        (["method=flare", "mt=file", "mt.path=."], False),
    ],
)
def test_a_translation_model_is_needed_where_it_translates(overrides, asked):
    assert (NLLB in [origin for _, origin, _ in needed("task=xnli", *overrides)]) == asked


def test_every_translation_system_is_needed():
    found = [origin for _, origin, _ in needed("task=xnli", "source.systems=[nllb_600m,gold]")]
    assert [origin for origin in found if "nllb" in origin] == [
        NLLB,
        NLLB.replace("3.3B", "distilled-600M"),
    ]


def test_a_grid_needs_everything_once():
    found = needed(
        "model=xlmr_base,xlmr_large",
        "task=xnli",
        "task.lang=sw,ur",
        "mt=gold",
        "model.revision=v1",
        "seed=0,1",
    )
    assert found == [
        ("backbone", "FacebookAI/xlm-roberta-base", "v1"),
        *(("data set", f"facebook/xnli ({lang})", XNLI.revision) for lang in ("en", "sw", "ur")),
        ("backbone", "FacebookAI/xlm-roberta-large", "v1"),
    ]
    table = needed("task=tydiqa", "task.lang=sw,ko", "mt=file", "mt.path=.")
    assert [origin for _, origin, _ in table] == [
        "google-research-datasets/tydiqa (secondary_task)"
    ]


SAFE, BIN = "model.safetensors", "pytorch_model.bin"
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        ([SAFE, BIN, *PARTS, "tf_model.h5"], [SAFE]),
        ([BIN, "flax_model.msgpack", "rust_model.ot"], [BIN]),
        ([*PARTS, f"{SAFE}.index.json", BIN, f"{BIN}.index.json"], [*PARTS, f"{SAFE}.index.json"]),
        (
            ["pytorch_model-00001-of-00001.bin", f"{BIN}.index.json"],
            ["pytorch_model-00001-of-00001.bin", f"{BIN}.index.json"],
        ),
        (["consolidated.00.pth", "model.fp16.safetensors"], []),
    ],
)
def test_weights_in_one_format(weights, chosen):
    small = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "vocab.txt",
        "merges.txt",
    ]
    others = [
        "README.md",
        "onnx/config.json",
        "onnx/model.onnx",
        "original/tokenizer.model",
        "trainer_state.json",
    ]
    assert sorted(hub.wanted([*weights, *others, *small])) == sorted([*small, *chosen])


def test_a_folder_is_what_transformers_reads_of_it(checkpoint, tmp_path):
    def identity():
        return existing_checkpoint(str(tmp_path / "here"), None).digest

    shutil.copytree(checkpoint, tmp_path / "here")
    before = identity()
    strays = [
        "README.md",
        "notes.txt",
        "training_args.bin",
        "optimizer.bin",
        "trainer_state.json",
        BIN,
        "onnx.json",
    ]
    for name in strays:
        (tmp_path / "here" / name).write_text("stray")
    (tmp_path / "here" / "checkpoint-500").mkdir()
    assert identity() == before
    for name in ("config.json", "tokenizer.json", SAFE, "adapter_config.json"):
        with (tmp_path / "here" / name).open("ab") as file:
            file.write(b" ")
        assert identity() != before, name
        before = identity()


# --- what is there -------------------------------------------------------------------------------


def test_a_complete_checkpoint_is_found_by_branch_and_commit(cache, checkpoint):
    assert hub.Checkpoint("backbone", "org/name", None).find() == hub.CacheStatus(lacks="all of it")
    put(cache, "org/name", checkpoint)
    size = sum(
        (checkpoint / name).stat().st_size
        for name in hub.wanted([p.name for p in checkpoint.iterdir()])
    )
    for revision in (None, "main", COMMIT):
        assert hub.Checkpoint("backbone", "org/name", revision).find() == hub.CacheStatus(
            COMMIT, size
        )
    for revision in ("v2", OTHER):
        assert hub.Checkpoint("backbone", "org/name", revision).find().lacks == "all of it"


def settled(*overrides):
    (composed,), problems = validation.validate(overrides, False)
    assert not problems
    return OmegaConf.to_object(composed)


def test_a_revision_becomes_the_commit_that_the_cache_has_of_it(cache, checkpoint):
    put(cache, "org/name", checkpoint)
    put(cache, "org/mt", checkpoint, OTHER, ref="v2")
    given = ["model=custom", "model.path=org/name", "mt=custom", "mt.path=org/mt", "mt.revision=v2"]
    cfg = pipeline.pinned(settled(*given))
    assert (cfg.model.revision, cfg.mt.revision) == (COMMIT, OTHER)
    assert pipeline.pinned(cfg) == cfg
    assert existing_checkpoint("org/name", cfg.model.revision).digest == f"org/name@{COMMIT}"
    # what is not read is not asked for
    assert pipeline.pinned(settled(*given[:-1], "method=zero_shot")).mt.revision is None


def test_a_revision_that_cannot_be_resolved_stops_a_run_and_not_a_plan(cache):
    for key, given in (("model", ["model=custom"]), ("mt", ["mt=custom"])):
        cfg = settled(*given, f"{key}.path=org/none")
        with pytest.raises(
            UserError, match=rf"{key}.path=org/none: the commit of main .* not known .*prefetch"
        ):
            pipeline.pinned(cfg)
        assert pipeline.pinned(cfg, required=False) == cfg
    unknown = existing_checkpoint("org/none", None).digest
    assert not re.search("@[0-9a-f]{40}$|None", unknown)
    assert unknown != existing_checkpoint("org/none", "v2").digest


@pytest.mark.parametrize("group", ["model", "mt"])
def test_presets_of_hub_checkpoints_are_pinned(group):
    for file in (composition.conf_dir() / group).glob("*.yaml"):
        preset = OmegaConf.load(file)
        preset = preset.get(group, preset)
        path = OmegaConf.to_container(preset, resolve=False).get("path")
        if path and "${" not in path:
            assert hub.is_commit(preset.get("revision")), file


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("model.safetensors", "its weights"),
        ("tokenizer.json", "its tokenizer"),
        ("config.json", "its config.json"),
    ],
)
def test_a_checkpoint_that_lacks_a_file_is_not_there(cache, checkpoint, name, lacks):
    (put(cache, "org/name", checkpoint) / name).resolve().unlink()  # the link to it stays
    assert hub.Checkpoint("backbone", "org/name", None).find().lacks == lacks


def test_a_checkpoint_that_lacks_a_shard_is_not_there(cache, checkpoint):
    snapshot = put(cache, "org/name", checkpoint)
    (snapshot / SAFE).rename(snapshot / PARTS[0])
    (snapshot / f"{SAFE}.index.json").write_text(
        json.dumps({"weight_map": {"a": PARTS[0], "b": PARTS[1], "c": PARTS[1]}})
    )
    assert (
        hub.Checkpoint("backbone", "org/name", None).find().lacks
        == f"1 of its 2 files of weights, e.g. {PARTS[1]}"
    )


def test_a_data_set_at_another_commit_is_not_there(cache, tmp_path):
    need = hub.DataSet("data set", "mteb/NusaX-senti", COMMIT, "jav")
    for commit, found in ((OTHER, False), (COMMIT, True)):
        place = tmp_path / "datasets" / "mteb___nusa_x-senti" / "jav" / "0.0.0" / commit
        place.mkdir(parents=True)
        assert need.find().lacks
        (place / "dataset_info.json").write_text("{}")
        assert (need.find().lacks is None) == found


def test_without_the_hub_no_other_commit_of_a_data_set_is_read(cache, tmp_path):
    hub_id, rows = "mteb/NusaX-senti", datasets.Dataset.from_dict({"text": ["a"]})
    place = tmp_path / "datasets" / "mteb___nusa_x-senti" / "jav" / "0.0.0" / COMMIT
    place.mkdir(parents=True)
    with ArrowWriter(path=str(place / "nusa_x-senti-train.arrow"), features=rows.features) as file:
        file.write(rows[0])
        file.finalize()
    datasets.DatasetInfo(
        features=rows.features,
        dataset_name="nusa_x-senti",
        config_name="jav",
        version="0.0.0",
        splits=datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=1)}),
    ).write_to_directory(str(place))
    assert hub.load_hub(hub_id, "jav", COMMIT, "train")["text"][:] == ["a"]
    for split in ("train", None):
        with pytest.raises(UserError, match=f"at commit {OTHER}, but .*{COMMIT}\n.* prefetch"):
            hub.load_hub(hub_id, "jav", OTHER, split)


# --- runs without network ------------------------------------------------------------------------


def test_all_that_is_missing_is_one_message_before_anything_runs(cache, tmp_path, capsys):
    given = [
        "model=xlmr_base",
        "task=xnli",
        "task.train_split=train[:2000]",
        f"output_dir={tmp_path / 'out' / 'run'}",
        f"cache_dir={tmp_path / 'artifacts'}",
        "offline=true",
    ]
    assert main(given) == 2
    message = capsys.readouterr().err
    for missing in (
        "backbone FacebookAI/xlm-roberta-base at e73636d",
        f"translation model {NLLB} at 1a07f7d",
        "data set facebook/xnli (en) at b8dd5d7",
        "data set facebook/xnli (sw) at",
    ):
        assert message.count(f"  - {missing}") == 1
    command = shlex.split(message.splitlines()[-1])
    assert command == ["python", "-m", "flare_exp", "prefetch", *given[:3], given[4]]
    assert not any((tmp_path / name).exists() for name in ("out", "artifacts"))
    assert main(command[3:]) == 1  # it does compose; without network it only reports
    capsys.readouterr()
    # of a grid too, and with the environment's word only (tests/conftest.py)
    assert main(["-m", "model=xlmr_base", "seed=0,1", f"output_dir={tmp_path / 'out'}"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "  python -m flare_exp prefetch -m model=xlmr_base seed=0,1"
    )


def test_a_hub_that_does_not_answer_is_one_message_at_once(tmp_path):
    run = ["model=xlmr_base", "task=xnli", f"output_dir={tmp_path / 'out'}"]
    start = time.perf_counter()
    done = launch(tmp_path, *run, offline=False, HF_ENDPOINT=NOWHERE)
    assert (
        time.perf_counter() - start < 15
    )  # 2 s on a machine of its own; the libraries' retries took 34
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith(
        f"flare_exp: {NOWHERE} cannot be reached ([Errno 111] Connection refused), but the local "
        "caches"
    )
    assert lines[-1] == "  python -m flare_exp prefetch model=xlmr_base task=xnli"
    assert len(lines) == 7  # two models, two data sets


def test_a_prefetch_from_a_hub_that_does_not_answer_ends_at_once(tmp_path):
    done = launch(
        tmp_path, "prefetch", "model=xlmr_base", "task=xnli", offline=False, HF_ENDPOINT=NOWHERE
    )
    assert done.returncode == 1
    assert done.stderr.count(f"{NOWHERE} cannot be reached") == 1
    assert "Retry" not in done.stdout + done.stderr
    assert "4 of 4 not there" in done.stdout


def test_a_name_that_is_no_folder_is_said_to_be_none(cache):
    need = hub.Checkpoint("backbone", "nowhere", None)
    assert "; there is no folder nowhere here either" in str(
        downloads.offline_problem([need], [], False)
    )


def test_a_hub_that_stays_silent_is_not_waited_for(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        assert "cannot be reached" in hub.unreachable(0.3)
        assert time.perf_counter() - start < 2


def test_prefetch_without_network_reports(cache, checkpoint, capsys):
    put(cache, "org/name", checkpoint)
    model = ["model=custom", "model.path=org/name", "offline=true"]
    assert main(["prefetch", *model]) == 0
    assert "Runs with offline=true find everything" in capsys.readouterr().out
    assert main(["prefetch", *model, "task=xnli", "mt=gold"]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["backbone", "org/name", COMMIT[:12]] in [row[:3] for row in rows]
    assert sum(row[-4:] == ["missing", "all", "of", "it"] for row in rows) == 2


@pytest.mark.parametrize(
    ("revision", "state"),
    [
        (None, "there already; whether it is the newest is unknown: no route"),
        (COMMIT, "there already"),
        ("v2", "failed: no route"),
    ],
)
def test_an_unreachable_hub(cache, checkpoint, monkeypatch, revision, state):
    def fetch(need):
        raise ConnectionError("no route\nto host")

    put(cache, "org/name", checkpoint)
    monkeypatch.setattr(hub.Checkpoint, "fetch", fetch)
    assert downloads.download(hub.Checkpoint("backbone", "org/name", revision))[1] == state


def test_mistakes_are_one_message(capsys):
    assert main(["prefetch", "modle=tiny", "fusion=ad", "seed=0,1"]) == 2
    message = capsys.readouterr().err
    assert "did you mean model?" in message
    assert "fusion=ad: choose one of" in message
    assert main(["prefetch", "--cfg", "job"]) == 2
    assert "--cfg: there is no such flag" in capsys.readouterr().err


def reads(cache: Path) -> None:
    """Make `cache` the hub cache of this process."""
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_CACHE = str(cache)


@pytest.mark.slow
def test_a_run_from_a_cache_alone(checkpoint, tmp_path):
    snapshot = put(tmp_path / "hub", "org/name", checkpoint)
    torch.save(load_file(snapshot / SAFE), snapshot / BIN)  # older checkpoints have no other format
    (snapshot / SAFE).unlink()
    run = [
        "model=custom",
        "model.path=org/name",
        "task.limit=16",
        "trainer=debug",
        "trainer.enable_progress_bar=false",
        "offline=true",
        f"cache_dir={tmp_path / 'artifacts'}",
        f"output_dir={tmp_path / 'out'}",
    ]
    for model in ("there", "gone"):  # a stored result needs no model
        process = processes.Run([*processes.PROGRAM, *run], before=partial(reads, tmp_path / "hub"))
        assert process.wait() == 0, (model, process.communicate())
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["model"] == "custom"
    made = json.loads((tmp_path / "out" / "provenance.json").read_text())["artefacts"]
    assert made["backbone"]["digest"] == f"org/name@{COMMIT}"


# --- fetching ------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Serves repositories as the hub does, as far as its libraries ask: {"models/<id>" or
    "datasets/<id>": {path: bytes}}.
    """

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.commits, self.got = repositories, {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(
            json.loads(body).get("paths")
            if body.startswith("{")
            else parse_qs(body).get("paths", [])
        )

    def answer(self, paths=()):
        words = unquote(urlparse(self.path).path).strip("/").removeprefix("api/").split("/")
        if words[0] not in ("models", "datasets"):
            words.insert(0, "models")
        kind, owner, name, what, _, *rest = (*words, "", "", "", "")
        repository, path = f"{kind}/{owner}/{name}", "/".join(rest).rstrip("/")
        files, commit = (
            self.server.repositories.get(repository),
            self.server.commits.get(repository, COMMIT),
        )
        if files is None:
            self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif what == "resolve":
            self.file(files, path, commit)
        elif what == "tree":
            self.send(200, tree(files, path, "recursive=true" in self.path.lower()))
        elif what == "paths-info":
            self.send(200, [entry(files, path) for path in paths if path in files])
        else:
            self.send(
                200,
                {
                    "id": f"{owner}/{name}",
                    "sha": commit,
                    "siblings": [
                        {"rfilename": path, "size": len(data)} for path, data in files.items()
                    ],
                },
            )

    def file(self, files, path, commit):
        if path not in files:
            return self.send(
                404,
                {"error": "Entry not found"},
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit},
            )
        if self.command == "GET":
            self.server.got.append(path)
        return self.send(
            200, files[path], {"ETag": f'"{digest(files[path])}"', "X-Repo-Commit": commit}
        )

    def send(self, status, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def entry(files, path):
    return {"type": "file", "path": path, "oid": digest(files[path]), "size": len(files[path])}


def tree(files, folder, recursive):
    below = [path for path in files if path.startswith(f"{folder}/" if folder else "")]
    depth = folder.count("/") + 1 if folder else 0
    folders = {"/".join(path.split("/")[: depth + 1]) for path in below if path.count("/") > depth}
    shown = below if recursive else [path for path in below if path.count("/") == depth]
    return [{"type": "directory", "path": path, "oid": ""} for path in folders] + [
        entry(files, path) for path in shown
    ]


def parquet(rows) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture
def server(checkpoint):
    model = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    others = {
        "tf_model.h5": b"tensorflow",
        "onnx/model.onnx": b"onnx",
        "README.md": b"# A model",
        "pytorch_model.bin": b"pickle",
    }
    splits = ("train", "validation", "test")
    data = {
        f"{lang}/{split}-0.parquet": parquet(
            [
                {"premise": f"{lang} {split} {i}", "hypothesis": "the food", "label": i % 3}
                for i in range(24)
            ]
        )
        for lang in ("en", "sw")
        for split in splits
    }
    configs = [
        {
            "config_name": lang,
            "data_files": [{"split": split, "path": f"{lang}/{split}-*"} for split in splits],
        }
        for lang in ("en", "sw")
    ]
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n# XNLI".encode()
    running = Hub(
        {
            "models/org/name": {**model, **others},
            "datasets/facebook/xnli": {"README.md": card, **data},
        }
    )
    running.commits["datasets/facebook/xnli"] = XNLI.revision
    yield running
    running.shutdown()


def test_what_will_be_downloaded_is_said_before_it_starts(server, tmp_path):
    run = [
        "-m",
        "model=custom",
        "model.path=org/name,org/none",
        "task=xnli",
        "mt=gold",
        f"output_dir={tmp_path / 'out'}",
    ]
    done = launch(tmp_path, *run, offline=False, HF_ENDPOINT=server.address)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    files = server.repositories["models/org/name"]
    size = decimal(sum(len(files[name]) for name in hub.wanted(list(files))))
    assert lines[0] == f"downloads backbone org/name at main: {size} into {tmp_path / 'hub'}"
    data = decimal(
        sum(
            len(data)
            for name, data in server.repositories["datasets/facebook/xnli"].items()
            if name[:3] == "en/"
        )
    )
    assert (
        f"downloads data set facebook/xnli (en) at {XNLI.revision}: {data} into "
        f"{tmp_path / 'datasets'}"
    ) in lines
    assert "flare_exp: backbone org/none at main: there is no such repository" in done.stderr
    assert lines[-1] == "Nothing was run."
    assert server.got == []


@pytest.mark.slow
def test_prefetch_then_run_without_network(server, tmp_path):
    run = [
        "model=custom",
        "model.path=org/name",
        "task=xnli",
        "mt=gold",
        "trainer=debug",
        "trainer.enable_progress_bar=false",
        f"cache_dir={tmp_path / 'artifacts'}",
    ]
    refused = launch(tmp_path, *run, f"output_dir={tmp_path / 'out'}")
    assert refused.returncode == 2
    assert refused.stderr.count("missing all of it") == 3

    # one model of the grid does not exist
    grid = [run[0], "model.path=org/name,org/none", *run[2:]]
    done = launch(tmp_path, "prefetch", *grid, offline=False, HF_ENDPOINT=server.address)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("fetched") == 3
    assert "failed: there is no such repository" in done.stdout
    fetched = Counter(Path(name).suffix for name in server.got)
    assert fetched.keys() == {
        ".json",
        ".safetensors",
        ".md",
        ".parquet",
    }  # the data set's card tells its configurations
    assert (fetched[".safetensors"], fetched[".parquet"]) == (1, 6)

    server.got.clear()
    again = launch(tmp_path, "prefetch", *run, offline=False, HF_ENDPOINT=server.address)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("there already") == 3
    assert server.got == []

    done = launch(
        tmp_path, *run, f"output_dir={tmp_path / 'out'}", offline=False, HF_ENDPOINT=NOWHERE
    )
    assert done.returncode == 0, done.stderr
    assert "sw test 0" in str(
        pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()[0]
    )


@pytest.mark.slow
def test_prefetch_follows_a_branch(server, tmp_path):
    model = ["prefetch", "model=custom", "model.path=org/name"]
    for commit, said in ((COMMIT, "fetched"), (COMMIT, "there already"), (OTHER, "fetched")):
        server.commits["models/org/name"] = commit
        done = launch(tmp_path, *model, offline=False, HF_ENDPOINT=server.address)
        assert f"{commit[:12]} " in done.stdout, done.stderr
        assert said in done.stdout
    # killed in between
    (
        tmp_path / "hub" / "models--org--name" / "snapshots" / OTHER / "tokenizer_config.json"
    ).unlink()
    done = launch(tmp_path, *model)
    assert done.returncode == 1
    assert "missing part of its configuration or tokenizer" in done.stdout
    done = launch(tmp_path, *model, offline=False, HF_ENDPOINT=server.address)
    assert "fetched" in done.stdout
