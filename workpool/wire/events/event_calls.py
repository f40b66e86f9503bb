"""The parts from which a session's events are read and sent.

The calls that a client offers for it, whatever carries them; the pages of a history; and who says
whether the session is still ours to read and to write.
See workpool/docs/protocol.md, "Events".
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
    """One answer of the list call; `next_page`: None when it is the last."""

    events: list[SessionEvent]
    next_page: str | None


class OpenStream(Protocol):
    """An event stream that is open."""

    async def read(self) -> bytes:
        """Return the next bytes, empty at the end. Loses nothing when it is cancelled.

        Raises:
            TransientError: The connection broke.
        """

    def close(self) -> None:
        """Hang up."""


class EventCalls(Protocol):
    """The calls on one session's events; each raises `ControlPlaneError`.

    Attributes:
        resumes: A list can begin after an event that was read.
    """

    resumes: bool

    async def page(
        self, limit: int, *, after_id: str | None = None, page: str | None = None
    ) -> EventPage:
        """List the first events, or those after an event, or the next page."""

    async def post(
        self, body: bytes, *, options: CallOptions = DEFAULT_OPTIONS
    ) -> list[SessionEvent]:
        """Append events; returns them as they were stored."""

    async def open(self, last_id: str | None) -> OpenStream:
        """Open a stream of the events to come, after `last_id` if the server can go back to it."""


class Guard(Protocol):
    """Says whether the session may still be read and written, and bounds every wait by that."""

    def check(self) -> None:
        """Raise when it may not."""

    async def within(self, call: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        """Await `call()`, which may be made anew; raises TimeoutError after `seconds`."""

    async def carry(self, call: Callable[[CallOptions], Awaitable[T]]) -> T:
        """Make a call that writes, with the options by which it is to be sent."""


class Unguarded:
    """The guard of a client that holds no lease."""

    def check(self) -> None:
        """There is nothing to lose."""

    async def within(self, call: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        """Await `call()`, no longer than `seconds`."""
        async with asyncio.timeout(seconds):
            return await call()

    async def carry(self, call: Callable[[CallOptions], Awaitable[T]]) -> T:
        """Make the call, once: what to do about an error is the caller's."""
        return await call(DEFAULT_OPTIONS)


class Pages:
    """The pages of a history, in order. A `next` that fails or is cancelled may be repeated.

    Attributes:
        done: There is no page left.
    """

    def __init__(self, calls: EventCalls, after_id: str | None = None) -> None:
        self.done = False
        self._calls = calls
        self._after_id = after_id
        self._page: str | None = None
        self._limit = LIST_LIMIT_MAX
        self._limits = PageLimits("events")

    async def next(self) -> list[SessionEvent]:
        """Read the next page; at most `PAGES_PER_SECOND` of them.

        Raises:
            TransientError: The page could not be read, or the pages lead nowhere.
        """
        while True:
            await self._limits.turn()
            after_id = self._after_id if self._page is None else None
            try:
                page = await self._calls.page(self._limit, after_id=after_id, page=self._page)
                break
            except TooLargeError:
                if self._limit == 1:
                    raise
                self._limit = max(1, self._limit // _SMALLER)
        self._limits.accept((event["id"] for event in page.events), page.next_page)
        self._page = page.next_page
        self.done = page.next_page is None
        return page.events
