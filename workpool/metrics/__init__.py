"""The metrics of workpool: their definitions, the counting of events, and the gauges.

The metrics are on the `CollectorRegistry` of a supervisor, which several supervisors may share.
Counters and histograms count events. Gauges are computed at scrape time and end with their
supervisor, so that none of them shows an old value.

Several processes: give each its own port (`metrics_listen = ":0"` finds a free one) and let
Prometheus add them up; that is the only way to see every process's gauges. prometheus_client's
multiprocess mode (`PROMETHEUS_MULTIPROC_DIR`, for pools inside pre-forking servers) works for
counters and histograms: scrape a registry with a `MultiProcessCollector`. The gauges are not in its
files, since no process can compute them for another; use the recorded rules of `alerts.yml` for the
null ratio. See workpool/docs/metrics.md, "Registries and processes".
"""

from workpool.metrics.definitions import DEFINITIONS, PREFIX, MetricDefinition
from workpool.metrics.gauges import PoolSnapshot
from workpool.metrics.observer import Metrics

__all__ = ["DEFINITIONS", "PREFIX", "MetricDefinition", "Metrics", "PoolSnapshot"]
