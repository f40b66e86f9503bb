"""Every metric of workpool, as one table: the interface that dashboards and alerts are built on.

Names, types, labels and buckets change only with a changelog entry. A row also says which event
feeds it, so that the observer has no code of its own per metric; rows without an event are gauges,
computed at scrape time, or counters that nothing feeds yet.
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
"""Handlers of one pool that have a label value of their own."""
OTHER_HANDLERS: Final = "other"
"""The label value of all further handlers."""
OPEN: Final[tuple[str, ...]] = ()
"""The values of a label that are known only at run time, bounded by settings and code."""

POLLER_STATES: Final = ("polling", "backoff", "waiting_slot", "paused")
SLOT_STATES: Final = ("free", "reserved", "busy")
LEASE_STATES: Final = ("starting", "active", "stopping")
ITEM_TYPES: Final = ("session", "healthcheck", "other")
OPS: Final = (
    *("poll", "ack", "heartbeat", "stop", "get", "list", "stats", "update"),
    *("session", "events", "stream"),
)
CODES: Final = (
    *("2xx", "304", "400", "401", "403", "404", "409", "412", "429", "4xx", "5xx", "error"),
)

H_POLL: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75),
    # Dense around block_ms (0.999 s): a null at 1.0 is healthy, 1.25 and more is network or server
    # trouble, less than 0.9 is a server that ignores block_ms.
    *(0.95, 1, 1.05, 1.1, 1.25, 1.5),
    *(2.5, 5, 10, 30),
)
H_HTTP: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
H_LAG: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
H_WAIT: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)
H_RUN: Final = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600)

_Labels = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric.

    Attributes:
        name: Without the prefix.
        kind: Its Prometheus type.
        help: What it says, in one sentence.
        labels: Label → its closed set of values, all present from the start; `OPEN` when not known.
        event: The event that feeds it; each of its labels is the event's attribute of that name.
        value: The event's attribute that is added or observed; None counts events.
        buckets: Upper bounds, histograms only.
        skips: Label values that the event may have and this metric leaves out on purpose.
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
    def full_name(self) -> str:
        """As Prometheus shows it."""
        return PREFIX + self.name


def _env(**closed: tuple[str, ...]) -> _Labels:
    return {ENVIRONMENT: OPEN, **closed}


def _counter(
    name: str, labels: _Labels, event: type[ev.Event] | None, text: str, value: str | None = None
) -> Definition:
    return Definition(name, "counter", text, labels, event, value)


def _gauge(name: str, labels: _Labels, text: str) -> Definition:
    return Definition(name, "gauge", text, labels)


def _histogram(
    name: str, labels: _Labels, fed_by: tuple[type[ev.Event], str], buckets: tuple[float, ...],
    text: str, skips: tuple[str, ...] = (),
) -> Definition:  # fmt: skip
    return Definition(name, "histogram", text, labels, *fed_by, buckets, skips)


DEFINITIONS: Final[tuple[Definition, ...]] = (
    # -- polling ---------------------------------------------------------------------------------
    _counter(
        "polls_total", _env(result=get_args(ev.PollResult)), ev.PollFinished,
        "Polls ended. A 429 is throttled, a 503 an error.",
    ),
    # Its own limit or our drain ended a timeout or a cancelled poll, and a 429 says nothing about
    # the queue: none of them measures how long a poll takes.
    _histogram(
        "poll_duration_seconds", _env(result=("item", "null", "error")),
        (ev.PollFinished, "seconds"), H_POLL,
        "Time from sending a poll to its answer.",
        skips=("throttled", "timeout", "cancelled"),
    ),
    _gauge(
        "poll_null_ratio", _env(),
        "Nulls among the item and null polls of the last 60 s; absent when there were none.",
    ),
    _counter(
        "poll_backoff_seconds_total", _env(reason=get_args(ev.BackoffReason)), ev.PollerBackedOff,
        "Time that pollers were told to wait after failed polls.", "seconds",
    ),
    _gauge("pollers", _env(state=POLLER_STATES), "Pollers by what they are doing."),
    _gauge("pollers_target", _env(), "Pollers that should be polling now."),
    _gauge("pollers_limit", _env(), "The most pollers that the settings allow."),
    _counter(
        "poller_scale_events_total",
        _env(direction=("up", "down"), reason=("hits", "nulls", "throttled", "slots", "budget")),
        ev.PollersScaled, "Changes of pollers_target.",
    ),
    _gauge(
        "last_poll_success_timestamp_seconds", _env(),
        "Unix time of the last poll that was answered with an item or null; 0 before the first.",
    ),
    # -- items -----------------------------------------------------------------------------------
    _counter(
        "items_received_total", _env(origin=get_args(ev.Origin), type=ITEM_TYPES), ev.ItemReceived,
        "Items that polls brought.",
    ),
    _histogram(
        "item_pickup_latency_seconds", _env(), (ev.ItemReceived, "pickup_seconds"), H_WAIT,
        "Poll time minus the item's created_at.",
    ),
    _counter(
        "reclaims_total",
        _env(direction=get_args(ev.ReclaimDirection), stage=get_args(ev.ReclaimStage)),
        ev.ItemReclaimed,
        "Items that changed hands: held before by someone and now ours, or ours and then lost.",
    ),
    _counter(
        "items_declined_total", _env(reason=get_args(ev.DeclineReason)), ev.ItemDeclined,
        "Items left unacknowledged for other workers.",
    ),
    _counter(
        "poller_restarts_total", _env(), ev.PollerRestarted,
        "Pollers that crashed, which is a bug, and were started again.",
    ),
    _gauge("queue_depth", _env(), "Items that wait for a slot."),
    _gauge("queue_capacity", _env(), "Places for items, in slots and waiting together."),
    _histogram(
        "queue_wait_seconds", _env(), (ev.AckFinished, "queue_seconds"), H_WAIT,
        "Time from an item's delivery until a slot took it.",
    ),
    _gauge("slots", _env(state=SLOT_STATES), "Handler slots by state."),
    _gauge("slots_limit", _env(), "Handler slots that the settings allow."),
    _counter(
        "acks_total", _env(result=get_args(ev.CallResult)), ev.AckFinished,
        "Acknowledgements settled, by their final result; attempts are in http_requests_total.",
    ),
    _histogram(
        "delivery_to_ack_seconds", _env(), (ev.AckFinished, "delivery_seconds"), H_WAIT,
        "Time from delivery to the answer to the ack; must stay below the reclaim window.",
    ),
    # -- leases ----------------------------------------------------------------------------------
    _gauge("leases", _env(state=LEASE_STATES), "Leases held, by the state of their item."),
    _gauge(
        "lease_remaining_seconds_min", _env(),
        "Time left of the lease nearest to its end; absent when none is held.",
    ),
    _counter(
        "heartbeats_total", _env(result=get_args(ev.HeartbeatResult)), ev.HeartbeatFinished,
        "Heartbeats settled; recovered: refused, and found to be still ours by reading the item.",
    ),
    _histogram(
        "heartbeat_lag_seconds", _env(), (ev.HeartbeatFinished, "lag_seconds"), H_LAG,
        "Actual minus planned send time of a heartbeat.",
    ),
    _counter(
        "stop_requests_total", _env(), ev.StopRequested,
        "Sessions that an operator asked to stop, learnt by heartbeat.",
    ),
    # -- sessions --------------------------------------------------------------------------------
    _gauge("sessions_active", _env(handler=OPEN), "Sessions running."),
    _gauge("session_age_seconds_max", _env(handler=OPEN), "Age of the oldest running session."),
    _histogram(
        "session_duration_seconds", {HANDLER: OPEN, "outcome": get_args(Outcome)},
        (ev.SessionFinished, "seconds"), H_RUN,
        "Time from a session's acknowledgement to the end of its finish.",
    ),
    _counter(
        "sessions_total", _env(handler=OPEN, outcome=get_args(Outcome)), ev.SessionFinished,
        "Sessions over: one per item that we acknowledged.",
    ),
    _counter(
        "stops_total", _env(mode=get_args(ev.StopMode), result=get_args(ev.CallResult)),
        ev.StopFinished,
        "Stop calls of ours settled, by their final result.",
    ),
    _gauge("draining", _env(), "1 while a drain is under way, else 0."),
    _histogram(
        "drain_duration_seconds", {"result": get_args(ev.DrainResult)},
        (ev.DrainFinished, "seconds"), H_RUN,
        "How long drains took: clean, to their deadline, or with sessions left behind (killed).",
    ),
    # -- requests --------------------------------------------------------------------------------
    _counter(
        "http_requests_total", _env(op=OPS, code=CODES), ev.RequestFinished,
        "HTTP requests sent, retries included.",
    ),
    _histogram(
        "http_request_duration_seconds", {"op": OPS}, (ev.RequestFinished, "seconds"), H_HTTP,
        "Time from sending a request to the end of its answer.",
    ),
    _counter(
        "rate_budget_wait_seconds_total", _env(kind=("read", "write")), ev.RateBudgetWaited,
        "Time that requests waited for our own rate limits.", "seconds",
    ),
    _counter(
        "credential_refreshes_total", _env(result=("ok", "error")), ev.CredentialRefreshed,
        "Times the token source was read again after a refusal.",
    ),
    # -- the control plane's own view ------------------------------------------------------------
    _gauge(
        "remote_queue_items", _env(state=("claimable", "pending")),
        "Items queued, as the control plane counts them; absent until it was asked.",
    ),
    _gauge(
        "remote_oldest_queued_age_seconds", _env(),
        "Age of the oldest queued item, 0 when none is; absent while it is not known.",
    ),
    _gauge(
        "remote_workers_polling", _env(),
        "Workers that polled lately; absent until the control plane was asked.",
    ),
    _gauge(
        "remote_stats_timestamp_seconds", _env(),
        "Unix time when the other remote_ metrics were read.",
    ),
    # -- the process -----------------------------------------------------------------------------
    _histogram(
        "event_loop_lag_seconds", {}, (ev.LoopLagMeasured, "seconds"), H_LAG,
        "How late the handlers' event loop answered, measured once a second.",
    ),
    _counter(
        "plugin_errors_total", {"plugin": OPEN, "hook": OPEN}, ev.PluginFailed,
        "Exceptions that plugins' hooks raised.",
    ),
    _gauge(
        "build_info", {"version": OPEN, "python": OPEN, "dialect": OPEN},
        "Always 1; its labels say what runs.",
    ),
)  # fmt: skip
