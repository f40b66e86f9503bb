"""`workpool new`: the generated project works unchanged, and no file is overwritten."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions
from typing import TYPE_CHECKING, NamedTuple

import pytest
from typer.testing import CliRunner

from workpool.cli.commands import app
from workpool.cli.new import NAME_LENGTH

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

LONG = "a" * (NAME_LENGTH + 1)


class CommandResult(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def project_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_workpool_new(*arguments: str) -> CommandResult:
    result = CliRunner().invoke(app, ["new", *arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return CommandResult(result.exit_code, result.stdout, result.stderr)


def run_python(*arguments: str, folder: Path) -> str:
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("flags", "target"),
    [((), "workpool_daily_reports"), (("--class",), "workpool_daily_reports:DailyReportsPlugin")],
    ids=["function", "class"],
)
def test_new_plugin_passes_its_tests_and_can_be_installed(
    project_directory: Path, flags: tuple[str, ...], target: str
) -> None:
    ended = run_workpool_new(*flags, "daily-reports")
    assert ended.status == 0
    assert ended.out.splitlines() == [
        "daily-reports/pyproject.toml",
        "daily-reports/README.md",
        "daily-reports/workpool_daily_reports.py",
        "daily-reports/tests/test_workpool_daily_reports.py",
    ]
    assert ended.err == "workpool: next: cd daily-reports && pytest\n"
    project = project_directory / "daily-reports"
    assert not [path for path in project.rglob("*.*") if "$" in path.read_text("utf-8")]

    assert "3 passed" in run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", folder=project)
    shown = run_python("-m", "workpool", "plugins", target, folder=project)
    assert "type=session job=daily-reports" in shown

    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", "installed"]
    run_python("-m", "pip", "install", "-q", *offline, ".", folder=project)
    (installed,) = distributions(path=[str(project / "installed")])
    (point,) = installed.entry_points
    assert (point.group, point.name, point.value) == ("workpool", "daily-reports", target)
    assert (project / "installed/workpool_daily_reports.py").exists()


@pytest.mark.parametrize("flags", [(), ("--class",)], ids=["function", "class"])
@pytest.mark.parametrize("name", ["reports", "session"])
def test_new_plugin_passes_linter_and_formatter(
    project_directory: Path, flags: tuple[str, ...], name: str
) -> None:
    run_workpool_new(*flags, name)
    ruff = ["-m", "ruff"]
    rules = ["--select", "E,F,I,W,UP,B,RUF"]
    run_python(*ruff, "check", "--isolated", *rules, ".", folder=project_directory / name)
    run_python(*ruff, "format", "--isolated", "--check", ".", folder=project_directory / name)


@pytest.mark.parametrize("what", ["directory", "file", "dangling link"])
def test_new_plugin_over_existing_file_is_refused_and_changes_nothing(
    project_directory: Path, what: str
) -> None:
    place = project_directory / "reports"
    if what == "directory":
        place.mkdir()
    elif what == "file":
        place.write_text("mine")
    else:
        place.symlink_to("nowhere")
    ended = run_workpool_new("reports")
    assert ended.status == 2
    assert "cannot write reports: File exists" in ended.err
    assert ended.out == ""
    assert [path.name for path in project_directory.rglob("*")] == ["reports"]


@pytest.mark.parametrize(
    "name",
    ["", "Reports", "my_reports", "2nd", "a--b", "a-", "../up", "/x", "é", "a\n", "echo me", LONG],
)
def test_new_plugin_with_invalid_name_is_refused(project_directory: Path, name: str) -> None:
    ended = run_workpool_new(name)
    assert ended.status == 2
    assert "cannot be a plugin's name" in ended.err
    assert not list(project_directory.iterdir())


def test_new_plugin_with_name_of_installed_plugin_is_refused(project_directory: Path) -> None:
    ended = run_workpool_new("echo")
    assert ended.status == 2
    assert "a plugin named 'echo' is installed already" in ended.err
    assert not list(project_directory.iterdir())


def test_new_plugin_in_deleted_directory_is_refused_with_error_text(
    project_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = project_directory / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    ended = run_workpool_new("reports")
    assert ended.status == 2
    assert "cannot write reports: No such file or directory" in ended.err
