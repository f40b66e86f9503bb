"""The acknowledgement: the moment an item becomes ours to run (protocol §3.2, design §1, §2).

Sent as late as possible, when a slot takes the item, and repeated only while the claim can still be
ours.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING

from workpool.backoff import Backoff
from workpool.errors import ConflictError, PreconditionError, RefusedError, TransientError
from workpool.events import AckFinished
from workpool.wire.protocol import ACK_LEASE_SECONDS, STARTING

if TYPE_CHECKING:
    from workpool.events import CallResult
    from workpool.pool.claim import Claim
    from workpool.pool.parts import Parts
    from workpool.wire.items import WorkItem

log = logging.getLogger(__name__)

RETRY_SECONDS, RETRY_CAP_SECONDS = 0.2, 3.0
MAYBE_APPLIED = frozenset({"network", "timeout", "bad_body", "server_error"})
MARGIN_SECONDS = 6.0
"""An ack answered later than this before its lease's end leaves no time for a first beat."""


class Acknowledger:
    """Acknowledges claims. Lives on the handlers' loop."""

    def __init__(self, parts: Parts) -> None:
        self._window = parts.settings.reclaim_older_than_ms / 1000
        self._calls = parts.calls
        self._clock = parts.clock
        self._observe = parts.observe
        self._leaving = asyncio.Event()

    def drain(self) -> None:
        """The pool is going away: repeat no ack any more, those that wait for it included."""
        self._leaving.set()

    async def acknowledge(self, claim: Claim) -> CallResult:
        """Acknowledge the claim's item, again while it is worth it, and say how it went.

        After "ok", `claim.item` is what the control plane answered and `claim.acked_at` is when the
        lease began at the earliest.
        """
        taken_at = self._clock()
        result = await self._settle(claim)
        self._observe(
            AckFinished(
                claim.item,
                result,
                queue_seconds=taken_at - claim.delivered_at,
                delivery_seconds=self._clock() - claim.delivered_at,
            )
        )
        return result

    async def _settle(self, claim: Claim) -> CallResult:
        backoff = Backoff(RETRY_SECONDS, RETRY_CAP_SECONDS)
        lease_from = math.inf
        until = claim.delivered_at + self._window
        reserved = True
        while True:
            sent = self._clock()
            try:
                item = await self._calls.ack(claim.item.id, reserved=reserved)
            except (ConflictError, PreconditionError):
                return "conflict"
            except RefusedError as error:
                return _refused(claim, error)
            except TransientError as error:
                failure = error
            else:
                return _accept(claim, item, min(lease_from, sent))
            reserved = False
            if failure.reason in MAYBE_APPLIED:
                # If it was, nobody else can have the item before that lease has lapsed.
                lease_from = min(lease_from, sent)
                until = max(until, lease_from + ACK_LEASE_SECONDS - MARGIN_SECONDS)
            delay = max(backoff.next(), failure.retry_after or 0.0)
            if self._clock() + delay >= until or await self._leaves_within(delay):
                log.warning("ack given up work_id=%s error=%s", claim.item.id, failure)
                return "error"

    async def _leaves_within(self, seconds: float) -> bool:
        """Sleep, unless the drain comes: it must not wait for a long `Retry-After`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._leaving.wait()
        return self._leaving.is_set()


def _accept(claim: Claim, item: WorkItem, acked_at: float) -> CallResult:
    if item.state != STARTING:  # `active`: another claimant's beats are running on it
        return "conflict"
    if item.sessions_token is None:  # told to whoever polled, and perhaps not again
        item = replace(item, sessions_token=claim.item.sessions_token)
    # While it waited for a slot, another worker may have run it and lost it.
    claim.held_before = claim.held_before or item.last_heartbeat is not None
    claim.item = item
    claim.acked_at = acked_at
    return "ok"


def _refused(claim: Claim, error: RefusedError) -> CallResult:
    log.warning("ack refused work_id=%s error=%s", claim.item.id, error)
    return "gone" if error.status == HTTPStatus.NOT_FOUND else "error"
