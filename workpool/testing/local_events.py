"""A client for a session's events that calls the control plane without a network.

`workpool.testing.local_client` makes the other calls in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from workpool.server.http.session_routes import KEEP_ALIVE, event_json, make_event_stream_frame
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
    from workpool.wire.events.event_calls import EventPage, EventStreamConnection, SessionEvent

T = TypeVar("T")


def _parse_stream_position(obj: Any) -> int:
    return int(obj["position"])


_OPEN: Final[Endpoint[int]] = endpoints.Endpoint(endpoints.STREAM, "GET", _parse_stream_position)


class LocalCallSender(Protocol):
    """The interface of a function that makes one call with its injected faults."""

    def __call__(
        self,
        endpoint: Endpoint[T],
        subject: str,
        run_operation: Callable[[], object],
        timeout: float | None,
        options: CallOptions = DEFAULT_OPTIONS,
        /,
    ) -> Awaitable[T]:
        """Make the call and return the parsed answer."""


class LocalEventCalls:
    """The calls for one session's events, made in the same process; implements `EventCalls`."""

    resumes = True

    def __init__(self, operations: Operations, session_id: str, send: LocalCallSender) -> None:
        self._operations = operations
        self._session_id = session_id
        self._send_call = send

    async def read_event_page(
        self, limit: int, *, after_id: str | None = None, page: str | None = None
    ) -> EventPage:
        """Return a page of the session's events.

        It is the first page, or the page that follows the event `after_id` or the cursor `page`.
        """
        after = after_id or (page or "").partition("-")[2]

        def answer_event_list_call() -> object:
            events = self._read_conversation().list_events(limit + 1, after=after)
            return page_json(make_page(events, limit, backwards=False), event_json)

        return await self._send_call(
            endpoints.EVENTS, self._session_id, answer_event_list_call, None
        )

    async def append_events(
        self, body: bytes, *, options: CallOptions = DEFAULT_OPTIONS
    ) -> list[SessionEvent]:
        """Append events to the session, and return them as the control plane stored them."""

        def answer_append_call() -> object:
            stored = self._operations.send_events(self._session_id, parse_event_batch(body))
            return {"data": [event_json(event) for event in stored]}

        return await self._send_call(
            endpoints.SEND, self._session_id, answer_append_call, None, options
        )

    async def open_stream(self, last_id: str | None) -> EventStreamConnection:
        """Open a stream of the events after the event `last_id`; None means new events only."""

        def answer_stream_call() -> object:
            history = self._read_conversation()
            return {
                "position": len(history.events)
                if last_id is None
                else history.find_position_after_event(last_id)
            }

        position = await self._send_call(_OPEN, self._session_id, answer_stream_call, None)
        return _LocalStream(self._operations, self._session_id, position)

    def _read_conversation(self) -> Conversation:
        self._operations.get_session(self._session_id)
        return self._operations.sessions.get_conversation(self._session_id)


class _LocalStream:
    """An open event stream: a position in the session's history."""

    def __init__(self, operations: Operations, session_id: str, position: int) -> None:
        self._sessions = operations.sessions
        self._session_id = session_id
        self._position = position

    async def read(self) -> bytes:
        """Wait for events after the stream's position, and return them as bytes of the stream.

        Returns a keep-alive if no event arrives in `KEEP_ALIVE_SECONDS`; no bytes if the stream
        has ended.
        """
        if not await self._sessions.wait_for_events(
            self._session_id, self._position, KEEP_ALIVE_SECONDS
        ):
            return b""
        new_events = self._sessions.get_conversation(self._session_id).events[self._position :]
        self._position += len(new_events)
        return b"".join(map(make_event_stream_frame, new_events)) or KEEP_ALIVE

    def close(self) -> None:
        """Do nothing, since the stream has no connection."""
