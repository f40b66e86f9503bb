"""The fields of log records: their names, and the ids that every record of a pool has.

The message of a record is a constant text. Variable data are fields: attributes of the record,
given as `extra` or added by `PoolIds`. Names and types are stable, so that logs can be searched.
See workpool/docs/operating.md, "Fields".
"""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableMapping

FIELDS: Final[Mapping[str, Literal["text", "number"]]] = {
    "environment_id": "text",
    "worker_id": "text",
    "trace_id": "text",
    "work_id": "text",
    "session_id": "text",
    "handler": "text",
    "outcome": "text",
    "seconds": "number",
    "attempt": "number",
    "retry": "number",
    "reason": "text",
    "type": "text",
    "direction": "text",
    "stage": "text",
    "origin": "text",
    "result": "text",
    "mode": "text",
    "until": "text",
    "running": "number",
    "abandoned": "number",
    "limit": "text",
    "timeout": "number",
    "in_a_row": "number",
    "wait_seconds": "number",
    "count": "number",
    "url": "text",
    "plugin": "text",
    "event_type": "text",
    "task": "text",
    "thread_name": "text",
    "signal": "text",
    "status": "number",
    "file": "text",
    "method": "text",
    "path": "text",
    "error": "text",
    "error_type": "text",
    "stack": "text",
}
"""The type of each field that the records of this package have, in the order of the page."""

_IDS: ContextVar[Mapping[str, str] | None] = ContextVar("workpool_log_ids", default=None)


@contextmanager
def pool_log_ids_context(ids: Mapping[str, str]) -> Iterator[None]:
    """Add a pool's ids to the log records of a `with` block and of tasks that the block starts."""
    token = _IDS.set(ids)
    try:
        yield
    finally:
        _IDS.reset(token)


class PoolIds(logging.Filter):
    """A filter that adds `environment_id`, `worker_id` and `trace_id` to records without them.

    A record that a pool's task makes has the ids of that pool. The trace is OpenTelemetry's current
    one, if the program uses OpenTelemetry. All loggers named `workpool.…` have this filter; add it
    to a log handler so that records of other loggers have the ids as well.

    Args:
        default: Returns the ids for records that are made outside of a pool's tasks.
    """

    def __init__(self, default: Callable[[], Mapping[str, str]] = dict) -> None:
        super().__init__()
        self._default = default

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields that the record lacks. Return True, so that every record is logged."""
        fields = vars(record)
        ids = _IDS.get()
        for name, value in (self._default() if ids is None else ids).items():
            fields.setdefault(name, value)
        if "trace_id" not in fields and (trace_id := current_trace_id()) is not None:
            fields["trace_id"] = trace_id
        return True


_POOL_IDS: Final = PoolIds()


def pool_logger(name: str) -> logging.Logger:
    """Return the logger of this name, with the ids of the current pool in its records."""
    logger = logging.getLogger(name)
    logger.addFilter(_POOL_IDS)
    return logger


class FieldsAdapter(logging.LoggerAdapter[logging.Logger]):
    """A logger that adds its own fields to those that a log call passes in `extra`."""

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[object, MutableMapping[str, Any]]:
        """Return the arguments of a log call, with the fields of this logger added to `extra`."""
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


def current_trace_id() -> str | None:
    """Return OpenTelemetry's current trace id, 32 hexadecimal digits; None if there is none.

    The library is never imported here: a program that has not imported it has no trace.
    """
    current_span = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if current_span is None:
        return None
    context = current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None
