"""The distributions are whole: the wheel runs from any folder, the sdist has tests and docs."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(kind: str, folder: Path) -> Path:
    """Build the wheel or the sdist of the checkout."""
    pytest.importorskip("hatchling", reason="hatchling builds them; it is in the dev extra")
    words = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    (made,) = folder.iterdir()
    return made


@pytest.mark.slow
def test_wheel_contains_conf_and_runs_from_any_folder(tmp_path):
    wheel = build("wheel", tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {n.removeprefix("flare_exp/conf/") for n in names if n.startswith("flare_exp/conf/")}
    assert shipped == {str(p.relative_to(ROOT / "conf")) for p in (ROOT / "conf").rglob("*.yaml")}
    assert any(n.endswith("entry_points.txt") for n in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import flare_exp; print(flare_exp.__file__); from flare_exp.cli.main import main; raise "
        "SystemExit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--cfg", "job", "fusion=gated"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert "name: gated" in done.stdout


@pytest.mark.slow
def test_sdist_has_what_tests_and_docs_need(tmp_path):
    """Every file of the checkout but what serves version control and CI, and no product of it."""
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"conf/config.yaml", "tests/conftest.py", "docs/index.md", "PKG-INFO"} <= names
    assert not [name for name in names if name.startswith((".venv", "dist", "outputs", "site"))]
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout of git, so its files are not known")
    served = (".ci/", ".pre-commit-config.yaml", "outputs/")
    files = [name for name in listed.stdout.decode().splitlines() if not name.startswith(served)]
    assert sorted({*files} - names) == []
