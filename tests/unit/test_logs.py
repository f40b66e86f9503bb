"""Log lines: what stands in them, and that each is one line of JSON (design §5, §6)."""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace
from typing import NoReturn

import pytest

from workpool.cli.logs import JsonFormatter, TextFormatter, configure


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("workpool.x", logging.INFO, __file__, 1, message, arguments, None)
    made.created = 1_772_366_400.25
    vars(made).update(more)
    return made


def raised() -> object:
    def fail() -> NoReturn:
        raise ValueError("two\nlines")

    try:
        fail()
    except ValueError:
        return sys.exc_info()


def test_a_text_line() -> None:
    line = TextFormatter().format(record("claimed n=%d", 3, work_id="work_1", why="a b\n"))
    expected = "2026-03-01T12:00:00.250Z INFO    workpool.x claimed n=3 work_id=work_1 why='a b\\n'"
    assert line == expected


def test_a_text_line_has_the_stack_below_it() -> None:
    line = TextFormatter().format(record("failed", exc_info=raised(), stack_info="Stack: here"))
    head, *stack = line.splitlines()
    assert head.endswith("failed")
    assert stack[-1] == "Stack: here"
    assert "ValueError: two" in stack


def test_a_json_line_holds_everything() -> None:
    made = record("failed %s", "x", exc_info=raised(), work_id="work_1", n=1, odd=object)
    made.stack_info = "Stack: here"
    text = JsonFormatter().format(made)
    assert "\n" not in text
    fields = json.loads(text)
    error = fields.pop("error")
    assert fields == {
        "time": "2026-03-01T12:00:00.250Z",
        "level": "info",
        "logger": "workpool.x",
        "message": "failed x",
        "work_id": "work_1",
        "n": 1,
        "odd": "<class 'object'>",
        "stack": "Stack: here",
    }
    assert (error["type"], error["message"]) == ("ValueError", "two\nlines")
    assert "in raised" in error["stack"]


def test_a_plugins_extra_cannot_forge_a_field() -> None:
    fields = json.loads(JsonFormatter().format(record("true", time="never", level="none")))
    assert fields["level"] == "info"
    assert fields["time"].startswith("2026")


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's own logging, whatever the test does to it."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.mark.usefixtures("untouched")
def test_configured_it_writes_to_stderr_uncaught_errors_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("warning", "json")
    try:
        logging.getLogger("plugin").info("not this")
        logging.getLogger("plugin").warning("this")
        error = SimpleNamespace(it=ValueError("lost"))
        sys.excepthook(ValueError, error.it, None)
    finally:
        logging.captureWarnings(capture=False)
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second = (json.loads(line) for line in printed.err.splitlines())
    assert first["message"] == "this"
    assert (second["level"], second["error"]["message"]) == ("critical", "lost")
