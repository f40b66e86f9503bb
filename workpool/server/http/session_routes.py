"""HTTP routes for sessions and their events; each `SessionRoutes` object serves one dialect.

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
from workpool.server.http.work_routes import json_response
from workpool.server.pagination import page_json
from workpool.server.parsing import request_values as requests
from workpool.server.parsing.client_events import parse_event_batch
from workpool.wire.protocol import KEEP_ALIVE_SECONDS, LAST_EVENT_ID_HEADER, STOPPED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workpool.server.conversation import StoredEvent
    from workpool.server.engine import ControlPlaneEngine
    from workpool.server.http.server_dialects import ServerDialect
    from workpool.server.http.tokens import AcceptedTokens
    from workpool.server.stored_session import SessionView

WRITE_BYTES: Final = 64 * 1024
"""Bytes that are written to a stream at once: there may be many slow readers."""
_STREAM: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    # Without this header, a proxy may buffer the stream and delay its events.
    "X-Accel-Buffering": "no",
}
KEEP_ALIVE: Final = b": keep-alive\n\n"
"""The keep-alive of a stream without events."""


class SessionRoutes:
    """The endpoints of one session: read the session; list, send and stream its events."""

    def __init__(
        self, engine: ControlPlaneEngine, tokens: AcceptedTokens, dialect: ServerDialect
    ) -> None:
        self._engine = engine
        self._tokens = tokens
        self._dialect = dialect

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of this class; each path begins with the dialect's prefix."""
        session = self._dialect.prefix + "/sessions/{session_id}"
        return [
            web.get(session, self.get_session, allow_head=False),
            web.get(session + "/events", self.list_events, allow_head=False),
            web.post(session + "/events", self.send_events),
            web.get(session + "/events/stream", self.stream_events, allow_head=False),
        ]

    async def get_session(self, request: web.Request) -> web.Response:
        """Answer with one session."""
        view = await self._authorize_session(request)
        await requests.read_body(request)
        return json_response(self._dialect.session_json(view.to_json()))

    async def list_events(self, request: web.Request) -> web.Response:
        """Answer with a page of the events that the query selects."""
        view = await self._authorize_session(request)
        await requests.read_body(request)
        place = requests.parse_page_request(request, EVENT_PREFIX)
        wanted = requests.parse_event_filter(request)
        if wanted.newest_first and place.after:
            raise APIError(400, "after_id goes with order=asc only", "after_id")
        page = await self._engine.list_events(view.id, place, wanted)
        return json_response(page_json(page, event_json))

    async def send_events(self, request: web.Request) -> web.Response:
        """Append the events of the request to a session: all of them, or none if one is refused."""
        view = await self._authorize_session(request)
        new_events = parse_event_batch(await requests.read_body(request))
        events = await self._engine.send_events(
            view.id, new_events, messages_bring_work=self._dialect.messages_bring_work
        )
        return json_response({"data": [event_json(event) for event in events]})

    async def stream_events(self, request: web.Request) -> web.StreamResponse:
        """Stream the events of a session.

        The stream begins after the event that the header `Last-Event-ID` names. Without the header,
        the stream begins with the next new event.
        """
        view = await self._authorize_session(request)
        await requests.read_body(request)
        last = request.headers.get(LAST_EVENT_ID_HEADER)
        # Count the events to skip before sending the first byte: an open stream must miss no event.
        place = await self._engine.count_events_to_skip(view.id, last)
        response = web.StreamResponse(headers=_STREAM)
        # The stream ends if the connection is lost, the reader stops reading or the store fails.
        # The client then opens a new stream after the last event that it received.
        with suppress(ConnectionError, StoreError, APIError):
            await response.prepare(request)
            await response.write(KEEP_ALIVE)
            while True:
                events = await self._engine.wait_for_events(view.id, place, KEEP_ALIVE_SECONDS)
                if events is None:
                    break
                place += len(events)
                for piece in _join_frames(events):
                    await response.write(piece)
        return response

    async def _authorize_session(self, request: web.Request) -> SessionView:
        """Return the session in the path; checks for a 401, 404 and 403 in this order.

        An item's token is accepted for the session of this item, until the item is stopped.
        """
        caller = self._tokens.authenticate(request.headers, self._dialect)
        own = self._dialect.parse_session_id(request.match_info["session_id"])
        if caller.item is not None:
            claimed = await self._engine.get_item(*caller.item)
            if claimed.session_id != own or claimed.state == STOPPED:
                raise APIError(403, "an item's token is for its session, until the item is stopped")
        view = await self._engine.get_session(own)
        caller.check_environment_access(view.session.environment_id)
        return view


def event_json(event: StoredEvent) -> dict[str, Any]:
    """Return the JSON of an event."""
    return dict(event.value)


def _join_frames(events: Sequence[StoredEvent]) -> Iterator[bytes]:
    """Join the frames of events to pieces of about `WRITE_BYTES`, and yield the pieces.

    If there are no events, yield a keep-alive.
    """
    frames: list[bytes] = []
    size = 0
    for event in events:
        frames.append(make_event_stream_frame(event))
        size += len(frames[-1])
        if size >= WRITE_BYTES:
            yield b"".join(frames)
            frames, size = [], 0
    if frames or not events:
        yield b"".join(frames) or KEEP_ALIVE


def make_event_stream_frame(event: StoredEvent) -> bytes:
    """Return an event as a frame of a `text/event-stream`."""
    head = f"id: {event.id}\nevent: {event.type}\ndata: "
    return b"%s%s\n\n" % (head.encode(), orjson.dumps(event.value, default=dict))
