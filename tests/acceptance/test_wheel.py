"""Wheels and source distributions contain the files that git tracks, and no others."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
SHIM = "workpool/testing/pytest_workpool.py"
FOR_THE_SOURCE = ("workpool/docs/", "workpool/deploy/")
"""Folders of the package that are in the source distribution only."""
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir())
UNTRACKED = [
    *("workpool/token.txt", "workpool/.env", "workpool/server/state.sqlite", "workpool/docs/notes"),
    *("workpool/deploy/token", "workpool/deploy/kubernetes/.env", "workpool/deploy/kubeconfig"),
    *("workpool/cli/template/.netrc", "workpool/wire/client.pem", "workpool/workpool.toml"),
    *("tests/id_rsa", "tests/protocol/recorded/token", "tests/.env", "benchmarks/results.csv"),
    *("plugins/token.txt", "token.txt", "id_rsa", ".env"),
    *(f"plugins/{name}/workpool_{name}/token.txt" for name in PLUGINS),
    *(f"plugins/{name}/tests/id_rsa" for name in PLUGINS),
    *(f"plugins/{name}/.env" for name in PLUGINS),
]


@pytest.fixture(scope="module")
def tracked_files() -> set[str]:
    """Return the names of all files that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no working copy of git")
    words = ["git", "ls-files", "-z"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)  # noqa: S603 - our own words
    return {name for name in done.stdout.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def copy_of_repository(tracked_files: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of all tracked files, together with some untracked files."""
    copy = tmp_path_factory.mktemp("copy")
    for name in tracked_files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for name in UNTRACKED:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("a secret")
    return copy


def built_distribution(project: Path, target: str, directory: Path) -> Path:
    """Build a project, and return the path of the distribution."""
    words = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(directory)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=project)  # noqa: S603 - our own words
    assert done.returncode == 0, done.stderr
    (path,) = directory.iterdir()
    return path


def list_files_in_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def list_files_in_sdist(path: Path) -> set[str]:
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}


def test_wheel_contains_every_tracked_file_except_documents_and_deployment(
    copy_of_repository: Path, tracked_files: set[str], tmp_path: Path
) -> None:
    path = built_distribution(copy_of_repository, "wheel", tmp_path)
    package = {
        name
        for name in tracked_files
        if name.startswith("workpool/") and not name.startswith(FOR_THE_SOURCE)
    }
    # SHIM is the pytest plugin. The wheel has it outside of the package, because pytest imports
    # it at every start and would otherwise import the whole package.
    assert list_files_in_wheel(path) == package - {SHIM} | {Path(SHIM).name}
    with zipfile.ZipFile(path) as wheel:
        (points,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
        assert "[pytest11]\nworkpool = pytest_workpool\n" in wheel.read(points).decode()


def test_source_distribution_contains_every_tracked_file_except_hidden_ones(
    copy_of_repository: Path, tracked_files: set[str], tmp_path: Path
) -> None:
    left_out = {name for name in tracked_files if name.startswith(".") and name != ".gitignore"}
    assert (
        list_files_in_sdist(built_distribution(copy_of_repository, "sdist", tmp_path))
        == tracked_files - left_out
    )


@pytest.mark.parametrize("name", PLUGINS)
def test_distributions_of_plugin_contain_its_tracked_files(
    copy_of_repository: Path, tracked_files: set[str], tmp_path: Path, name: str
) -> None:
    project, folder = copy_of_repository / "plugins" / name, f"plugins/{name}/"
    files = {each.removeprefix(folder) for each in tracked_files if each.startswith(folder)}
    package = {each for each in files if each.startswith("workpool_")}
    for target in ("wheel", "sdist"):
        (tmp_path / target).mkdir()
    assert list_files_in_wheel(built_distribution(project, "wheel", tmp_path / "wheel")) == package
    assert (
        list_files_in_sdist(built_distribution(project, "sdist", tmp_path / "sdist"))
        - {".gitignore"}
        == files
    )
