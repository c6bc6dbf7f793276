"""Fixtures of all tests. A pytest plugin, which conftest.py imports."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import processes
import pytest
import warm
from conftest import SHARED
from copying_nllb import converted, engine, nllb_folder  # noqa: F401 (fixtures)
from finished_runs import finished_run, flare_folder, loaded_run, toy_texts  # noqa: F401 (fixtures)
from random_models import BUILDERS, random_backbone

from flare_exp.config import composition
from flare_exp.languages import LANGUAGES


def pytest_sessionstart() -> None:
    """Fork the server of processes before anything has a thread."""
    processes.start_server()


def pytest_collection_finish() -> None:
    """Speed up what the tests do in this process."""
    warm.read_toy_tasks_once()
    warm.sync_nothing()
    warm.freeze()


@pytest.fixture(params=list(BUILDERS), ids="-".join)
def kind(request) -> tuple[str, str]:
    """(family, form)"""
    return request.param


@pytest.fixture
def make_model(kind):
    """(seed) -> a random float64 Backbone of the family and form, in eval mode."""
    return functools.partial(random_backbone, kind)


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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real benchmark data; skips where it is not."""
    if not (SHARED / "nusax").is_dir():
        pytest.skip(f"the real benchmark data is not here ({SHARED}); set FLARE_EXP_SHARED")
    return SHARED


@pytest.fixture
def interruptible():
    """Let Ctrl-C interrupt, also in tests started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
