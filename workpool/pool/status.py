"""The state of a pool for its users, and the statistics of the remote queue.

`PoolView` supplies status, gauges, readiness and health. It only reads, and may be called on any
thread while the pool runs: each value is read once, and its writers replace it in one atomic step.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from workpool.errors import ControlPlaneError
from workpool.events import QueueStatsRead
from workpool.log_fields import pool_logger
from workpool.metrics import PoolSnapshot
from workpool.pool.diagnostics import LAG_WARNING_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workpool.pool.dispatcher import Dispatcher
    from workpool.pool.drain import Drain
    from workpool.pool.exit_limits import ExitLimits
    from workpool.pool.poller import Poller, PollerGroup
    from workpool.pool.pool_context import PoolContext

log = pool_logger(__name__)

POLL_SUCCESS_SECONDS = 30.0
"""A pool is ready for this long after a successful poll."""


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a supervisor at one moment.

    Attributes:
        ready: Whether the pool takes work, or all places of its queue are occupied.
        reasons: The reasons why the pool is not ready.
        running: The number of items in slots.
        waiting: The number of delivered items that wait for a slot.
        capacity: `concurrency + prefetch`.
        draining: Whether a drain has begun, so that the pool does not poll anymore.
        error: The fatal error, if any.
        slots: `concurrency`.
        claiming: Whether the pool claims items when a place is free: it has started and is not
            paused, draining, failed or at an exit limit.
        paused: Whether a pause or the refusal of a plugin keeps the pool from claiming.
        idle_seconds: Seconds for which no slot has been taken; 0 while a slot is taken.
    """

    ready: bool
    reasons: tuple[str, ...]
    running: int
    waiting: int
    capacity: int
    draining: bool
    error: BaseException | None
    slots: int
    claiming: bool
    paused: bool
    idle_seconds: float


def compute_worker_scaling_numbers(status: Status) -> dict[str, float]:
    """Return the numbers of one worker for autoscalers, as a flat JSON object without ids.

    A slot is busy from the claim of its item to the end of the completion.
    """
    return {
        "busy": status.running,
        "idle": max(0, status.slots - status.running),
        "slots": status.slots,
        "waiting": status.waiting,
        "claiming": status.claiming,
        "paused": status.paused,
        "draining": status.draining,
        "idle_seconds": status.idle_seconds,
    }


@dataclass(frozen=True, slots=True)
class PoolView:
    """Reads the state of a running pool from its queue, pollers, items and leases."""

    context: PoolContext
    dispatcher: Dispatcher
    group: PollerGroup
    pollers: Sequence[Poller]
    drain: Drain
    limits: ExitLimits | None = None

    def snapshot(self) -> PoolSnapshot:
        """Return the values of the gauges."""
        queue, clock = self.context.queue, self.context.clock
        now = clock()
        polled_at = self.group.last_success_at
        items = self.dispatcher.items.copy_items()
        leases = [item.lease for item in items if item.has_lease and not item.lease.is_over]
        states = Counter(
            "stopping" if lease.stop_requested else "active" if lease.begun else "starting"
            for lease in leases
        )
        free = queue.free_slot_count
        reserved = min(queue.reserved, free)
        # Leave out leases that are always short: those that an acknowledgement began and no
        # heartbeat has extended yet, and those that are about to lapse.
        renewed = [lease for lease in leases if lease.begun and not lease.is_releasing]
        blocked = self.context.renewer.monitor.loop_blocked_seconds
        settings = self.context.settings
        return PoolSnapshot(
            # A blocked loop does not poll, whatever the state of its pollers.
            pollers=Counter(
                "blocked" if blocked >= LAG_WARNING_SECONDS else poller.state
                for poller in self.pollers
            ),
            pollers_target=self.group.target,
            pollers_limit=len(self.pollers),
            last_poll_success=(
                None
                if polled_at is None
                else datetime.now(UTC).timestamp() - max(0.0, now - polled_at)
            ),
            queue_depth=queue.waiting_item_count,
            items_set_aside=len(queue.items_set_aside),
            queue_capacity=queue.capacity,
            slots={"busy": queue.running, "reserved": reserved, "free": free - reserved},
            slots_limit=queue.concurrency,
            stuck_handlers=len(self.dispatcher.executor.stuck),
            loop_blocked=blocked,
            leases=states,
            lease_ttl=min((lease.ttl for lease in renewed), default=settings.lease_ttl),
            remote_stats_interval=settings.stats_interval,
            lease_remaining_min=min(
                (lease.remaining_seconds(now) for lease in renewed), default=None
            ),
            sessions=self._count_sessions_by_handler(now),
            draining=self.drain.requested.is_set(),
            paused=self._find_pause_flags(),
        )

    def _find_pause_flags(self) -> dict[str, int]:
        admission, limits = self.context.admission, self.limits
        return {
            "pause": admission.pause_reason is not None,
            "plugin": admission.refusal_reason is not None,
            "limit": limits is not None and limits.reached is not None,
        }

    def _count_sessions_by_handler(self, now: float) -> list[tuple[str, int, float, float]]:
        running: Counter[str] = Counter()
        oldest: dict[str, float] = {}
        silence: dict[str, float] = {}
        for item in self.dispatcher.items.copy_items():
            if item.is_handler_running:
                running[item.handler_label] += 1
                oldest[item.handler_label] = max(
                    oldest.get(item.handler_label, 0.0), now - item.acked_at
                )
                silence[item.handler_label] = max(
                    silence.get(item.handler_label, 0.0), item.seconds_without_progress(now)
                )
        return [(name, count, oldest[name], silence[name]) for name, count in running.items()]

    @property
    def claiming(self) -> bool:
        """Whether the pool claims items if it has room: no drain, pause or limit stops it."""
        return not any(self._find_reasons_not_to_claim())

    @property
    def paused(self) -> bool:
        """Whether a pause or the refusal of a plugin keeps the pool from claiming."""
        admission = self.context.admission
        return (admission.pause_reason, admission.refusal_reason) != (None, None)

    @property
    def idle_seconds(self) -> float:
        """Seconds for which no slot has been in use; 0 while a slot is in use."""
        if self.context.queue.running:
            return 0.0
        # Read `idle_since` after `running`. At the end of a session the dispatcher first sets
        # `idle_since` and then frees the slot, so the other order could combine the freed slot with
        # the old time, and report an idle time that is too long.
        return max(0.0, self.context.clock() - self.dispatcher.idle_since)

    def unready_reasons(self) -> list[str]:
        """The reasons why the pool is not ready, except a fatal error."""
        return [*self._find_reasons_not_to_claim(), *self._find_problems_for_operator()]

    def _find_reasons_not_to_claim(self) -> Iterator[str]:
        """Yield the reasons for which the pool claims no items, such as a drain or a pause."""
        if self.drain.requested.is_set():
            yield "draining"
        if self.limits is not None and self.limits.reached is not None:
            yield f"ending: {self.limits.reached}"
        if (paused := self.context.admission.pause_reason) is not None:
            yield f"paused: {paused}"
        if (refused := self.context.admission.refusal_reason) is not None:
            yield f"refused: {refused}"

    def _find_problems_for_operator(self) -> Iterator[str]:
        """Yield the problems that an operator should look at."""
        blocked = self.context.renewer.monitor.loop_blocked_seconds
        if blocked >= LAG_WARNING_SECONDS:
            yield f"the handlers' event loop has been blocked for {blocked:.0f} s"
        if stuck := len(self.dispatcher.executor.stuck):
            yield f"handlers that ignore their cancellation: {stuck}"
        for name in self.dispatcher.health.failing_handlers():
            yield f"handler_failing:{name}"
        if self.group.refused or self.group.ack_refused:
            yield "refused by the control plane"
        polled_at = self.group.last_success_at
        recent = polled_at is not None and self.context.clock() - polled_at < POLL_SUCCESS_SECONDS
        if not recent and not self.context.queue.is_full:
            yield f"no successful poll in the last {POLL_SUCCESS_SECONDS:.0f} s"

    def unhealthy_reasons(self) -> list[str]:
        """The reasons why the process should be restarted."""
        if self.context.renewer.renewing:
            return []
        return [
            "leases are not renewed: the handlers' event loop has been blocked for max_block or "
            "does not run, or the renewer has failed; see the log"
        ]


async def read_remote_stats(context: PoolContext) -> None:
    """Read the statistics of the remote queue every `stats_interval` seconds, without end.

    If a read fails, the metrics keep the values of the last successful read.
    """
    optional, client = context.optional, context.client
    while True:
        try:
            context.observe(
                QueueStatsRead, await optional.send_optional_call("stats", client.stats)
            )
        except ControlPlaneError as error:
            log.debug("stats not read: %s", error, extra={"error": str(error)})
        await asyncio.sleep(context.settings.stats_interval)
