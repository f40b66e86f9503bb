"""Log formatters whose lines are safe to print: escaped, bounded, and without tokens.

Text from outside, such as the type of an item, reaches the log in messages, in extra values and in
exceptions. The formatters of this module treat the records of all loggers alike: no record can
forge a second line, move the cursor of a terminal, or fill a disk.

A line is time (UTC), level, logger and message, then the extra values of the record: the fields of
`workpool.log_fields`, and the `extra` of a plugin. See workpool/docs/operating.md, "Logs".
"""

from __future__ import annotations

import json
import logging
import math
import threading
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Sequence

MESSAGE_CHARACTERS: Final = 8_000
VALUE_CHARACTERS: Final = 2_000
"""Characters of one extra value."""
LINE_CHARACTERS: Final = 16_000
ERROR_CHARACTERS: Final = 32_000
"""Characters of an exception with its traceback; each line has `MESSAGE_CHARACTERS` at most."""
STACK_CHARACTERS: Final = 150_000
"""Characters of the stacks of all threads, which contain no text from outside."""
EXTRAS: Final = 64
"""Extra values of one record."""
_REDACTED: Final = "[token]"
"""Takes the place of a token. A token that is a part of it is not redacted: text that is redacted
twice would change."""
TOKEN_CHARACTERS_MIN: Final = 4
"""A shorter token is not redacted: it is part of many words and guards nothing."""
TOKENS: Final = 64
ITEM_TOKENS: Final = 64
"""Numbers of tokens that are redacted: the last ones of clients, and the last ones of items."""
_INDENT: Final = "\n  "
_STANDARD: Final = {
    *vars(logging.makeLogRecord({})),
    "asctime",
    "message",
    "taskName",  # Set on every record by Python 3.12 and later.
}
_tokens: dict[str, Sequence[str]] = {}
_item_tokens: dict[str, Sequence[str]] = {}
"""Each token with the forms in which text may contain it; empty until the first text is redacted,
since most items end without a record."""
_lock = threading.Lock()


def hide_token(token: str) -> None:
    """Redact the token of a client from all texts that `readable` returns after this call."""
    _add_token_to_redact(_tokens, token, TOKENS)


def hide_item_token(token: str) -> None:
    """Redact the token of one item from all texts that `readable` returns after this call."""
    _add_token_to_redact(_item_tokens, token, ITEM_TOKENS)


def _add_token_to_redact(tokens: dict[str, Sequence[str]], token: str, limit: int) -> None:
    if token in tokens or token in _REDACTED or len(token) < TOKEN_CHARACTERS_MIN:
        return
    with _lock:
        tokens[token] = ()
        while len(tokens) > limit:
            del tokens[next(iter(tokens))]


def readable(text: str, limit: int = MESSAGE_CHARACTERS) -> str:
    """Return the text in a form that is safe in a log line or on a terminal.

    Characters that are not printable become escape sequences: line ends, control characters, marks
    that change the direction of text. Text longer than `limit` characters loses its middle. Tokens
    are redacted.
    """
    return _make_printable(_redact_tokens(text), limit)


def escape_text(text: str) -> str:
    """Return the text with an escape sequence for each character that is not printable."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _make_printable(text: str, limit: int) -> str:
    text = _shorten_in_middle(text, limit)
    return text if text.isprintable() else _shorten_in_middle(escape_text(text), limit)


def _redact_tokens(text: str) -> str:
    found: list[str] = []
    for tokens in (_tokens, _item_tokens):
        for token, forms in tuple(tokens.items()):
            if not forms:
                forms = tokens[token] = _list_token_forms(token)  # noqa: PLW2901 - the same, computed now
            for form in forms:
                if form in text:
                    found.append(form)  # noqa: PERF401 - a third of the time of a generator
    # Replace the longest form of a token first, because it may contain a shorter form.
    for form in sorted(found, key=len, reverse=True):
        text = text.replace(form, _REDACTED)
    return text


def _list_token_forms(token: str) -> Sequence[str]:
    """Return the forms in which a text may contain the token: plain, quoted and encoded."""
    return list({token, repr(token)[1:-1], json.dumps(token)[1:-1], quote(token, safe="")})


def _limit_length(text: str, limit: int) -> str:
    """Cut a long text to `limit`; redact it first, as a cut could leave a part of a token."""
    return text if len(text) <= limit else _shorten_in_middle(_redact_tokens(text), limit)


def _shorten_in_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    note = f" … {len(text)} characters … "
    room = max(0, limit - len(note))
    tail = room // 4
    return (text[: room - tail] + note + text[len(text) - tail :])[:limit]


def _split_into_printable_lines(text: str, limit: int) -> list[str]:
    """Return the lines of a text, redacted and printable, such as those of a traceback."""
    lines = _shorten_in_middle(_redact_tokens(text), limit).split("\n")
    return [_make_printable(line, MESSAGE_CHARACTERS) for line in lines]


def _format_record_message(record: logging.LogRecord) -> str:
    """Return the message of a record; a substitute if it cannot be formatted with its arguments."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - code of users, in `__str__`
        return f"cannot be formatted: {_str_or_placeholder(record.msg)}"


def _str_or_placeholder(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - code of users
        return f"<{type(value).__name__} that has no text>"


def _format_record_time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _limit_extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    found = ((name, value) for name, value in vars(record).items() if name not in _STANDARD)
    return {
        _limit_length(name, VALUE_CHARACTERS): value
        if value is None or (isinstance(value, int | float) and math.isfinite(value))
        else _limit_length(_str_or_placeholder(value), VALUE_CHARACTERS)
        for name, value in islice(found, EXTRAS)
    }


class TextFormatter(logging.Formatter):
    """Formats lines like `2026-03-01T12:00:00.000Z INFO    workpool.session hello work_id=…`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line, with the stack of an error indented below the line."""
        message = _make_printable(
            _limit_length(_format_record_message(record), MESSAGE_CHARACTERS), MESSAGE_CHARACTERS
        )
        # Cut the message and each field separately, so that a line with a long message still has
        # the ids.
        line = f"{_format_record_time(record)} {record.levelname:<7} {record.name} {message}"
        for name, value in _limit_extra_fields(record).items():
            text = str(value)
            if name == "error" and message.endswith(text):
                continue  # Omit the field: the message already ends with the text of the error.
            plain = text.isprintable() and " " not in text
            line += f" {name}={text if plain else repr(_redact_tokens(text))}"
        lines = [readable(line, LINE_CHARACTERS)]
        if record.exc_info:
            lines += _split_into_printable_lines(
                self.formatException(record.exc_info), ERROR_CHARACTERS
            )
        if record.stack_info:
            lines += _split_into_printable_lines(
                self.formatStack(record.stack_info), STACK_CHARACTERS
            )
        return _INDENT.join(lines)


class JsonFormatter(logging.Formatter):
    """Formats each record as one flat JSON object, whose values are strings and numbers.

    An exception becomes three members: `error` is its text, beside `error_type` and `stack`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as exactly one line of JSON."""
        fields: dict[str, Any] = {
            "time": _format_record_time(record),
            "level": readable(record.levelname, VALUE_CHARACTERS).lower(),
            "logger": readable(record.name, VALUE_CHARACTERS),
            "message": readable(_format_record_message(record)),
        }
        extras = {
            name if name.isidentifier() else readable(name): readable(value, VALUE_CHARACTERS)
            if isinstance(value, str)
            else value
            for name, value in _limit_extra_fields(record).items()
        }
        fields |= {name: value for name, value in extras.items() if name not in fields}
        stack: list[str] = []
        if record.exc_info and record.exc_info[1] is not None:
            stack = _split_into_printable_lines(
                self.formatException(record.exc_info), ERROR_CHARACTERS
            )
            fields["error"] = readable(_str_or_placeholder(record.exc_info[1]))
            fields["error_type"] = readable(type(record.exc_info[1]).__name__, VALUE_CHARACTERS)
        if record.stack_info:
            stack += _split_into_printable_lines(record.stack_info, STACK_CHARACTERS)
        if stack:
            fields["stack"] = "\n".join(stack)
        return json.dumps(fields, ensure_ascii=False)
