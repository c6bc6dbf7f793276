"""The wheel is whole: it contains conf/ and runs from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_contains_conf_and_runs_from_any_folder(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; it is in the dev extra")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
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
