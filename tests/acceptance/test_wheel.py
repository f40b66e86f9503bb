"""What is installed from a wheel is all that lies here."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
SHIM = "workpool/testing/pytest_workpool.py"


def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("workpool-*.whl")
    with zipfile.ZipFile(path) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (points,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
        assert "[pytest11]\nworkpool = pytest_workpool\n" in wheel.read(points).decode()
    files = (each for each in (ROOT / "workpool").rglob("*") if each.is_file())
    names = {each.relative_to(ROOT).as_posix() for each in files}
    here = {name for name in names if "/." not in name and not name.endswith(".pyc")}  # no caches
    # pytest imports this at every start: it must not lie within the package.
    assert held == here - {SHIM} | {Path(SHIM).name}
