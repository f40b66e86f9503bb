"""Gauges, computed at scrape time: a gauge that events set would be wrong while the pool is idle.

Supervisors of one environment on one registry have one value: the sum of counts, limits and
capacities, the latest successful poll, the oldest session, the lease that ends first, the shortest
TTL, the longest block of an event loop, 1 for draining if any of them drains, the null ratio of all
polls, and the newest statistics of the queue. `build_info` is 1 for each combination of its labels.
A closed supervisor has no gauges.
"""

from __future__ import annotations

import platform
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from prometheus_client.metrics_core import GaugeMetricFamily

from workpool.metrics.definitions import (
    DEFINITIONS,
    HANDLERS_MAX,
    LEASE_STATES,
    OTHER_HANDLERS,
    PAUSE_REASONS,
    POLLER_STATES,
    SLOT_STATES,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from workpool.events import PollResult
    from workpool.wire.items import QueueStats

    Sample = tuple[str, tuple[str, ...], float]
    """The metric's name without prefix, the label values, and the value."""


WINDOW_SECONDS: Final = 60


class RecentPollCounter:
    """Counts the polls with an item and without one (null) in the last 60 s. Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Each entry is [second, null answers, counted polls] and is overwritten after 60 s.
        self._buckets = [[-WINDOW_SECONDS, 0, 0] for _ in range(WINDOW_SECONDS)]

    def count_poll(self, result: PollResult, _: float) -> None:
        """Count a poll if it returned an item or null."""
        null = result == "null"
        if not null and result != "item":
            return
        second = int(self._clock())
        with self._lock:
            bucket = self._buckets[second % WINDOW_SECONDS]
            if bucket[0] != second:
                bucket[:] = second, 0, 0
            bucket[1] += null
            bucket[2] += 1

    def read_null_and_poll_counts(self) -> tuple[int, int]:
        """Return the numbers of null answers and of all counted polls in the window of 60 s."""
        oldest = int(self._clock()) - WINDOW_SECONDS
        with self._lock:
            live = [bucket for bucket in self._buckets if bucket[0] > oldest]
            return sum(bucket[1] for bucket in live), sum(bucket[2] for bucket in live)


_BY_STATE: Final = {
    "pollers": POLLER_STATES,
    "slots": SLOT_STATES,
    "leases": LEASE_STATES,
    "paused": PAUSE_REASONS,
}
_SUMS: Final = (
    "pollers_target",
    "pollers_limit",
    "queue_depth",
    "items_set_aside",
    "queue_capacity",
    "slots_limit",
    "stuck_handlers",
)


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """The state of one supervisor at one moment, from which gauges are computed.

    In the mappings by state, a missing state means 0.

    Attributes:
        pollers: Pollers by state, one of `POLLER_STATES`.
        last_poll_success: Unix time in seconds; None before the first success.
        slots: Handler slots by state: free, reserved, busy.
        stuck_handlers: Handlers that ignore their cancellation.
        loop_blocked: Seconds for which the handlers' event loop has not answered.
        leases: Leases by the state of their item: starting, active, stopping.
        lease_ttl: Seconds that the last heartbeat was granted; before the first heartbeat, the
            seconds that it will ask for.
        remote_stats_interval: Seconds between two readings of the queue's statistics; 0 = never.
        lease_remaining_min: Remaining seconds of the lease that ends first; None without leases.
        paused: 1 for each kind of reason for which no item is claimed: pause, plugin, limit.
        sessions: (handler, number of running sessions, age of the oldest in seconds, longest time
            without progress in seconds).
    """

    pollers: Mapping[str, int] = field(default_factory=dict)
    pollers_target: int = 0
    pollers_limit: int = 0
    last_poll_success: float | None = None
    queue_depth: int = 0
    items_set_aside: int = 0
    queue_capacity: int = 0
    slots: Mapping[str, int] = field(default_factory=dict)
    slots_limit: int = 0
    stuck_handlers: int = 0
    loop_blocked: float = 0.0
    leases: Mapping[str, int] = field(default_factory=dict)
    lease_ttl: float = 0.0
    remote_stats_interval: float = 0.0
    lease_remaining_min: float | None = None
    sessions: Sequence[tuple[str, int, float, float]] = ()
    draining: bool = False
    paused: Mapping[str, int] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class GaugeValueSource:
    """The data from which a scrape computes the gauges of one open supervisor.

    Attributes:
        snapshot: Returns the state. Called at each scrape, on the thread of the scrape.
        handlers: The handler labels that have gauges, at 0 without sessions. Labels are only
            added, on any thread.
        remote: The Unix time of the last reading of the queue's statistics, and the statistics.
    """

    environment_id: str
    worker_id: str
    version: str
    dialect: str
    snapshot: Callable[[], PoolSnapshot]
    polls: RecentPollCounter
    now: Callable[[], float]
    handlers: set[str] = field(default_factory=set)
    remote: tuple[float, QueueStats] | None = None

    def handler_label(self, handler: str) -> str:
        """Return the label of a handler: its name, or `other` if there are too many handlers."""
        if handler in self.handlers or len(self.handlers) < HANDLERS_MAX:
            return handler
        return OTHER_HANDLERS


def gauge_families(sources: Iterable[GaugeValueSource]) -> Iterable[GaugeMetricFamily]:
    """Return all gauges of `DEFINITIONS` with their current values."""
    families = {
        row.name: GaugeMetricFamily(row.prefixed_name, row.help, labels=tuple(row.labels))
        for row in DEFINITIONS
        if row.kind == "gauge"
    }
    for name, labels, value in _collect_gauge_samples(sources):
        families[name].add_metric(labels, value)
    return families.values()


def _collect_gauge_samples(sources: Iterable[GaugeValueSource]) -> Iterator[Sample]:
    environments = defaultdict[str, list[GaugeValueSource]](list)
    for source in sources:
        environments[source.environment_id].append(source)
    for environment_id, group in environments.items():
        snapshots = [source.snapshot() for source in group]
        yield from _collect_pool_samples(environment_id, snapshots)
        yield from _collect_session_samples(environment_id, group, snapshots)
        yield from _collect_poll_null_ratio_samples(environment_id, group)
        yield from _collect_queue_samples(environment_id, group)
        python = platform.python_version()
        for build in {(s.worker_id, s.version, python, s.dialect) for s in group}:
            yield "build_info", (environment_id, *build), 1


def _collect_pool_samples(
    environment_id: str, snapshots: Sequence[PoolSnapshot]
) -> Iterator[Sample]:
    env = (environment_id,)
    for name, states in _BY_STATE.items():
        for state in states:
            yield name, (*env, state), sum(getattr(s, name).get(state, 0) for s in snapshots)
    for name in _SUMS:
        yield name, env, sum(getattr(s, name) for s in snapshots)
    last_success = max(s.last_poll_success or 0 for s in snapshots)
    yield "last_poll_success_timestamp_seconds", env, last_success
    yield "draining", env, max(s.draining for s in snapshots)
    interval = max(s.remote_stats_interval for s in snapshots)
    yield "remote_stats_interval_seconds", env, interval
    yield "lease_ttl_seconds", env, min(s.lease_ttl for s in snapshots)
    yield "event_loop_blocked_seconds", env, max(s.loop_blocked for s in snapshots)
    remaining = [s.lease_remaining_min for s in snapshots if s.lease_remaining_min is not None]
    if remaining:
        yield "lease_remaining_seconds_min", env, min(remaining)


def _collect_session_samples(
    environment_id: str, group: Sequence[GaugeValueSource], snapshots: Sequence[PoolSnapshot]
) -> Iterator[Sample]:
    # Copy `source.handlers` with `tuple`, because the pool's thread may add a handler meanwhile.
    active = dict.fromkeys((name for source in group for name in tuple(source.handlers)), 0)
    oldest, silent = dict.fromkeys(active, 0.0), dict.fromkeys(active, 0.0)
    rows = [
        (source.handler_label(handler), count, age, silence)
        for source, snapshot in zip(group, snapshots, strict=True)
        for handler, count, age, silence in snapshot.sessions
    ]
    for handler, count, age, silence in rows:
        active[handler] = active.get(handler, 0) + count
        oldest[handler] = max(oldest.get(handler, 0.0), age)
        silent[handler] = max(silent.get(handler, 0.0), silence)
    for handler, count in active.items():
        labels = (environment_id, handler)
        yield "sessions_active", labels, count
        yield "session_age_seconds_max", labels, oldest[handler]
        yield "session_silence_seconds_max", labels, silent[handler]


def _collect_poll_null_ratio_samples(
    environment_id: str, group: Sequence[GaugeValueSource]
) -> Iterator[Sample]:
    counts = [source.polls.read_null_and_poll_counts() for source in group]
    polls = sum(polls for _, polls in counts)
    if polls:
        yield "poll_null_ratio", (environment_id,), sum(nulls for nulls, _ in counts) / polls


def _collect_queue_samples(
    environment_id: str, group: Sequence[GaugeValueSource]
) -> Iterator[Sample]:
    reads = [(source.remote, source.now) for source in group if source.remote is not None]
    if not reads:
        return
    (read_at, stats), now = max(reads, key=lambda read: read[0][0])
    env = (environment_id,)
    oldest = stats.oldest_queued_at
    yield "remote_queue_items", (*env, "claimable"), stats.depth
    yield "remote_queue_items", (*env, "pending"), stats.pending
    if oldest is not None or not stats.depth + stats.pending:
        age = 0.0 if oldest is None else max(0.0, now() - oldest.timestamp())
        yield "remote_oldest_queued_age_seconds", env, age
    yield "remote_workers_polling", env, stats.workers_polling
    yield "remote_stats_timestamp_seconds", env, read_at
