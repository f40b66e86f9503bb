"""The events that observers receive: one frozen dataclass for each kind of event.

An event is created after the fact, and the pool never reads one to decide what to do next. Ids of
items and sessions are in events and logs, never in the labels of metrics. See
workpool/docs/plugins.md, "`workpool_event(event)`".
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from workpool.session import Outcome, Session
    from workpool.wire.items import QueueStats, WorkItem

PollResult = Literal["item", "null", "throttled", "error", "timeout", "cancelled"]
BackoffReason = Literal["throttled", "server_error", "network", "retry_after"]
ScaleDirection = Literal["up", "down"]
ScaleReason = Literal["hits", "nulls", "throttled"]
Origin = Literal["new", "redelivered", "duplicate"]
DeclineReason = Literal["unwanted", "busy", "plugin_error"]
ReclaimDirection = Literal["gained", "lost"]
ReclaimStage = Literal["poll", "ack", "start", "run", "drain"]
CallResult = Literal["ok", "conflict", "gone", "error"]
HeartbeatResult = Literal[
    "ok", "recovered", "precondition", "conflict", "rejected", "transient", "timeout"
]
LossReason = Literal["expired", "taken", "gone", "refused"]
"""The way in which a lease was lost.

`expired`: no heartbeat was answered in time, or the machine was paused. `taken`: another worker has
the item. `gone`: the control plane does not know the item. `refused`: the control plane does not
accept the heartbeat.
"""
SessionErrorKind = Literal["exception", "result_refused", "attempts_exceeded", "timeout", "stalled"]
StopMode = Literal["graceful", "force", "confirm"]
DrainResult = Literal["clean", "deadline", "killed"]


current_work_id: ContextVar[str | None] = ContextVar("workpool_work_id", default=None)
"""The id of the item that the current code works for; None outside of an item.

Set in handlers, and in observers of what the pool does for one item: in one of `RequestFinished` it
is the item of the request. A poll, a list and the mark of a drain have none.
"""


@dataclass(frozen=True, slots=True)
class PollFinished:
    """A poll ended, with or without an answer. `seconds`: the duration of the poll."""

    result: PollResult
    seconds: float


@dataclass(frozen=True, slots=True)
class PollerBackedOff:
    """A poll failed, and its poller waits for `seconds` before the next one."""

    reason: BackoffReason
    seconds: float


@dataclass(frozen=True, slots=True)
class PollersScaled:
    """The number of active pollers changed to `target`."""

    direction: ScaleDirection
    reason: ScaleReason
    target: int


@dataclass(frozen=True, slots=True)
class PollerRestarted:
    """A poller crashed, which is a bug, and continues after a pause."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class ItemReceived:
    """A poll returned an item.

    `pickup_seconds`: the age of a new item, at least 0; None if it has no `created_at`, and for
    items that were received or held before.
    """

    item: WorkItem
    origin: Origin
    pickup_seconds: float | None


@dataclass(frozen=True, slots=True)
class ItemDeclined:
    """An item was not acknowledged, so that other workers receive it."""

    item: WorkItem
    reason: DeclineReason


@dataclass(frozen=True, slots=True)
class ItemReclaimed:
    """An item changed its holder: this pool took it over (gained) or lost it (lost)."""

    item: WorkItem
    direction: ReclaimDirection
    stage: ReclaimStage


@dataclass(frozen=True, slots=True)
class AckFinished:
    """An ack has its final result, after all retries.

    `queue_seconds`: from the delivery until a slot took the item. `delivery_seconds`: from the
    delivery until the answer.
    """

    item: WorkItem
    result: CallResult
    queue_seconds: float
    delivery_seconds: float


@dataclass(frozen=True, slots=True)
class HeartbeatFinished:
    """A heartbeat has its final result. `lag_seconds`: how late it was sent.

    Usually created on the thread of the lease renewer.
    """

    item: WorkItem
    result: HeartbeatResult
    lag_seconds: float


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The answer to a heartbeat says that an operator wants the session to end."""

    item: WorkItem


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """The lease is held and the handler is about to be called."""

    session: Session
    handler: str


@dataclass(frozen=True, slots=True)
class HandlerRetried:
    """A handler raised an error and is about to be called again in the same session run.

    `retry`: the number of this call. `error`: the exception of the call before it.
    """

    session: Session
    handler: str
    retry: int
    error: Exception


@dataclass(frozen=True, slots=True)
class SessionFinished:
    """A session has ended in this pool. There is exactly one such event for each acknowledgement.

    `seconds`: from the acknowledgement to the end of the completion. `error`: the exception of the
    handler, if any.
    """

    session: Session
    handler: str
    outcome: Outcome
    seconds: float
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class SessionLost:
    """A session ended because its lease was lost; `SessionFinished` follows."""

    item: WorkItem
    reason: LossReason


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """A session failed. `SessionFinished` follows.

    `error`: the kind of error. `attempts_exceeded`: the item had failed `max_attempts` times
    before, so no handler ran.
    """

    item: WorkItem
    error: SessionErrorKind


@dataclass(frozen=True, slots=True)
class StopFinished:
    """The pool's request to stop an item has its final result, after all retries."""

    item: WorkItem
    mode: StopMode
    result: CallResult


@dataclass(frozen=True, slots=True)
class ResultDropped:
    """A handler's result was not written, as the pool's credential cannot write metadata."""

    item: WorkItem


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """An HTTP request ended.

    `code`: the value of the label `code` of `http_requests_total`, such as 2xx, 304, 400 or error.
    """

    op: str
    code: str
    seconds: float


@dataclass(frozen=True, slots=True)
class RateBudgetWaited:
    """A request waited for the pool's own rate limit."""

    kind: Literal["read", "write"]
    seconds: float


@dataclass(frozen=True, slots=True)
class CredentialRefreshed:
    """The control plane refused the token, and the client read it again from its source.

    `result`: "error" if the token could not be read again.
    """

    result: Literal["ok", "error"]


@dataclass(frozen=True, slots=True)
class QueueStatsRead:
    """The pool has read the control plane's statistics of the queue, once per `stats_interval`."""

    stats: QueueStats


@dataclass(frozen=True, slots=True)
class LoopLagMeasured:
    """The delay of the handlers' loop, measured once a second.

    Created on the thread of the lease renewer.
    """

    seconds: float


@dataclass(frozen=True, slots=True)
class PluginFailed:
    """A hook of a plugin raised `error`."""

    plugin: str
    hook: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """A drain began. Running sessions have `timeout` seconds to end; None: no limit."""

    timeout: float | None


@dataclass(frozen=True, slots=True)
class DrainFinished:
    """A drain ended.

    `result`: "clean" if all sessions ended in time, "deadline" if the drain had to cancel handlers
    at its deadline, "killed" if it abandoned sessions.
    """

    result: DrainResult
    seconds: float


@dataclass(frozen=True, slots=True)
class PoolFailed:
    """A pool ended with an error, at its start or later.

    The last event of the pool: the lifespans of its plugins have ended.
    """

    error: BaseException


Event = (
    PollFinished
    | PollerBackedOff
    | PollersScaled
    | PollerRestarted
    | ItemReceived
    | ItemDeclined
    | ItemReclaimed
    | AckFinished
    | HeartbeatFinished
    | StopRequested
    | SessionStarted
    | HandlerRetried
    | SessionFinished
    | SessionLost
    | SessionFailed
    | StopFinished
    | ResultDropped
    | RequestFinished
    | RateBudgetWaited
    | CredentialRefreshed
    | QueueStatsRead
    | LoopLagMeasured
    | PluginFailed
    | DrainStarted
    | DrainFinished
    | PoolFailed
)
