"""The calls of the protocol (protocol §3, §5, §7), one method each, in either dialect.

Owns the URLs and the rate limits. Connections, headers and credentials are the transport's; what
to do about an error is the caller's: no call is ever repeated here but for what transport.py says.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from yarl import URL

from workpool.errors import TransientError
from workpool.wire import bodies, calls, protocol
from workpool.wire.budget import Budget, Budgets
from workpool.wire.dialect import DIALECTS
from workpool.wire.http_events import HttpEvents
from workpool.wire.items import WorkItem
from workpool.wire.paying import Paying
from workpool.wire.session_events import SessionEvents
from workpool.wire.transport import Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from types import TracebackType

    import aiohttp
    from pydantic import SecretStr

    from workpool.settings import Settings
    from workpool.wire.event_calls import Guard
    from workpool.wire.items import Heartbeat, QueueStats

Items = list[WorkItem]

_is_id: Final = re.compile(protocol.ID_PATTERN).fullmatch


class WorkClient:
    """A client of one environment's work queue, for one event loop: `async with WorkClient(…)`.

    Every call takes `timeout`, in seconds, for all of it: the wait for our own rate limit, the
    request, and its repetition after a renewed token; None = the setting `request_timeout` (for a
    poll: beside the time that it blocks). Every call raises `ControlPlaneError` and its subclasses,
    `ValueError` for an id that cannot be one, and `RuntimeError` when the client is not open.

    Args:
        settings: Where the control plane is; needs `environment_id` and a token.
        session: Your own aiohttp session; stays open. Its proxy and TLS settings are used.
        worker_id: Our identity on the wire; None = the setting.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        session: aiohttp.ClientSession | None = None,
        worker_id: str | None = None,
    ) -> None:
        self._settings = settings
        self._transport = Transport(settings, session)
        self._paying = Paying(self._transport, settings.request_timeout)
        self._sessions = f"{settings.base_url}/sessions"
        work = URL(f"{settings.base_url}/environments/{settings.environment_id}/work", encoded=True)
        self._scheme, self._authority, self._work = work.scheme, work.raw_authority, work.raw_path
        self._work_query = DIALECTS[settings.dialect].work_query
        self.worker_id: str | None = worker_id or settings.worker_id
        """Our identity on the wire (protocol §1), None to tell none; set before opening."""
        self.budgets = Budgets(
            Budget("read", settings.read_limit), Budget("write", settings.write_limit)
        )
        """Our own rate limits; give two clients the same to make them share."""
        self.on_request: Callable[[str, str, float], None] | None = None
        """Told of each request's end: call, status label of metrics.md, seconds."""
        self.on_budget_wait: Callable[[str, float], None] | None = None
        """Told of each wait for our own rate limit: "read" or "write", seconds."""
        self.on_credential_refresh: Callable[[str], None] | None = None
        """Told when the token source was read again: "ok" or "error"."""

    async def __aenter__(self) -> WorkClient:
        """Open for the running loop; connects at the first call.

        Raises:
            SettingsError: `environment_id` or the token is missing or cannot be read.
        """
        self._settings.require_connection()
        self._transport.on_request = self.on_request
        self._transport.on_credential_refresh = self.on_credential_refresh
        self._paying.on_budget_wait = self.on_budget_wait
        self._transport.open(self.worker_id)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections that are ours."""
        await self._transport.close()

    async def poll(
        self,
        block_ms: int | None = None,
        reclaim_older_than_ms: int | None = None,
        *,
        timeout: float | None = None,
    ) -> WorkItem | None:
        """Ask for the oldest claimable item, waiting up to `block_ms` for one (protocol §3.1).

        A poll only delivers: one that is cancelled, or whose answer is lost, costs an item a
        redelivery and nothing more.

        Args:
            block_ms: How long the control plane may wait for an item; None = not at all.
            reclaim_older_than_ms: Redeliver what was delivered this long ago and not acknowledged;
                None = the control plane's default.
            timeout: See the class; None = `request_timeout` beside `block_ms`.
        """
        asked = (("block_ms", block_ms), ("reclaim_older_than_ms", reclaim_older_than_ms))
        query = "&".join(f"{name}={value:d}" for name, value in asked if value is not None)
        if timeout is None:
            timeout = self._settings.request_timeout + (block_ms or 0) / 1000
        url = self._work_url("/poll", query)
        return await self._paying.send(calls.POLL, url, timeout, self.budgets.read)

    async def reserve_ack(self) -> None:
        """Pay for an acknowledgement before polling, so that no item waits for our rate limit."""
        write = self.budgets.write
        if write.limited:
            await self._paying.pay(write, "ack", self._settings.request_timeout)

    def return_ack(self) -> None:
        """Take back what `reserve_ack` paid: there is nothing to acknowledge."""
        if self.budgets.write.limited:
            self.budgets.write.give_back()

    async def ack(
        self, work_id: str, *, reserved: bool = False, timeout: float | None = None
    ) -> WorkItem:
        """Confirm an item before working on it (protocol §3.2); safe to repeat.

        Args:
            work_id: The item.
            reserved: `reserve_ack` has paid for this call.
            timeout: See the class.

        Raises:
            ConflictError: Another worker has it, or it is stopping or stopped.
        """
        budget = None if reserved else self.budgets.write
        url = self._item_url(work_id, "/ack")
        return calls.same_item(
            calls.ACK, work_id, await self._paying.send(calls.ACK, url, timeout, budget)
        )

    async def heartbeat(
        self,
        work_id: str,
        expected: str | None = protocol.NO_HEARTBEAT,
        ttl: int | None = None,
        *,
        timeout: float | None = None,
    ) -> Heartbeat:
        """Keep an item's lease (protocol §3.3). Never waits for our rate limit.

        Args:
            work_id: The item.
            expected: The last heartbeat as the control plane wrote it; None = unconditional.
            ttl: The lease to ask for, in seconds; None = the control plane's default.
            timeout: See the class.

        Raises:
            PreconditionError: `expected` is not the lease owner's.
            ConflictError: The item is queued or stopped.
        """
        asked = []
        if expected is not None:
            asked.append(f"expected_last_heartbeat={quote(expected, safe=':')}")
        if ttl is not None:
            asked.append(f"desired_ttl_seconds={ttl:d}")
        url = self._item_url(work_id, "/heartbeat", "&".join(asked))
        if self.budgets.write.limited:
            self.budgets.write.debit()
        return await self._paying.send(calls.HEARTBEAT, url, timeout, None)

    async def stop(
        self,
        work_id: str,
        force: bool = False,  # noqa: FBT001, FBT002 - the call has one argument
        *,
        timeout: float | None = None,
    ) -> WorkItem | None:
        """Finish an item, or ask for or confirm its stop (protocol §3.4).

        Returns:
            The item; None from a control plane that does not answer it (protocol §6).
        """
        url = self._item_url(work_id, "/stop")
        return await self._paying.send(
            calls.STOP, url, timeout, self.budgets.write, bodies.STOP[force]
        )

    async def update_metadata(
        self, work_id: str, patch: Mapping[str, str | None], *, timeout: float | None = None
    ) -> WorkItem:
        """Merge `patch` into an item's metadata; None deletes a key (protocol §3.5).

        Raises:
            TypeError: A key or a value is of another type; nothing was sent.
        """
        body = bodies.update(patch)
        url = self._item_url(work_id)
        return await self._paying.send(calls.UPDATE, url, timeout, self.budgets.write, body)

    async def get(self, work_id: str, *, timeout: float | None = None) -> WorkItem:
        """Read one item (protocol §3.6)."""
        url = self._item_url(work_id)
        return calls.same_item(
            calls.GET, work_id, await self._paying.send(calls.GET, url, timeout, self.budgets.read)
        )

    async def list(
        self,
        *,
        limit: int | None = None,
        after_id: str | None = None,
        before_id: str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[WorkItem]:
        """Iterate over items by ascending id, page by page (protocol §3.7).

        Args:
            limit: Stop after this many; None = all there are.
            after_id: Only items after this one.
            before_id: The pages before this item, nearest page first, each ascending.
            timeout: See the class; for each page.
        """
        start = ""
        for name, value in (("after_id", after_id), ("before_id", before_id)):
            if value is not None:
                _check_id(name, value)
                start += f"&{name}={value}"
        left = sys.maxsize if limit is None else limit
        seen: set[str] = set()
        while left > 0:
            url = self._work_url("", f"limit={min(left, protocol.LIST_LIMIT_MAX)}{start}")
            page = await self._paying.send(calls.LIST, url, timeout, self.budgets.read)
            for item in page.items[:left]:
                yield item
            left -= len(page.items)
            if page.next_page is None:
                return
            if page.next_page in seen:  # else we would go round for ever
                raise TransientError("list", None, "the pages repeat", reason="bad_body")
            seen.add(page.next_page)
            start = f"&page={quote(page.next_page, safe='')}"

    async def stats(self, *, timeout: float | None = None) -> QueueStats:
        """Read how full the queue is (protocol §3.8)."""
        url = self._work_url("/stats")
        return await self._paying.send(calls.STATS, url, timeout, self.budgets.read)

    async def session(self, session_id: str, *, timeout: float | None = None) -> Mapping[str, Any]:
        """Read a session as the control plane writes it (protocol §5)."""
        _check_id("session_id", session_id)
        url = URL(f"{self._sessions}/{session_id}", encoded=True)
        return await self._paying.send(calls.SESSION, url, timeout, self.budgets.read)

    def events(
        self, session_id: str, *, token: SecretStr | None = None, guard: Guard | None = None
    ) -> SessionEvents:
        """The events of a session: list, send, stream (protocol §5).

        Args:
            session_id: The session.
            token: The bearer for these calls; None = the client's own.
            guard: Asked before and during each; None = nothing is.
        """
        _check_id("session_id", session_id)
        own = self._paying if token is None else self._paying.bearing(token.get_secret_value())
        http_events = HttpEvents(
            own,
            self.budgets,
            f"{self._sessions}/{session_id}/events",
            self._work_query,
            # The sibling's list begins at a page only.
            resumes=self._settings.dialect == protocol.QODER,
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
        """Create work, on the embedded control plane only (protocol §7). Not safe to repeat.

        Args:
            count: How many items, 1 to 1000.
            metadata: Given to each.
            item_type: Their `data.type`; None = "session".
            script: The tool uses of a scripted session (protocol §5).
            timeout: See the class.
        """
        fields = {"count": count, "metadata": metadata, "type": item_type, "script": script}
        body = bodies.enqueue(fields)
        url = self._work_url()
        page = await self._paying.send(calls.ENQUEUE, url, timeout, self.budgets.write, body)
        return page.items

    def _work_url(self, path: str = "", query: str = "") -> URL:
        """The URL of a work call; all parts must be encoded already."""
        if self._work_query:
            query = f"{query}&{self._work_query}" if query else self._work_query
        # From its parts: that costs half of finding them in a string, three times per item.
        return URL.build(
            scheme=self._scheme,
            authority=self._authority,
            path=f"{self._work}{path}",
            query_string=query,
            encoded=True,
        )

    def _item_url(self, work_id: str, path: str = "", query: str = "") -> URL:
        _check_id("work_id", work_id)
        return self._work_url(f"/{work_id}{path}", query)


def _check_id(name: str, value: object) -> None:
    """Ids become parts of URLs: what is not an id must not get that far (protocol §1)."""
    if not isinstance(value, str) or not _is_id(value):
        raise ValueError(f"{name}: not an id")
