"""The client of a work queue: one method for each call of the protocol, in either dialect.

Owns the URLs and the rate limits. The transport owns connections, headers and credentials, and
repeats a request in two cases; apart from these the caller decides what to do about an error. See
workpool/docs/protocol.md, "Calls" and "Sessions".
"""

from __future__ import annotations

import math
import re
import sys
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote

from yarl import URL

from workpool.errors import RefusedError
from workpool.wire import endpoints, protocol, request_bodies
from workpool.wire.client_dialects import DIALECTS
from workpool.wire.events.http_events import HttpEventCalls
from workpool.wire.events.session_events import SessionEvents
from workpool.wire.http.call_options import CLAIM_OPTIONS, DEFAULT_OPTIONS, CallOptions, Priority
from workpool.wire.http.rate_limiter import RateLimits
from workpool.wire.http.transport import Transport
from workpool.wire.item_search import FIND_PAGES_MAX, FoundItems, ItemSearch
from workpool.wire.items import WorkItem
from workpool.wire.page_limits import PageLimits

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
    from types import TracebackType

    import aiohttp

    from workpool.secret import Secret
    from workpool.settings import Settings
    from workpool.wire.endpoints import Endpoint
    from workpool.wire.events.event_calls import SessionGuard
    from workpool.wire.items import Heartbeat, QueueStats

T = TypeVar("T")

Items = list[WorkItem]

_is_id: Final = re.compile(protocol.ID_PATTERN).fullmatch


class WorkClient:
    """A client of one environment's work queue, for one event loop: `async with WorkClient(…)`.

    Every call takes `timeout`, in seconds: the limit of the wait for the rate limit, the request,
    and its repetition after a renewed token; None = the setting `request_timeout` (for a poll, in
    addition to the time that it blocks). The calls about one item also take `options`, see
    `CallOptions`. Every call raises `ControlPlaneError` and its subclasses, `ValueError` for a
    malformed id, and `RuntimeError` when the client is not open.

    Args:
        settings: The settings of the connection; `environment_id` and a token are needed.
        session: The caller's own aiohttp session, which stays open. Its proxy and connections are
            used, and its TLS settings unless the settings name a CA file or a client certificate.
        worker_id: The name of the worker in requests; None = the setting.
        rate_limits: The rate limits that all clients of one account share; None = the settings'
            rates, for this client alone.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        session: aiohttp.ClientSession | None = None,
        worker_id: str | None = None,
        rate_limits: RateLimits | None = None,
    ) -> None:
        self._settings = settings
        self._transport = self._key_transport = Transport(settings, session)
        self._sessions = f"{settings.base_url}/sessions"
        self._work = f"{settings.base_url}/environments/{settings.environment_id}/work"
        self._work_query = DIALECTS[settings.dialect].work_query
        # Parse these URLs once; `_build_item_url` then replaces only the path, which costs less.
        # All polls of a pool have the same query, and all first heartbeats of a pool do, too.
        self._base = self._build_work_url()
        self._path = self._base.raw_path
        self._last_poll: tuple[tuple[int | None, int | None], URL]
        self._last_poll = (None, None), self._build_poll_url(None, None)
        self._first_heartbeat: tuple[int | None, URL]
        self._first_heartbeat = None, self._build_heartbeat_url(protocol.NO_HEARTBEAT, None)
        self.worker_id: str | None = worker_id or settings.worker_id
        """The name that the worker sends, None for none. Set it before opening."""
        self.rate_limits = rate_limits or RateLimits(settings.read_limit, settings.write_limit)
        """The rate limits of the client."""
        self.on_request: Callable[[str, str, float], None] | None = None
        """Called at each request's end with the call, the status label and the seconds."""
        self.on_rate_limit_wait: Callable[[str, float], None] | None = None
        """Called at the end of each wait for the rate limit, with "read" or "write" and seconds."""
        self.on_credential_refresh: Callable[[str], None] | None = None
        """Called when the token source was read again, with "ok" or "error"."""

    async def __aenter__(self) -> WorkClient:
        """Open the client on the running event loop, without a connection yet.

        Raises:
            SettingsError: `environment_id` or the token is missing or cannot be read.
        """
        self._transport.on_request = self.on_request
        self._transport.on_credential_refresh = self.on_credential_refresh
        self._transport.on_rate_limit_wait = self.on_rate_limit_wait
        await self._transport.open(self.worker_id)
        self._key_transport = self._transport.copy_with_api_key()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections that the client has opened."""
        await self._transport.close()

    async def poll(
        self,
        block_ms: int | None = None,
        reclaim_older_than_ms: int | None = None,
        *,
        timeout: float | None = None,
    ) -> WorkItem | None:
        """Ask for the oldest claimable item, waiting up to `block_ms` for one.

        A poll only delivers: if it is cancelled or its answer is lost, the item is delivered again
        later.

        Args:
            block_ms: Milliseconds for which the control plane may wait for an item; None = it does
                not wait.
            reclaim_older_than_ms: Redeliver items that were delivered this many milliseconds ago
                and not acknowledged; None = the control plane's default.
            timeout: See the class; None = `request_timeout` in addition to `block_ms`.
        """
        asked, url = self._last_poll
        if asked != (block_ms, reclaim_older_than_ms):
            url = self._build_poll_url(block_ms, reclaim_older_than_ms)
            self._last_poll = (block_ms, reclaim_older_than_ms), url
        if timeout is None:
            timeout = self._settings.request_timeout + (block_ms or 0) / 1000
        limiter = self.rate_limits.read
        return await self._transport.send(
            endpoints.POLL, url, timeout, limiter, None, CLAIM_OPTIONS
        )

    async def acquire_ack_permit(self) -> None:
        """Acquire the right to send one ack. Called before a poll.

        A received item can then be acknowledged at once, without a wait for the rate limit.

        Raises:
            TransientError: The wait exceeded the setting `request_timeout`.
        """
        if self.rate_limits.write.limited:
            await self._transport.acquire_rate_token(self.rate_limits.write, "ack", Priority.CLAIM)

    def release_ack_permit(self) -> None:
        """Give back an ack permit that was not used, because there is nothing to acknowledge."""
        self.release_permit()

    def try_acquire_permit(self, priority: Priority) -> bool:
        """Acquire the right to send one write, or return False if that would need a wait."""
        return not self.rate_limits.write.limited or self.rate_limits.write.try_acquire(priority)

    async def acquire_permit(self, priority: Priority) -> None:
        """Acquire the right to send one write. The wait has no time limit."""
        await self._transport.acquire_rate_token(
            self.rate_limits.write, "permit", priority, math.inf
        )

    def release_permit(self) -> None:
        """Give back a permit that was not used."""
        if self.rate_limits.write.limited:
            self.rate_limits.write.refund()

    async def ack(
        self,
        work_id: str,
        *,
        permit: bool = False,
        timeout: float | None = None,
        options: CallOptions = CLAIM_OPTIONS,
    ) -> WorkItem:
        """Acknowledge an item before working on it; safe to repeat.

        Args:
            work_id: The item.
            permit: This call uses an ack permit and waits for no rate limit.
            timeout: See the class.
            options: See the class.

        Raises:
            ConflictError: Another worker holds the item, or it is stopping or stopped.
        """
        limiter = None if permit else self.rate_limits.write
        url = self._build_item_url(work_id, "/ack")
        item = await self._transport.send(endpoints.ACK, url, timeout, limiter, None, options)
        return endpoints.check_item_id_of_answer(endpoints.ACK, work_id, item)

    async def heartbeat(
        self,
        work_id: str,
        expected: str | None = protocol.NO_HEARTBEAT,
        ttl: int | None = None,
        *,
        timeout: float | None = None,
        options: CallOptions = CLAIM_OPTIONS,
    ) -> Heartbeat:
        """Extend an item's lease. Never waits for the rate limit.

        Args:
            work_id: The item.
            expected: The last heartbeat as the control plane wrote it; None = unconditional.
            ttl: The lease to ask for, in seconds; None = the control plane's default.
            timeout: See the class.
            options: See the class.

        Raises:
            PreconditionError: `expected` is not the last heartbeat of the lease.
            ConflictError: The item is queued or stopped.
        """
        if expected == protocol.NO_HEARTBEAT:
            asked, base = self._first_heartbeat
            if asked != ttl:
                base = self._build_heartbeat_url(expected, ttl)
                self._first_heartbeat = ttl, base
        else:
            base = self._build_heartbeat_url(expected, ttl)
        url = self._build_item_url(work_id, "/heartbeat", base)
        if self.rate_limits.write.limited:
            self.rate_limits.write.charge()
        return await self._transport.send(endpoints.HEARTBEAT, url, timeout, None, None, options)

    async def stop(
        self,
        work_id: str,
        force: bool = False,  # noqa: FBT001, FBT002 - `stop(id, True)` is public
        *,
        read_item: bool = True,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem | None:
        """Stop an item.

        The worker that holds the item ends it with this call. For anyone else, the call asks that
        worker to end it, or ends it at once with `force`.

        Args:
            work_id: The item.
            force: Stop the item at once.
            read_item: False = the item in the answer is not read; any JSON object is a success.
            timeout: See the class.
            options: See the class.

        Returns:
            The item; None if `read_item` is false, and from a control plane that answers
            without a body.
        """
        url, body = self._build_item_url(work_id, "/stop"), request_bodies.STOP[force]
        limiter = self.rate_limits.write
        endpoint = endpoints.STOP if read_item else endpoints.STOP_UNREAD
        return await self._transport.send(endpoint, url, timeout, limiter, body, options)

    async def update_metadata(
        self,
        work_id: str,
        patch: Mapping[str, str | None],
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem:
        """Merge `patch` into an item's metadata; None deletes a key.

        Raises:
            TypeError: A key or a value is of another type; nothing was sent.
        """
        body = request_bodies.make_metadata_patch_body(patch)
        limiter, url = self.rate_limits.write, self._build_item_url(work_id)
        return await self._key_transport.send(
            endpoints.UPDATE, url, timeout, limiter, body, options
        )

    async def get(
        self,
        work_id: str,
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem:
        """Read one item."""
        limiter, url = self.rate_limits.read, self._build_item_url(work_id)
        item = await self._key_transport.send(endpoints.GET, url, timeout, limiter, None, options)
        return endpoints.check_item_id_of_answer(endpoints.GET, work_id, item)

    async def list(
        self,
        *,
        limit: int | None = None,
        after_id: str | None = None,
        before_id: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[WorkItem, None]:
        """Iterate over items in the control plane's order, page by page.

        Args:
            limit: Stop after this many items; None = all.
            after_id: Only items after this one.
            before_id: The pages before this item, nearest page first, each ascending.
            timeout: See the class; for each page.
        """
        start = _make_start_position_query(after_id, before_id)
        left = sys.maxsize if limit is None else limit
        limits = PageLimits("list")
        while left > 0:
            await limits.wait_before_next_page()
            url = self._build_work_url("", f"limit={min(left, protocol.LIST_LIMIT_MAX)}{start}")
            page = await self._send_read_request(endpoints.LIST, url, timeout)
            for item in page.items[:left]:
                yield item
            left -= len(page.items)
            if page.next_page is None:
                return
            limits.record_page_entries((item.id for item in page.items), page.next_page)
            start = f"&page={quote(page.next_page, safe='')}"

    async def find(
        self,
        search: ItemSearch,
        *,
        after_id: str | None = None,
        before_id: str | None = None,
        timeout: float | None = None,
    ) -> FoundItems:
        """Search the list of items, reading `FIND_PAGES_MAX` pages of 100 items at most.

        A control plane that knows the parameters of a search selects and orders the items itself.
        From any other control plane, all items are read, and they are selected here.

        Args:
            search: The items to find.
            after_id: As for `list`.
            before_id: As for `list`.
            timeout: As for `list`.
        """
        query, start = search.query_parameters, _make_start_position_query(after_id, before_id)
        size = min(protocol.LIST_LIMIT_MAX if query else search.limit, protocol.LIST_LIMIT_MAX)
        found, limits = FoundItems(search), PageLimits("list")
        for _ in range(FIND_PAGES_MAX):
            await limits.wait_before_next_page()
            url = self._build_work_url("", f"limit={size}{query}{start}")
            try:
                page = await self._send_read_request(endpoints.LIST, url, timeout)
            except RefusedError as error:
                if error.status != HTTPStatus.BAD_REQUEST or not query:
                    raise
                # The control plane does not support the search parameters, so read all items.
                query = ""
                continue
            found.add_page(page)
            if page.next_page is None or found.has_enough_items:
                break
            start = f"&page={quote(page.next_page, safe='')}"
        found.sort_and_limit()
        return found

    async def stats(self, *, timeout: float | None = None) -> QueueStats:
        """Read the statistics of the queue."""
        url, limiter = self._build_work_url("/stats"), self.rate_limits.read
        return await self._key_transport.send(endpoints.STATS, url, timeout, limiter)

    async def session(self, session_id: str, *, timeout: float | None = None) -> Mapping[str, Any]:
        """Read a session; returns the JSON object of the control plane."""
        _check_id("session_id", session_id)
        url = URL(f"{self._sessions}/{session_id}", encoded=True)
        return await self._send_read_request(endpoints.SESSION, url, timeout)

    def events(
        self, session_id: str, *, token: Secret | None = None, guard: SessionGuard | None = None
    ) -> SessionEvents:
        """Return an object that lists, sends and streams the events of a session.

        Args:
            session_id: The session.
            token: The bearer token for these calls; None = the client's own.
            guard: Checked before and during each call; None = no check.
        """
        _check_id("session_id", session_id)
        own = self._transport
        http_events = HttpEventCalls(
            own if token is None else own.copy_with_token(token.get_secret_value()),
            self.rate_limits,
            f"{self._sessions}/{session_id}/events",
            self._work_query,
            resumes=DIALECTS[self._settings.dialect].events_resume,
        )
        return SessionEvents(http_events, session_id, guard)

    async def enqueue(
        self,
        count: int = 1,
        metadata: Mapping[str, str] | None = None,
        *,
        item_type: str | None = None,
        script: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
    ) -> Items:
        """Create work, on the embedded control plane only. Not safe to repeat.

        Args:
            count: The number of items, 1 to 1000.
            metadata: The metadata of each item.
            item_type: The `data.type` of each item; None = "session".
            script: The tool uses of a scripted session.
            timeout: See the class.
        """
        fields = {"count": count, "metadata": metadata, "type": item_type, "script": script}
        body = request_bodies.make_create_items_body(fields)
        url = self._build_work_url()
        return (await self._send_write_request(endpoints.ENQUEUE, url, body, timeout)).items

    def _send_read_request(
        self,
        endpoint: Endpoint[T],
        url: URL,
        timeout: float | None,
    ) -> Coroutine[Any, Any, T]:
        return self._transport.send(endpoint, url, timeout, self.rate_limits.read)

    def _send_write_request(
        self,
        endpoint: Endpoint[T],
        url: URL,
        body: bytes,
        timeout: float | None,
    ) -> Coroutine[Any, Any, T]:
        return self._transport.send(endpoint, url, timeout, self.rate_limits.write, body)

    def _build_work_url(self, path: str = "", query: str = "") -> URL:
        """Return the URL of a call below `/work`. `path` and `query` must be encoded already."""
        if self._work_query:
            query = f"{query}&{self._work_query}" if query else self._work_query
        mark = "?" if query else ""
        return URL(f"{self._work}{path}{mark}{query}", encoded=True)

    def _build_item_url(self, work_id: str, path: str = "", base: URL | None = None) -> URL:
        """Return the URL of a call for an item.

        The query comes from `base`, or from the dialect if `base` is None.
        """
        if type(work_id) is not str or not _is_id(work_id):
            _check_id("work_id", work_id)
        path = f"{self._path}/{work_id}{path}"
        base = self._base if base is None else base
        return base.with_path(path, encoded=True, keep_query=True)

    def _build_heartbeat_url(self, expected: str | None, ttl: int | None) -> URL:
        asked = []
        if expected is not None:
            quoted = expected if expected == protocol.NO_HEARTBEAT else quote(expected, safe=":")
            asked.append(f"expected_last_heartbeat={quoted}")
        if ttl is not None:
            asked.append(f"desired_ttl_seconds={ttl:d}")
        return self._build_work_url("", "&".join(asked))

    def _build_poll_url(self, block_ms: int | None, reclaim_older_than_ms: int | None) -> URL:
        asked = (("block_ms", block_ms), ("reclaim_older_than_ms", reclaim_older_than_ms))
        query = "&".join(f"{name}={value:d}" for name, value in asked if value is not None)
        return self._build_work_url("/poll", query)


def _make_start_position_query(after_id: str | None, before_id: str | None) -> str:
    """Return the query parameters of a list that begins after `after_id` or before `before_id`."""
    place = ""
    for name, value in (("after_id", after_id), ("before_id", before_id)):
        if value is not None:
            _check_id(name, value)
            place += f"&{name}={value}"
    return place


def _check_id(name: str, value: object) -> None:
    """Raise `ValueError` if `value`, which becomes a part of a URL, is not a valid id."""
    if not isinstance(value, str) or not _is_id(value):
        raise ValueError(f"{name}: not an id")
