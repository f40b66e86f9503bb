"""The interface of the control plane's client, as the pool uses it.

A client is a `WorkClient`, or another object that `connect` creates. It belongs to one event loop.
The supervisor creates two: one on its own loop, one on the lease renewer's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from workpool.wire.http.call_options import CLAIM_OPTIONS, DEFAULT_OPTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from types import TracebackType

    from workpool.secret import Secret
    from workpool.wire.events.event_calls import SessionGuard
    from workpool.wire.events.session_events import SessionEvents
    from workpool.wire.http.call_options import CallOptions, Priority
    from workpool.wire.items import Heartbeat, QueueStats, WorkItem


class ClientProtocol(Protocol):
    """The interface of a control-plane client; entered and left on the event loop that uses it.

    Every call raises `TransientError`, `RefusedError`, `ConflictError` or `PreconditionError`;
    anything else is a bug. `timeout` is the limit of one call in seconds; None: the client's own
    limit. `options` say how a call is sent; a call for which `options.check` raises sends nothing.

    Attributes:
        worker_id: The worker's name in requests; the supervisor sets it before it opens the client.
        rate_limits: The rate limits; shared by the clients of one supervisor.
        on_request: Called with the operation, the code and the seconds of every request.
        on_rate_limit_wait: Called with the kind and the seconds of every wait for a rate limit.
        on_credential_refresh: Called with "ok" or "error" when the token source was read again.
    """

    worker_id: str | None
    rate_limits: Any
    on_request: Callable[[str, str, float], None] | None
    on_rate_limit_wait: Callable[[Any, float], None] | None
    on_credential_refresh: Callable[[Any], None] | None

    async def __aenter__(self) -> ClientProtocol:
        """Open the client for use on the running event loop."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """Close the connections."""

    def try_acquire_permit(self, priority: Priority) -> bool:
        """Return whether the rate limit permits one write now; if so, count the write."""

    async def acquire_permit(self, priority: Priority) -> None:
        """Wait until the rate limit permits one write; waits of higher priority end first."""

    def release_permit(self) -> None:
        """Give an acquired permit back to the rate limiter, because the write was not sent."""

    async def acquire_ack_permit(self) -> None:
        """Wait until the rate limit permits the ack that may follow a poll."""

    def release_ack_permit(self) -> None:
        """Give an ack permit back to the rate limiter, because the poll brought no item."""

    async def poll(
        self, block_ms: int | None = None, reclaim_older_than_ms: int | None = None
    ) -> WorkItem | None:
        """Poll for an item."""

    async def ack(
        self,
        work_id: str,
        *,
        permit: bool = False,
        timeout: float | None = None,
        options: CallOptions = CLAIM_OPTIONS,
    ) -> WorkItem:
        """Acknowledge an item; `permit`: whether `acquire_ack_permit` was called for this ack."""

    async def heartbeat(
        self,
        work_id: str,
        expected: str | None,
        ttl: int | None,
        *,
        timeout: float | None = None,
        options: CallOptions = CLAIM_OPTIONS,
    ) -> Heartbeat:
        """Extend a lease."""

    async def stop(
        self,
        work_id: str,
        force: bool = False,  # noqa: FBT001, FBT002 - `stop(id, True)` is public
        *,
        read_item: bool = True,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> object:
        """Stop an item; if `read_item` is false, the item in the answer is not parsed."""

    async def update_metadata(
        self,
        work_id: str,
        patch: Mapping[str, str | None],
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem:
        """Merge a patch into an item's metadata."""

    async def get(self, work_id: str, *, timeout: float | None = None) -> WorkItem:
        """Read one item."""

    def list(
        self, *, limit: int | None = None, timeout: float | None = None
    ) -> AsyncGenerator[WorkItem, None]:
        """Iterate over at most `limit` items of the environment, page by page.

        `timeout` limits the request for each page.
        """

    def events(
        self, session_id: str, *, token: Secret | None = None, guard: SessionGuard | None = None
    ) -> SessionEvents:
        """Return an object that lists, sends and follows the events of a session.

        The object makes its calls through `guard`, which refuses them once the pool no longer holds
        the session's item. None: nothing is checked.
        """

    async def stats(self) -> QueueStats:
        """Read the statistics of the remote queue."""
