"""Log lines on stderr, text or JSON; the only place that configures logging.

A line is time (UTC), level, logger and message, then what the record carries beside: the ids of
`session.log`, and whatever a plugin passed as `extra`.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final

_STANDARD: Final = {
    *vars(logging.makeLogRecord({})),
    "asctime",
    "message",
    "taskName",  # from Python 3.12 on
}
log = logging.getLogger("workpool")


def configure(level: str, form: str) -> None:
    """Log to stderr from `level` on, as `text` or `json`; uncaught errors and warnings, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("crashed error=%s", kind.__name__, exc_info=(kind, error, trace))


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str | int | None) else str(value)
        for name, value in vars(record).items()
        if name not in _STANDARD
    }


class TextFormatter(logging.Formatter):
    """`2026-03-01T12:00:00.000Z INFO    workpool.session hello work_id=… session_id=…`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the stack of an error below it."""
        line = f"{_time(record)} {record.levelname:<7} {record.name} {record.getMessage()}"
        for name, value in _extras(record).items():
            text = str(value)
            line += f" {name}={text if text.isprintable() and ' ' not in text else repr(text)}"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        if record.stack_info:
            line += f"\n{self.formatStack(record.stack_info)}"
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line; an error is inside it, as `error`."""

    def format(self, record: logging.LogRecord) -> str:
        """Exactly one line."""
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = _extras(record) | fields
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = {
                "type": type(record.exc_info[1]).__name__,
                "message": str(record.exc_info[1]),
                "stack": self.formatException(record.exc_info),
            }
        if record.stack_info:
            fields["stack"] = record.stack_info
        return json.dumps(fields, ensure_ascii=False)
