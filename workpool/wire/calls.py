"""The calls of the protocol as a table: name, method, and how to read a success (protocol §3).

Reading is all that happens here; a parser raises `ValueError` for what it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, TypeVar

from workpool.errors import TransientError
from workpool.wire.answers import NO_CONTENT
from workpool.wire.items import WorkItem, parse_heartbeat, parse_item, parse_stats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A call: `op` is its name in errors and metrics."""

    op: str
    method: Literal["GET", "POST"]
    parse: Callable[[object], T]


class Page(NamedTuple):
    """One answer of the list call (protocol §3.7)."""

    items: list[WorkItem]
    next_page: str | None


def _delivery(obj: object) -> WorkItem | None:
    return None if obj is None else parse_item(obj)


def _stopped(obj: object) -> WorkItem | None:
    return None if obj is NO_CONTENT else parse_item(obj)


def _object(obj: object) -> dict[str, Any]:
    if isinstance(obj, dict):
        return obj
    raise ValueError("not an object")


def _page(obj: object) -> Page:
    get = _object(obj).get
    data, following = get("data"), get("next_page") if get("has_more") else None
    if isinstance(data, list) and isinstance(following, str | None):
        return Page([parse_item(item) for item in data], following or None)
    raise ValueError("not a list of items")


POLL: Final[Call[WorkItem | None]] = Call("poll", "GET", _delivery)
ACK: Final = Call("ack", "POST", parse_item)
HEARTBEAT: Final = Call("heartbeat", "POST", parse_heartbeat)
STOP: Final[Call[WorkItem | None]] = Call("stop", "POST", _stopped)
UPDATE: Final = Call("update", "POST", parse_item)
GET: Final = Call("get", "GET", parse_item)
LIST: Final = Call("list", "GET", _page)
STATS: Final = Call("stats", "GET", parse_stats)
SESSION: Final[Call[Mapping[str, Any]]] = Call("session", "GET", _object)
ENQUEUE: Final = Call("enqueue", "POST", _page)


def same_item(call: Call[WorkItem], work_id: str, item: WorkItem) -> WorkItem:
    """Pass on an answer about `work_id`.

    Another item's, by a proxy's mistake say, must not decide about this one.

    Raises:
        TransientError: It is about another.
    """
    if item.id != work_id:
        raise TransientError(call.op, None, "the answer is about another item", reason="bad_body")
    return item
