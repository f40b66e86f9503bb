"""Sends one heartbeat, and reads the item if the answer leaves open which worker holds it.

See workpool/docs/architecture.md, "The arithmetic of a lease".
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from workpool.errors import (
    ConflictError,
    NotPermittedError,
    PreconditionError,
    RefusedError,
    SessionGoneError,
    TransientError,
)
from workpool.events import HeartbeatFinished
from workpool.pool.optional_calls import OptionalCalls, read_item
from workpool.wire.http.call_options import CallOptions, Priority

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.errors import ControlPlaneError
    from workpool.pool.client_protocol import ClientProtocol
    from workpool.pool.lease import Decision, HeartbeatAttempt, Lease
    from workpool.pool.lease_clock import Clock, PauseDetector
    from workpool.pool.telemetry import Observe
    from workpool.wire.items import Heartbeat, WorkItem

log = logging.getLogger(__name__)

ControlPlaneErrors = (TransientError, RefusedError, ConflictError, PreconditionError)


class HeartbeatSender:
    """Sends heartbeats through one client; there is one for each event loop."""

    def __init__(
        self,
        client: ClientProtocol,
        clock: Clock,
        pauses: PauseDetector,
        observe: Observe,
        optional: OptionalCalls | None = None,
    ) -> None:
        self._optional = optional or OptionalCalls()
        self._client = client
        self._clock = clock
        self._pauses = pauses
        self._observe = observe

    async def send(self, lease: Lease, check: Callable[[], None] | None = None) -> bool:
        """Send one heartbeat, apply its answer to the lease, and return whether it extended it.

        `check` is called right before the bytes; it may end the lease, so that nothing is sent.
        An unexpected error ends the lease: no handler may go on with a lease that nobody renews.
        """
        try:
            return await self._exchange(lease, check)
        except Exception:
            log.exception("heartbeat crashed work_id=%s", lease.item.id)
            lease.in_flight = False
            lease.end("lost")
            return False

    async def _exchange(self, lease: Lease, check: Callable[[], None] | None) -> bool:
        attempt = lease.send(self._clock(), lease.due_at, self._pauses.offset())
        try:
            outcome = await self._heartbeat(lease, attempt, check)
            if outcome is None:
                lease.unsent(attempt)
                return False
            decision = lease.answered(self._clock(), attempt, outcome)
            if decision.then == "read":
                look_up = not isinstance(outcome, ConflictError)
                decision = await self._read(lease, attempt, decision, look_up=look_up)
        finally:
            if lease.in_flight:
                lease.abandoned()
        if decision.result is not None:
            self._observe(HeartbeatFinished, lease.item, decision.result, attempt.lag)
        return decision.then == "held"

    async def _heartbeat(
        self, lease: Lease, attempt: HeartbeatAttempt, check: Callable[[], None] | None
    ) -> Heartbeat | TransientError | RefusedError | ConflictError | PreconditionError | None:
        """Return the answer; None if nothing was sent because the lease was not held anymore."""
        options = CallOptions(
            check=partial(self._check, lease, check), priority=Priority.COMPLETION
        )
        try:
            return await self._client.heartbeat(
                lease.item.id,
                attempt.expected,
                attempt.ttl,
                timeout=attempt.timeout,
                options=options,
            )
        except SessionGoneError:
            return None
        except ControlPlaneErrors as error:
            return error

    async def _read(
        self, lease: Lease, attempt: HeartbeatAttempt, decision: Decision, *, look_up: bool
    ) -> Decision:
        """Read the item and apply it to the lease.

        `look_up`: if the credential may not read it, look it up in the list. After a 409 that is
        of no use: the lease is over, and only who ended it is open.
        """
        outcome: WorkItem | ControlPlaneError | None
        client, work_id, timeout = self._client, lease.item.id, attempt.timeout
        try:
            if look_up:
                outcome = await read_item(client, self._optional, work_id, timeout)
            else:
                outcome = await self._optional.make(
                    "get", lambda: client.get(work_id, timeout=timeout)
                )
        except NotPermittedError:
            outcome = None
        except ControlPlaneErrors as error:
            outcome = error
        return lease.read(self._clock(), decision.result, outcome)

    def _check(self, lease: Lease, check: Callable[[], None] | None) -> None:
        if check is not None:
            check()
        lease.check(self._clock())
