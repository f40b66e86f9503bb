"""The documented table of metrics, the events that feed them, and shared registries."""

from __future__ import annotations

import gc
import importlib
import itertools
import re
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any, cast, get_args

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.manual_clock import ManualClock
from workpool import events as ev
from workpool.errors import RegistryError
from workpool.metrics import DEFINITIONS, Metrics, PoolSnapshot
from workpool.session import Session
from workpool.wire.items import QueueStats, WorkItem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

ENV = ()
"""A label whose values are known at run time only."""

H_POLL = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.95, 1, 1.05, 1.1, 1.25, 1.5, 2.5, 5, 10, 30,
)  # fmt: skip
H_HTTP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
H_LAG = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
H_WAIT = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)
H_RUN = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600)

# The documented table, copied literally. Each row has a metric's name, its type (C for counter,
# G for gauge, or the buckets of a histogram) and its labels.
TABLE: tuple[tuple[str, str | tuple[float, ...], str], ...] = (
    ("polls_total", "C", "environment_id, result=item|null|throttled|error|timeout|cancelled"),
    ("poll_duration_seconds", H_POLL, "environment_id, result=item|null|error"),
    ("poll_null_ratio", "G", "environment_id"),
    ("poll_backoff_seconds_total", "C",
     "environment_id, reason=throttled|server_error|network|retry_after"),
    ("pollers", "G", "environment_id, state=polling|pacing|backoff|waiting_slot|paused|blocked"),
    ("pollers_target", "G", "environment_id"),
    ("pollers_limit", "G", "environment_id"),
    ("poller_scale_events_total", "C",
     "environment_id, direction=up|down, reason=hits|nulls|throttled"),
    ("last_poll_success_timestamp_seconds", "G", "environment_id"),
    ("items_received_total", "C",
     "environment_id, origin=new|redelivered|duplicate, type=session|healthcheck|other"),
    ("item_pickup_latency_seconds", H_WAIT, "environment_id"),
    ("reclaims_total", "C",
     "environment_id, direction=gained|lost, stage=poll|ack|start|run|drain"),
    ("items_declined_total", "C", "environment_id, reason=unwanted|busy|plugin_error"),
    ("poller_restarts_total", "C", "environment_id"),
    ("session_age_seconds_max", "G", "environment_id, handler"),
    ("session_silence_seconds_max", "G", "environment_id, handler"),
    ("queue_depth", "G", "environment_id"),
    ("items_set_aside", "G", "environment_id"),
    ("queue_capacity", "G", "environment_id"),
    ("queue_wait_seconds", H_WAIT, "environment_id"),
    ("slots", "G", "environment_id, state=free|reserved|busy"),
    ("slots_limit", "G", "environment_id"),
    ("acks_total", "C", "environment_id, result=ok|conflict|gone|error"),
    ("delivery_to_ack_seconds", H_WAIT, "environment_id"),
    ("lease_ttl_seconds", "G", "environment_id"),
    ("leases_lost_total", "C", "environment_id, reason=expired|taken|gone|refused"),
    ("leases", "G", "environment_id, state=starting|active|stopping"),
    ("lease_remaining_seconds_min", "G", "environment_id"),
    ("heartbeats_total", "C",
     "environment_id, result=ok|recovered|precondition|conflict|rejected|transient|timeout"),
    ("heartbeat_lag_seconds", H_LAG, "environment_id"),
    ("sessions_active", "G", "environment_id, handler"),
    ("session_duration_seconds", H_RUN,
     "handler, outcome=completed|failed|timed_out|stalled|stopped|released|lease_lost|detached"),
    ("sessions_total", "C",
     "environment_id, handler, "
     "outcome=completed|failed|timed_out|stalled|stopped|released|lease_lost|detached"),
    ("session_errors_total", "C",
     "environment_id, error=exception|result_refused|attempts_exceeded|timeout|stalled"),
    ("stuck_handlers", "G", "environment_id"),
    ("handler_retries_total", "C", "environment_id, handler"),
    ("stops_total", "C",
     "environment_id, mode=graceful|force|confirm, result=ok|conflict|gone|error"),
    ("stop_requests_total", "C", "environment_id"),
    ("results_dropped_total", "C", "environment_id"),
    ("paused", "G", "environment_id, reason=pause|plugin|limit"),
    ("draining", "G", "environment_id"),
    ("drain_duration_seconds", H_RUN, "result=clean|deadline|killed"),
    ("http_requests_total", "C",
     "environment_id, op=poll|ack|heartbeat|stop|get|list|stats|update|session|events|stream, "
     "code=2xx|304|400|401|403|404|409|412|429|4xx|5xx|"
     "dns|refused|tls|timeout|reset|error"),
    ("http_request_duration_seconds", H_HTTP,
     "op=poll|ack|heartbeat|stop|get|list|stats|update|session|events|stream"),
    ("rate_budget_wait_seconds_total", "C", "environment_id, kind=read|write"),
    ("remote_queue_items", "G", "environment_id, state=claimable|pending"),
    ("remote_oldest_queued_age_seconds", "G", "environment_id"),
    ("remote_workers_polling", "G", "environment_id"),
    ("remote_stats_timestamp_seconds", "G", "environment_id"),
    ("remote_stats_interval_seconds", "G", "environment_id"),
    ("event_loop_lag_seconds", H_LAG, ""),
    ("event_loop_blocked_seconds", "G", "environment_id"),
    ("plugin_errors_total", "C", "environment_id, plugin, hook"),
    ("credential_refreshes_total", "C", "environment_id, result=ok|error"),
    ("pool_failures_total", "C", "environment_id"),
    ("build_info", "G", "environment_id, worker_id, version, python, dialect"),
)  # fmt: skip

# All labels, in the order of the documented table. The exposition sorts labels by name.
LABELS = (
    *(
        "environment_id",
        "handler",
        "plugin",
        "hook",
        "worker_id",
        "version",
        "python",
        "dialect",
        "origin",
    ),
    *("direction", "mode", "op", "code", "state", "result", "outcome", "reason", "stage"),
    *("type", "kind", "error"),
)

CREATED = datetime(2026, 1, 1, tzinfo=UTC)
ITEM = WorkItem(
    id="work_1", type="session", session_id="sess_1", environment_id="env_1", state="starting",
    metadata={}, created_at=CREATED, acknowledged_at=None, started_at=None,
    latest_heartbeat_at=None, last_heartbeat=None, stop_requested_at=None, stopped_at=None,
)  # fmt: skip
IDLE = PoolSnapshot(
    pollers={"polling": 2}, pollers_target=2, pollers_limit=2, last_poll_success=None,
    queue_depth=0, queue_capacity=8, slots={"free": 6, "reserved": 2}, slots_limit=8,
    leases={}, lease_remaining_min=None, sessions=(), draining=False,
)  # fmt: skip
BUSY = PoolSnapshot(
    pollers={"polling": 1, "waiting_slot": 1}, pollers_target=2, pollers_limit=3,
    last_poll_success=1000.0, queue_depth=1, queue_capacity=9, slots={"busy": 8}, slots_limit=8,
    leases={"active": 7, "stopping": 1}, lease_remaining_min=41.5,
    sessions=(("echo.run", 5, 60.0, 30.0), ("mail.send", 3, 7.0, 0.0)), draining=True,
)  # fmt: skip


SESSION = Session(ITEM, cast("Any", None), redelivered=False)


class PoolMetricsTestbed:
    """The metrics of one pool with a clock and a snapshot that the test can change."""

    def __init__(
        self, registry: CollectorRegistry, environment_id: str = "env_1", **options: Any
    ) -> None:
        self.snapshot = options.pop("snapshot", IDLE)
        self.clock = ManualClock(5000.0)
        self.metrics = Metrics(
            registry, environment_id, worker_id="vm-1", dialect="qoder", version="1.2.3",
            snapshot=lambda: self.snapshot, clock=self.clock, now=self.clock, **options,
        )  # fmt: skip


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def pool(registry: CollectorRegistry) -> Iterator[PoolMetricsTestbed]:
    pool = PoolMetricsTestbed(registry)
    pool.metrics.open()
    yield pool
    pool.metrics.close()


def scrape_samples(registry: CollectorRegistry) -> dict[str, float]:
    """Return all values except buckets and creation times, keyed by metric name and labels."""
    samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                ordered = sorted(sample.labels.items(), key=lambda pair: LABELS.index(pair[0]))
                labels = ",".join(f"{name}={value}" for name, value in ordered)
                samples[f"{sample.name.removeprefix('workpool_')}{{{labels}}}"] = sample.value
    return samples


def compute_increases_of_samples(
    before: dict[str, float], after: dict[str, float]
) -> dict[str, float]:
    return {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)}


def parse_label_values(labels: str) -> dict[str, tuple[str, ...]]:
    pairs = (label.partition("=") for label in labels.split(", ") if label)
    return {name: tuple(values.split("|")) if values else () for name, _, values in pairs}


def test_metric_definitions_equal_documented_table() -> None:
    kinds = {"C": "counter", "G": "gauge"}
    ours = {
        row.name: (row.kind, row.buckets, {k: set(v) for k, v in row.labels.items()})
        for row in DEFINITIONS
    }
    theirs = {
        name: (
            kinds[kind] if isinstance(kind, str) else "histogram",
            () if isinstance(kind, str) else kind,
            {label: set(values) for label, values in parse_label_values(labels).items()},
        )
        for name, kind, labels in TABLE
    }
    assert ours == theirs
    assert len(DEFINITIONS) == len(TABLE)


@pytest.mark.usefixtures("pool")
def test_every_metric_family_is_exposed_with_its_type_labels_and_buckets(
    registry: CollectorRegistry,
) -> None:
    exposed = {
        f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())
    }
    for name, kind, labels in TABLE:
        family = exposed[f"workpool_{name}".removesuffix("_total")]
        wanted = parse_label_values(labels)
        names = set(wanted) | ({"le"} if isinstance(kind, tuple) else set())
        if isinstance(kind, tuple):
            assert family.type == "histogram"
            bounds = {float(s.labels["le"]) for s in family.samples if "le" in s.labels}
            assert bounds <= {*kind, float("inf")}
            assert not bounds or bounds == {*kind, float("inf")}
        else:
            assert family.type == {"C": "counter", "G": "gauge"}[kind]
        for sample in family.samples:
            assert set(sample.labels) | {"le"} == names | {"le"}


def test_metric_series_with_fixed_label_values_start_at_zero(registry: CollectorRegistry) -> None:
    pool = PoolMetricsTestbed(registry, handlers=["echo.run"])
    pool.metrics.open()
    samples = scrape_samples(registry)
    for name, kind, labels in TABLE:
        if kind == "G" or name == "plugin_errors_total":
            continue
        values = parse_label_values(labels)
        known = {"environment_id": ("env_1",), "handler": ("echo.run",)}
        suffix = "" if kind == "C" else "_count"
        for combination in itertools.product(*(v or known[k] for k, v in values.items())):
            text = ",".join(f"{k}={v}" for k, v in zip(values, combination, strict=True))
            assert samples[f"{name}{suffix}{{{text}}}"] == 0
    assert samples["sessions_active{environment_id=env_1,handler=echo.run}"] == 0
    assert not any(name.startswith("plugin_errors") for name in samples)


FED: tuple[tuple[ev.Event, Mapping[str, float]], ...] = (
    *(
        (ev.PollFinished(result, 0.5), {
            f"polls_total{{environment_id=env_1,result={result}}}": 1,
            f"poll_duration_seconds_count{{environment_id=env_1,result={result}}}": 1,
            f"poll_duration_seconds_sum{{environment_id=env_1,result={result}}}": 0.5,
        } | ({"poll_null_ratio{environment_id=env_1}": 1} if result == "null" else {}))
        for result in ("null", "error")
    ),
    *(
        (ev.PollFinished(result, 0.5), {f"polls_total{{environment_id=env_1,result={result}}}": 1})
        for result in ("throttled", "timeout", "cancelled")
    ),
    (ev.PollerBackedOff("retry_after", 2.5),
     {"poll_backoff_seconds_total{environment_id=env_1,reason=retry_after}": 2.5}),
    (ev.PollersScaled("down", "throttled", 1), {
        "poller_scale_events_total{environment_id=env_1,direction=down,reason=throttled}": 1
    }),
    (ev.PollerRestarted(ValueError()), {"poller_restarts_total{environment_id=env_1}": 1}),
    *(
        (ev.ItemReceived(replace(ITEM, type=kind), origin, 0.25), {
            f"items_received_total{{environment_id=env_1,origin={origin},type={label}}}": 1,
            "item_pickup_latency_seconds_count{environment_id=env_1}": 1,
            "item_pickup_latency_seconds_sum{environment_id=env_1}": 0.25,
        })
        for kind, label in (("session", "session"), ("healthcheck", "healthcheck"), ("x", "other"))
        for origin in get_args(ev.Origin)
    ),
    (ev.ItemReceived(ITEM, "new", None),
     {"items_received_total{environment_id=env_1,origin=new,type=session}": 1}),
    (ev.ItemDeclined(ITEM, "busy"), {"items_declined_total{environment_id=env_1,reason=busy}": 1}),
    (ev.ItemReclaimed(ITEM, "lost", "ack"),
     {"reclaims_total{environment_id=env_1,direction=lost,stage=ack}": 1}),
    (ev.AckFinished(ITEM, "conflict", 0.5, 0.75), {
        "acks_total{environment_id=env_1,result=conflict}": 1,
        "queue_wait_seconds_count{environment_id=env_1}": 1,
        "queue_wait_seconds_sum{environment_id=env_1}": 0.5,
        "delivery_to_ack_seconds_count{environment_id=env_1}": 1,
        "delivery_to_ack_seconds_sum{environment_id=env_1}": 0.75,
    }),
    (ev.HeartbeatFinished(ITEM, "recovered", 0.125), {
        "heartbeats_total{environment_id=env_1,result=recovered}": 1,
        "heartbeat_lag_seconds_count{environment_id=env_1}": 1,
        "heartbeat_lag_seconds_sum{environment_id=env_1}": 0.125,
    }),
    (ev.StopRequested(ITEM), {"stop_requests_total{environment_id=env_1}": 1}),
    (ev.SessionFinished(SESSION, "echo.run", "timed_out", 12.0, TimeoutError()), {
        "sessions_total{environment_id=env_1,handler=echo.run,outcome=timed_out}": 1,
        "session_duration_seconds_count{handler=echo.run,outcome=timed_out}": 1,
        "session_duration_seconds_sum{handler=echo.run,outcome=timed_out}": 12,
    }),
    (ev.SessionLost(ITEM, "taken"),
     {"leases_lost_total{environment_id=env_1,reason=taken}": 1}),
    (ev.SessionFailed(ITEM, "timeout"),
     {"session_errors_total{environment_id=env_1,error=timeout}": 1}),
    (ev.StopFinished(ITEM, "force", "gone"),
     {"stops_total{environment_id=env_1,mode=force,result=gone}": 1}),
    (ev.ResultDropped(ITEM), {"results_dropped_total{environment_id=env_1}": 1}),
    (ev.RequestFinished("update", "412", 0.25), {
        "http_requests_total{environment_id=env_1,op=update,code=412}": 1,
        "http_request_duration_seconds_count{op=update}": 1,
        "http_request_duration_seconds_sum{op=update}": 0.25,
    }),
    (ev.RateBudgetWaited("write", 0.75),
     {"rate_budget_wait_seconds_total{environment_id=env_1,kind=write}": 0.75}),
    (ev.CredentialRefreshed("error"),
     {"credential_refreshes_total{environment_id=env_1,result=error}": 1}),
    (ev.QueueStatsRead(QueueStats(3, 2, CREATED, 4)), {
        "remote_queue_items{environment_id=env_1,state=claimable}": 3,
        "remote_queue_items{environment_id=env_1,state=pending}": 2,
        "remote_workers_polling{environment_id=env_1}": 4,
        "remote_stats_timestamp_seconds{environment_id=env_1}": 5000,
    }),
    (ev.LoopLagMeasured(0.5),
     {"event_loop_lag_seconds_count{}": 1, "event_loop_lag_seconds_sum{}": 0.5}),
    (ev.PluginFailed("mail", "workpool_event", ValueError()),
     {"plugin_errors_total{environment_id=env_1,plugin=mail,hook=workpool_event}": 1}),
    (ev.DrainFinished("killed", 30.0), {
        "drain_duration_seconds_count{result=killed}": 1,
        "drain_duration_seconds_sum{result=killed}": 30,
    }),
    (ev.SessionStarted(SESSION, "echo.run"), {}),
    (
        ev.HandlerRetried(SESSION, "echo.run", 2, ConnectionError()),
        {"handler_retries_total{environment_id=env_1,handler=echo.run}": 1},
    ),
    (ev.DrainStarted(None), {}),
    (ev.PoolFailed(ValueError()), {"pool_failures_total{environment_id=env_1}": 1}),
)  # fmt: skip


@pytest.mark.parametrize(("event", "adds"), FED, ids=lambda v: type(v).__name__)
def test_each_event_increases_exactly_the_metrics_listed_for_it(
    pool: PoolMetricsTestbed,
    registry: CollectorRegistry,
    event: ev.Event,
    adds: Mapping[str, float],
) -> None:
    before = scrape_samples(registry)
    pool.metrics.observe(event)
    assert compute_increases_of_samples(before, scrape_samples(registry)) == adds


def test_every_event_type_has_a_row_in_table_of_expected_metric_changes() -> None:
    assert {type(event) for event, _ in FED} == set(get_args(ev.Event))


def test_error_in_metrics_is_logged_and_not_raised(
    pool: PoolMetricsTestbed, caplog: pytest.LogCaptureFixture
) -> None:
    pool.metrics.count(ev.AckFinished, ITEM, "ok", "not a number", 1.0)
    assert "metrics failed" in caplog.text


def test_handlers_after_first_hundred_share_one_metric_label_and_cause_one_warning(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"many.handler_{number}" for number in range(150)]
    pool = PoolMetricsTestbed(registry, handlers=names[:20], snapshot=replace(IDLE, sessions=tuple(
        (name, 1, float(age), 0.0) for age, name in enumerate(names)
    )))  # fmt: skip
    pool.metrics.open()
    for name in names:
        pool.metrics.observe(ev.SessionStarted(SESSION, name))
        pool.metrics.observe(ev.SessionFinished(SESSION, name, "completed", 1.0))
    samples = scrape_samples(registry)

    def list_handler_label_values(metric: str, rest: str = "") -> list[str]:
        pattern = re.compile(rf"{metric}{{(?:environment_id=env_1,)?handler=([^,}}]*){rest}}}")
        return [found[1] for name in samples if (found := pattern.fullmatch(name))]

    shown = {*names[:100], "other"}
    assert set(list_handler_label_values("sessions_active")) == shown
    assert set(list_handler_label_values("sessions_total", ",outcome=completed")) == shown
    assert (
        set(list_handler_label_values("session_duration_seconds_count", ",outcome=completed"))
        == shown
    )
    other = "environment_id=env_1,handler=other"
    assert samples[f"sessions_total{{{other},outcome=completed}}"] == 50
    assert samples["session_duration_seconds_count{handler=other,outcome=completed}"] == 50
    assert samples[f"sessions_active{{{other}}}"] == 50
    assert samples[f"session_age_seconds_max{{{other}}}"] == 149
    assert caplog.text.count("more than 100 handlers") == 1


def test_first_session_of_handler_creates_all_its_metric_series(
    pool: PoolMetricsTestbed, registry: CollectorRegistry
) -> None:
    assert "sessions_active{environment_id=env_1,handler=late.one}" not in scrape_samples(registry)
    pool.metrics.observe(ev.SessionStarted(SESSION, "late.one"))
    samples = scrape_samples(registry)
    assert samples["sessions_active{environment_id=env_1,handler=late.one}"] == 0
    for outcome in ("completed", "failed", "detached"):
        labels = f"handler=late.one,outcome={outcome}"
        assert samples[f"sessions_total{{environment_id=env_1,{labels}}}"] == 0
        assert samples[f"session_duration_seconds_count{{{labels}}}"] == 0


def test_unknown_label_value_causes_warning_and_is_not_counted(
    pool: PoolMetricsTestbed, registry: CollectorRegistry
) -> None:
    before = scrape_samples(registry)
    with pytest.warns(RuntimeWarning, match=r"acks_total has no result='lost'"):
        pool.metrics.observe(ev.AckFinished(ITEM, cast("Any", "lost"), 1.0, 1.0))
    with pytest.warns(RuntimeWarning, match=r"http_requests_total has no code='418'"):
        pool.metrics.observe(ev.RequestFinished("poll", "418", 0.0))
    after = scrape_samples(registry)
    assert after.keys() == before.keys()
    assert [name for name in compute_increases_of_samples(before, after) if "_total" in name] == []


def test_gauges_show_pool_state_at_time_of_scrape(
    pool: PoolMetricsTestbed, registry: CollectorRegistry
) -> None:
    idle = scrape_samples(registry)
    assert idle["slots{environment_id=env_1,state=free}"] == 6
    assert idle["slots{environment_id=env_1,state=busy}"] == 0
    assert idle["last_poll_success_timestamp_seconds{environment_id=env_1}"] == 0
    assert "lease_remaining_seconds_min{environment_id=env_1}" not in idle
    assert "poll_null_ratio{environment_id=env_1}" not in idle
    assert "remote_workers_polling{environment_id=env_1}" not in idle
    pool.snapshot = BUSY
    busy = scrape_samples(registry)
    assert {k: v for k, v in busy.items() if k.startswith(("pollers", "queue_d", "queue_c"))} == {
        "pollers{environment_id=env_1,state=polling}": 1,
        "pollers{environment_id=env_1,state=pacing}": 0,
        "pollers{environment_id=env_1,state=backoff}": 0,
        "pollers{environment_id=env_1,state=blocked}": 0,
        "pollers{environment_id=env_1,state=waiting_slot}": 1,
        "pollers{environment_id=env_1,state=paused}": 0,
        "pollers_target{environment_id=env_1}": 2,
        "pollers_limit{environment_id=env_1}": 3,
        "queue_depth{environment_id=env_1}": 1,
        "queue_capacity{environment_id=env_1}": 9,
    }
    assert busy["slots{environment_id=env_1,state=busy}"] == 8
    assert busy["slots_limit{environment_id=env_1}"] == 8
    assert busy["leases{environment_id=env_1,state=active}"] == 7
    assert busy["leases{environment_id=env_1,state=starting}"] == 0
    assert busy["lease_remaining_seconds_min{environment_id=env_1}"] == 41.5
    assert busy["last_poll_success_timestamp_seconds{environment_id=env_1}"] == 1000
    assert busy["sessions_active{environment_id=env_1,handler=echo.run}"] == 5
    assert busy["session_age_seconds_max{environment_id=env_1,handler=mail.send}"] == 7
    assert busy["session_silence_seconds_max{environment_id=env_1,handler=echo.run}"] == 30
    assert busy["draining{environment_id=env_1}"] == 1


def test_build_info_shows_version_python_and_dialect(
    pool: PoolMetricsTestbed, registry: CollectorRegistry
) -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    assert pool.metrics.version == "1.2.3"
    assert (
        scrape_samples(registry)[
            f"build_info{{environment_id=env_1,worker_id=vm-1,version=1.2.3,python={python},dialect=qoder}}"
        ]
        == 1
    )


def test_metric_poll_null_ratio_is_share_of_empty_polls_in_last_minute(
    pool: PoolMetricsTestbed, registry: CollectorRegistry
) -> None:
    key = "poll_null_ratio{environment_id=env_1}"
    pool.metrics.observe(ev.PollFinished("item", 0.1))
    for _ in range(3):
        pool.metrics.observe(ev.PollFinished("null", 1.0))
    for other in ("throttled", "error", "timeout", "cancelled"):
        pool.metrics.observe(ev.PollFinished(other, 1.0))
    assert scrape_samples(registry)[key] == 0.75
    pool.clock.advance(30)
    pool.metrics.observe(ev.PollFinished("item", 0.1))
    assert scrape_samples(registry)[key] == 0.6
    pool.clock.advance(29)
    assert scrape_samples(registry)[key] == 0.6
    pool.clock.advance(1)
    assert scrape_samples(registry)[key] == 0
    pool.clock.advance(30)
    assert key not in scrape_samples(registry)
    # The ring buffer overwrites the entry of a poll that is too old to count.
    pool.metrics.observe(ev.PollFinished("null", 1.0))
    assert scrape_samples(registry)[key] == 1


def test_age_of_oldest_item_grows_between_reads_of_stats(
    pool: PoolMetricsTestbed, registry: CollectorRegistry
) -> None:
    key = "remote_oldest_queued_age_seconds{environment_id=env_1}"
    queued = datetime.fromtimestamp(4990, UTC)
    pool.metrics.observe(ev.QueueStatsRead(QueueStats(1, 0, queued, 1)))
    assert scrape_samples(registry)[key] == 10
    pool.clock.advance(5)
    assert scrape_samples(registry)[key] == 15
    assert scrape_samples(registry)["remote_stats_timestamp_seconds{environment_id=env_1}"] == 5000
    pool.metrics.observe(ev.QueueStatsRead(QueueStats(0, 0, None, 1)))
    assert scrape_samples(registry)[key] == 0


def test_oldest_item_without_readable_time_has_no_age_metric(
    pool: PoolMetricsTestbed, registry: CollectorRegistry
) -> None:
    key = "remote_oldest_queued_age_seconds{environment_id=env_1}"
    pool.metrics.observe(ev.QueueStatsRead(QueueStats(1, 0, None, 1)))
    assert key not in scrape_samples(registry)
    pool.metrics.observe(ev.QueueStatsRead(QueueStats(0, 1, None, 1)))
    assert key not in scrape_samples(registry)


def test_metrics_use_wall_clock_by_default(
    registry: CollectorRegistry,
) -> None:
    metrics = Metrics(
        registry, "env_1", worker_id="vm-1", dialect="qoder", version="1", snapshot=lambda: IDLE
    )
    metrics.open()
    before = datetime.now(UTC).timestamp()
    metrics.observe(ev.QueueStatsRead(QueueStats(1, 0, None, 1)))
    read_at = scrape_samples(registry)["remote_stats_timestamp_seconds{environment_id=env_1}"]
    assert before <= read_at <= datetime.now(UTC).timestamp()


def test_supervisors_of_one_environment_share_metric_series(registry: CollectorRegistry) -> None:
    one, two = (
        PoolMetricsTestbed(registry, handlers=["echo.run"]),
        PoolMetricsTestbed(registry, snapshot=BUSY),
    )
    second = replace(
        BUSY,
        lease_remaining_min=9.0,
        last_poll_success=900.0,
        sessions=(("echo.run", 1, 90.0, 20.0),),
    )
    one.snapshot = second
    for pool in (one, two):
        pool.metrics.open()
        pool.metrics.observe(ev.AckFinished(ITEM, "ok", 1.0, 1.0))
    one.metrics.observe(ev.PollFinished("item", 1.0))
    two.metrics.observe(ev.PollFinished("null", 1.0))
    two.clock.advance(1)
    # Pool `two` reads newer queue statistics than `one`. The metrics must show the statistics of
    # `two`, although those of `one` are observed last.
    for pool, depth in ((two, 7), (one, 3)):
        pool.metrics.observe(ev.QueueStatsRead(QueueStats(depth, 0, None, 1)))
    samples = scrape_samples(registry)
    assert samples["acks_total{environment_id=env_1,result=ok}"] == 2
    assert samples["queue_wait_seconds_count{environment_id=env_1}"] == 2
    assert samples["slots{environment_id=env_1,state=busy}"] == 16
    assert samples["slots_limit{environment_id=env_1}"] == 16
    assert samples["leases{environment_id=env_1,state=active}"] == 14
    assert samples["lease_remaining_seconds_min{environment_id=env_1}"] == 9
    assert samples["last_poll_success_timestamp_seconds{environment_id=env_1}"] == 1000
    assert samples["draining{environment_id=env_1}"] == 1
    assert samples["sessions_active{environment_id=env_1,handler=echo.run}"] == 6
    assert samples["session_age_seconds_max{environment_id=env_1,handler=echo.run}"] == 90
    assert samples["session_silence_seconds_max{environment_id=env_1,handler=echo.run}"] == 30
    assert samples["sessions_active{environment_id=env_1,handler=mail.send}"] == 3
    assert samples["poll_null_ratio{environment_id=env_1}"] == 0.5
    assert samples["remote_queue_items{environment_id=env_1,state=claimable}"] == 7
    assert len([name for name in samples if name.startswith("build_info")]) == 1


@pytest.mark.usefixtures("pool")
def test_supervisors_of_two_environments_have_separate_metric_series(
    registry: CollectorRegistry,
) -> None:
    other = PoolMetricsTestbed(registry, "env_2", snapshot=BUSY)
    other.metrics.open()
    other.metrics.observe(ev.StopRequested(ITEM))
    samples = scrape_samples(registry)
    assert samples["slots{environment_id=env_1,state=busy}"] == 0
    assert samples["slots{environment_id=env_2,state=busy}"] == 8
    assert samples["stop_requests_total{environment_id=env_1}"] == 0
    assert samples["stop_requests_total{environment_id=env_2}"] == 1


def test_closing_metrics_removes_gauges_and_keeps_counters(
    pool: PoolMetricsTestbed, registry: CollectorRegistry
) -> None:
    gauges = {row.name for row in DEFINITIONS if row.kind == "gauge"}
    pool.metrics.observe(ev.StopRequested(ITEM))
    assert gauges & {name.partition("{")[0] for name in scrape_samples(registry)}
    pool.metrics.close()
    pool.metrics.close()
    for late in (ev.StopRequested(ITEM), ev.QueueStatsRead(QueueStats(1, 1, None, 1))):
        pool.metrics.observe(late)
    samples = scrape_samples(registry)
    assert samples["stop_requests_total{environment_id=env_1}"] == 2
    assert not gauges & {name.partition("{")[0] for name in samples}
    pool.metrics.open()
    assert scrape_samples(registry)["slots_limit{environment_id=env_1}"] == 8


@pytest.mark.usefixtures("pool")
def test_metrics_opened_twice_raise_registry_error(
    pool: PoolMetricsTestbed, registry: CollectorRegistry
) -> None:
    with pytest.raises(RegistryError, match="open already"):
        pool.metrics.open()
    assert scrape_samples(registry)["slots_limit{environment_id=env_1}"] == 8


def test_metric_name_already_registered_is_refused_and_registers_nothing(
    registry: CollectorRegistry,
) -> None:
    theirs = Counter("workpool_stops", "Not ours.", registry=registry)
    pool = PoolMetricsTestbed(registry)
    with pytest.raises(RegistryError, match="workpool_stops"):
        pool.metrics.open()
    assert scrape_samples(registry) == {"stops_total{}": 0}
    registry.unregister(theirs)
    pool.metrics.open()
    assert scrape_samples(registry)["stops_total{environment_id=env_1,mode=force,result=ok}"] == 0
    with pytest.raises(ValueError, match="workpool_slots"):
        Counter("workpool_slots", "Not ours.", registry=registry)


def test_metrics_registry_can_be_garbage_collected_after_metrics_close() -> None:
    registry = CollectorRegistry()
    pool = PoolMetricsTestbed(registry)
    pool.metrics.open()
    pool.metrics.close()
    gone = weakref.ref(registry)
    del registry, pool
    gc.collect()
    assert gone() is None


def test_metrics_count_correctly_from_several_threads_during_scrape(
    pool: PoolMetricsTestbed, registry: CollectorRegistry
) -> None:
    rounds, errors = 2000, []
    begin = threading.Barrier(3)

    def observe_events_of_sessions(name: str) -> None:
        try:
            begin.wait()
            for i in range(rounds):
                pool.metrics.observe(ev.RequestFinished("poll", "2xx", 0.01))
                pool.metrics.observe(ev.PollFinished("null", 1.0))
                handler = f"{name}.handler_{i // 100}"
                pool.metrics.observe(ev.SessionStarted(SESSION, handler))
                pool.metrics.observe(ev.SessionFinished(SESSION, handler, "completed", 1.0))
        except BaseException as error:
            errors.append(error)
            raise

    threads = [
        threading.Thread(target=observe_events_of_sessions, args=(name,)) for name in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    begin.wait()
    while any(thread.is_alive() for thread in threads):
        scrape_samples(registry)
    for thread in threads:
        thread.join()
    assert errors == []
    samples = scrape_samples(registry)
    assert samples["http_requests_total{environment_id=env_1,op=poll,code=2xx}"] == 2 * rounds
    assert samples["http_request_duration_seconds_count{op=poll}"] == 2 * rounds
    assert samples["polls_total{environment_id=env_1,result=null}"] == 2 * rounds
    finished = [
        v for k, v in samples.items() if k.startswith("sessions_total") and "completed" in k
    ]
    assert finished == [100] * 40


def test_several_threads_can_register_pool_metrics_in_one_registry(
    registry: CollectorRegistry,
) -> None:
    pools = [PoolMetricsTestbed(registry, f"env_{i}") for i in range(8)]
    threads = [threading.Thread(target=pool.metrics.open) for pool in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([k for k in scrape_samples(registry) if k.startswith("slots_limit")]) == 8


MULTIPROCESS = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from workpool.events import PollFinished
from workpool.metrics import Metrics

names = {"worker_id": "vm-1", "dialect": "qoder", "version": "1"}
metrics = Metrics(CollectorRegistry(), "env_1", **names, snapshot=lambda: None)
metrics.open()
metrics.observe(PollFinished("item", 0.5))
everybody = CollectorRegistry()
MultiProcessCollector(everybody)
print(generate_latest(everybody).decode())
"""


def test_metrics_in_multiprocess_mode_add_up_counters_and_histograms(tmp_path: Path) -> None:
    def run_python_process() -> str:
        return subprocess.run(  # noqa: S603 - our own interpreter and text
            [sys.executable, "-c", MULTIPROCESS], env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            capture_output=True, text=True, check=True, timeout=25,
        ).stdout  # fmt: skip

    run_python_process()
    output = run_python_process()
    assert 'workpool_polls_total{environment_id="env_1",result="item"} 2.0' in output
    line = 'workpool_poll_duration_seconds_sum{environment_id="env_1",result="item"} 1.0'
    assert line in output
    assert "workpool_slots" not in output


def test_alert_rules_contain_no_unknown_metric_or_label() -> None:
    text = resources.files("workpool").joinpath("alerts.yml").read_text("utf-8")
    # An import statement would need type information about yaml, which mypy does not find.
    yaml = importlib.import_module("yaml")
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    assert len([rule for rule in rules if "record" in rule]) == 1
    assert len([rule for rule in rules if "alert" in rule]) == 21
    known = {row.prefixed_name: row for row in DEFINITIONS}
    for rule in rules:
        selectors = re.findall(r"\b(workpool_\w+)(?:\{([^}]*)\})?", rule["expr"])
        assert selectors
        for name, matchers in selectors:
            base = re.sub("_(bucket|count|sum)$", "", name)
            row = known.get(name) or known[base]
            assert (row.kind == "histogram") == (name != base)
            for label, values in re.findall(r'(\w+)!?=~?"([^"]*)"', matchers):
                assert set(values.split("|")) <= set(row.labels[label])
    described = " ".join(str(rule.get("annotations", "")) for rule in rules)
    assert set(re.findall(r"\bworkpool_\w+", described)) <= set(known)
