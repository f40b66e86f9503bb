"""The JSON bodies of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STOP: Final = {False: b'{"force":false}', True: b'{"force":true}'}


def update(patch: Mapping[str, str | None]) -> bytes:
    """Return the body of a merge patch of metadata.

    Raises:
        TypeError: A key or a value is of another type, or cannot be sent.
    """
    texts = {
        _plain_text(key): None if value is None else _plain_text(value)
        for key, value in patch.items()
    }
    return orjson.dumps({"metadata": texts})


def enqueue(fields: Mapping[str, Any]) -> bytes:
    """Return the body that creates work; fields that are None are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    return orjson.dumps(given, default=dict)


def events(new_events: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the body that appends events.

    Raises:
        TypeError: A value cannot be written as JSON.
    """
    return orjson.dumps({"events": new_events}, default=dict)


def _plain_text(text: object) -> str:
    # The control plane would refuse a number, far from the code of the handler that wrote it.
    if not isinstance(text, str):
        raise TypeError("metadata: a key or a value is not a string")
    # orjson accepts only a plain str as a key, and not a member of a StrEnum, for example
    return str.__str__(text)
