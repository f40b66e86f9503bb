"""The JSON bodies of the client's requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STOP: Final = {False: b'{"force":false}', True: b'{"force":true}'}


def make_metadata_patch_body(patch: Mapping[str, str | None]) -> bytes:
    """Return the body of a request that merges `patch` into an item's metadata.

    Raises:
        TypeError: A key or a value is of another type, or cannot be sent.
    """
    texts = {
        _require_plain_string(key): None if value is None else _require_plain_string(value)
        for key, value in patch.items()
    }
    return orjson.dumps({"metadata": texts})


def make_create_items_body(fields: Mapping[str, Any]) -> bytes:
    """Return the body of a request that creates items; fields that are None are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    return orjson.dumps(given, default=dict)


def make_append_events_body(new_events: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the body of a request that appends events to a session.

    Raises:
        TypeError: A value cannot be written as JSON.
    """
    return orjson.dumps({"events": new_events}, default=dict)


def _require_plain_string(text: object) -> str:
    # Without this check, the control plane would refuse a value such as a number. The error would
    # come later, and its traceback would not show the handler's line with that value.
    if not isinstance(text, str):
        raise TypeError("metadata: a key or a value is not a string")
    # Convert to a plain str: orjson refuses a subclass of str as a key, such as a StrEnum member.
    return str.__str__(text)
