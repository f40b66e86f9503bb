"""What the metrics of a shared registry counted between two moments."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from workpool.metrics.collectors import collectors_of

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
}
"""By which label each is summed up."""


def totals(registry: CollectorRegistry) -> Counter[tuple[str, ...]]:
    """Read the counters now; the difference of two readings is what was counted between them."""
    found: Counter[tuple[str, ...]] = Counter()
    stores: Any = collectors_of(registry).stores
    for name, label in _LABEL.items():
        place = list(stores[name]._row.labels).index(label)
        for labels, count in stores[name]._series.items():
            found[name, labels[place]] += count.value
    return found
