"""Stores the values of counters and histograms, so that counting an event costs little CPU time.

Counting an event takes five Python calls with prometheus_client and none here, and each session
counts about twenty events. A scrape returns the same text. In the multiprocess mode of
prometheus_client its own metrics are used, since only they write the files that other processes
read. See workpool/docs/decisions.md, "Counters and histograms have stores of their own".

Any thread may add, and any thread may scrape. The stores of one registry share a lock, which is
held while one event is counted, and while one metric is read.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prometheus_client import Counter, Histogram, values
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

    from prometheus_client.metrics_core import Metric

    from workpool.metrics.definitions import MetricDefinition


class Series(Protocol):
    """The interface of one series, which is one combination of label values of a metric."""

    @property
    def add(self) -> Callable[[float], object]:
        """Add an amount to a counter, or observe it in a histogram. The caller holds the lock."""


class MetricStore(Protocol):
    """The interface of a store that contains all series of one metric."""

    def get_or_create_series(self, labels: tuple[str, ...]) -> Series:
        """Return the series of these label values; a new series begins at 0."""

    def describe(self) -> Iterable[Metric]:
        """Return the name and the type of the metric, without series."""

    def collect(self) -> Iterable[Metric]:
        """Return the current values of all series."""


def new_metric_store(row: MetricDefinition, lock: threading.RLock) -> MetricStore:
    """Return a new store for a counter or a histogram. `lock` protects the values in the store."""
    if values.ValueClass is not values.MutexValue:
        return _PrometheusStore(row)
    return _CounterStore(row, lock) if row.kind == "counter" else _HistogramStore(row, lock)


class CounterSeries:
    """The value of a counter for one combination of label values.

    Attributes:
        value: The sum of all amounts. Counting an event adds to it without a call.
    """

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float) -> None:
        """Add an amount to the counter."""
        self.value += amount


class _CounterStore:
    """All series of one counter."""

    def __init__(self, row: MetricDefinition, lock: threading.RLock) -> None:
        self._row = row
        self._lock = lock
        self._series: dict[tuple[str, ...], CounterSeries] = {}

    def get_or_create_series(self, labels: tuple[str, ...]) -> CounterSeries:
        return self._series.setdefault(labels, CounterSeries())

    def describe(self) -> Iterable[CounterMetricFamily]:
        row = self._row
        return [CounterMetricFamily(row.prefixed_name, row.help, labels=tuple(row.labels))]

    def collect(self) -> Iterable[Metric]:
        [family] = self.describe()
        with self._lock:
            counts = [(labels, count.value) for labels, count in list(self._series.items())]
        for labels, value in counts:
            family.add_metric(labels, value)
        return [family]


class HistogramSeries:
    """The buckets and the sum of a histogram for one combination of label values.

    Attributes:
        bounds: The upper bounds of the buckets, without the infinite one.
        counts: The amounts in each bucket, one more than there are bounds.
        total: The sum of all amounts. Counting an event adds to both without a call.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, amount: float) -> None:
        """Observe an amount in the histogram."""
        self.counts[bisect_left(self.bounds, amount)] += 1
        self.total += amount

    def cumulative_bucket_counts_and_sum(self) -> tuple[list[int], float]:
        """Return the cumulative counts of the buckets, and the sum of all amounts."""
        return list(itertools.accumulate(self.counts)), self.total


class _HistogramStore:
    """All series of one histogram."""

    def __init__(self, row: MetricDefinition, lock: threading.RLock) -> None:
        self._row = row
        self._lock = lock
        self._bounds = tuple(map(float, row.buckets))
        self._names = [*map(str, self._bounds), "+Inf"]
        self._series: dict[tuple[str, ...], HistogramSeries] = {}

    def get_or_create_series(self, labels: tuple[str, ...]) -> HistogramSeries:
        return self._series.setdefault(labels, HistogramSeries(self._bounds))

    def describe(self) -> Iterable[HistogramMetricFamily]:
        row = self._row
        return [HistogramMetricFamily(row.prefixed_name, row.help, labels=tuple(row.labels))]

    def collect(self) -> Iterable[Metric]:
        [family] = self.describe()
        with self._lock:
            spreads = [
                (labels, *spread.cumulative_bucket_counts_and_sum())
                for labels, spread in list(self._series.items())
            ]
        for labels, counts, total in spreads:
            family.add_metric(labels, list(zip(self._names, counts, strict=True)), total)
        return [family]


class _PrometheusSeries(NamedTuple):
    """A series that prometheus_client stores, for its multiprocess mode."""

    add: Callable[[float], object]


class _PrometheusStore:
    """All series of one metric that prometheus_client stores, for its multiprocess mode."""

    def __init__(self, row: MetricDefinition) -> None:
        name, text, labels = row.prefixed_name, row.help, tuple(row.labels)
        self._metric: Counter | Histogram = (
            Counter(name, text, labels, registry=None)
            if row.kind == "counter"
            else Histogram(name, text, labels, registry=None, buckets=row.buckets)
        )
        self.describe = self._metric.describe
        self.collect = self._metric.collect

    def get_or_create_series(self, labels: tuple[str, ...]) -> _PrometheusSeries:
        child = self._metric.labels(*labels) if labels else self._metric
        return _PrometheusSeries(child.inc if isinstance(child, Counter) else child.observe)
