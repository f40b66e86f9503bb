"""Items, heartbeats and queue statistics, and the parsers of their JSON.

Parsing is strict about fields that decide (ids, states, leases) and lenient about the others: a
time that cannot be read is None, metadata that is not text is left out, unknown fields are ignored.
Only the bearer token for the session's calls is kept of an item's `secret`, and no repr shows it. A
malformed object raises `ValueError` that names the field; its content is never quoted. See
workpool/docs/protocol.md, "Objects".
"""

from __future__ import annotations

import base64
import math
import re
from dataclasses import dataclass, make_dataclass
from datetime import UTC, datetime
from sys import intern
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import orjson

from workpool.logs import hide_item_token
from workpool.secret import Secret
from workpool.wire import protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.wire.protocol import State


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One item of the queue. `metadata` is read-only.

    Times are aware datetimes in UTC; None if the control plane gave none that can be read. A time
    without a zone counts as UTC.

    `type` is `data.type` ("session", "healthcheck", …); `session_id` is `data.id`, which only a
    session must have: it is empty for an item of another type without one.
    `last_heartbeat` is `latest_heartbeat_at` as the control plane wrote it: the next heartbeat must
    expect exactly this text. `sessions_token`, if there is one, is the bearer token for the calls
    on this item's session only. `traceparent` is the W3C trace context that came in the headers of
    the poll's answer.
    """

    id: str
    type: str
    session_id: str
    environment_id: str
    state: State
    metadata: Mapping[str, str]
    created_at: datetime | None
    acknowledged_at: datetime | None
    started_at: datetime | None
    latest_heartbeat_at: datetime | None
    last_heartbeat: str | None
    stop_requested_at: datetime | None
    stopped_at: datetime | None
    sessions_token: Secret | None = None
    traceparent: str | None = None


_Draft: Final[Any] = make_dataclass("_Draft", WorkItem.__slots__, slots=True)
"""A mutable class with the fields of `WorkItem`, in their order.

It is used while an item is parsed, because setting the fields of a frozen class would take a third
of the parsing time.
"""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The answer to a heartbeat: whether the lease was extended, and the state of the item.

    Attributes:
        last_heartbeat: Opaque, sent back unchanged. Empty if the control plane gave none, which is
            allowed for a lease that it has not extended, and for a stopped item.
        lease_extended: Whether the item is held for `ttl_seconds` from now on.
        state: The item's state.
        ttl_seconds: 0 if the lease was not extended and none was given.
    """

    last_heartbeat: str
    lease_extended: bool
    state: State
    ttl_seconds: float


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Statistics of the queue: counts of items, and of the workers that poll.

    `running` counts the items that are starting, active or stopping, and `stopped` the stopped
    items that the control plane still stores. Both are None from a control plane that does not
    count them.
    """

    depth: int
    pending: int
    oldest_queued_at: datetime | None
    workers_polling: int
    running: int | None = None
    stopped: int | None = None


def parse_item(obj: object) -> WorkItem:
    """Parse the JSON object of an item.

    Raises:
        ValueError: A field is missing or malformed. Names the field and quotes no value.
    """
    # One expression is faster than a function call for each field, and each session parses three
    # items.
    if not (
        isinstance(obj, dict)
        and isinstance(data := obj.get("data"), dict)
        and isinstance(work_id := obj.get("id"), str)
        and _is_id(work_id)
        and isinstance(item_type := data.get("type"), str)
        and isinstance(environment_id := obj.get("environment_id"), str)
        and _is_id(environment_id)
        and (state := obj.get("state")) in protocol.STATES
    ):
        raise ValueError(_describe_malformed_item(obj))
    get, session_id = obj.get, data.get("id")
    if not isinstance(session_id, str) or not _is_id(session_id):
        session_id = _parse_optional_session_id(session_id, item_type)
    heartbeat_at, secret = get("latest_heartbeat_at"), get("secret")
    item: Any = _Draft(
        work_id,
        intern(item_type),  # saves memory: few types exist, so equal strings become one object
        session_id,
        intern(environment_id),
        intern(state),
        _parse_metadata(get("metadata")),
        _parse_time(get("created_at")),
        at if (at := get("acknowledged_at")) is None else _parse_time(at),
        at if (at := get("started_at")) is None else _parse_time(at),
        heartbeat_at if heartbeat_at is None else _parse_time(heartbeat_at),
        heartbeat_at if heartbeat_at is None else _parse_last_heartbeat(heartbeat_at),
        at if (at := get("stop_requested_at")) is None else _parse_time(at),
        at if (at := get("stopped_at")) is None else _parse_time(at),
        None if secret is None else _parse_sessions_token(secret),
        None,
    )
    item.__class__ = WorkItem
    made: WorkItem = item
    return made


def parse_heartbeat(obj: object) -> Heartbeat:
    """Parse the answer to a heartbeat.

    Raises:
        ValueError: A field is missing or malformed. Names the field and quotes no value.
    """
    # One expression is faster than a function call for each field, and each session sends many
    # heartbeats.
    seconds: Any
    if (
        isinstance(obj, dict)
        and obj.get("lease_extended") is True
        and (state := obj.get("state")) in protocol.STATES
        and isinstance(last_heartbeat := obj.get("last_heartbeat"), str)
        and 0 < len(last_heartbeat) <= _TIME_LENGTH_MAX
        and type(seconds := obj.get("ttl_seconds")) in _NUMBERS
        and 0 < seconds < math.inf
    ):
        return Heartbeat(last_heartbeat, True, state, seconds)  # noqa: FBT003 - in the order of its fields
    return _parse_heartbeat_without_extension(obj)


def _parse_heartbeat_without_extension(obj: object) -> Heartbeat:
    """Parse the answer to a heartbeat that did not extend the lease.

    Raises:
        ValueError: A field is missing or malformed.
    """
    get = _require_json_object("heartbeat", obj).get
    extended = _require_flag("lease_extended", get("lease_extended"))
    state = _require_item_state(get("state"))
    last_heartbeat, ttl_seconds = get("last_heartbeat"), get("ttl_seconds")
    over = not extended or state == protocol.STOPPED
    return Heartbeat(
        "" if over and last_heartbeat is None else _parse_expected_last_heartbeat(last_heartbeat),
        extended,
        state,
        0.0 if over and ttl_seconds in (None, 0) else _require_seconds("ttl_seconds", ttl_seconds),
    )


def parse_stats(obj: object) -> QueueStats:
    """Parse the queue statistics; the anthropic dialect may leave `workers_polling` out.

    Raises:
        ValueError: A field is missing or malformed. Names the field and quotes no value.
    """
    get = _require_json_object("queue stats", obj).get
    workers = get("workers_polling")
    return QueueStats(
        depth=_require_count("depth", get("depth")),
        pending=_require_count("pending", get("pending")),
        oldest_queued_at=_parse_time(get("oldest_queued_at")),
        workers_polling=0 if workers is None else _require_count("workers_polling", workers),
        running=_parse_optional_count(get("running")),
        stopped=_parse_optional_count(get("stopped")),
    )


_is_id = re.compile(protocol.ID_PATTERN).fullmatch
_is_token = re.compile(r"[\x21-\x7e]{1,8192}").fullmatch
_NUMBERS: Final = frozenset({int, float})
_NO_METADATA: Final[Mapping[str, str]] = MappingProxyType({})
_TIME_LENGTH_MAX: Final = 64
"""A heartbeat's time goes back to the control plane in a URL, which must stay short."""


def _parse_optional_count(value: object) -> int | None:
    """Return a count that only some control planes send; None if it is missing or malformed."""
    return value if type(value) is int and value >= 0 else None


def _require_json_object(name: str, value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError(f"{name}: not an object")


def _require_text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{name}: not a string")


def _describe_malformed_item(obj: object) -> str:
    """Describe the malformed field of an item that `parse_item` does not accept."""
    if not isinstance(obj, dict):
        return "work item: not an object"
    if not isinstance(data := obj.get("data"), dict):
        return "data: not an object"
    for name in ("id", "environment_id"):
        if not (isinstance(value := obj.get(name), str) and _is_id(value)):
            return f"{name}: not an id"
    if not isinstance(data.get("type"), str):
        return "data.type: not a string"
    return "state: not one of the protocol's five"


def _parse_optional_session_id(session_id: object, item_type: str) -> str:
    """Return "" for a missing session id. Only items of type `session` must have such an id.

    An id becomes a part of URLs, so a malformed id is an error.

    Raises:
        ValueError: The id is malformed, or an item of type `session` has none.
    """
    if session_id is None and item_type != protocol.SESSION:
        return ""
    raise ValueError("data.id: not an id")


def _parse_sessions_token(secret: object) -> Secret | None:
    """Return the token `sessions_token` in an item's `secret`; None if it cannot be read."""
    if not isinstance(secret, str) or not secret.isascii():
        return None
    try:
        # The base64 padding may be missing, so add it; `b64decode` ignores surplus padding.
        payload = orjson.loads(base64.urlsafe_b64decode(secret + "=="))
    except ValueError:
        return None
    token = payload.get("sessions_token") if isinstance(payload, dict) else None
    if not isinstance(token, str) or not _is_token(token):
        return None
    hide_item_token(token)
    return Secret(token)


def _require_item_state(value: object) -> State:
    if value in protocol.STATES:
        return value
    raise ValueError("state: not one of the protocol's five")


def _parse_metadata(value: object) -> Mapping[str, str]:
    """Return the metadata entries whose values are strings; empty if `value` is not an object."""
    if not isinstance(value, dict) or not value:
        return _NO_METADATA
    for text in value.values():
        if not isinstance(text, str):
            texts = {name: text for name, text in value.items() if isinstance(text, str)}
            return MappingProxyType(texts)
    return MappingProxyType(value)


def _parse_time(value: object) -> datetime | None:
    if not isinstance(value, str) or len(value) > _TIME_LENGTH_MAX:
        return None
    try:
        time = datetime.fromisoformat(value)
        if time.tzinfo is UTC:
            return time
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _parse_last_heartbeat(value: object) -> str | None:
    """Return the time of the item's last heartbeat as the text that the control plane wrote.

    A later heartbeat may send this text back in its URL. Returns None if the value is not text, is
    empty, or is too long for a URL.
    """
    return value if isinstance(value, str) and 0 < len(value) <= _TIME_LENGTH_MAX else None


def _parse_expected_last_heartbeat(value: object) -> str:
    """Return the value that the next heartbeat sends as `expected_last_heartbeat`.

    This is `last_heartbeat` of the answer. Empty text means that there was no heartbeat before.
    """
    text = _require_text("last_heartbeat", value)
    if len(text) > _TIME_LENGTH_MAX:
        raise ValueError("last_heartbeat: too long")
    return text or protocol.NO_HEARTBEAT


def _require_flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name}: not a boolean")


def _require_count(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"{name}: not a count")


def _require_seconds(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return value
    raise ValueError(f"{name}: not a positive number of seconds")
