"""A session's events as one sequence: first the history, then new events, each once.

For every connection, the stream is opened first, then the history is read, and both are merged by
their ids, so that no event in between is missed. After a failure, a new connection is opened. Each
await may be cancelled without the loss of an event: the next await continues at the same place. See
workpool/docs/protocol.md, "Event stream".
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

import orjson

from workpool.backoff import Backoff
from workpool.errors import ConflictError, TransientError
from workpool.log_fields import pool_logger
from workpool.wire.endpoints import parse_event
from workpool.wire.events.event_calls import EventPageReader
from workpool.wire.events.sse import FrameParser
from workpool.wire.page_limits import BoundedIdSet
from workpool.wire.protocol import KEEP_ALIVE_SECONDS, SESSION_DELETED, STATUS_TERMINATED

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from workpool.wire.events.event_calls import (
        EventCalls,
        EventStreamConnection,
        SessionEvent,
        SessionGuard,
    )

log = pool_logger(__name__)

BACKOFF_SECONDS: Final = 0.5
BACKOFF_CAP_SECONDS: Final = 10.0
STALL_SECONDS: Final = 4.5 * KEEP_ALIVE_SECONDS
"""A stream that is silent for this long, keep-alives included, counts as broken."""
REMEMBERED_EVENTS: Final = 50_000
"""The number of ids that a stream remembers, to yield each event once: some 10 MB at most.

An event is yielded twice only if a connection repeats more events than that.
"""
_LAST_EVENT_TYPES: Final = frozenset({STATUS_TERMINATED, SESSION_DELETED})


class EventStream:
    """The events of one session as an async iterator for one reader: `async with`, `async for`.

    Ends after the event that says that the session is terminated or deleted.

    Attributes:
        caught_up: Whether the last yielded event was the newest one when its history was read, or
            came live. False while a history, or the events that a broken connection missed, are
            replayed.
    """

    def __init__(
        self, calls: EventCalls, guard: SessionGuard, session_id: str, *, stall_seconds: float
    ) -> None:
        self.caught_up = False
        self._calls = calls
        self._guard = guard
        self._session_id = session_id
        self._stall_seconds = stall_seconds
        self._backoff = Backoff(BACKOFF_SECONDS, BACKOFF_CAP_SECONDS)
        self._entered = self._ended = False
        # The events that were read and not yet yielded, each with the value that `caught_up` gets
        # when the event is yielded.
        self._ready: deque[tuple[SessionEvent, bool]] = deque()
        # Contains the last event of the latest history page until the next page is read, else
        # nothing. `caught_up` becomes true with the last event of the history, and only the next
        # page shows whether this event is the last one.
        self._held_back: list[SessionEvent] = []
        self._seen = BoundedIdSet(REMEMBERED_EVENTS)
        # Whether events of the history are skipped, because they were read before and `_seen` may
        # have forgotten their ids. The first event whose id is in `_seen` ends the skipping.
        self._skipping = False
        self._last_id: str | None = None
        self._reconnect_at = 0.0
        # Each new connection replaces the next four attributes.
        self._stream: EventStreamConnection | None = None
        self._pages: EventPageReader
        self._parser: FrameParser
        self._last_byte_at = 0.0

    async def __aenter__(self) -> Self:
        """Return the stream. Its connection is opened when the first event is requested."""
        self._entered = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the stream, and close its connection."""
        self._ended = True
        self._disconnect()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionEvent:
        """Return the next event. A call that is cancelled, such as by a timeout, loses no event.

        Raises:
            LeaseLost, SessionEnded: The handler may not use the session anymore.
            ControlPlaneError: The call was refused; other errors are tried again without a limit.
        """
        if not self._entered:
            raise RuntimeError("this event stream is not open: use it inside `async with`")
        while True:
            self._guard.check()
            if self._ready:
                return self._take_ready_event()
            if self._ended:
                raise StopAsyncIteration
            try:
                await self._read_more_events()
            except (TransientError, ConflictError) as error:
                self._schedule_reconnect(error)

    def _take_ready_event(self) -> SessionEvent:
        event, self.caught_up = self._ready.popleft()
        if event["type"] in _LAST_EVENT_TYPES:
            self._ended = True
            self._ready.clear()
            self._disconnect()
        return event

    async def _read_more_events(self) -> None:
        if self._stream is None:
            await self._connect()
        elif not self._pages.done:
            await self._read_history(self._pages)
        else:
            await self._read_live_events(self._stream)

    async def _connect(self) -> None:
        clock = asyncio.get_running_loop().time
        await self._guard.await_guarded_call(lambda: asyncio.sleep(self._reconnect_at - clock()))
        self._stream = await self._guard.await_guarded_call(
            lambda: self._calls.open_stream(self._last_id)
        )
        self._pages = EventPageReader(self._calls, self._last_id if self._calls.resumes else None)
        self._skipping = self._seen.forgot and not self._calls.resumes
        self._parser = FrameParser()
        self._last_byte_at = clock()

    async def _read_history(self, pages: EventPageReader) -> None:
        events = await self._guard.await_guarded_call(pages.read_next_page)
        fresh = self._held_back + [
            event for event in events if self._is_unread_history_event(event)
        ]
        self._held_back = [] if pages.done else fresh[-1:]
        fresh = fresh if pages.done else fresh[:-1]
        self._ready.extend((event, False) for event in fresh)
        if not pages.done:
            return
        if fresh:
            self._ready[-1] = (fresh[-1], True)
        else:
            self.caught_up = True

    async def _read_live_events(self, stream: EventStreamConnection) -> None:
        clock = asyncio.get_running_loop().time
        # Measure the timeout from the last received byte and not from the beginning of this wait: a
        # reader that cancels each wait early would otherwise never notice a dead connection. If the
        # reader has paused for longer than the timeout, pass 0 s: the call then still returns the
        # bytes that have arrived.
        silence_left = self._last_byte_at + self._stall_seconds - clock()
        try:
            chunk = await self._guard.await_guarded_call(stream.read, max(0.0, silence_left))
        except TimeoutError:
            raise TransientError("stream", None, "silent for too long", reason="timeout") from None
        if not chunk:
            raise TransientError("stream", None, "ended by the server", reason="network")
        self._last_byte_at = clock()
        try:
            for frame in self._parser.parse_chunk(chunk):
                self._add_event_of_frame(frame.event, frame.data)
        # Do not quote the frame in the error, because a frame may contain secrets.
        except ValueError:
            raise TransientError("stream", None, "malformed", reason="bad_body") from None

    def _add_event_of_frame(self, kind: str, text: str) -> None:
        value = orjson.loads(text)
        if kind == "error":
            raise ValueError("the server reports an error")
        if isinstance(value, dict) and "id" not in value:
            return  # This frame has no event of the session; it may be a ping of the server.
        event = parse_event(value)
        if self._is_new_event(event):
            self._ready.append((event, True))

    def _is_unread_history_event(self, event: SessionEvent) -> bool:
        # `_seen` remembers a limited number of ids. If it has forgotten some, skip the events at
        # the beginning of the history until one of the remembered ids: they were yielded before.
        self._skipping = self._skipping and event["id"] not in self._seen
        return not self._skipping and self._is_new_event(event)

    def _is_new_event(self, event: SessionEvent) -> bool:
        event_id = event["id"]
        if not self._seen.add_id(event_id):
            return False
        self._last_id = event_id
        self._backoff.reset()
        return True

    def _schedule_reconnect(self, error: TransientError | ConflictError) -> None:
        self._disconnect()
        self._ready.extend((event, False) for event in self._held_back)
        self._held_back = []
        self.caught_up = False
        asked = error.retry_after if isinstance(error, TransientError) else None
        delay = max(self._backoff.next_delay(), asked or 0.0)
        self._reconnect_at = asyncio.get_running_loop().time() + delay
        log.info(
            "event stream broke: %s",
            error,
            extra={
                "session_id": self._session_id,
                "wait_seconds": round(delay, 3),
                "error": str(error),
            },
        )

    def _disconnect(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
