"""HTTP calls for one session's events: list, append, and stream."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from yarl import URL

from workpool.wire import endpoints
from workpool.wire.http.call_options import DEFAULT_OPTIONS, CallOptions
from workpool.wire.http.connection_errors import TRANSIENT, make_no_answer_error
from workpool.wire.protocol import LAST_EVENT_ID_HEADER

if TYPE_CHECKING:
    import aiohttp

    from workpool.wire.events.event_calls import EventPage, EventStreamConnection, SessionEvent
    from workpool.wire.http.rate_limiter import RateLimits
    from workpool.wire.http.transport import Transport


class HttpEventCalls:
    """Calls for one session's events over HTTP (an implementation of `EventCalls`).

    Args:
        transport: Sends the requests.
        rate_limits: The client's own rate limits.
        url: The URL of the session's events, already encoded.
        query: Added to every query.
        resumes: Whether a list can begin after a given event.
    """

    def __init__(
        self, transport: Transport, rate_limits: RateLimits, url: str, query: str, *, resumes: bool
    ) -> None:
        self.resumes = resumes
        self._transport = transport
        self._rate_limits = rate_limits
        self._url = url
        self._query = query

    async def read_event_page(
        self, limit: int, *, after_id: str | None = None, page: str | None = None
    ) -> EventPage:
        """Request one page of events over HTTP; see `EventCalls.read_event_page`."""
        asked = {"after_id": after_id, "page": page}
        start = [f"{name}={quote(at, safe='')}" for name, at in asked.items() if at is not None]
        url = self._build_url("", f"limit={limit}", *start)
        return await self._transport.send(endpoints.EVENTS, url, None, self._rate_limits.read)

    async def append_events(
        self, body: bytes, *, options: CallOptions = DEFAULT_OPTIONS
    ) -> list[SessionEvent]:
        """Append events to the session, and return them as the control plane stored them."""
        limiter = self._rate_limits.write
        return await self._transport.send(
            endpoints.SEND, self._build_url(), None, limiter, body, options
        )

    async def open_stream(self, last_id: str | None) -> EventStreamConnection:
        """Open a stream of the session's events on a separate connection."""
        headers = {"Accept": "text/event-stream"}
        if last_id is not None:
            headers[LAST_EVENT_ID_HEADER] = last_id
        limiter = self._rate_limits.read
        return _HttpEventStream(
            await self._transport.open_stream(self._build_url("/stream"), headers, limiter)
        )

    def _build_url(self, path: str = "", *query: str) -> URL:
        text = "&".join((*query, self._query)).strip("&")
        return URL(f"{self._url}{path}?{text}" if text else f"{self._url}{path}", encoded=True)


class _HttpEventStream:
    """An open event stream over HTTP (an implementation of `EventStreamConnection`)."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def read(self) -> bytes:
        """Return the next bytes of the stream; empty at its end."""
        try:
            return await self._response.content.readany()
        except TRANSIENT as error:
            failure = make_no_answer_error(endpoints.STREAM, error)
        # Raise outside of the except block. Inside it, the context of the error would be aiohttp's
        # error, which contains the headers of the request with the token.
        raise failure

    def close(self) -> None:
        """Close the connection without reading the rest of the stream."""
        self._response.close()
