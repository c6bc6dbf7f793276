"""Fixtures of all tests, and the order in which the tests run; what they import is in tools/."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["WANDB_MODE"] = "offline"  # no test talks to W&B's servers
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
if sys.dont_write_bytecode:
    # As containers often have it. Every process that a test starts would compile the libraries
    # anew, which is two thirds of the time that it imports. So bytecode is kept after all, but in a
    # folder of its own.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

import pytest
import warm
from copying_nllb import converted, engine, nllb_folder  # noqa: F401 (fixtures)
from finished_runs import finished_run, flare_folder, loaded_run, toy_texts  # noqa: F401 (fixtures)
from random_models import BUILDERS, random_backbone

from flare_exp.config import composition
from flare_exp.languages import LANGUAGES


@pytest.fixture(params=list(BUILDERS), ids="-".join)
def kind(request) -> tuple[str, str]:
    """(family, form)"""
    return request.param


@pytest.fixture
def make_model(kind):
    """(seed) -> a random float64 Backbone of the family and form, in eval mode."""
    return functools.partial(random_backbone, kind)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes long, so that no worker is left alone with it at the end, and keep the
    tests of a group on one worker.

    pytest-xdist reads a test's group from its id, where it writes it itself. What it writes is lost
    since pytest 9.2, without a word (pytest-xdist issue 1386): then the tests of a group are spread
    and every worker builds what they share.
    """
    items.sort(key=lambda item: [not item.get_closest_marker(m) for m in ("slow", "xdist_group")])
    if config.getoption("loadgroup", False):
        for item in items:
            if mark := item.get_closest_marker("xdist_group"):
                suffix = f"@{mark.args[0]}"
                if not item.nodeid.endswith(suffix):
                    item._id = type(item.id).parse(item.nodeid + suffix)  # type: ignore[attr-defined]
                assert item.nodeid.endswith(suffix)


def pytest_collection_finish() -> None:
    """Speed up what the tests do in this process."""
    warm.read_toy_tasks_once()
    warm.freeze()


@pytest.fixture(scope="module", autouse=True)
def own_languages() -> Iterator[None]:
    """Forget the languages of descriptions (task=custom) after the tests of a module."""
    before = dict(LANGUAGES)
    yield
    for code in LANGUAGES.keys() - before.keys():
        del LANGUAGES[code]


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Compose every choice of groups once: what follows from it are the files in conf/ alone, and
    nobody changes it in place.
    """
    with pytest.MonkeyPatch.context() as patch:
        compose, known = composition._compose, {}

        def remembered(overrides: Sequence[str], **options: Any) -> Any:
            key = (*overrides, *options)
            if key not in known:
                known[key] = compose(overrides, **options)
            return known[key]

        patch.setattr(composition, "_compose", remembered)
        yield


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """One artifact cache for the session, so that tests build the debug-sized tiny model once."""
    return tmp_path_factory.mktemp("cache")


SHARED = Path(os.environ.get("FLARE_EXP_SHARED", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real benchmark data; skips where it is not."""
    if not (SHARED / "nusax").is_dir():
        pytest.skip(f"the real benchmark data is not here ({SHARED}); set FLARE_EXP_SHARED")
    return SHARED
