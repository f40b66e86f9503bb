"""The client of the control plane for the pool: its interface, and calls that may be refused.

A client is a `WorkClient`, or another object that `connect` creates. It belongs to one event loop.
The supervisor creates two: one on its own loop, one on the lease renewer's.

Some control planes do not let a worker's key read an item, write its metadata or query statistics.
A pool works without these calls. Such a refusal is remembered as long as the process runs and
logged once with its meaning; the call is not sent again. See workpool/docs/architecture.md,
"Optional calls".
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

from workpool.errors import NotPermittedError, RefusedError, TransientError
from workpool.log_fields import pool_logger
from workpool.wire.http.call_options import CLAIM_OPTIONS, DEFAULT_OPTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
    from types import TracebackType

    from workpool.errors import ControlPlaneError
    from workpool.secret import Secret
    from workpool.wire.events.event_calls import Guard
    from workpool.wire.events.session_events import SessionEvents
    from workpool.wire.http.call_options import CallOptions, Priority
    from workpool.wire.items import Heartbeat, QueueStats, WorkItem

log = pool_logger(__name__)
T = TypeVar("T")
Op = Literal["get", "update", "stats"]

DENIED: Final = frozenset({401, 403, 405, 501})
UNSUPPORTED: Final = "unsupported_capability"
"""The error type of one control plane's 400 for calls that it does not have."""
NOT_PERMITTED: Final = "the credential may not make this call"
MEANING: Final[Mapping[Op, str]] = {
    "get": "an item in doubt is looked up in the list of items",
    "update": "results and errors of sessions are not written, and attempts are counted in this"
    " process only",
    "stats": "the metrics of the remote queue are absent",
}
LOOK_UP_ITEMS: Final = 1000
"""Largest number of items that are listed to find one."""


class ClientProtocol(Protocol):
    """A client, opened as an async context on the loop that uses it.

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
        """Open on the running loop."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """Close."""

    def try_acquire_permit(self, priority: Priority) -> bool:
        """Take a permit for one write if no wait is needed; return whether it was taken."""

    async def acquire_permit(self, priority: Priority) -> None:
        """Wait for a permit for one write of this priority."""

    def release_permit(self) -> None:
        """Return a permit that was not used."""

    async def acquire_ack_permit(self) -> None:
        """Acquire a permit for one ack, before a poll."""

    def release_ack_permit(self) -> None:
        """Return an ack permit, since there is nothing to acknowledge."""

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
        """Acknowledge an item; `permit`: an ack permit was acquired for it."""

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
        force: bool = False,  # noqa: FBT001, FBT002 - the call has one argument
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
        """Iterate over at most `limit` items of the environment; `timeout` is for each page."""

    def events(
        self, session_id: str, *, token: Secret | None = None, guard: Guard | None = None
    ) -> SessionEvents:
        """Return the events of a session; `guard` checks before and during each call."""

    async def stats(self) -> QueueStats:
        """Read the statistics of the remote queue."""


class OptionalCalls:
    """Makes optional calls for one pool, on all of its loops.

    Attributes:
        refused: The calls that the credential is known not to permit, with the status of the
            refusal. Only this class changes it.
    """

    def __init__(self) -> None:
        self.refused: dict[Op, int | None] = {}
        self._allowed: set[Op] = set()
        self._logged: set[Op] = set()

    def check(self, op: Op) -> None:
        """Raise an error if the call is known to be refused.

        Raises:
            NotPermittedError: The call was refused before.
        """
        if op in self.refused:
            raise NotPermittedError(op, self.refused[op], NOT_PERMITTED)

    async def make(self, op: Op, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call, unless it was refused before.

        Raises:
            NotPermittedError: The credential does not permit the call.
            ControlPlaneError: The error of the call.
        """
        self.check(op)
        try:
            value = await call()
        except (RefusedError, TransientError) as error:
            if not self._record_refusal(op, error):
                raise
            status = error.status
        else:
            self._allowed.add(op)
            return value
        raise NotPermittedError(op, status, NOT_PERMITTED)

    def forget(self) -> None:
        """Let all calls be tried again, since a call was refused that every credential permits."""
        self.refused.clear()

    def _record_refusal(self, op: Op, error: ControlPlaneError) -> bool:
        """Return whether a refusal means that the credential does not permit this call at all."""
        if op in self._allowed or not _means_never(op, error):
            return False
        self.refused[op] = error.status
        if op not in self._logged:
            self._logged.add(op)
            log.warning(
                "%s; the setting api_key can hold a credential that may make this call: %s",
                MEANING[op],
                error,
                extra={"error": str(error)},
            )
        return True


def _means_never(op: Op, error: ControlPlaneError) -> bool:
    status = error.status
    if op == "stats" and status == HTTPStatus.NOT_FOUND:
        return True  # the control plane does not have the path
    return status in DENIED or error.error_type == UNSUPPORTED


async def read_item(
    client: ClientProtocol, optional: OptionalCalls, work_id: str, timeout: float
) -> WorkItem | None:
    """Read an item, or look it up in the list if the credential may not read it.

    Args:
        client: Sends the calls.
        optional: The optional calls of the credential.
        work_id: The item.
        timeout: The limit in seconds of each of the two calls.

    Returns:
        The item; None if it is not among the first `LOOK_UP_ITEMS` of the list.
    """
    try:
        return await optional.make("get", lambda: client.get(work_id, timeout=timeout))
    except NotPermittedError:
        pass
    try:
        async with (
            asyncio.timeout(timeout),
            aclosing(client.list(limit=LOOK_UP_ITEMS, timeout=timeout)) as items,
        ):
            async for item in items:
                if item.id == work_id:
                    return item
    except TimeoutError:
        raise TransientError("list", None, "no answer in time", reason="timeout") from None
    return None
