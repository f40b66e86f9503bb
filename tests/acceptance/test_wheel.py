"""A wheel holds the whole package but its documents, which the source distribution holds."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
SHIM = "workpool/testing/pytest_workpool.py"
DOCS = "workpool/docs/"


def run(*arguments: str) -> None:
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_wheel_holds_every_file_of_the_package_but_documents(tmp_path: Path) -> None:
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    run("pip", "wheel", "-q", *offline, "-w", str(tmp_path), str(ROOT))
    (path,) = tmp_path.glob("workpool-*.whl")
    with zipfile.ZipFile(path) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (points,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
        assert "[pytest11]\nworkpool = pytest_workpool\n" in wheel.read(points).decode()
    files = (each for each in (ROOT / "workpool").rglob("*") if each.is_file())
    names = {each.relative_to(ROOT).as_posix() for each in files}
    caches = {name for name in names if "/." in name or name.endswith(".pyc")}
    docs = {name for name in names if name.startswith(DOCS)}
    assert docs
    here = names - caches - docs
    # pytest imports this at every start: it must not lie within the package.
    assert held == here - {SHIM} | {Path(SHIM).name}


def test_source_distribution_holds_the_documents(tmp_path: Path) -> None:
    run("hatchling", "build", "-t", "sdist", "-d", str(tmp_path))
    (path,) = tmp_path.glob("workpool-*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    documents = {each.relative_to(ROOT).as_posix() for each in (ROOT / DOCS).glob("*.md")}
    assert documents
    assert documents <= held
