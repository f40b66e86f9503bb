"""The calls on one session's events over HTTP (protocol §5): URLs, and a response that goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from yarl import URL

from workpool.wire import calls
from workpool.wire.protocol import LAST_EVENT_ID_HEADER
from workpool.wire.transport import TRANSIENT, no_answer

if TYPE_CHECKING:
    import aiohttp

    from workpool.wire.budget import Budgets
    from workpool.wire.event_calls import Event, EventPage, OpenStream
    from workpool.wire.paying import Paying


class HttpEvents:
    """See `workpool.wire.event_calls.EventCalls`.

    Args:
        paying: Sends the requests.
        budgets: Our own rate limits.
        url: Of the session's events; encoded already.
        query: Added to every query.
        resumes: A list can begin after an event that was read.
    """

    def __init__(
        self, paying: Paying, budgets: Budgets, url: str, query: str, *, resumes: bool
    ) -> None:
        self.resumes = resumes
        self._paying = paying
        self._budgets = budgets
        self._url = url
        self._query = query

    async def page(
        self, limit: int, *, after_id: str | None = None, page: str | None = None
    ) -> EventPage:
        """List the first events, or those after an event, or the next page."""
        asked = {"after_id": after_id, "page": page}
        start = [f"{name}={quote(at, safe='')}" for name, at in asked.items() if at is not None]
        url = self._at("", f"limit={limit}", *start)
        return await self._paying.send(calls.EVENTS, url, None, self._budgets.read)

    async def post(self, body: bytes) -> list[Event]:
        """Append events."""
        return await self._paying.send(calls.SEND, self._at(), None, self._budgets.write, body)

    async def open(self, last_id: str | None) -> OpenStream:
        """Open a stream on a connection of its own."""
        headers = {"Accept": "text/event-stream"}
        if last_id is not None:
            headers[LAST_EVENT_ID_HEADER] = last_id
        url = self._at("/stream")
        return _Stream(await self._paying.open(url, headers, self._budgets.read))

    def _at(self, path: str = "", *query: str) -> URL:
        text = "&".join((*query, self._query)).strip("&")
        return URL(f"{self._url}{path}?{text}" if text else f"{self._url}{path}", encoded=True)


class _Stream:
    """A response that goes on."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def read(self) -> bytes:
        """Return the next bytes; empty at the end."""
        try:
            return await self._response.content.readany()
        except TRANSIENT as error:
            failure = no_answer(calls.STREAM, error)
        raise failure  # out here: aiohttp's errors carry the request's headers

    def close(self) -> None:
        """Hang up: the rest is not read."""
        self._response.close()
