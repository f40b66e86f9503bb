"""The output of commands as tables, lines and JSON, and the import path of plugins."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from workpool.cli import conform
from workpool.cli.flags import add_current_directory_to_path
from workpool.cli.output import print_json, print_names_and_values, print_rows
from workpool.conformance import CLAUSES, Finding, Verdict
from workpool.logs import hide_token
from workpool.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [("work_1", None, datetime(2026, 3, 1, 12, tzinfo=UTC), "two\nlines \x1b[2J")]

ID, SESSION = f"work_{'0' * 32}", f"sess_{'1' * 32}"
COLUMNS = ["id", "state", "session", "text"]


def test_rows_are_printed_as_tab_separated_lines_if_output_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_rows(("id", "state", "time", "text"), ROWS)
    assert capsys.readouterr().out == "work_1\t-\t2026-03-01T12:00:00Z\ttwo\\nlines \\x1b[2J\n"


def test_json_output_contains_no_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "\n\r\x1b[2J\x7f\x9b\u2028\u202e\u2066\U000e0041\xe9\u4e2d"
    print_json({text: [text]})
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.split("\n"))
    assert "\xe9\u4e2d" in printed
    assert json.loads(printed) == {text: [text]}


def test_conform_output_shows_answers_of_control_plane_escaped_and_cut(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hide_token("hunter2-hunter2")
    text = "hunter2-hunter2\n\x1b[2J\u202e" + "x" * 4_000_000
    findings = [Finding(CLAUSES[0], Verdict.BREAKS, text)]
    conform._print_findings(findings)
    print_json(conform._make_json_report(Settings(), findings, Verdict.BREAKS))
    printed = capsys.readouterr().out
    assert len(printed) < 10_000
    assert printed.replace("\n", "").isprintable()
    assert "hunter2" not in printed


def test_rows_on_terminal_are_printed_as_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    print_rows(("id", "state", "time", "text"), ROWS)
    printed = capsys.readouterr().out
    assert "state" in printed
    assert "\x1b[2J" not in printed
    assert "work_1" in printed


def test_current_directory_is_first_in_import_path_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["elsewhere"])
    add_current_directory_to_path()
    add_current_directory_to_path()
    assert sys.path == [str(tmp_path), "elsewhere"]


@pytest.mark.parametrize(
    ("width", "columns"),
    [(10, ["id"]), (50, ["id", "state"]), (69, ["id", "state", "text"]), (150, COLUMNS)],
)
def test_table_on_narrow_terminal_omits_columns_and_never_cuts_ids(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    columns: list[str],
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    print_rows(COLUMNS, [(ID, "queued", SESSION, "words of a text " * 9)])
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert printed.splitlines()[1].split() == columns
    assert ID in printed
    assert (SESSION in printed) is ("session" in columns)


def test_each_name_value_pair_on_narrow_terminal_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    print_names_and_values({"id": ID, "session_id": SESSION, "metadata": "[red]x[/red] " * 9})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"id          {ID}", f"session_id  {SESSION}"]
    assert len(lines) == 3
    assert "[red]" in lines[2]
