"""The trace of a simulation: all calls, handler runs and events of the simulated pools.

The network records the calls, the handlers record their runs. Only `PoolProcess.events` come from
the pool itself; `event_invariants` compares them with the rest of the trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.simulation.schedule import PoolSettings
    from tests.simulation.simulated_machine import SimulatedMachine
    from workpool.events import Event
    from workpool.pool.shared_slots import SlotShare
    from workpool.testing.fault import Fault

FOREVER: Final = float("inf")
LATENCY_SECONDS: Final = 0.001
"""Shortest latency; more than 0, as the control plane's clock counts microseconds."""


@dataclass(slots=True, eq=False, repr=False)
class SentCall:
    """One call that a pool has sent to the control plane.

    Attributes:
        at: The time at which its bytes were sent.
        fault: The fault that was injected.
        answer: "ok", the status of an error, or "lost"; None: its caller did not wait for it.
        answered_at: The time at which its caller got the answer or gave up.
        value: The parsed answer of a successful call.
        patch: The metadata of an update.
    """

    at: float
    node: PoolProcess
    op: str
    work_id: str | None
    fault: Fault | None
    answer: str | int | None = None
    answered_at: float = FOREVER
    value: object = None
    patch: Mapping[str, str | None] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the sender, the operation, the item and the time of the call."""
        return f"{self.node.machine.name}:{self.op}({str(self.work_id)[-6:]})@{self.at:.3f}"

    @property
    def arrival_time(self) -> float:
        """The time at which the control plane applies the call; infinite if it is never applied."""
        if self.fault is None:
            return self.at + LATENCY_SECONDS
        return self.at + self.fault.request_delay if self.fault.applied else FOREVER

    @property
    def latest_effect_time(self) -> float:
        """The latest time at which the call can take effect, even if its sender no longer waits."""
        fault = self.fault
        late = 0.0
        if fault is not None:
            late = fault.request_delay + fault.answer_delay + float(fault.retry_after or 0.0)
        return max(self.answered_at, self.at + late + 0.1)


@dataclass(slots=True, eq=False, repr=False)
class DelayedCall:
    """A call that had to wait in the pool's client, and was perhaps never sent.

    After the wait, the client sends the call only if the lease is still held.

    Attributes:
        op: The operation; empty if the client does not know it.
        work_id: The item; None if the client does not know it.
    """

    node: PoolProcess
    op: str
    work_id: str | None
    since: float
    until: float


@dataclass(slots=True, eq=False, repr=False)
class HandlerRun:
    """One call of a handler by a pool, and how it ended.

    Attributes:
        behaviour: What the handler does; a name of `schedule.BEHAVIOURS`.
        cancelled_at: The time of its first cancellation.
        result: The kind of its end: returned, raised, retried (raised an error after which it is
            called again), released, cancelled, handed (off to a child),
            crashed (with its machine); None: it has not ended.
        stop_seen: The handler knew of an operator's request to stop when it ended.
        attempt: The attempt of its session.
        progressed_at: When it last reported progress; its start if it never did.
        waits: It waits for a person, and so need not report progress.
        leaked: Another session's context variable was set when it started.
        retry: The number of the call, as the session has it.
        again: It is a further call in the same session run.
    """

    node: PoolProcess
    work_id: str
    session_id: str
    behaviour: str
    started: float
    ended: float = FOREVER
    cancelled_at: float = FOREVER
    result: str | None = None
    stop_seen: bool = False
    attempt: int = 1
    progressed_at: float = 0.0
    waits: bool = False
    leaked: bool = False
    retry: int = 0
    again: bool = False

    def __post_init__(self) -> None:
        """Count the start of the run as its first progress."""
        self.progressed_at = self.started

    @property
    def time_of_end_or_cancellation(self) -> float:
        """The time at which the handler ended or was first cancelled, whichever was earlier."""
        return min(self.ended, self.cancelled_at)


@dataclass(slots=True, eq=False, repr=False)
class HandoffPeriod:
    """The time that a handler spent in one block `async with session.handover()`.

    Attributes:
        ttl: TTL of the lease, in seconds.
    """

    node: PoolProcess
    work_id: str
    ttl: float
    entered: float
    left: float = FOREVER


@dataclass(slots=True, eq=False, repr=False)
class PoolProcess:
    """One process of a simulated pool, from its start to its end or crash.

    Attributes:
        child: It is a child process, which runs one item that a pool handed off.
        started: The time of its start.
        drain: The start of its first drain and the timeout; None without a drain.
        drained: The time at which that drain ended.
        closed: The time at which the process ended; infinite if it crashed.
        crashed: The time of its crash.
        abandoned: Number of sessions that its drain abandoned.
        polls: Number of polls begun; a poll that waits on its machine may never be sent.
        error: The error with which it ended.
        share: Its share of the slots that pools share; None: it has its own slots.
        no_fault: The latency of a call without a fault.
        cuts: Start and end of each time in which its network was cut.
        denials: Start and end of each time in which its acks were refused.
        refrains: Start and end of each pause of its claiming.
        claim_permits: The times at which it acquired permits for acks, if it has a rate limit.
        events: Every event for its observers, with its time.
    """

    machine: SimulatedMachine
    pool: PoolSettings
    started: float
    worker_id: str = ""
    child: bool = False
    drain: tuple[float, float] | None = None
    drained: float = FOREVER
    closed: float = FOREVER
    crashed: float = FOREVER
    abandoned: int = 0
    polls: int = 0
    error: BaseException | None = None
    share: SlotShare | None = None
    no_fault: Fault = field(init=False)
    cuts: list[tuple[float, float]] = field(default_factory=list)
    denials: list[tuple[float, float]] = field(default_factory=list)
    refrains: list[tuple[float, float]] = field(default_factory=list)
    claim_permits: list[float] = field(default_factory=list)
    events: list[tuple[float, Event]] = field(default_factory=list)

    def was_machine_halted(self, start: float, end: float) -> bool:
        """Return whether the machine was halted at any time between `start` and `end`."""
        return any(since < end and until > start for since, until in self.machine.pauses)

    def seconds_of_machine_halts(self, start: float, end: float) -> float:
        """Return the seconds between `start` and `end` for which the machine was halted."""
        pauses = self.machine.pauses
        return sum(max(0.0, min(end, until) - max(start, since)) for since, until in pauses)

    def lease_clock_stood_still(self, start: float, end: float) -> bool:
        """Return whether the lease clock stood still at any time between `start` and `end`.

        This is an unnoticed pause: the pool cannot see it on this clock.
        """
        return any(since < end and until > start for since, until in self.machine.unseen)


@dataclass(slots=True, repr=False)
class Trace:
    """The record of all calls, handler runs and events of one simulation.

    Attributes:
        broken: The time at which an operator ended a lease early, and the item.
        misplaced: PoolProcess, operation and time of each call on another event loop than its
            client's.
        faults: Number of calls with a fault.
        actions: Number of actions.
        shared_slots: The number of slots that all pools share; None: each has its own.
    """

    nodes: list[PoolProcess] = field(default_factory=list)
    sent: list[SentCall] = field(default_factory=list)
    runs: list[HandlerRun] = field(default_factory=list)
    handoff_periods: list[HandoffPeriod] = field(default_factory=list)
    delays: list[DelayedCall] = field(default_factory=list)
    broken: list[tuple[float, str]] = field(default_factory=list)
    misplaced: list[tuple[PoolProcess, str, float]] = field(default_factory=list)
    faults: int = 0
    actions: int = 0
    shared_slots: int | None = None
