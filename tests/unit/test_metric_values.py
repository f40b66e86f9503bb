"""The pool's own metric stores, whose exposed text must equal that of prometheus_client."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from workpool.metrics import DEFINITIONS
from workpool.metrics.metric_values import new_metric_store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.registry import Collector

    from workpool.metrics import MetricDefinition

ROWS = {row.name: row for row in DEFINITIONS}
COUNTER, HISTOGRAM = ROWS["acks_total"], ROWS["session_duration_seconds"]
AMOUNTS = st.lists(
    st.one_of(st.sampled_from(HISTOGRAM.buckets), st.floats(-1, 1e9, allow_nan=False)), max_size=30
)
LABELS = ("env_1", "ok"), ('quote"\\d\n', "error")


def expose_collector_as_lines(collector: Collector) -> list[str]:
    """Return the lines that the collector exposes to Prometheus, without creation times."""
    registry = CollectorRegistry()
    registry.register(collector)
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def make_prometheus_client_metric(row: MetricDefinition) -> Counter | Histogram:
    labels = tuple(row.labels)
    if row.kind == "counter":
        return Counter(row.prefixed_name, row.help, labels, registry=None)
    return Histogram(row.prefixed_name, row.help, labels, registry=None, buckets=row.buckets)


def add_amounts_and_get_metric_lines(row: MetricDefinition, amounts: Iterable[float]) -> list[str]:
    """Add `amounts` to each series of a new metric store; return the lines that it exposes."""
    store = new_metric_store(row, threading.RLock())
    for labels in LABELS:
        series = store.get_or_create_series(labels)
        for amount in amounts:
            series.add(amount)
    return expose_collector_as_lines(store)


@given(AMOUNTS)
def test_histogram_store_exposes_same_text_as_client_library(amounts: Iterable[float]) -> None:
    theirs = make_prometheus_client_metric(HISTOGRAM)
    assert isinstance(theirs, Histogram)
    for labels in LABELS:
        child = theirs.labels(*labels)
        for amount in amounts:
            child.observe(amount)
    assert add_amounts_and_get_metric_lines(HISTOGRAM, amounts) == expose_collector_as_lines(theirs)


@given(st.lists(st.floats(0, 1e9), max_size=30))
def test_counter_store_exposes_same_text_as_client_library(amounts: Iterable[float]) -> None:
    theirs = make_prometheus_client_metric(COUNTER)
    assert isinstance(theirs, Counter)
    for labels in LABELS:
        child = theirs.labels(*labels)
        for amount in amounts:
            child.inc(amount)
    assert add_amounts_and_get_metric_lines(COUNTER, amounts) == expose_collector_as_lines(theirs)


@pytest.mark.parametrize("row", [COUNTER, HISTOGRAM], ids=lambda row: row.kind)
def test_increments_from_four_threads_to_one_series_are_all_counted(row: MetricDefinition) -> None:
    lock, begin = threading.RLock(), threading.Barrier(4)
    store = new_metric_store(row, lock)

    def increment_series_repeatedly() -> None:
        begin.wait()
        for _ in range(2000):
            with lock:
                store.get_or_create_series(("a", "b")).add(1)

    threads = [threading.Thread(target=increment_series_repeatedly) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [family] = store.collect()
    suffix = "_total" if row is COUNTER else "_count"
    assert [s.value for s in family.samples if s.name.endswith(suffix)] == [8000]
