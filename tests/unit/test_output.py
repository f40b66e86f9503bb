"""What a command prints for people, and where it looks for plugins."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from workpool.cli.options import import_from_here
from workpool.cli.output import print_rows

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

ROWS = [("work_1", None, datetime(2026, 3, 1, 12, tzinfo=UTC), "two\nlines \x1b[2J")]


def test_plain_rows_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(("id", "state", "time", "text"), ROWS)
    assert capsys.readouterr().out == "work_1\t-\t2026-03-01T12:00:00Z\ttwo\\nlines \\x1b[2J\n"


def test_on_a_terminal_they_are_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    print_rows(("id", "state", "time", "text"), ROWS)
    printed = capsys.readouterr().out
    assert "state" in printed
    assert "\x1b[2J" not in printed
    assert "work_1" in printed


def test_the_current_directory_comes_first_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["elsewhere"])
    import_from_here()
    import_from_here()
    assert sys.path == [str(tmp_path), "elsewhere"]
