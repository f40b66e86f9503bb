"""The endpoints of the protocol as a table: name, method, and the parser of the answer.

The module parses answers and sends nothing; a function that parses raises `ValueError` for an
unknown form.
See workpool/docs/protocol.md, "Calls" and "Sessions".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, TypeVar

import orjson

from workpool.errors import TooLargeError, TransientError, UnreadableError
from workpool.wire.events.event_calls import EventPage, SessionEvent
from workpool.wire.events.sse import FRAME_LIMIT_BYTES
from workpool.wire.items import WorkItem, parse_heartbeat, parse_item, parse_stats
from workpool.wire.protocol import ID_PATTERN
from workpool.wire.response import OversizedBody

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

ANSWER_LIMIT_BYTES: Final = 4 * 1024 * 1024
PAGE_TOKEN_CHARACTERS: Final = 4096
ITEM_LIMIT_BYTES: Final = ANSWER_LIMIT_BYTES + 64 * 1024
"""Larger than the limit of a poll, because control plane and pool add to the item after it."""


_NO_CONTENT_STATUS: Final = 204


class NoContentMarker:
    """The type of `NO_CONTENT`, which stands for the missing body of an answer with 204."""


NO_CONTENT: Final = NoContentMarker()
"""The parsed body of a 204, which differs from the JSON literal null."""


class MalformedItemError(ValueError):
    """Raised if a received item is malformed but its id can be read.

    Attributes:
        work_id: The id of the item.
    """

    def __init__(self, problem: str, work_id: str) -> None:
        super().__init__(problem)
        self.work_id = work_id


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[T]):
    """One call of the protocol: its name, its HTTP method, and the parser of its answer.

    Attributes:
        op: The name of the call in errors and metrics.
        parse: Parses the value that `load` returns.
        limit: The largest accepted answer in bytes.
        add_headers: Adds values of the answer's headers to the parsed value; None: adds nothing.
        load: Decodes the body of a successful answer.
    """

    op: str
    method: Literal["GET", "POST"]
    parse: Callable[[object], T]
    limit: int = ANSWER_LIMIT_BYTES
    add_headers: Callable[[T, Mapping[str, str]], T] | None = None
    load: Callable[[bytes], object] = orjson.loads

    def parse_success_answer(self, status: int, body: bytes | OversizedBody) -> T:
        """Return the parsed body of a successful answer.

        Raises:
            TransientError: The body is not what `load` or `parse` expects, or exceeds `limit`.
        """
        if isinstance(body, OversizedBody):
            raise TooLargeError(self.op, status, work_id=_find_id_in_truncated_json(body.beginning))
        failure: TransientError
        try:
            return self.parse(NO_CONTENT if status == _NO_CONTENT_STATUS else self.load(body))
        except orjson.JSONDecodeError:
            failure = TransientError(self.op, status, "the answer is not JSON", reason="bad_body")
        except MalformedItemError as error:
            problem = f"the answer is malformed: {error}"
            failure = UnreadableError(self.op, status, problem, work_id=error.work_id)
        except ValueError as error:
            problem = f"the answer is malformed: {error}"
            failure = TransientError(self.op, status, problem, reason="bad_body")
        # Raise outside of the except block. Inside it, the context of the error would be the
        # JSONDecodeError, which contains the whole body.
        raise failure


_BEFORE_ID: Final = rb'\s*"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[-+.0-9A-Za-z]+)\s*,'
_find_id = re.compile(rb'\s*\{(?:%b)*\s*"id"\s*:\s*"([A-Za-z0-9_-]{1,128})"' % _BEFORE_ID).match


def _find_id_in_truncated_json(beginning: bytes) -> str | None:
    """Return the `id` near the beginning of a truncated JSON object; None if none is found."""
    found = _find_id(beginning)
    return None if found is None else found[1].decode()


class ItemPage(NamedTuple):
    """One page of the list of items.

    `selected`: the control plane has applied the parameters `state`, `failed` and `order`.
    """

    items: list[WorkItem]
    next_page: str | None
    selected: bool = False


_EMPTY_POLL: Final[tuple[object, ...]] = (None, NO_CONTENT, {})
"""The answers of a poll without an item, one per kind of control plane: null, 204, `{}`."""


def _parse_poll_answer(obj: object) -> WorkItem | None:
    if obj in _EMPTY_POLL:
        return None
    try:
        return parse_item(obj)
    except ValueError as error:
        work_id = obj.get("id") if isinstance(obj, dict) else None
        if not isinstance(work_id, str) or not _is_id(work_id):
            raise
        raise MalformedItemError(str(error), work_id) from None


def _add_trace_context(item: WorkItem | None, headers: Mapping[str, str]) -> WorkItem | None:
    """Return the item with the `traceparent` of the headers; ignore a malformed `traceparent`."""
    trace = headers.get("traceparent")
    if item is None or trace is None or not _is_traceparent(trace):
        return item
    return replace(item, traceparent=trace)


def _check_object_shape(body: bytes) -> None:
    """Check that an answer looks like a JSON object, without parsing it.

    The check excludes a gateway's HTML page with status 200. No field of the object is used, and
    parsing it would take 1 % of the CPU time that the pool spends on an item.

    Raises:
        ValueError: The answer does not look like an object.
    """
    text = body.strip()
    if not (text.startswith(b"{") and text.endswith(b"}")):
        raise ValueError("not an object")


def _ignore_body(_: object) -> None:
    """Parse nothing. For calls that do not use the body of their answer."""


def _parse_stopped_item(obj: object) -> WorkItem | None:
    return None if obj is NO_CONTENT else parse_item(obj)


def _require_json_object(obj: object) -> dict[str, Any]:
    if isinstance(obj, dict):
        return obj
    raise ValueError("not an object")


def _require_page_rows(page: dict[str, Any]) -> list[object]:
    data = page.get("data")
    if isinstance(data, list):
        return data
    raise ValueError("data: not a list")


def _parse_next_page_token(page: dict[str, Any]) -> str | None:
    """Return the token of the page that follows; None for the last page.

    `has_more` is optional: without it a list continues while there is a `next_page`.
    """
    token = None if page.get("has_more") is False else page.get("next_page")
    if isinstance(token, str | None):
        # Refuse a long token: it becomes a part of a URL, and servers limit the length of URLs.
        if len(token or "") <= PAGE_TOKEN_CHARACTERS:
            return token or None
        raise ValueError("next_page: too long")
    raise ValueError("next_page: not a string")


def _parse_item_page(obj: object) -> ItemPage:
    page = _require_json_object(obj)
    items = [parse_item(row) for row in _require_page_rows(page)]
    return ItemPage(items, _parse_next_page_token(page), page.get("selected") is True)


def parse_event(obj: object) -> SessionEvent:
    """Parse one session event; `ValueError` if its type or id is missing or malformed."""
    event = _require_json_object(obj)
    kind, event_id = event.get("type"), event.get("id")
    # The event's id is sent back in a URL and a header; a malformed id could change the request.
    if isinstance(kind, str) and isinstance(event_id, str) and _is_id(event_id):
        return event
    raise ValueError("an event without type or id")


def _parse_event_page(obj: object) -> EventPage:
    page = _require_json_object(obj)
    return EventPage(
        [parse_event(row) for row in _require_page_rows(page)], _parse_next_page_token(page)
    )


def _parse_stored_events(obj: object) -> list[SessionEvent]:
    page = {} if obj is NO_CONTENT else _require_json_object(obj)
    # In the anthropic dialect, `data`, the list of the stored events, may be absent.
    return (
        [] if page.get("data") is None else [parse_event(row) for row in _require_page_rows(page)]
    )


_is_id: Final = re.compile(ID_PATTERN).fullmatch
_is_traceparent: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}").fullmatch

POLL: Final[Endpoint[WorkItem | None]] = Endpoint(
    "poll", "GET", _parse_poll_answer, add_headers=_add_trace_context
)
ACK: Final = Endpoint("ack", "POST", parse_item, ITEM_LIMIT_BYTES)
HEARTBEAT: Final = Endpoint("heartbeat", "POST", parse_heartbeat)
STOP: Final[Endpoint[WorkItem | None]] = Endpoint(
    "stop", "POST", _parse_stopped_item, ITEM_LIMIT_BYTES
)
STOP_UNREAD: Final[Endpoint[WorkItem | None]] = Endpoint(
    "stop", "POST", _ignore_body, load=_check_object_shape
)
UPDATE: Final = Endpoint("update", "POST", parse_item, ITEM_LIMIT_BYTES)
GET: Final = Endpoint("get", "GET", parse_item, ITEM_LIMIT_BYTES)
LIST: Final = Endpoint("list", "GET", _parse_item_page)
STATS: Final = Endpoint("stats", "GET", parse_stats)
SESSION: Final[Endpoint[Mapping[str, Any]]] = Endpoint("session", "GET", _require_json_object)
ENQUEUE: Final = Endpoint("enqueue", "POST", _parse_item_page)
EVENTS: Final = Endpoint("events", "GET", _parse_event_page, FRAME_LIMIT_BYTES)
SEND: Final = Endpoint("events", "POST", _parse_stored_events, FRAME_LIMIT_BYTES)
STREAM: Final = "stream"


def check_item_id_of_answer(endpoint: Endpoint[WorkItem], work_id: str, item: WorkItem) -> WorkItem:
    """Return the item of an answer, after a check that its id is `work_id`.

    An answer about another item, for example by a proxy's mistake, must not decide about this one.

    Raises:
        TransientError: The answer is about another item.
    """
    if item.id != work_id:
        raise TransientError(
            endpoint.op, None, "the answer is about another item", reason="bad_body"
        )
    return item
