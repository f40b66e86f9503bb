"""The data of the live page: one pool as JSON, computed only when somebody asks for it.

Read on the exporter's thread while the pool runs: each value is read once.
See workpool/docs/operating.md, "The live page".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from workpool.logs import readable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prometheus_client import CollectorRegistry

    from workpool.pool.pool_item import PoolItem
    from workpool.pool.status import PoolView

SESSIONS_MAX: Final = 200
"""The oldest sessions are listed, at most so many."""
TEXT_CHARACTERS: Final = 200

Counts = dict[tuple[str, str], float]
"""Values of counters, by sample name and the label that tells them apart."""

_COUNTED: Final = {
    "workpool_polls_total": "result",
    "workpool_poll_duration_seconds_sum": "",
    "workpool_poll_duration_seconds_count": "",
    "workpool_reclaims_total": "direction",
    "workpool_sessions_total": "outcome",
}


def live_status(
    view: PoolView,
    registry: CollectorRegistry,
    reasons: Sequence[str],
    worker: Mapping[str, str],
    *,
    show_ids: bool,
) -> dict[str, Any]:
    """Return the state of a pool as JSON values.

    Args:
        view: The pool.
        registry: Where its counters are.
        reasons: Why it is not ready.
        worker: Its names: `worker_id`, `environment_id`, `version`.
        show_ids: Whether ids of items and sessions are included.
    """
    snapshot = view.snapshot()
    counts = _counts(registry, worker["environment_id"])
    sessions = sorted(_running(view), key=lambda item: item.acked_at)
    now = view.context.clock()
    return {
        **worker,
        "reasons": [readable(reason, TEXT_CHARACTERS) for reason in reasons],
        "draining": snapshot.draining,
        "slots": {**snapshot.slots, "limit": snapshot.slots_limit},
        "queue": {"waiting": snapshot.queue_depth, "set_aside": snapshot.items_set_aside},
        "pollers": dict(snapshot.pollers),
        "polls": {
            "item": counts.get(("workpool_polls_total", "item"), 0),
            "null": counts.get(("workpool_polls_total", "null"), 0),
            "answers": counts.get(("workpool_poll_duration_seconds_count", ""), 0),
            "seconds": counts.get(("workpool_poll_duration_seconds_sum", ""), 0),
        },
        "outcomes": _by_label(counts, "workpool_sessions_total"),
        "reclaims": _by_label(counts, "workpool_reclaims_total"),
        "leases": {
            "held": sum(snapshot.leases.values()),
            "shortest_seconds": snapshot.lease_remaining_min,
        },
        "loop_blocked_seconds": snapshot.loop_blocked,
        "sessions_running": len(sessions),
        "sessions": [_session(item, now, show_ids=show_ids) for item in sessions[:SESSIONS_MAX]],
    }


def _running(view: PoolView) -> Iterator[PoolItem]:
    return (item for item in view.dispatcher.items.all() if item.executing)


def _session(item: PoolItem, now: float, *, show_ids: bool) -> dict[str, Any]:
    attempt = item.attempt
    ids = {"session_id": item.session_id, "work_id": item.id} if show_ids else {}
    return ids | {
        "handler": readable(item.label, TEXT_CHARACTERS),
        "age_seconds": now - item.acked_at,
        "attempt": 1 if attempt is None else attempt.number,
        "lease_seconds": item.lease.remaining(now),
        "silence_seconds": item.silence(now),
    }


def _counts(registry: CollectorRegistry, environment_id: str) -> Counts:
    counts: Counts = {}
    for family in registry.collect():
        for sample in family.samples:
            label = _COUNTED.get(sample.name)
            if label is not None and sample.labels.get("environment_id") == environment_id:
                key = sample.name, sample.labels.get(label, "")
                counts[key] = counts.get(key, 0) + sample.value
    return counts


def _by_label(counts: Counts, name: str) -> dict[str, float]:
    return {label: value for (sample, label), value in counts.items() if sample == name}
