"""What observers see: one frozen dataclass per fact, handed to `workpool_event` (design §4).

Facts only: an event is created after the thing happened and nothing reads it to decide what to do
next. Work and session ids appear here and in logs, never in metric labels.
"""

from __future__ import annotations

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
StopMode = Literal["graceful", "force", "confirm"]
DrainResult = Literal["clean", "deadline", "killed"]


@dataclass(frozen=True, slots=True)
class PollFinished:
    """A poll ended, one way or another; `seconds` from send to answer."""

    result: PollResult
    seconds: float


@dataclass(frozen=True, slots=True)
class PollerBackedOff:
    """A poller is about to wait `seconds` because of a failed poll."""

    reason: BackoffReason
    seconds: float


@dataclass(frozen=True, slots=True)
class PollersScaled:
    """`target` pollers poll from now on; what made it change."""

    direction: ScaleDirection
    reason: ScaleReason
    target: int


@dataclass(frozen=True, slots=True)
class PollerRestarted:
    """A poller crashed (a bug) and goes on after a pause."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class ItemReceived:
    """A poll brought an item.

    `pickup_seconds`: poll time minus `created_at`, never negative; None for an item without one.
    """

    item: WorkItem
    origin: Origin
    pickup_seconds: float | None


@dataclass(frozen=True, slots=True)
class ItemDeclined:
    """An item was left for others: not acknowledged, so redelivered."""

    item: WorkItem
    reason: DeclineReason


@dataclass(frozen=True, slots=True)
class ItemReclaimed:
    """An item changed hands: gained, it was held before; lost, it was ours and is not any more."""

    item: WorkItem
    direction: ReclaimDirection
    stage: ReclaimStage


@dataclass(frozen=True, slots=True)
class AckFinished:
    """An acknowledgement is settled, retries included.

    `queue_seconds`: from delivery until a slot took the item; `delivery_seconds`: from delivery
    until the answer.
    """

    item: WorkItem
    result: CallResult
    queue_seconds: float
    delivery_seconds: float


@dataclass(frozen=True, slots=True)
class HeartbeatFinished:
    """A beat is settled; `lag_seconds`: actual minus planned send time. Arises on the keeper."""

    item: WorkItem
    result: HeartbeatResult
    lag_seconds: float


@dataclass(frozen=True, slots=True)
class StopRequested:
    """A heartbeat told us that an operator wants this session to end."""

    item: WorkItem


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """The lease is held and the handler is about to be called."""

    session: Session
    handler: str


@dataclass(frozen=True, slots=True)
class SessionFinished:
    """An acknowledged session is over for us: exactly one per item that we acknowledged.

    `seconds`: from the acknowledgement to the end of the finish. `error`: what the handler raised,
    None when it did not.
    """

    session: Session
    handler: str
    outcome: Outcome
    seconds: float
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class StopFinished:
    """A stop call of ours is settled, retries included."""

    item: WorkItem
    mode: StopMode
    result: CallResult


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """One HTTP request ended. `code`: as in metrics.md (2xx, 304, 400 … 5xx, error)."""

    op: str
    code: str
    seconds: float


@dataclass(frozen=True, slots=True)
class RateBudgetWaited:
    """A request waited for our own rate limit."""

    kind: Literal["read", "write"]
    seconds: float


@dataclass(frozen=True, slots=True)
class CredentialRefreshed:
    """The token source was read again after a refusal; "error" when it could not be read."""

    result: Literal["ok", "error"]


@dataclass(frozen=True, slots=True)
class QueueStatsRead:
    """The control plane's own view of the queue (protocol §3.8), read every `stats_interval`."""

    stats: QueueStats


@dataclass(frozen=True, slots=True)
class LoopLagMeasured:
    """How late the handlers' loop answered the keeper, once a second. Arises on the keeper."""

    seconds: float


@dataclass(frozen=True, slots=True)
class PluginFailed:
    """A plugin's hook raised; `error` is what."""

    plugin: str
    hook: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """No more polls; running sessions have `timeout` seconds (None: no limit)."""

    timeout: float | None


@dataclass(frozen=True, slots=True)
class DrainFinished:
    """The drain is over: clean, at its deadline, or with sessions left behind (killed)."""

    result: DrainResult
    seconds: float


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
    | SessionFinished
    | StopFinished
    | RequestFinished
    | RateBudgetWaited
    | CredentialRefreshed
    | QueueStatsRead
    | LoopLagMeasured
    | PluginFailed
    | DrainStarted
    | DrainFinished
)
