"""The calls on sessions and their events over HTTP, in one dialect.

An event stream has no queue for its reader, only a place in the session's events, and writes in
bounded pieces, so that a slow reader costs little. If a reader stops reading, its connection is
closed (`inbound_connections`). See workpool/docs/protocol.md, "Sessions".
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from workpool.server.api_errors import APIError, StoreError
from workpool.server.conversation import EVENT_PREFIX
from workpool.server.http.work_routes import answer
from workpool.server.pagination import listing, page_of
from workpool.server.parsing import request_values as requests
from workpool.server.parsing.client_events import client_events
from workpool.wire.protocol import KEEP_ALIVE_SECONDS, LAST_EVENT_ID_HEADER, STOPPED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workpool.server.conversation import Conversation, StoredEvent
    from workpool.server.http.server_dialects import Dialect
    from workpool.server.http.tokens import Tokens
    from workpool.server.operations import Operations
    from workpool.server.stored_item import Item
    from workpool.server.stored_session import StoredSession

WRITE_BYTES: Final = 64 * 1024
"""Bytes that are written to a stream at once: there may be many slow readers."""
_STREAM: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    # otherwise a proxy would buffer the stream, which would look stalled
    "X-Accel-Buffering": "no",
}
KEEP_ALIVE: Final = b": keep-alive\n\n"
"""The keep-alive of a stream without events."""


class SessionRoutes:
    """The endpoints of sessions in one dialect."""

    def __init__(self, operations: Operations, tokens: Tokens, dialect: Dialect) -> None:
        self._operations = operations
        self._tokens = tokens
        self._dialect = dialect

    def table(self) -> list[web.RouteDef]:
        """Return the routes under the dialect's prefix."""
        session = self._dialect.prefix + "/sessions/{session_id}"
        return [
            web.get(session, self.session, allow_head=False),
            web.get(session + "/events", self.list, allow_head=False),
            web.post(session + "/events", self.send),
            web.get(session + "/events/stream", self.stream, allow_head=False),
        ]

    async def session(self, request: web.Request) -> web.Response:
        """Answer with the session."""
        session, item = self._session(request)
        await requests.body(request)
        value = self._operations.sessions.answer(session, item)
        return await self._durable(self._dialect.session(value))

    async def list(self, request: web.Request) -> web.Response:
        """List the events of a session that the query selects, page by page."""
        conversation = self._conversation(request)
        await requests.body(request)
        place = requests.place(request, EVENT_PREFIX)
        wanted = requests.event_filter(request)
        if wanted.newest_first and place.after:
            raise APIError(400, "after_id goes with order=asc only", "after_id")
        events = conversation.page(
            place.limit + 1, after=place.after, before=place.before, wanted=wanted
        )
        page = page_of(
            events,
            place.limit,
            backwards=place.before is not None,
            newest_first=wanted.newest_first,
        )
        return await self._durable(listing(page, render_event))

    async def send(self, request: web.Request) -> web.Response:
        """Append all events of a client, or none."""
        session, _ = self._session(request)
        new_events = client_events(await requests.body(request))
        events = self._operations.send(
            session.id, new_events, messages_bring_work=self._dialect.messages_bring_work
        )
        return await self._durable({"data": [render_event(event) for event in events]})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Stream new events, after those that follow `Last-Event-ID`."""
        session, _ = self._session(request)
        await requests.body(request)
        conversation = self._operations.sessions.conversation(session.id)
        last = request.headers.get(LAST_EVENT_ID_HEADER)
        # Before the first byte is sent, so that a client with an open stream misses no later event.
        place = len(conversation.events) if last is None else conversation.place_after(last)
        response = web.StreamResponse(headers=_STREAM)
        # The stream ends if the reader has gone or stopped reading, or if the store has failed.
        with suppress(ConnectionError, StoreError):
            await response.prepare(request)
            await response.write(KEEP_ALIVE)
            while await self._operations.sessions.wait(session.id, place, KEEP_ALIVE_SECONDS):
                end = len(conversation.events)
                await self._operations.durable()
                if place == end:
                    await response.write(KEEP_ALIVE)
                while place < end:
                    frames = _frames(conversation.events, place, end)
                    place += len(frames)
                    await response.write(b"".join(frames))
        return response

    def _session(self, request: web.Request) -> tuple[StoredSession, Item]:
        """Admit the caller to the session of the path: 401, 404, 403, in this order.

        An item's token is accepted for the session of this item, until the item is stopped.
        """
        caller = self._tokens.admit(request.headers, self._dialect)
        own = self._dialect.own_session_id(request.match_info["session_id"])
        if caller.item is not None:
            claimed = self._operations.get(*caller.item)
            if claimed.session_id != own or claimed.state == STOPPED:
                raise APIError(403, "an item's token is for its session, until the item is stopped")
        session, item = self._operations.session(own)
        caller.check_environment(session.environment_id)
        return session, item

    def _conversation(self, request: web.Request) -> Conversation:
        session, _ = self._session(request)
        return self._operations.sessions.conversation(session.id)

    async def _durable(self, value: dict[str, Any]) -> web.Response:
        await self._operations.durable()
        return answer(value)


def render_event(event: StoredEvent) -> dict[str, Any]:
    """Return an event's JSON."""
    return dict(event.value)


def _frames(events: Sequence[StoredEvent], place: int, end: int) -> list[bytes]:
    """Return the frames of the first events in this range, up to the one that fills a write."""
    frames, size = [], 0
    while place < end and size < WRITE_BYTES:
        frames.append(frame_of(events[place]))
        size += len(frames[-1])
        place += 1
    return frames


def frame_of(event: StoredEvent) -> bytes:
    """Return an event as a frame of a stream."""
    head = f"id: {event.id}\nevent: {event.type}\ndata: "
    return b"%s%s\n\n" % (head.encode(), orjson.dumps(event.value, default=dict))
