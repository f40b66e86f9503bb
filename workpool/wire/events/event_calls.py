"""The interfaces for reading and sending a session's events.

`EventCalls` makes the calls over any transport, and `EventPageReader` reads a history page by page.
A `SessionGuard` decides whether the session may still be read and written. See
workpool/docs/protocol.md, "Events".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

from workpool.errors import TooLargeError
from workpool.wire.http.call_options import DEFAULT_OPTIONS, CallOptions
from workpool.wire.page_limits import PageLimits
from workpool.wire.protocol import LIST_LIMIT_MAX

T = TypeVar("T")

SessionEvent: TypeAlias = Mapping[str, Any]
"""An event as the control plane writes it: it has an `id` and a `type`."""

_SMALLER: Final = 10


class EventPage(NamedTuple):
    """One page of a session's events; `next_page` is None for the last page."""

    events: list[SessionEvent]
    next_page: str | None


class EventStreamConnection(Protocol):
    """The connection of an event stream, from which bytes are read."""

    async def read(self) -> bytes:
        """Return the next bytes of the stream; empty at its end. Cancelling the call loses no byte.

        Raises:
            TransientError: The connection broke.
        """

    def close(self) -> None:
        """Close the connection of the stream."""


class EventCalls(Protocol):
    """The interface of the calls for one session's events. Each may raise `ControlPlaneError`.

    Attributes:
        resumes: Whether a list can begin after a given event.
    """

    resumes: bool

    async def read_event_page(
        self, limit: int, *, after_id: str | None = None, page: str | None = None
    ) -> EventPage:
        """Return a page of events, oldest first.

        With `after_id`, the page begins after that event; `page` is the token of a further page.
        Without either, the first page is returned.
        """

    async def append_events(
        self, body: bytes, *, options: CallOptions = DEFAULT_OPTIONS
    ) -> list[SessionEvent]:
        """Append events to the session, and return them as the control plane stored them."""

    async def open_stream(self, last_id: str | None) -> EventStreamConnection:
        """Open a stream of new events; it begins after `last_id` if the server can resume there."""


class SessionGuard(Protocol):
    """Makes calls on a session, as long as the caller may use the session.

    The implementation for handlers refuses calls, and ends waiting calls, once the lease is lost.
    """

    def check(self) -> None:
        """Raise an error if the caller must not use the session anymore."""

    async def await_guarded_call(
        self, call: Callable[[], Awaitable[T]], seconds: float | None = None
    ) -> T:
        """Call `call` and await its result; raise TimeoutError after `seconds`.

        The implementation may repeat the call.
        """

    async def run_write_call(self, call: Callable[[CallOptions], Awaitable[T]]) -> T:
        """Make a call that changes the session; `call` receives the options of its HTTP request."""


class PermissiveSessionGuard:
    """The `SessionGuard` of a client that holds no lease: it permits all calls."""

    def check(self) -> None:
        """Accept every use of the session, since there is no lease that could be lost."""

    async def await_guarded_call(
        self, call: Callable[[], Awaitable[T]], seconds: float | None = None
    ) -> T:
        """Call `call` once, and await its result for at most `seconds`."""
        async with asyncio.timeout(seconds):
            return await call()

    async def run_write_call(self, call: Callable[[CallOptions], Awaitable[T]]) -> T:
        """Make the call once; an error of the call is raised to the caller."""
        return await call(DEFAULT_OPTIONS)


class EventPageReader:
    """Reads a session's history page by page. A page that could not be read may be read again.

    Attributes:
        done: Whether all pages were read.
    """

    def __init__(self, calls: EventCalls, after_id: str | None = None) -> None:
        self.done = False
        self._calls = calls
        self._after_id = after_id
        self._page: str | None = None
        self._limit = LIST_LIMIT_MAX
        self._limits = PageLimits("events")

    async def read_next_page(self) -> list[SessionEvent]:
        """Read the next page of events; at most `PAGES_PER_SECOND` pages are requested in a second.

        Raises:
            TransientError: The page could not be read, or the pages have no end.
        """
        while True:
            await self._limits.wait_before_next_page()
            after_id = self._after_id if self._page is None else None
            try:
                page = await self._calls.read_event_page(
                    self._limit, after_id=after_id, page=self._page
                )
                break
            except TooLargeError:
                if self._limit == 1:
                    raise
                self._limit = max(1, self._limit // _SMALLER)
        self._limits.record_page_entries((event["id"] for event in page.events), page.next_page)
        self._page = page.next_page
        self.done = page.next_page is None
        return page.events
