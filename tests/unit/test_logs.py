"""Log lines: their content, escaped characters, hidden tokens, and limited length."""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workpool import logs
from workpool.cli.log_config import configure_logging
from workpool.logs import (
    ERROR_CHARACTERS,
    ITEM_TOKENS,
    LINE_CHARACTERS,
    MESSAGE_CHARACTERS,
    STACK_CHARACTERS,
    TOKENS,
    JsonFormatter,
    TextFormatter,
    hide_item_token,
    hide_token,
    readable,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def make_log_record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("workpool.x", logging.INFO, __file__, 1, message, arguments, None)
    made.created = 1_772_366_400.25
    vars(made).update(more)
    return made


def make_exc_info_of_raised_error() -> object:
    def raise_value_error() -> NoReturn:
        raise ValueError("two\nlines")

    try:
        raise_value_error()
    except ValueError:
        return sys.exc_info()


def test_text_log_line_has_time_level_logger_message_and_extras() -> None:
    line = TextFormatter().format(make_log_record("claimed n=%d", 3, work_id="work_1", why="a b\n"))
    expected = "2026-03-01T12:00:00.250Z INFO    workpool.x claimed n=3 work_id=work_1 why='a b\\n'"
    assert line == expected


def test_text_log_line_has_stack_on_following_lines() -> None:
    line = TextFormatter().format(
        make_log_record(
            "failed", exc_info=make_exc_info_of_raised_error(), stack_info="Stack: here"
        )
    )
    head, *stack = line.splitlines()
    assert head.endswith("failed")
    assert stack[-1] == "  Stack: here"
    assert "  ValueError: two" in stack


def test_json_log_line_has_all_fields_and_error() -> None:
    made = make_log_record(
        "failed %s",
        "x",
        exc_info=make_exc_info_of_raised_error(),
        work_id="work_1",
        n=1,
        odd=object,
    )
    made.stack_info = "Stack: here"
    text = JsonFormatter().format(made)
    assert "\n" not in text
    fields = json.loads(text)
    stack = fields.pop("stack")
    assert fields == {
        "time": "2026-03-01T12:00:00.250Z",
        "level": "info",
        "logger": "workpool.x",
        "message": "failed x",
        "work_id": "work_1",
        "n": 1,
        "odd": "<class 'object'>",
        "error": "two\\nlines",
        "error_type": "ValueError",
    }
    assert "in make_exc_info_of_raised_error" in stack
    assert stack.endswith("Stack: here")


def test_extra_log_field_of_plugin_cannot_replace_standard_field() -> None:
    fields = json.loads(JsonFormatter().format(make_log_record("true", time="never", level="none")))
    assert fields["level"] == "info"
    assert fields["time"].startswith("2026")


HOSTILE = {
    "line feed": "\n", "carriage return": "\r", "escape": "\x1b", "bell": "\x07", "null": "\0",
    "delete": "\x7f", "next line": "\x85", "CSI": "\x9b", "line separator": "\u2028",
    "paragraph separator": "\u2029", "right-to-left override": "\u202e", "isolate": "\u2066",
    "right-to-left mark": "\u200f", "Arabic letter mark": "\u061c", "zero width": "\u200b",
    "tag": "\U000e0041", "surrogate": "\ud800", "unassigned": "\U000e0fff", "no-break": "\xa0",
}  # fmt: skip
FORGED = "2026-03-01T12:00:00.250Z ERROR   workpool.x forged"


def make_hostile_log_record(text: str) -> logging.LogRecord:
    """Return a record with `text` in every field that can contain text."""
    error = ValueError(text)
    error.add_note(text)
    exc_info = (ValueError, error, None)
    made = make_log_record(
        "item %s", text, exc_info=exc_info, stack_info=text, why=text, odd=[text]
    )
    made.name = made.levelname = text
    vars(made)[f"extra {text}"] = text
    return made


def assert_output_is_escaped(made: logging.LogRecord) -> None:
    text = TextFormatter().format(made)
    first, *more = text.split("\n")
    assert first.isprintable()
    assert all(line.isprintable() and line.startswith("  ") for line in more)
    line = JsonFormatter().format(made)
    assert line.isprintable()
    fields = json.loads(line)
    assert fields["message"].isprintable()
    assert fields["why"].isprintable()
    assert fields["error"].isprintable()
    assert all(each.isprintable() for each in fields["stack"].split("\n"))


@pytest.mark.parametrize("char", HOSTILE.values(), ids=HOSTILE)
def test_control_character_in_log_record_is_escaped(char: str) -> None:
    made = make_hostile_log_record(f"a{char}{FORGED}{char}b")
    assert_output_is_escaped(made)
    assert ascii(char)[1:-1] in TextFormatter().format(made)


@given(st.text())
def test_arbitrary_text_in_log_record_is_escaped_in_output(text: str) -> None:
    assert_output_is_escaped(make_hostile_log_record(text))


@pytest.mark.parametrize("char", ["x", "\n", "\x1b", "\U000e0041", "\\", '"'])
def test_log_record_of_megabytes_is_cut_to_limit(char: str) -> None:
    made = make_hostile_log_record(char * 1_000_000)
    limit = LINE_CHARACTERS + 2 * ERROR_CHARACTERS + STACK_CHARACTERS
    for form in (TextFormatter(), JsonFormatter()):
        # Line breaks and indentation are added to the stack after its text was cut to the limit.
        assert len(form.format(made)) < 3 * limit
    made.exc_info = made.stack_info = None
    assert len(TextFormatter().format(made)) <= LINE_CHARACTERS


def test_shortened_log_message_keeps_its_beginning_and_end_and_ids() -> None:
    made = make_log_record("declined type=%s reason=unwanted", "x" * 3_900_000, work_id="work_1")
    line = TextFormatter().format(made)
    assert "declined type=xxx" in line
    assert f"… {3_900_000 + 30} characters …" in line
    assert line.endswith("reason=unwanted work_id=work_1")
    fields = json.loads(JsonFormatter().format(made))
    assert len(fields["message"]) == MESSAGE_CHARACTERS
    assert fields["work_id"] == "work_1"


def test_log_record_with_many_extras_is_cut_to_limit() -> None:
    made = make_log_record("hello", **{f"name{number}": "x" * 5000 for number in range(1000)})
    assert len(TextFormatter().format(made)) <= LINE_CHARACTERS
    assert len(JsonFormatter().format(made)) < 200_000


class UnprintableObject(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("form", [TextFormatter(), JsonFormatter()])
def test_log_record_that_cannot_be_formatted_is_still_logged(form: logging.Formatter) -> None:
    """After an error of a formatter, `logging` would print the unescaped arguments itself."""
    assert "cannot be formatted: n=%d" in form.format(make_log_record("n=%d", "x" * 1_000_000))
    assert "UnprintableObject that has no text" in form.format(
        make_log_record("hello", odd=UnprintableObject())
    )
    assert "hello" in form.format(
        make_log_record("hello", exc_info=(UnprintableObject, UnprintableObject(), None))
    )


@pytest.fixture
def clear_tokens_to_redact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_tokens", {})
    monkeypatch.setattr(logs, "_item_tokens", {})


@pytest.mark.usefixtures("clear_tokens_to_redact")
@pytest.mark.parametrize("hiding", [hide_token, hide_item_token])
def test_token_anywhere_in_log_record_is_redacted(hiding: Callable[[str], None]) -> None:
    token = "pat-" + "\"hunter2\\hunter2+/'"
    hiding(token)
    made = make_hostile_log_record(f"a{token}b {quote(token, safe='')}")
    for form in (TextFormatter(), JsonFormatter()):
        text = form.format(made)
        assert "hunter2" not in text
        assert "a[token]b" in text


@pytest.mark.usefixtures("clear_tokens_to_redact")
def test_token_of_three_characters_is_not_redacted_within_words() -> None:
    hide_token("and")
    assert readable("workers and handlers") == "workers and handlers"


@pytest.mark.usefixtures("clear_tokens_to_redact")
def test_second_redaction_does_not_change_redacted_text() -> None:
    hide_token("token")
    hide_token("hunter2-hunter2")
    assert readable(readable("Bearer hunter2-hunter2")) == "Bearer [token]"


@pytest.mark.usefixtures("clear_tokens_to_redact")
def test_token_split_by_truncation_of_long_log_message_is_redacted_completely() -> None:
    hide_token("hunter2-" * 8)
    for before in range(0, 2 * MESSAGE_CHARACTERS, 50):
        text = "x" * before + "hunter2-" * 8 + "y" * (2 * MESSAGE_CHARACTERS - before)
        assert "hunter2" not in readable(text)


@pytest.mark.usefixtures("clear_tokens_to_redact")
def test_number_of_tokens_remembered_for_redaction_is_limited() -> None:
    for number in range(1000):
        hide_token(f"token-{number:04}")
        hide_item_token(f"item-{number:04}")
    assert (len(logs._tokens), len(logs._item_tokens)) == (TOKENS, ITEM_TOKENS)
    assert readable("token-0999 item-0999 token-0000") == "[token] [token] token-0000"


@pytest.fixture
def restore_logging_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the logging configuration of the process after the test."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.mark.usefixtures("restore_logging_configuration")
def test_configured_logging_writes_records_and_uncaught_errors_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("warning", "json")
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
    assert (second["level"], second["error"]) == ("critical", "lost")
