"""The environment of all tests, and the order in which they run; their fixtures are in
tools/shared_fixtures.py.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

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

SHARED = Path(os.environ.get("FLARE_EXP_SHARED", Path(__file__).parents[2] / "shared" / "data"))


def pytest_configure(config: pytest.Config) -> None:
    """Import the libraries where tests run, which is not the process that gives them to workers."""
    spread = config.getoption("numprocesses", None) and not config.option.collectonly
    if hasattr(config, "workerinput") or not spread:
        # The libraries and the tests leave few cycles. To look for them as often as usual takes a
        # tenth of the time.
        gc.set_threshold(50_000, 20, 100)
        config.pluginmanager.import_plugin("shared_fixtures")


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
