"""Type checkers accept the correct handlers in `typed_handlers.py` and reject the wrong ones."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).with_name("typed_handlers.py")
ROOT = Path(__file__).parents[2]
WRONG = re.compile(r"  # type: ignore\[([a-z-]+)\] # .*")


def read_expected_error_codes_by_line() -> dict[int, str]:
    """Return the numbers of the lines that mypy must reject, each with mypy's error code."""
    lines = enumerate(PAGE.read_text().splitlines(), 1)
    return {number: found[1] for number, line in lines if (found := WRONG.search(line))}


def run_type_checker_on_handlers(tmp_path: Path, *command: str) -> str:
    """Return the output of a type checker for a copy of `typed_handlers.py`.

    The copy has no `type: ignore`, so that the checker reports every wrong handler.
    """
    copy = tmp_path / "page.py"
    copy.write_text(WRONG.sub("", PAGE.read_text()))
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-m", *command, str(copy)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")},
    )
    return done.stdout


@pytest.mark.trial
@pytest.mark.timeout(300)
def test_mypy_strict_reports_expected_error_in_each_wrong_handler_and_no_other(
    tmp_path: Path,
) -> None:
    output = run_type_checker_on_handlers(
        tmp_path, "mypy", "--strict", "--show-error-codes", "--no-pretty"
    )
    errors = re.findall(r"^page\.py:(\d+): error: .*\[([a-z-]+)\]$", output, re.MULTILINE)
    assert {int(line): code for line, code in errors} == read_expected_error_codes_by_line()
    assert len(errors) == len(read_expected_error_codes_by_line()) > 10


@pytest.mark.trial
@pytest.mark.timeout(300)
@pytest.mark.skipif(not importlib.util.find_spec("pyright"), reason="pyright is not installed")
def test_pyright_reports_error_in_each_wrong_handler_and_no_other(tmp_path: Path) -> None:
    output = run_type_checker_on_handlers(tmp_path, "pyright", "--pythonpath", sys.executable)
    assert {int(line) for line in re.findall(r"page\.py:(\d+):\d+ - error", output)} == set(
        read_expected_error_codes_by_line()
    )
