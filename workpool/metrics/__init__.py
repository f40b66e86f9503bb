"""Every metric of workpool: the table, the observer of events that fills it, the gauges.

Nothing is global: the metrics live on the `CollectorRegistry` of a supervisor, which several
supervisors may share. Counters and histograms count events; gauges are computed at scrape time and
vanish with their supervisor, so that none of them shows a past that nobody updates.

Several processes: give each its own port (`metrics_listen = ":0"` finds a free one) and let
Prometheus add them up; that is the only way to see every process's gauges. prometheus_client's
multiprocess mode (`PROMETHEUS_MULTIPROC_DIR`, for pools inside pre-forking servers) works for
counters and histograms: scrape a registry with a `MultiProcessCollector`. The gauges are not in its
files, since nobody could compute them for another process; use the recorded rules of `alerts.yml`
for the null rate.
"""

from workpool.metrics.definitions import DEFINITIONS, PREFIX, Definition
from workpool.metrics.gauges import PoolSnapshot
from workpool.metrics.observer import Metrics

__all__ = ["DEFINITIONS", "PREFIX", "Definition", "Metrics", "PoolSnapshot"]
