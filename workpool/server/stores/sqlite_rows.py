"""Conversion between SQLite rows and environments, items, sessions and events, with checks.

A file may have been edited, or written by a version with an error. The start reports a malformed
row, so that no later call fails because of it.
"""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import orjson

from workpool.server.api_errors import StoreError
from workpool.server.conversation import StoredEvent
from workpool.server.environments import Environment
from workpool.server.stored_item import Item
from workpool.server.stored_session import StoredSession
from workpool.server.timestamps import SECOND
from workpool.wire.protocol import STATES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Row: TypeAlias = Item | StoredSession | StoredEvent | Environment

_YEAR_10000: Final = 253_402_300_800 * SECOND
"""The first time that cannot be written as text."""


class DeletedRow(NamedTuple):
    """A row to delete, given by the dataclass of the row's table and the row's id."""

    kind: type[Row]
    id: str


class RowTable:
    """The SQL statements and conversions of one table, whose columns are a dataclass's fields.

    Attributes:
        kind: The dataclass.
        read: The statement that selects all rows in ascending order of ids.
        write: The statement that inserts or replaces a row.
        delete: The statement that deletes the row of an id.
    """

    def __init__(self, kind: type[Any], read: str, write: str, delete: str) -> None:
        self.kind = kind
        self.read = read
        self.write = write
        self.delete = delete
        columns = [field.name for field in fields(kind)]
        types = [str(field.type) for field in fields(kind)]
        self._values = attrgetter(*columns)
        self._checks = [(name, _CHECKS[each]) for name, each in zip(columns, types, strict=True)]
        self._json = [place for place, each in enumerate(types) if each.startswith(_JSON)]
        self._flags = [place for place, each in enumerate(types) if each == "bool"]

    def encode_row(self, one: Row) -> list[Any]:
        """Return the column values of `one`, an object of this table's dataclass."""
        row = list(self._values(one))
        for place in self._json:
            if row[place] is not None:
                row[place] = orjson.dumps(row[place], default=dict).decode()
        return row

    def decode_row(self, columns: Sequence[Any]) -> Any:
        """Return the object with these column values. Raises `StoreError` for a malformed value."""
        row = list(columns)
        for place in self._json:
            row[place] = _from_json(row[place])
        for value, (name, is_valid) in zip(row, self._checks, strict=True):
            if not is_valid(value):
                raise StoreError(f"the row {row[0]!r:.80} cannot be read: {name} is malformed")
        for place in self._flags:
            row[place] = bool(row[place])
        return self.kind(**dict(zip((name for name, _ in self._checks), row, strict=True)))


def _from_json(text: object) -> object:
    try:
        return orjson.loads(text) if isinstance(text, str) else text
    except orjson.JSONDecodeError:
        return text  # `decode_row` then reports that this column is malformed


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < _YEAR_10000


def _is_boolean(value: object) -> bool:
    return value in {0, 1}


def _is_item_state(value: object) -> bool:
    return value in STATES


def _is_event(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("id", "type", "processed_at")
    )


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_string_mapping(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _is_session_script(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _make_check_that_allows_none(is_valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_valid(value)


_JSON: Final = ("Mapping", "Script")
"""The prefixes of the names of types that are written as JSON."""

_CHECKS: Final[Mapping[str, Callable[[object], bool]]] = {
    "str": _is_text,
    "str | None": _make_check_that_allows_none(_is_text),
    "int": _is_number,
    "int | None": _make_check_that_allows_none(_is_number),
    "bool": _is_boolean,
    "State": _is_item_state,
    "Mapping[str, str]": _is_string_mapping,
    "Mapping[str, Any]": _is_event,
    "Mapping[str, Any] | None": _make_check_that_allows_none(_is_object),
    "Script | None": _make_check_that_allows_none(_is_session_script),
}
"""For each type of a field, the check of a column's value."""

TABLES: Final = (
    RowTable(
        StoredSession,
        "SELECT * FROM session ORDER BY id",
        "INSERT OR REPLACE INTO session VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        "DELETE FROM session WHERE id = ?",
    ),
    RowTable(
        Item,
        "SELECT * FROM work ORDER BY id",
        "INSERT OR REPLACE INTO work VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        "DELETE FROM work WHERE id = ?",
    ),
    RowTable(
        StoredEvent,
        "SELECT * FROM event ORDER BY id",
        "INSERT OR REPLACE INTO event VALUES (?, ?, ?)",
        "DELETE FROM event WHERE id = ?",
    ),
    RowTable(
        Environment,
        "SELECT * FROM environment ORDER BY id",
        "INSERT OR REPLACE INTO environment VALUES (?, ?, ?, ?, ?)",
        "DELETE FROM environment WHERE id = ?",
    ),
)
