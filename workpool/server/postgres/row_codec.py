"""Conversion between rows of the database and items, sessions, environments and events.

Statements name their columns, since a later migration may add some. JSON is text. Fields that may
contain any text are JSON too, since PostgreSQL refuses a NUL character.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import orjson

from workpool.server.conversation import StoredEvent
from workpool.server.environments import Environment
from workpool.server.history import Record
from workpool.server.stored_item import Item
from workpool.server.stored_session import SessionView, StoredSession
from workpool.server.timestamps import SECOND
from workpool.wire.protocol import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ITEM_FIELDS: Final = (
    "id",
    "environment_id",
    "session_id",
    "created_at",
    "type",
    "state",
    "metadata",
    "acknowledged_at",
    "started_at",
    "heartbeat_at",
    "stop_requested_at",
    "stopped_at",
    "holder",
    "delivered_at",
    "lease_end",
    "ttl_seconds",
    "beaten",
)
_SESSION_FIELDS: Final = (
    "id",
    "environment_id",
    "metadata",
    "created_at",
    "script",
    "title",
    "agent",
    "archived_at",
)
ITEM_COLUMNS: Final = ", ".join(f"i.{name}" for name in ITEM_FIELDS)
"""The columns of an item, of the table or subquery `i`, for `item_from_row`."""
SESSION_COLUMNS: Final = ", ".join(f"s.{name}" for name in _SESSION_FIELDS)
"""The columns of a session, of the table `s`, for `session_from_row`."""
VIEW_COLUMNS: Final = f"{SESSION_COLUMNS}, s.status, s.last_event_at, {ITEM_COLUMNS}"
"""The columns of a session `s` and of its latest item `i`, for `session_view_from_row`."""
VIEW_WIDTH: Final = len(_SESSION_FIELDS) + 2 + len(ITEM_FIELDS)
ENVIRONMENT_COLUMNS: Final = "id, name, description, metadata, created_at"
RECORD_COLUMNS: Final = "time, work_id, kind, worker_id, state, lease_end, op"

_ID: Final = re.compile(ID_PATTERN)


def has_id_format(text: str) -> bool:
    """Return whether a text has the form of an id, so that it can be a value in a statement."""
    return _ID.fullmatch(text) is not None


def is_storable_text(text: str) -> bool:
    """Return whether a text column of PostgreSQL can contain this text."""
    return "\0" not in text and text.isprintable()


def to_json(value: object) -> str:
    """Return a value as JSON text."""
    return orjson.dumps(value, default=dict).decode()


def to_json_or_null(value: object) -> str | None:
    """Return a value as JSON text, or None if the value is None."""
    return None if value is None else to_json(value)


def item_from_row(row: Sequence[Any]) -> Item:
    """Return the item whose fields are the first columns of a row."""
    values = dict(zip(ITEM_FIELDS, row, strict=False))
    values["metadata"] = orjson.loads(values["metadata"])
    return Item(**values)


def session_from_row(row: Sequence[Any]) -> StoredSession:
    """Return the session whose fields are the first columns of a row."""
    values = dict(zip(_SESSION_FIELDS, row, strict=False))
    for name in ("metadata", "script", "title", "agent"):
        if values[name] is not None:
            values[name] = orjson.loads(values[name])
    return StoredSession(**values)


def session_view_from_row(row: Sequence[Any]) -> SessionView:
    """Return a session and its latest item from the first columns of a row."""
    width = len(_SESSION_FIELDS)
    return SessionView(
        session_from_row(row), item_from_row(row[width + 2 :]), row[width], row[width + 1]
    )


def session_to_row(session: StoredSession) -> list[Any]:
    """Return the values of a session's columns."""
    return [
        session.id,
        session.environment_id,
        to_json(session.metadata),
        session.created_at,
        to_json_or_null(session.script),
        to_json_or_null(session.title),
        to_json_or_null(session.agent),
        session.archived_at,
    ]


def environment_from_row(row: Sequence[Any]) -> Environment:
    """Return the environment in a row with the columns `ENVIRONMENT_COLUMNS`."""
    environment_id, name, description, metadata, created_at = row
    return Environment(
        environment_id,
        orjson.loads(name),
        orjson.loads(description),
        orjson.loads(metadata),
        created_at,
    )


def environment_to_row(environment: Environment) -> list[Any]:
    """Return the values of an environment's columns."""
    return [
        environment.id,
        to_json(environment.name),
        to_json(environment.description),
        to_json(environment.metadata),
        environment.created_at,
    ]


def event_from_columns(session_id: str, event_id: str, value: str) -> StoredEvent:
    """Return a session's event, given the values of the columns `event_id` and `value`."""
    return StoredEvent(event_id, session_id, orjson.loads(value))


def events_to_columns(events: Iterable[StoredEvent]) -> list[list[str]]:
    """Return four lists for SQL's `unnest`: the ids, types, times and JSON texts of events."""
    rows = [
        (event.id, event.type, str(event.value["processed_at"]), to_json(event.value))
        for event in events
    ]
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[], [], [], []]


def history_record_from_row(row: Sequence[Any]) -> Record:
    """Return the history record in a row with the columns `RECORD_COLUMNS`."""
    time, work_id, kind, worker_id, state, lease_end, op = row
    return Record(
        time / SECOND,
        work_id,
        kind,
        worker_id,
        state,
        None if lease_end is None else lease_end / SECOND,
        op,
    )
