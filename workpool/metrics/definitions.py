"""The table of all metrics, on which dashboards and alerts rely.

Names, types, labels and buckets change only with a changelog entry. A row also names the event that
the metric counts or observes, so that `observer` needs no code for single metrics. Rows without an
event are gauges, which are computed at scrape time. See workpool/docs/metrics.md, "All metrics".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from workpool import events as ev
from workpool.session import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX: Final = "workpool_"
ENVIRONMENT: Final = "environment_id"
HANDLER: Final = "handler"
HANDLERS_MAX: Final = 100
"""The number of handlers of one pool that have a label value of their own."""
OTHER_HANDLERS: Final = "other"
"""The label value of all further handlers."""
OPEN: Final[tuple[str, ...]] = ()
"""For a label whose values are known at run time only; settings and code bound their number."""

POLLER_STATES: Final = ("polling", "pacing", "backoff", "waiting_slot", "paused", "blocked")
SLOT_STATES: Final = ("free", "reserved", "busy")
LEASE_STATES: Final = ("starting", "active", "stopping")
PAUSE_REASONS: Final = ("pause", "plugin", "limit")
ITEM_TYPES: Final = ("session", "healthcheck", "other")
OPS: Final = (
    *("poll", "ack", "heartbeat", "stop", "get", "list", "stats", "update"),
    *("session", "events", "stream"),
)
CODES: Final = (
    *("2xx", "304", "400", "401", "403", "404", "409", "412", "429", "4xx", "5xx"),
    # Codes of requests without an answer.
    *("dns", "refused", "tls", "timeout", "reset", "error"),
)

H_POLL: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75),
    # These bounds are dense around `block_ms` (0.999 s): a poll without an item should take 1 s.
    # From 1.25 s on, the network or the server is slow; below 0.9 s, the server ignores `block_ms`.
    *(0.95, 1, 1.05, 1.1, 1.25, 1.5),
    *(2.5, 5, 10, 30),
)
H_HTTP: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
H_LAG: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
H_WAIT: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)
H_RUN: Final = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600)

_Labels = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """The definition of one metric: its name, type, labels and source.

    Attributes:
        name: The name without the prefix.
        kind: The Prometheus type.
        help: The meaning, in one sentence.
        labels: For each label its closed set of values, all present from the start, or `OPEN`.
        event: The event that is counted or observed. Each label is the attribute of that name.
        value: The attribute that is added or observed; None: events are counted.
        buckets: The upper bounds of a histogram.
        skips: Label values of the event that this metric leaves out on purpose.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...]]
    event: type[ev.Event] | None = None
    value: str | None = None
    buckets: tuple[float, ...] = ()
    skips: tuple[str, ...] = ()

    @property
    def prefixed_name(self) -> str:
        """The name of the metric with the prefix `workpool_`."""
        return PREFIX + self.name


def _make_labels(**closed: tuple[str, ...]) -> _Labels:
    """Return the labels of a metric: the environment, and one label for each argument.

    An argument has the name of its label, and its value contains all values of that label,
    or is `OPEN`.
    """
    return {ENVIRONMENT: OPEN, **closed}


def _counter(
    name: str, labels: _Labels, event: type[ev.Event] | None, text: str, value: str | None = None
) -> MetricDefinition:
    return MetricDefinition(name, "counter", text, labels, event, value)


def _gauge(name: str, labels: _Labels, text: str) -> MetricDefinition:
    return MetricDefinition(name, "gauge", text, labels)


def _histogram(
    name: str, labels: _Labels, fed_by: tuple[type[ev.Event], str], buckets: tuple[float, ...],
    text: str, skips: tuple[str, ...] = (),
) -> MetricDefinition:  # fmt: skip
    return MetricDefinition(name, "histogram", text, labels, *fed_by, buckets, skips)


DEFINITIONS: Final[tuple[MetricDefinition, ...]] = (
    _counter(
        "polls_total", _make_labels(result=get_args(ev.PollResult)), ev.PollFinished,
        "Polls that ended. A 429 is throttled, a 503 an error.",
    ),
    # This histogram leaves out polls that a timeout or a cancellation ended early, and polls with
    # a 429: their duration does not show how long a poll takes.
    _histogram(
        "poll_duration_seconds", _make_labels(result=("item", "null", "error")),
        (ev.PollFinished, "seconds"), H_POLL,
        "Time from sending a poll to its answer.",
        skips=("throttled", "timeout", "cancelled"),
    ),
    _gauge(
        "poll_null_ratio", _make_labels(),
        "Share of nulls in this worker's item and null polls of the last 60 s; absent without such "
        "polls. Not to be averaged over workers: divide the rates of polls_total instead.",
    ),
    _counter(
        "poll_backoff_seconds_total", _make_labels(reason=get_args(ev.BackoffReason)),
        ev.PollerBackedOff,
        "Time that pollers waited after failed polls.", "seconds",
    ),
    _gauge("pollers", _make_labels(state=POLLER_STATES), "Pollers by state."),
    _gauge("pollers_target", _make_labels(), "Number of pollers that poll while they have places."),
    _gauge("pollers_limit", _make_labels(), "Largest number of pollers that the settings allow."),
    _counter(
        "poller_scale_events_total",
        _make_labels(direction=("up", "down"), reason=get_args(ev.ScaleReason)),
        ev.PollersScaled, "Changes of pollers_target.",
    ),
    _gauge(
        "last_poll_success_timestamp_seconds", _make_labels(),
        "Unix time of the last poll with an item or null; 0 before the first.",
    ),
    _counter(
        "items_received_total", _make_labels(origin=get_args(ev.Origin), type=ITEM_TYPES),
        ev.ItemReceived,
        "Items that polls returned.",
    ),
    _histogram(
        "item_pickup_latency_seconds", _make_labels(), (ev.ItemReceived, "pickup_seconds"), H_WAIT,
        "Time from the creation of a new item to the poll that returned it.",
    ),
    _counter(
        "reclaims_total",
        _make_labels(direction=get_args(ev.ReclaimDirection), stage=get_args(ev.ReclaimStage)),
        ev.ItemReclaimed,
        "Items that changed hands: received although held before, or held and then lost.",
    ),
    _counter(
        "items_declined_total", _make_labels(reason=get_args(ev.DeclineReason)), ev.ItemDeclined,
        "Items that were not acknowledged, so that other workers receive them.",
    ),
    _counter(
        "poller_restarts_total", _make_labels(), ev.PollerRestarted,
        "Crashes of pollers, which are bugs, followed by a restart.",
    ),
    _gauge("queue_depth", _make_labels(), "Items that wait for a slot."),
    _gauge("items_set_aside", _make_labels(), "Items that wait for a slot of their handler."),
    _gauge("queue_capacity", _make_labels(), "Places for items: slots and places to wait."),
    _histogram(
        "queue_wait_seconds", _make_labels(), (ev.AckFinished, "queue_seconds"), H_WAIT,
        "Time from an item's delivery until a slot took it.",
    ),
    _gauge("slots", _make_labels(state=SLOT_STATES), "Handler slots by state."),
    _gauge("slots_limit", _make_labels(), "Handler slots that the settings allow."),
    _counter(
        "acks_total", _make_labels(result=get_args(ev.CallResult)), ev.AckFinished,
        "Acknowledgements by final result; http_requests_total counts each try.",
    ),
    _histogram(
        "delivery_to_ack_seconds", _make_labels(), (ev.AckFinished, "delivery_seconds"), H_WAIT,
        "Time from delivery to the answer of the ack; must stay below the reclaim window.",
    ),
    _gauge(
        "lease_ttl_seconds", _make_labels(), "Duration of the leases that heartbeats are granted."
    ),
    _counter(
        "leases_lost_total", _make_labels(reason=get_args(ev.LossReason)), ev.SessionLost,
        "Leases lost: expired without an answer, taken by another worker, gone, or refused.",
    ),
    _gauge("leases", _make_labels(state=LEASE_STATES), "Leases held, by the state of their item."),
    _gauge(
        "lease_remaining_seconds_min", _make_labels(),
        "Remaining time of the lease that ends first; absent if no lease is being renewed.",
    ),
    _counter(
        "heartbeats_total", _make_labels(result=get_args(ev.HeartbeatResult)), ev.HeartbeatFinished,
        "Heartbeats by final result; recovered: refused, but the item was read and is still held.",
    ),
    _histogram(
        "heartbeat_lag_seconds", _make_labels(), (ev.HeartbeatFinished, "lag_seconds"), H_LAG,
        "Actual minus planned send time of a heartbeat.",
    ),
    _counter(
        "stop_requests_total", _make_labels(), ev.StopRequested,
        "Stop requests of operators, as heartbeats reported them.",
    ),
    _gauge("sessions_active", _make_labels(handler=OPEN), "Sessions running."),
    _gauge(
        "session_age_seconds_max", _make_labels(handler=OPEN), "Age of the oldest running session."
    ),
    _gauge(
        "session_silence_seconds_max", _make_labels(handler=OPEN),
        "Longest time without progress of a running session that does not wait for others.",
    ),
    _histogram(
        "session_duration_seconds", {HANDLER: OPEN, "outcome": get_args(Outcome)},
        (ev.SessionFinished, "seconds"), H_RUN,
        "Time from the acknowledgement to the end of the completion.",
    ),
    _counter(
        "sessions_total", _make_labels(handler=OPEN, outcome=get_args(Outcome)), ev.SessionFinished,
        "Sessions that ended: one for each acknowledgement.",
    ),
    _counter(
        "session_errors_total", _make_labels(error=get_args(ev.SessionErrorKind)), ev.SessionFailed,
        "Sessions that failed, by the kind of error.",
    ),
    _gauge("stuck_handlers", _make_labels(), "Handlers that ignore their cancellation."),
    _counter(
        "handler_retries_total", _make_labels(handler=OPEN), ev.HandlerRetried,
        "Calls of handlers that followed an error in the same session run.",
    ),
    _counter(
        "stops_total", _make_labels(mode=get_args(ev.StopMode), result=get_args(ev.CallResult)),
        ev.StopFinished,
        "Stop calls of the pool by final result.",
    ),
    _counter(
        "results_dropped_total", _make_labels(), ev.ResultDropped,
        "Results of handlers not written, as the credential may not write metadata.",
    ),
    _gauge(
        "paused", _make_labels(reason=PAUSE_REASONS),
        "Pools that claim nothing: paused, refused by a plugin, or at an exit limit.",
    ),
    _gauge("draining", _make_labels(), "1 during a drain, else 0."),
    _histogram(
        "drain_duration_seconds", {"result": get_args(ev.DrainResult)},
        (ev.DrainFinished, "seconds"), H_RUN,
        "Duration of drains: clean, until the deadline, or with abandoned sessions (killed).",
    ),
    _counter(
        "http_requests_total", _make_labels(op=OPS, code=CODES), ev.RequestFinished,
        "HTTP requests sent, retries included.",
    ),
    _histogram(
        "http_request_duration_seconds", {"op": OPS}, (ev.RequestFinished, "seconds"), H_HTTP,
        "Time from sending a request to the end of its answer.",
    ),
    _counter(
        "rate_budget_wait_seconds_total", _make_labels(kind=("read", "write")), ev.RateBudgetWaited,
        "Time that requests waited for the pool's own rate limits.", "seconds",
    ),
    _counter(
        "credential_refreshes_total", _make_labels(result=("ok", "error")), ev.CredentialRefreshed,
        "Readings of the token's source after a refusal.",
    ),
    _gauge(
        "remote_queue_items", _make_labels(state=("claimable", "pending")),
        "Queued items, as the control plane counts them; absent until the first reading. Each "
        "worker reports the same queue: use max, not sum.",
    ),
    _gauge(
        "remote_oldest_queued_age_seconds", _make_labels(),
        "Age of the oldest queued item, 0 without one; absent while unknown. Each worker reports "
        "the same queue: use max, not sum.",
    ),
    _gauge(
        "remote_workers_polling", _make_labels(),
        "Workers that polled recently, as the control plane counts them: use max, not sum. Not the "
        "size of the fleet, since full workers do not poll; count build_info for that.",
    ),
    _gauge(
        "remote_stats_timestamp_seconds", _make_labels(),
        "Unix time of the last reading of the other remote_ metrics.",
    ),
    _gauge(
        "remote_stats_interval_seconds", _make_labels(),
        "Interval of reading the other remote_ metrics; 0 = never.",
    ),
    _histogram(
        "event_loop_lag_seconds", {}, (ev.LoopLagMeasured, "seconds"), H_LAG,
        "Delay of the handlers' event loop, measured once a second; no value while it is blocked.",
    ),
    _gauge(
        "event_loop_blocked_seconds", _make_labels(),
        "Time for which the handlers' event loop has not answered; 0 while it answers.",
    ),
    _counter(
        "plugin_errors_total", _make_labels(plugin=OPEN, hook=OPEN), ev.PluginFailed,
        "Exceptions of plugins' hooks.",
    ),
    _counter(
        "pool_failures_total", _make_labels(), ev.PoolFailed,
        "Pools that ended with an error. A process for several environments starts such a pool "
        "again after a minute.",
    ),
    _gauge(
        "build_info", _make_labels(worker_id=OPEN, version=OPEN, python=OPEN, dialect=OPEN),
        "Always 1; the labels are the worker and the versions in use.",
    ),
)  # fmt: skip
