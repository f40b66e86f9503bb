"""Parsers of query parameters, headers and bodies; a malformed value raises a 400.

Independent of items. Query values are parsed strictly: no sign, no space, ASCII digits only, no
parameter twice. See workpool/docs/protocol.md, "Calls".
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson
from aiohttp import web
from aiohttp.client_exceptions import ClientPayloadError
from aiohttp.http_exceptions import HttpProcessingError

from workpool.server.answer_limits import check_enqueue_response_size
from workpool.server.api_errors import APIError
from workpool.server.conversation import EventFilter
from workpool.server.pagination import AFTER, BEFORE
from workpool.server.queue.long_polls import Poll
from workpool.server.timestamps import TimeRange, is_rfc3339, to_utc_text
from workpool.wire.protocol import (
    BLOCK_MS_MAX,
    BLOCK_MS_MIN,
    BODY_LIMIT_BYTES,
    ENQUEUE_COUNT_MAX,
    LIST_LIMIT_DEFAULT,
    LIST_LIMIT_MAX,
    NO_HEARTBEAT,
    OUR_ERROR,
    RECLAIM_OLDER_THAN_MS,
    SESSION,
    STATES,
    STOPPED,
    TTL_DEFAULT_SECONDS,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.server.stored_item import Item

BODY_SECONDS: Final = 10.0
"""Limit of the time for a body to arrive, so that a stalled client cannot occupy a handler."""
LARGE_BODY_BYTES: Final = 64 * 1024
LARGE_BODIES: Final = web.AppKey("large_bodies", asyncio.Semaphore)
"""Limit of large bodies that are read at once: the others wait in the senders' buffers."""
LARGE_BODIES_MAX: Final = 16
VALUES_MAX: Final = 100_000
"""Largest number of JSON values in one body: an empty object has three bytes and takes 64."""
WORKER_ID_LENGTH: Final = 256
_LONGEST_NUMBER: Final = 15
_DIGITS: Final = "[0-9a-f]{32}"
_NUMBER: Final = re.compile(r"[0-9]+")
_WORK_TYPE: Final = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_PLACES: Final = {"page": "", "before_id": BEFORE, "after_id": AFTER}


@dataclass(frozen=True, slots=True)
class EnqueueRequest:
    """The body of a request to create items."""

    count: int
    metadata: Mapping[str, str]
    work_type: str
    script: object


class ListPageRequest(NamedTuple):
    """The request for one page of up to `limit` rows, after the id `after` or before `before`."""

    limit: int
    after: str
    before: str | None


class ItemFilter(NamedTuple):
    """The filter and sort order of a list of items.

    Attributes:
        state: Only items in this state; None: in any.
        failed: Only items that were stopped with an error of their worker.
        newest_first: Whether the list begins with the newest item.
    """

    state: str | None
    failed: bool
    newest_first: bool

    def matches(self, item: Item) -> bool:
        """Return whether the filter selects this item."""
        failed = item.state == STOPPED and OUR_ERROR in item.metadata
        return (self.state is None or item.state == self.state) and (failed or not self.failed)


def read_single_parameter(request: web.Request, name: str) -> str | None:
    """Return a query parameter, or None if it is absent; raises a 400 if it is repeated."""
    values = request.query.getall(name, ())
    if len(values) > 1:
        raise APIError(400, f"{name} is given more than once", name)
    return values[0] if values else None


def read_integer_parameter(request: web.Request, name: str, default: int) -> int:
    """Parse a query parameter that is a non-negative integer; `default` if it is absent."""
    text = read_single_parameter(request, name)
    if text is None:
        return default
    if not _NUMBER.fullmatch(text):
        raise APIError(400, f"{name} must be a non-negative integer", name)
    digits = text.lstrip("0")
    # int() fails on thousands of digits. A very long number is replaced by a shorter one that also
    # exceeds every limit.
    return int(digits or "0") if len(digits) <= _LONGEST_NUMBER else 10**_LONGEST_NUMBER


def parse_poll(request: web.Request, worker_id: str | None) -> Poll:
    """Parse the query parameters of a poll."""
    block_ms = read_integer_parameter(request, "block_ms", 0)
    if (
        read_single_parameter(request, "block_ms") is not None
        and not BLOCK_MS_MIN <= block_ms <= BLOCK_MS_MAX
    ):
        raise APIError(400, f"block_ms must be in {BLOCK_MS_MIN}-{BLOCK_MS_MAX}", "block_ms")
    reclaim = read_integer_parameter(request, "reclaim_older_than_ms", RECLAIM_OLDER_THAN_MS)
    return Poll(worker_id, block_ms, reclaim)


def parse_heartbeat(request: web.Request) -> tuple[str | None, int]:
    """Parse the query of a heartbeat: `expected_last_heartbeat`, and the requested TTL."""
    ttl_seconds = read_integer_parameter(request, "desired_ttl_seconds", TTL_DEFAULT_SECONDS)
    if ttl_seconds == 0:
        raise APIError(400, "desired_ttl_seconds must be positive", "desired_ttl_seconds")
    expected = read_single_parameter(request, "expected_last_heartbeat")
    if expected is not None and expected != NO_HEARTBEAT and not is_rfc3339(expected):
        raise APIError(
            400,
            f"expected_last_heartbeat must be {NO_HEARTBEAT} or an RFC 3339 time",
            "expected_last_heartbeat",
        )
    return expected, ttl_seconds


def parse_page_request(request: web.Request, prefix: str, digits: str = _DIGITS) -> ListPageRequest:
    """Parse the query parameters of a page: `limit`, and `page`, `before_id` or `after_id`.

    The id in these parameters is `prefix` and a text that the pattern `digits` matches.
    """
    limit = read_integer_parameter(request, "limit", LIST_LIMIT_DEFAULT)
    if limit == 0:
        raise APIError(400, "limit must be positive", "limit")
    limit = min(limit, LIST_LIMIT_MAX)
    values = {name: read_single_parameter(request, name) for name in _PLACES}
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) > 1:
        raise APIError(400, "give at most one of page, before_id and after_id", list(given)[1])
    for name, value in given.items():
        direction, text = _PLACES[name], value
        if name == "page":
            direction, _, text = value.partition("-")
        if direction not in {AFTER, BEFORE} or not re.fullmatch(prefix + digits, text):
            raise APIError(400, f"{name} is malformed", name)
        return (
            ListPageRequest(limit, text, None)
            if direction == AFTER
            else ListPageRequest(limit, "", text)
        )
    return ListPageRequest(limit, "", None)


def parse_item_filter(request: web.Request) -> ItemFilter | None:
    """Parse the query parameters `state`, `failed` and `order`; None if all are absent."""
    state, failed = (
        read_single_parameter(request, "state"),
        read_single_parameter(request, "failed"),
    )
    if state is None and failed is None and read_single_parameter(request, "order") is None:
        return None
    if state is not None and state not in STATES:
        raise APIError(400, "state is not one of the protocol's five", "state")
    return ItemFilter(
        state, read_boolean_parameter(request, "failed"), parse_newest_first(request, default=False)
    )


def parse_event_filter(request: web.Request) -> EventFilter:
    """Parse the query parameters `order`, `types` and `created_at[…]` of a list of events."""
    return EventFilter(
        types=read_repeated_parameter(request, "types"),
        times=parse_time_range(request),
        newest_first=parse_newest_first(request, default=False),
    )


def parse_newest_first(request: web.Request, *, default: bool) -> bool:
    """Return whether the query parameter `order` is `desc`; `default` if it is absent."""
    order = read_single_parameter(request, "order")
    if order not in {None, "asc", "desc"}:
        raise APIError(400, "order must be asc or desc", "order")
    return default if order is None else order == "desc"


def read_boolean_parameter(request: web.Request, name: str) -> bool:
    """Parse a query parameter that is `true` or `false`; False if it is absent."""
    text = read_single_parameter(request, name)
    if text not in {None, "true", "false"}:
        raise APIError(400, f"{name} must be true or false", name)
    return text == "true"


def read_repeated_parameter(request: web.Request, name: str) -> frozenset[str] | None:
    """Return all values of the query parameters `name` and `name[]`; None if there are none."""
    values = [*request.query.getall(f"{name}[]", ()), *request.query.getall(name, ())]
    return frozenset(values) if values else None


def parse_time_range(request: web.Request) -> TimeRange:
    """Parse the query parameters `created_at[gt]`, `[gte]`, `[lt]` and `[lte]`."""
    return TimeRange(*(_parse_time(request, f"created_at[{name}]") for name in TimeRange._fields))


def _parse_time(request: web.Request, name: str) -> str | None:
    text = read_single_parameter(request, name)
    if text is None:
        return None
    time = to_utc_text(text)
    if time is None:
        raise APIError(400, f"{name} must be an RFC 3339 time", name)
    return time


def parse_worker_id(request: web.Request, header: str) -> str | None:
    """Return the worker id in a header; None if the header is absent or empty."""
    value = request.headers.get(header)
    if not value:
        return None
    if len(value) > WORKER_ID_LENGTH or not value.isprintable():
        # `isprintable` also rejects lone surrogates, which stand for bytes that are not UTF-8: no
        # store can write them.
        raise APIError(400, f"{header} must be at most {WORKER_ID_LENGTH} characters", header)
    return value


async def read_body(request: web.Request) -> bytes:
    """Read a request's body; raises a 400 if the body is too large, a 408 if the client is slow."""
    if not request.can_read_body:
        return b""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        # A body is never decompressed: 4 MiB could become 4 GiB in memory.
        raise APIError(400, "a compressed body is not read", "Content-Encoding")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if (request.content_length or LARGE_BODY_BYTES + 1) <= LARGE_BODY_BYTES:
                return await request.read()
            async with request.app[LARGE_BODIES]:
                return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise APIError(400, f"the body is larger than {BODY_LIMIT_BYTES} bytes") from None
    except TimeoutError:
        raise APIError(408, "the body did not arrive in time, or too many others did") from None
    except (ClientPayloadError, HttpProcessingError, web.RequestPayloadError):
        raise APIError(400, "the body cannot be read") from None


def parse_json_object(content: bytes) -> dict[str, Any]:
    """Parse a body that is a JSON object; raises a 400 for any other body."""
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        raise APIError(400, "the body is not valid JSON") from None
    if not isinstance(value, dict):
        raise APIError(400, "the body must be a JSON object")
    if len(content) > VALUES_MAX and _has_too_many_values(value):
        raise APIError(400, f"the body has more than {VALUES_MAX} JSON values")
    return value


def _has_too_many_values(value: object) -> bool:
    count, left = 0, [value]
    while left and count <= VALUES_MAX:
        each = left.pop()
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        count += len(inner)
        left.extend(inner)
    return count > VALUES_MAX


def parse_force(content: bytes) -> bool:
    """Parse the field `force` in the body of a stop request; False if it is absent."""
    value = parse_json_object(content).get("force") if content else None
    if value is not None and not isinstance(value, bool):
        raise APIError(400, "force must be a boolean", "force")
    return bool(value)


def parse_metadata_patch(content: bytes, *, required: bool) -> Mapping[str, str | None]:
    """Parse the metadata patch of an update; raises a 400 if any value is malformed."""
    fields = parse_json_object(content)
    if "metadata" not in fields and not required:
        return {}
    return check_string_values(fields.get("metadata"), (str, type(None)))


def parse_enqueue_request(content: bytes) -> EnqueueRequest:
    """Parse the body of a request to create items."""
    fields = parse_json_object(content) if content else {}
    if fields.get("script", ...) is None:
        raise APIError(400, "script must be a list of tool uses", "script")
    count = fields.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool):
        raise APIError(400, "count must be an integer", "count")
    if not 1 <= count <= ENQUEUE_COUNT_MAX:
        raise APIError(400, f"count must be in 1-{ENQUEUE_COUNT_MAX}", "count")
    work_type = fields.get("type", SESSION)
    if not isinstance(work_type, str) or not _WORK_TYPE.fullmatch(work_type):
        raise APIError(400, "type must be a lowercase word", "type")
    metadata = check_string_values(fields.get("metadata", {}))
    check_enqueue_response_size(count, metadata)
    return EnqueueRequest(count, metadata, work_type, fields.get("script"))


def check_string_values(value: object, allowed: tuple[type, ...] = (str,)) -> dict[str, Any]:
    """Return `value` if it is an object whose values are all strings; else raise a 400.

    `allowed` has the allowed types of the values, if other types than `str` are allowed.
    """
    if not isinstance(value, dict):
        raise APIError(400, "metadata must be an object", "metadata")
    if not all(isinstance(entry, allowed) for entry in value.values()):
        raise APIError(400, "metadata values must be strings", "metadata")
    return value
