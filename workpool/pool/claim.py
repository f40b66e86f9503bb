"""Claims an item: sends its acknowledgement, and then its first heartbeat.

Both requests are sent on the handlers' loop. No handler runs for the item before the first
heartbeat has succeeded, so a claim that is lost costs a redelivery and nothing else. After that
heartbeat, the lease renewer extends the lease.
See workpool/docs/architecture.md, "The path of one item".
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from workpool.errors import ConflictError, PreconditionError, RefusedError, TransientError
from workpool.events import AckFinished
from workpool.log_fields import pool_logger
from workpool.pool.completion import RELEASE_DELAY_SECONDS
from workpool.pool.item_requests import make_request_backoff
from workpool.wire.http.call_options import CLAIM_OPTIONS, CallOptions, Priority
from workpool.wire.protocol import (
    ACK_LEASE_SECONDS,
    ACTIVE,
    STARTING,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.backoff import Backoff
    from workpool.events import CallResult
    from workpool.pool.item_requests import HeartbeatSender
    from workpool.pool.lease import Lease
    from workpool.pool.pool_context import PoolContext
    from workpool.pool.pool_item import PoolItem
    from workpool.wire.items import WorkItem

log = pool_logger(__name__)

MARGIN_SECONDS = 6.0
"""The ack is repeated until this many seconds before the end of its lease.

A later answer leaves no time for a first heartbeat.
"""


@dataclass(slots=True)
class _AckRetryState:
    """The time limit and the backoff for repeating one ack.

    Attributes:
        until: The time from which the ack is not sent anymore, on the lease clock: another worker
            may claim the item then, or the lease would end before its first heartbeat.
        first_sent: The time at which the first ack that may have been applied was sent; infinite:
            no such ack was sent.
    """

    until: float
    first_sent: float = math.inf
    backoff: Backoff = field(default_factory=make_request_backoff)


class Claimer:
    """Claims items: sends their acks and first heartbeats. Lives on the handlers' loop.

    During a drain, no ack is repeated, and the first heartbeat already releases the item.

    Args:
        context: The context of the pool.
        heartbeats: Sends the first heartbeat.
        on_ack: Called with the final error of an ack, or with None when one was accepted.
    """

    def __init__(
        self,
        context: PoolContext,
        heartbeats: HeartbeatSender,
        on_ack: Callable[[RefusedError | ConflictError | PreconditionError | None], None],
    ) -> None:
        self._context = context
        self._client = context.client
        self._clock = context.clock
        self._pauses = context.renewer.pauses
        self._observe = context.observe
        self._heartbeats = heartbeats
        self._on_ack = on_ack

    async def acknowledge_item(self, item: PoolItem, taken_at: float) -> CallResult:
        """Acknowledge the item, with retries while this pool can still get it; return the result.

        After "ok", `item.work_item` is the answer and `item.acked_at` is set. `taken_at` is the
        current time on the lease clock: the item has just got its slot.
        """
        sent, retry, options = taken_at, None, CLAIM_OPTIONS
        while True:
            try:
                answer = await self._client.ack(item.id, permit=retry is None, options=options)
            except (ConflictError, PreconditionError) as error:
                self._on_ack(error)
                result: CallResult | None = "conflict"
            except RefusedError as error:
                result = self._report_ack_refusal(item, error)
            except TransientError as error:
                retry = retry or _AckRetryState(
                    item.delivered_at + self._context.redelivery_window_seconds
                )
                options = CallOptions(partial(self._check_ack_not_too_late, retry), Priority.CLAIM)
                result = (
                    None if await self._wait_before_ack_retry(item, retry, error, sent) else "error"
                )
            else:
                self._on_ack(None)
                first_sent = sent if retry is None else min(retry.first_sent, sent)
                result = _apply_ack_answer(item, answer, first_sent)
            now, delivered_at = self._clock(), item.delivered_at
            if result is not None:
                in_queue, since_delivery = taken_at - delivered_at, now - delivered_at
                self._observe(AckFinished, item.work_item, result, in_queue, since_delivery)
                return result
            sent = now

    def _check_ack_not_too_late(self, retry: _AckRetryState) -> None:
        """Raise an error if it is too late to repeat the ack. Called right before the ack is sent.

        A late ack could lease the item for 60 s to this pool, which would not run it.
        """
        if self._clock() >= retry.until:
            raise TransientError("ack", None, "too late to own the item", reason="not_sent")

    async def send_first_heartbeats(self, item: PoolItem) -> None:
        """Try to send the first heartbeat until it succeeds or the lease has ended."""
        lease = item.lease
        while not lease.end_if_expired(self._clock()):
            draining = self._context.draining
            if draining:
                lease.schedule_last_heartbeat(self._clock(), RELEASE_DELAY_SECONDS)
            await self._heartbeats.send_heartbeat(lease, self._end_lease_if_machine_paused)
            now = self._clock()
            if lease.begun:
                # The heartbeat may have succeeded so late that no time is left to run a handler.
                lease.end_if_expired(now)
            if lease.begun or lease.is_over:
                self._end_lease_if_machine_paused(lease, now)
                return
            seconds = min(lease.due_at, lease.give_up_at) - now
            if draining:
                await asyncio.sleep(max(0.0, seconds))
            else:
                # A heartbeat's Retry-After can make this wait long, so a drain must end the wait.
                await self._wait_for_drain(item, seconds)

    def _end_lease_if_machine_paused(self, lease: Lease, now: float) -> None:
        """End the lease if the machine was paused since the ack: the lease may have expired."""
        if self._pauses.was_machine_paused(lease.clock_offset, now):
            log.warning("the machine was paused during a claim", extra={"work_id": lease.item.id})
            lease.end_lease("lost")

    async def _wait_before_ack_retry(
        self, item: PoolItem, retry: _AckRetryState, failure: TransientError, sent: float
    ) -> bool:
        """Wait for the next try of an ack; return False if the ack must not be repeated."""
        if failure.may_be_applied:
            # If the control plane applied the ack, no other worker can get the item while the lease
            # lasts. So the ack may be repeated until shortly before the end of the lease.
            retry.first_sent = min(retry.first_sent, sent)
            retry.until = retry.first_sent + ACK_LEASE_SECONDS - MARGIN_SECONDS
        delay = max(retry.backoff.next_delay(), failure.retry_after or 0.0)
        if self._clock() + delay < retry.until and not await self._wait_for_drain(item, delay):
            return True
        log.warning("ack given up: %s", failure, extra={"work_id": item.id, "error": str(failure)})
        return False

    def _report_ack_refusal(self, item: PoolItem, error: RefusedError) -> CallResult:
        log.warning("ack refused: %s", error, extra={"work_id": item.id, "error": str(error)})
        if error.status == HTTPStatus.NOT_FOUND:
            return "gone"
        self._on_ack(error)
        return "error"

    async def _wait_for_drain(self, item: PoolItem, seconds: float) -> bool:
        """Wait until a drain begins, at most for `seconds`; return whether it has begun."""
        if seconds > 0:
            await item.wait_until(lambda: self._context.draining, seconds)
        return self._context.draining


def _apply_ack_answer(item: PoolItem, answer: WorkItem, acked_at: float) -> CallResult:
    # The state `active` does not prove that another worker has the item: some control planes give
    # it in every answer to an ack, and all of them in the answer to a repeated ack. The first
    # heartbeat shows which worker has the item.
    if answer.state not in {STARTING, ACTIVE}:
        return "conflict"
    token, trace = item.work_item.sessions_token, item.work_item.traceparent
    if token is not None or trace is not None:
        # The answer to an ack lacks the session token and the trace: use those of the poll.
        answer = replace(answer, sessions_token=answer.sessions_token or token, traceparent=trace)
    # `last_heartbeat` is set if another worker has had the item, perhaps while the item waited for
    # a slot of this pool.
    item.held_before = item.held_before or answer.last_heartbeat is not None
    item.work_item = answer
    item.acked_at = acked_at
    return "ok"
