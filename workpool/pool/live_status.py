"""The state of pools as JSON, for the exporter's status page in a browser (the live page).

It is computed for each request, on the exporter's thread while the pool runs. Therefore each value
is read only once.
See workpool/docs/operating.md, "The live page".
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from workpool.logs import readable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prometheus_client import CollectorRegistry

    from workpool.pool.pool_item import PoolItem
    from workpool.pool.status import PoolView

SESSIONS_MAX: Final = 200
"""Largest number of sessions that are listed, the oldest first."""
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
    counts_by_environment: Mapping[str, Counts],
    reasons: Sequence[str],
    worker: Mapping[str, str],
    *,
    show_ids: bool,
) -> dict[str, Any]:
    """Return the state of a pool as JSON values.

    Args:
        view: The pool.
        counts_by_environment: The values of the registry's counters, by environment.
        reasons: The reasons why the pool is not ready.
        worker: The names of the worker: `worker_id`, `environment_id`, `version`.
        show_ids: Whether ids of items and sessions are included.
    """
    snapshot = view.snapshot()
    counts = counts_by_environment.get(worker["environment_id"], {})
    sessions = sorted(_find_items_with_running_handler(view), key=lambda item: item.acked_at)
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
        "outcomes": _group_counts_by_label(counts, "workpool_sessions_total"),
        "reclaims": _group_counts_by_label(counts, "workpool_reclaims_total"),
        "leases": {
            "held": sum(snapshot.leases.values()),
            "shortest_seconds": snapshot.lease_remaining_min,
        },
        "loop_blocked_seconds": snapshot.loop_blocked,
        "sessions_running": len(sessions),
        "sessions": [
            _make_session_status(item, now, show_ids=show_ids) for item in sessions[:SESSIONS_MAX]
        ],
    }


def merge_statuses(
    worker: Mapping[str, str],
    statuses: Sequence[Mapping[str, Any]],
    slots_limit: int,
    reasons: Sequence[str],
) -> dict[str, Any]:
    """Return the states of the pools of one process as the state of one worker.

    The result has the keys of `live_status`, with the sums over the pools, and the sessions of all
    pools. Its key `environments` has each pool's own state without the sessions.

    Args:
        worker: The names of the worker: `worker_id`, `version`.
        statuses: The states of the pools; one that has not started has only names and `reasons`.
        slots_limit: The number of slots of the process.
        reasons: The reasons why the process is not ready.
    """
    ids = [each["environment_id"] for each in statuses]
    environments = [
        {name: value for name, value in each.items() if name != "sessions"} for each in statuses
    ]
    names = {**worker, "environment_id": ", ".join(ids)}
    shown = [readable(reason, TEXT_CHARACTERS) for reason in reasons]
    statuses = [each for each in statuses if "slots" in each]
    if not statuses:
        return {**names, "reasons": shown, "environments": environments}
    slots = _sum_counts(statuses, "slots")
    shortest = [each["leases"]["shortest_seconds"] for each in statuses]
    sessions = [
        {**session, "environment_id": each["environment_id"]}
        for each in statuses
        for session in each["sessions"]
    ]
    sessions.sort(key=lambda session: -session["age_seconds"])
    used = slots["busy"] + slots["reserved"]
    return {
        **names,
        "reasons": shown,
        "draining": all(each["draining"] for each in statuses),
        # The pools share the free slots, so a sum over the pools would count them several times.
        "slots": {**slots, "free": max(0, slots_limit - used), "limit": slots_limit},
        **{name: _sum_counts(statuses, name) for name in ("queue", "pollers", "polls", "outcomes")},
        "reclaims": _sum_counts(statuses, "reclaims"),
        "leases": {
            "held": sum(each["leases"]["held"] for each in statuses),
            "shortest_seconds": min((each for each in shortest if each is not None), default=None),
        },
        "loop_blocked_seconds": max(each["loop_blocked_seconds"] for each in statuses),
        "sessions_running": sum(each["sessions_running"] for each in statuses),
        "sessions": sessions[:SESSIONS_MAX],
        "environments": environments,
    }


def _sum_counts(statuses: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for each in statuses:
        sums.update(each[name])
    return dict(sums)


def _find_items_with_running_handler(view: PoolView) -> Iterator[PoolItem]:
    return (item for item in view.dispatcher.items.copy_items() if item.is_handler_running)


def _make_session_status(item: PoolItem, now: float, *, show_ids: bool) -> dict[str, Any]:
    ids = {"session_id": item.session_id, "work_id": item.id} if show_ids else {}
    return ids | {
        "handler": readable(item.handler_label, TEXT_CHARACTERS),
        "age_seconds": now - item.acked_at,
        "attempt": item.attempt.number,
        "lease_seconds": item.lease.remaining_seconds(now),
        "silence_seconds": item.seconds_without_progress(now),
    }


def read_live_page_counters(registry: CollectorRegistry) -> dict[str, Counts]:
    """Return the counters in `registry` that the live page shows, grouped by environment."""
    found: dict[str, Counts] = {}
    for family in registry.collect():
        for sample in family.samples:
            label = _COUNTED.get(sample.name)
            if label is not None:
                counts = found.setdefault(sample.labels.get("environment_id", ""), {})
                key = sample.name, sample.labels.get(label, "")
                counts[key] = counts.get(key, 0) + sample.value
    return found


def _group_counts_by_label(counts: Counts, name: str) -> dict[str, float]:
    return {label: value for (sample, label), value in counts.items() if sample == name}
