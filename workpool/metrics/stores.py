"""What holds the counts of one counter or histogram: cheap to add to, read at scrape time.

prometheus_client's own children take five calls for what is one here, some twenty times per
session; to a scrape both look the same. In its multiprocess mode the library's own are used, since
only they write the files that other processes read. Any thread may add, and any thread may scrape.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left
from typing import TYPE_CHECKING, Protocol

from prometheus_client import Counter, Histogram, values
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client.metrics_core import Metric

    from workpool.metrics.definitions import Definition

    Add = Callable[[float], object]
    """Add to a counter, or observe an amount."""


class Store(Protocol):
    """All series of one metric."""

    def series(self, labels: tuple[str, ...]) -> Add:
        """How to add to the series of these label values; there from now on, and 0 at first."""

    def describe(self) -> Iterable[Metric]:
        """Its name and type, without series."""

    def collect(self) -> Iterable[Metric]:
        """The values of now."""


def store_of(row: Definition) -> Store:
    """A new store for this counter or histogram."""
    if values.ValueClass is not values.MutexValue:
        return _Library(row)
    return _Counts(row) if row.kind == "counter" else _Spreads(row)


class _Count:
    """One series of a counter."""

    __slots__ = ("_lock", "value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0.0

    def add(self, amount: float) -> None:
        with self._lock:
            self.value += amount


class _Counts:
    """The series of a counter."""

    def __init__(self, row: Definition) -> None:
        self._row = row
        self._series: dict[tuple[str, ...], _Count] = {}

    def series(self, labels: tuple[str, ...]) -> Add:
        # One step of the interpreter: two threads that ask for one series get the same.
        return self._series.setdefault(labels, _Count()).add

    def describe(self) -> Iterable[CounterMetricFamily]:
        row = self._row
        return [CounterMetricFamily(row.full_name, row.help, labels=tuple(row.labels))]

    def collect(self) -> Iterable[Metric]:
        [family] = self.describe()
        for labels, count in list(self._series.items()):  # a copy: others may add one meanwhile
            family.add_metric(labels, count.value)
        return [family]


class _Spread:
    """One series of a histogram; `counts` has one entry more than there are bounds."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._lock = threading.Lock()
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, amount: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, amount)] += 1
            self._sum += amount

    def read(self) -> tuple[list[int], float]:
        """(how many per bucket and those before it, the sum of all), which belong together."""
        with self._lock:
            return list(itertools.accumulate(self._counts)), self._sum


class _Spreads:
    """The series of a histogram."""

    def __init__(self, row: Definition) -> None:
        self._row = row
        self._bounds = tuple(map(float, row.buckets))
        self._names = [*map(str, self._bounds), "+Inf"]
        self._series: dict[tuple[str, ...], _Spread] = {}

    def series(self, labels: tuple[str, ...]) -> Add:
        return self._series.setdefault(labels, _Spread(self._bounds)).add  # as above

    def describe(self) -> Iterable[HistogramMetricFamily]:
        row = self._row
        return [HistogramMetricFamily(row.full_name, row.help, labels=tuple(row.labels))]

    def collect(self) -> Iterable[Metric]:
        [family] = self.describe()
        for labels, spread in list(self._series.items()):
            counts, total = spread.read()
            family.add_metric(labels, list(zip(self._names, counts, strict=True)), total)
        return [family]


class _Library:
    """The library's own metric, for its multiprocess mode."""

    def __init__(self, row: Definition) -> None:
        name, text, labels = row.full_name, row.help, tuple(row.labels)
        self._metric: Counter | Histogram = (
            Counter(name, text, labels, registry=None)
            if row.kind == "counter"
            else Histogram(name, text, labels, registry=None, buckets=row.buckets)
        )
        self.describe = self._metric.describe
        self.collect = self._metric.collect

    def series(self, labels: tuple[str, ...]) -> Add:
        child = self._metric.labels(*labels) if labels else self._metric
        return child.inc if isinstance(child, Counter) else child.observe
