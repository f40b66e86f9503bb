"""Parser of the events that a client may send to a session; a malformed event raises a 400.

Independent of any session: `conversation` decides whether an event fits the earlier ones.
See workpool/docs/protocol.md, "Events".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from workpool.server.api_errors import APIError
from workpool.server.parsing.request_values import parse_json_object
from workpool.wire import protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BATCH_MAX: Final = 100


def parse_event_batch(content: bytes) -> list[dict[str, Any]]:
    """Parse the body of a request that sends events; raises a 400 if any event is malformed."""
    return parse_client_events(parse_json_object(content).get("events"), "events", BATCH_MAX)


def parse_client_events(given: object, name: str, limit: int) -> list[dict[str, Any]]:
    """Parse a list of 1 to `limit` events from the field `name`; any other list raises a 400."""
    if not isinstance(given, list) or not 1 <= len(given) <= limit:
        raise APIError(400, f"{name} must be a list of 1 to {limit} events", name)
    events = [_parse_event(event) for event in given]
    try:
        orjson.dumps({"data": events})
    # orjson encodes the answers, too, and limits the nesting of values. Refuse an event that is
    # nested too deep, because no answer could contain it.
    except orjson.JSONEncodeError:
        raise APIError(400, f"{name} are nested too deep", name) from None
    return events


def _parse_event(given: object) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise APIError(400, "an event must be an object", "events")
    kind = given.get("type")
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise APIError(400, "not an event type that a client may send", "type")
    event: dict[str, Any] = {"type": kind}
    for name, (check, required) in fields.items():
        if given.get(name) is None:
            if required:
                raise APIError(400, f"{kind}: {name} is missing", name)
        elif check(given[name]):
            event[name] = given[name]
        else:
            raise APIError(400, f"{kind}: {name} is malformed", name)
    if "deny_message" in event and event["result"] != "deny":
        raise APIError(400, f"{kind}: deny_message goes with a denial only", "deny_message")
    return event


def _is_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 128  # noqa: PLR2004 - as in ID_PATTERN


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_confirmation_result(value: object) -> bool:
    return value in {"allow", "deny"} if isinstance(value, str) else False


def _is_content_block_list(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_content_block, value))


def _is_message_content(value: object) -> bool:
    return _is_content_block_list(value) and bool(value)


def _is_content_block(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return False
    return value["type"] != "text" or isinstance(value.get("text"), str)


_FIELDS: Final[Mapping[str, Mapping[str, tuple[Callable[[object], bool], bool]]]] = {
    protocol.USER_MESSAGE: {"content": (_is_message_content, True)},
    protocol.USER_INTERRUPT: {},
    protocol.USER_TOOL_RESULT: {
        "tool_use_id": (_is_id, True),
        "content": (_is_content_block_list, False),
        "is_error": (_is_boolean, False),
    },
    protocol.USER_CUSTOM_TOOL_RESULT: {
        "custom_tool_use_id": (_is_id, True),
        "content": (_is_content_block_list, False),
        "is_error": (_is_boolean, False),
    },
    protocol.USER_TOOL_CONFIRMATION: {
        "tool_use_id": (_is_id, True),
        "result": (_is_confirmation_result, True),
        "deny_message": (_is_text, False),
    },
}
"""For each type its fields: the check of each, and whether it is required; others are ignored."""
