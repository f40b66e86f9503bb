"""Sends one heartbeat, and reads the item if the answer leaves open which worker holds it.

See workpool/docs/architecture.md, "The arithmetic of a lease".
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from workpool.errors import (
    ConflictError,
    PreconditionError,
    RefusedError,
    SessionGoneError,
    TransientError,
)
from workpool.events import HeartbeatFinished
from workpool.wire.options import CallOptions, Priority

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.pool.client import Client
    from workpool.pool.clock import Clock, PauseDetector
    from workpool.pool.lease import Attempt, Decision, Lease
    from workpool.pool.telemetry import Observe
    from workpool.wire.items import Heartbeat, WorkItem

log = logging.getLogger(__name__)

ControlPlaneErrors = (TransientError, RefusedError, ConflictError, PreconditionError)


class HeartbeatSender:
    """Sends heartbeats through one client; there is one for each event loop."""

    def __init__(
        self, client: Client, clock: Clock, pauses: PauseDetector, observe: Observe
    ) -> None:
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
                decision = await self._read(lease, attempt, decision)
        finally:
            if lease.in_flight:
                lease.abandoned()
        if decision.result is not None:
            self._observe(HeartbeatFinished, lease.item, decision.result, attempt.lag)
        return decision.then == "held"

    async def _heartbeat(
        self, lease: Lease, attempt: Attempt, check: Callable[[], None] | None
    ) -> Heartbeat | TransientError | RefusedError | ConflictError | PreconditionError | None:
        """Return the answer; None if nothing was sent because the lease was not held any more."""
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

    async def _read(self, lease: Lease, attempt: Attempt, decision: Decision) -> Decision:
        outcome: WorkItem | TransientError | RefusedError | ConflictError | PreconditionError
        try:
            outcome = await self._client.get(lease.item.id, timeout=attempt.timeout)
        except ControlPlaneErrors as error:
            outcome = error
        return lease.read(self._clock(), decision.result, outcome)

    def _check(self, lease: Lease, check: Callable[[], None] | None) -> None:
        if check is not None:
            check()
        lease.check(self._clock())
