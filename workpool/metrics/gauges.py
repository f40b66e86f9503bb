"""Gauges, computed when somebody looks: a gauge that is only set by events lies while it is idle.

Several supervisors may share a registry. Supervisors of one environment are shown as one: counts,
limits and capacities add up; the last successful poll is the latest, the oldest session the oldest,
the lease nearest to its end the nearest; draining is 1 when any of them drains; poll_null_ratio is
over the polls of all; of the control plane's answers the newest counts. `build_info` is 1 per
combination of its labels. A supervisor that is closed is no longer shown.
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
    POLLER_STATES,
    SLOT_STATES,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from workpool.wire.items import QueueStats

    Sample = tuple[str, tuple[str, ...], float]
    """Metric name without prefix, label values, value."""

WINDOW_SECONDS: Final = 60
_BY_STATE: Final = {"pollers": POLLER_STATES, "slots": SLOT_STATES, "leases": LEASE_STATES}
_SUMS: Final = ("pollers_target", "pollers_limit", "queue_depth", "queue_capacity", "slots_limit")


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """What one supervisor looks like at one moment. States that are not named count as 0.

    Attributes:
        pollers: Pollers by state: polling, backoff, waiting_slot, paused.
        last_poll_success: Unix time in seconds, None before the first success.
        slots: Handler slots by state: free, reserved, busy.
        leases: Leases held by state of their item: starting, active, stopping.
        lease_remaining_min: Seconds left of the lease nearest to its end, None when none is held.
        sessions: (handler, how many run, age of the oldest in seconds), for each handler.
    """

    pollers: Mapping[str, int] = field(default_factory=dict)
    pollers_target: int = 0
    pollers_limit: int = 0
    last_poll_success: float | None = None
    queue_depth: int = 0
    queue_capacity: int = 0
    slots: Mapping[str, int] = field(default_factory=dict)
    slots_limit: int = 0
    leases: Mapping[str, int] = field(default_factory=dict)
    lease_remaining_min: float | None = None
    sessions: Sequence[tuple[str, int, float]] = ()
    draining: bool = False


class NullWindow:
    """Counts the item and null polls of the last 60 s, in one bucket per second. Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # [second, nulls, polls], each overwritten when its second comes round again.
        self._buckets = [[-WINDOW_SECONDS, 0, 0] for _ in range(WINDOW_SECONDS)]

    def add(self, *, null: bool) -> None:
        """Count one poll that was answered."""
        second = int(self._clock())
        with self._lock:
            bucket = self._buckets[second % WINDOW_SECONDS]
            if bucket[0] != second:
                bucket[:] = second, 0, 0
            bucket[1] += null
            bucket[2] += 1

    def counts(self) -> tuple[int, int]:
        """(nulls, polls) of the window."""
        oldest = int(self._clock()) - WINDOW_SECONDS
        with self._lock:
            live = [bucket for bucket in self._buckets if bucket[0] > oldest]
            return sum(bucket[1] for bucket in live), sum(bucket[2] for bucket in live)


@dataclass(eq=False, slots=True)
class Source:
    """What one supervisor contributes to the gauges, for as long as it is open.

    Attributes:
        snapshot: Called at every scrape, on the thread that scrapes.
        handlers: Labels, shown with 0 while no session of theirs runs. Only ever grows; any thread.
        remote: When (Unix time) and what the control plane said of its queue last.
    """

    environment_id: str
    version: str
    dialect: str
    snapshot: Callable[[], PoolSnapshot]
    polls: NullWindow
    now: Callable[[], float]
    handlers: set[str] = field(default_factory=set)
    remote: tuple[float, QueueStats] | None = None

    def label_of(self, handler: str) -> str:
        """Return the label of a handler: its name, as long as there are not too many."""
        if handler in self.handlers or len(self.handlers) < HANDLERS_MAX:
            return handler
        return OTHER_HANDLERS


def gauge_families(sources: Iterable[Source]) -> Iterable[GaugeMetricFamily]:
    """Every gauge of the table, with the values of now."""
    families = {
        row.name: GaugeMetricFamily(row.full_name, row.help, labels=tuple(row.labels))
        for row in DEFINITIONS
        if row.kind == "gauge"
    }
    for name, labels, value in _samples(sources):
        families[name].add_metric(labels, value)
    return families.values()


def _samples(sources: Iterable[Source]) -> Iterator[Sample]:
    environments = defaultdict[str, list[Source]](list)
    for source in sources:
        environments[source.environment_id].append(source)
    for environment_id, group in environments.items():
        snapshots = [source.snapshot() for source in group]
        yield from _pool(environment_id, snapshots)
        yield from _sessions(environment_id, group, snapshots)
        yield from _poll_null_ratio(environment_id, group)
        yield from _remote(environment_id, group)
    python = platform.python_version()
    for version, dialect in {
        (s.version, s.dialect) for group in environments.values() for s in group
    }:
        yield "build_info", (version, python, dialect), 1


def _pool(environment_id: str, snapshots: Sequence[PoolSnapshot]) -> Iterator[Sample]:
    env = (environment_id,)
    for name, states in _BY_STATE.items():
        for state in states:
            yield name, (*env, state), sum(getattr(s, name).get(state, 0) for s in snapshots)
    for name in _SUMS:
        yield name, env, sum(getattr(s, name) for s in snapshots)
    last_success = max(s.last_poll_success or 0 for s in snapshots)
    yield "last_poll_success_timestamp_seconds", env, last_success
    yield "draining", env, max(s.draining for s in snapshots)
    remaining = [s.lease_remaining_min for s in snapshots if s.lease_remaining_min is not None]
    if remaining:
        yield "lease_remaining_seconds_min", env, min(remaining)


def _sessions(
    environment_id: str, group: Sequence[Source], snapshots: Sequence[PoolSnapshot]
) -> Iterator[Sample]:
    # tuple(): a session on another thread may add a handler while we look.
    active = dict.fromkeys((name for source in group for name in tuple(source.handlers)), 0)
    oldest = dict.fromkeys(active, 0.0)
    rows = [
        (source.label_of(handler), count, age)
        for source, snapshot in zip(group, snapshots, strict=True)
        for handler, count, age in snapshot.sessions
    ]
    for handler, count, age in rows:
        active[handler] = active.get(handler, 0) + count
        oldest[handler] = max(oldest.get(handler, 0.0), age)
    for handler, count in active.items():
        yield "sessions_active", (environment_id, handler), count
        yield "session_age_seconds_max", (environment_id, handler), oldest[handler]


def _poll_null_ratio(environment_id: str, group: Sequence[Source]) -> Iterator[Sample]:
    counts = [source.polls.counts() for source in group]
    polls = sum(polls for _, polls in counts)
    if polls:
        yield "poll_null_ratio", (environment_id,), sum(nulls for nulls, _ in counts) / polls


def _remote(environment_id: str, group: Sequence[Source]) -> Iterator[Sample]:
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
