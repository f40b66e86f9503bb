"""What a registry holds of us, and the only import-time state of workpool: which registry has it.

Supervisors that share a registry share its counters and histograms, told apart by their labels.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from prometheus_client.registry import Collector

from workpool.errors import RegistryError
from workpool.metrics.definitions import DEFINITIONS
from workpool.metrics.gauges import Source, gauge_families
from workpool.metrics.stores import store_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric


class Collectors(Collector):
    """Every metric, registered as one collector: a clash of names leaves nothing half-done."""

    def __init__(self) -> None:
        self.stores_lock = threading.RLock()  # logging, in the middle of a count, may read metrics
        self.stores = {
            row.name: store_of(row, self.stores_lock) for row in DEFINITIONS if row.kind != "gauge"
        }
        self._lock = threading.Lock()
        self._sources: list[Source] = []  # guarded by the lock: supervisors and scrapes use threads

    def attach(self, source: Source) -> None:
        """Show this supervisor's gauges from now on."""
        with self._lock:
            self._sources.append(source)

    def detach(self, source: Source) -> None:
        """Show them no more; a scrape that has begun may still take one last snapshot."""
        with self._lock:
            self._sources.remove(source)

    def describe(self) -> Iterable[Metric]:
        """The names that we take; the registry then refuses others of the same name."""
        for store in self.stores.values():
            yield from store.describe()
        yield from gauge_families(())

    def collect(self) -> Iterable[Metric]:
        """The values of now."""
        for store in self.stores.values():
            yield from store.collect()
        with self._lock:
            sources = tuple(self._sources)
        yield from gauge_families(sources)


_collectors: WeakKeyDictionary[CollectorRegistry, Collectors] = WeakKeyDictionary()
_collectors_lock = threading.Lock()  # two threads may each open a supervisor on one registry


def collectors_of(registry: CollectorRegistry) -> Collectors:
    """Our collectors on this registry, put there by the first call.

    Raises:
        RegistryError: The registry already holds somebody else's metric of one of our names.
    """
    with _collectors_lock:
        collectors = _collectors.get(registry)
        if collectors is None:
            collectors = Collectors()
            try:
                registry.register(collectors)
            except ValueError as error:
                raise RegistryError(
                    f"the registry holds metrics of the same names already ({error}); "
                    "give the supervisor another CollectorRegistry"
                ) from error
            _collectors[registry] = collectors
        return collectors
