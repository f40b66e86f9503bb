"""Registers the metrics of workpool on a Prometheus registry, once for each registry.

The map of registries to collectors is the only global state of workpool. Supervisors that share a
registry share its counters and histograms, and the labels tell them apart.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from prometheus_client.registry import Collector

from workpool.errors import RegistryError
from workpool.metrics.definitions import DEFINITIONS
from workpool.metrics.gauges import GaugeValueSource, gauge_families
from workpool.metrics.metric_values import new_metric_store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric


class MetricsCollector(Collector):
    """All metrics of workpool on one registry, as one Prometheus collector.

    If the registry has another metric with one of the names, it registers none of them.
    """

    def __init__(self) -> None:
        self.stores_lock = threading.RLock()
        self.stores = {
            row.name: new_metric_store(row, self.stores_lock)
            for row in DEFINITIONS
            if row.kind != "gauge"
        }
        self._lock = threading.Lock()
        self._sources: list[GaugeValueSource] = []

    def add_gauges(self, source: GaugeValueSource) -> None:
        """Add the gauges of one more supervisor to each scrape."""
        with self._lock:
            self._sources.append(source)

    def remove_gauges(self, source: GaugeValueSource) -> None:
        """Stop reading the gauges of a supervisor.

        A scrape that has already begun may still read them once.
        """
        with self._lock:
            self._sources.remove(source)

    def describe(self) -> Iterable[Metric]:
        """Return all metrics without values, so that the registry knows which names are taken."""
        for store in self.stores.values():
            yield from store.describe()
        yield from gauge_families(())

    def collect(self) -> Iterable[Metric]:
        """Return all metrics with their current values."""
        for store in self.stores.values():
            yield from store.collect()
        with self._lock:
            sources = tuple(self._sources)
        yield from gauge_families(sources)


_collectors: WeakKeyDictionary[CollectorRegistry, MetricsCollector] = WeakKeyDictionary()
# Two threads may open supervisors on one registry at once; only one may register the collector.
_collectors_lock = threading.Lock()


def collector_for_registry(registry: CollectorRegistry) -> MetricsCollector:
    """Return the `MetricsCollector` of this registry; the first call creates and registers it.

    Raises:
        RegistryError: The registry has another metric with one of the names.
    """
    with _collectors_lock:
        collectors = _collectors.get(registry)
        if collectors is None:
            collectors = MetricsCollector()
            try:
                registry.register(collectors)
            except ValueError as error:
                raise RegistryError(
                    f"the registry holds metrics of the same names already ({error}); "
                    "give the supervisor another CollectorRegistry"
                ) from error
            _collectors[registry] = collectors
        return collectors
