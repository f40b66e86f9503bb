"""A session's events without a network, for virtual time; see `workpool.testing.local_client`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from workpool.server.http.session_routes import KEEP_ALIVE, event_frame, event_json
from workpool.server.pagination import make_page, page_json
from workpool.server.parsing.client_events import parse_event_batch
from workpool.wire import endpoints
from workpool.wire.http.call_options import DEFAULT_OPTIONS, CallOptions
from workpool.wire.protocol import KEEP_ALIVE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.server import Operations
    from workpool.server.conversation import Conversation
    from workpool.wire.endpoints import Endpoint
    from workpool.wire.events.event_calls import EventPage, OpenEventStream, SessionEvent

T = TypeVar("T")


def _place(obj: Any) -> int:
    return int(obj["place"])


_OPEN: Final[Endpoint[int]] = endpoints.Endpoint(endpoints.STREAM, "GET", _place)


class Send(Protocol):
    """The interface of a function that makes one call, with the injected faults."""

    def __call__(
        self,
        endpoint: Endpoint[T],
        subject: str,
        operate: Callable[[], object],
        timeout: float | None,
        options: CallOptions = DEFAULT_OPTIONS,
        /,
    ) -> Awaitable[T]:
        """Make the call and return the parsed answer."""


class LocalEvents:
    """The calls on one session's events; see `workpool.wire.events.event_calls.EventCalls`."""

    resumes = True

    def __init__(self, operations: Operations, session_id: str, send: Send) -> None:
        self._operations = operations
        self._session_id = session_id
        self._send = send

    async def list_page(
        self, limit: int, *, after_id: str | None = None, page: str | None = None
    ) -> EventPage:
        """Return one page of the history."""
        after = after_id or (page or "").partition("-")[2]

        def operate() -> object:
            events = self._conversation().list_events(limit + 1, after=after)
            return page_json(make_page(events, limit, backwards=False), event_json)

        return await self._send(endpoints.EVENTS, self._session_id, operate, None)

    async def append_events(
        self, body: bytes, *, options: CallOptions = DEFAULT_OPTIONS
    ) -> list[SessionEvent]:
        """Append events and return them as stored."""

        def operate() -> object:
            stored = self._operations.send_events(self._session_id, parse_event_batch(body))
            return {"data": [event_json(event) for event in stored]}

        return await self._send(endpoints.SEND, self._session_id, operate, None, options)

    async def open_stream(self, last_id: str | None) -> OpenEventStream:
        """Open a stream."""

        def operate() -> object:
            history = self._conversation()
            return {
                "place": len(history.events) if last_id is None else history.position_after(last_id)
            }

        place = await self._send(_OPEN, self._session_id, operate, None)
        return _LocalStream(self._operations, self._session_id, place)

    def _conversation(self) -> Conversation:
        self._operations.get_session(self._session_id)
        return self._operations.sessions.get_conversation(self._session_id)


class _LocalStream:
    """An open stream: a position in the history."""

    def __init__(self, operations: Operations, session_id: str, place: int) -> None:
        self._sessions = operations.sessions
        self._session_id = session_id
        self._place = place

    async def read(self) -> bytes:
        """Return the events since the last call, or a keep-alive."""
        if not await self._sessions.wait_for_events(
            self._session_id, self._place, KEEP_ALIVE_SECONDS
        ):
            return b""
        new_events = self._sessions.get_conversation(self._session_id).events[self._place :]
        self._place += len(new_events)
        return b"".join(map(event_frame, new_events)) or KEEP_ALIVE

    def close(self) -> None:
        """No effect, since there is no connection."""
