"""The totals of the counters in the metrics registry that all simulated pools share."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from workpool.metrics.collectors import collector_for_registry

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_LABEL: Final = {
    "http_requests_total": "op",
    "polls_total": "result",
    "sessions_total": "outcome",
    "acks_total": "result",
    "stops_total": "result",
    "items_received_total": "origin",
    "reclaims_total": "direction",
    "heartbeats_total": "result",
    "handler_retries_total": "handler",
}
"""The label by which each counter is summed up."""


def counter_totals(registry: CollectorRegistry) -> Counter[tuple[str, ...]]:
    """Return the current value of each counter, by name and label value."""
    found: Counter[tuple[str, ...]] = Counter()
    stores: Any = collector_for_registry(registry).stores
    for name, label in _LABEL.items():
        place = list(stores[name]._row.labels).index(label)
        for labels, count in stores[name]._series.items():
            found[name, labels[place]] += count.value
    return found
