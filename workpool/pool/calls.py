"""What the pool asks of a client: `WorkClient`, or anything else that `connect` makes.

One client belongs to one event loop; the supervisor makes two, one for its own loop and one for the
keeper's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from workpool.wire.options import DEFAULT_OPTIONS, CallOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from pydantic import SecretStr

    from workpool.wire.event_calls import Guard
    from workpool.wire.items import Heartbeat, QueueStats, WorkItem
    from workpool.wire.session_events import SessionEvents


class Calls(Protocol):
    """A client, opened as an async context on the loop that uses it.

    Every call raises `TransientError`, `RefusedError`, `ConflictError` or `PreconditionError`
    (design §2); anything else is a bug. `timeout` bounds one call in seconds, None: the client's
    own bound.

    Attributes:
        worker_id: What it calls itself; set by the supervisor before it is opened.
        on_request: Told the operation, the code and the seconds of every request.
        on_rate_limit_wait: Told the kind and the seconds of every wait for our own rate limit.
        on_credential_refresh: Told "ok" or "error" when the token source was read again.
        rate_limits: Our own rate limits; shared between the clients of one supervisor.
    """

    worker_id: str | None
    on_request: Callable[[str, str, float], None] | None
    on_rate_limit_wait: Callable[[Any, float], None] | None
    on_credential_refresh: Callable[[Any], None] | None
    rate_limits: Any

    async def __aenter__(self) -> Calls:
        """Open on the running loop."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """Close."""

    async def acquire_ack_permit(self) -> None:
        """Acquire the right to send one ack, within our own rate limit for writes."""

    def release_ack_permit(self) -> None:
        """Give an ack permit back: the poll brought nothing to acknowledge."""

    async def poll(
        self, block_ms: int | None = None, reclaim_older_than_ms: int | None = None
    ) -> WorkItem | None:
        """Protocol §3.1."""

    async def ack(
        self,
        work_id: str,
        *,
        permit: bool = False,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem:
        """Protocol §3.2."""

    async def heartbeat(
        self,
        work_id: str,
        expected: str | None,
        ttl: int | None,
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Heartbeat:
        """Protocol §3.3."""

    async def stop(
        self,
        work_id: str,
        force: bool = False,  # noqa: FBT001, FBT002 - the call has one argument
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem | None:
        """Protocol §3.4."""

    async def update_metadata(
        self,
        work_id: str,
        patch: Mapping[str, str | None],
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem:
        """Protocol §3.5."""

    async def get(
        self,
        work_id: str,
        *,
        timeout: float | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> WorkItem:
        """Protocol §3.6."""

    def events(
        self, session_id: str, *, token: SecretStr | None = None, guard: Guard | None = None
    ) -> SessionEvents:
        """Protocol §5; `guard` is asked before and during each call."""

    async def stats(self) -> QueueStats:
        """Protocol §3.8."""
