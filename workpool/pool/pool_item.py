"""An item that the pool owns: its state, and why its session ended.

`PoolItem` is the only place that records the progress of an item. Slots, owned ids and taken
sessions are derived from it. It is changed on the handlers' loop, except where an attribute says
otherwise.

See workpool/docs/architecture.md, "The states of an item" and "The end of a session".
"""

from __future__ import annotations

import asyncio
import enum
import math
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextvars import Context

    from workpool.handlers import Handler
    from workpool.pool.attempt_number import AttemptNumber
    from workpool.pool.lease import Lease, LeaseStatus
    from workpool.session import Session
    from workpool.wire.http.timeouts import TimeLimit
    from workpool.wire.items import WorkItem

ItemState = Literal["delivered", "acking", "beginning", "running", "completing", "closed"]
Transition = Literal["slot", "adopted", "acknowledged", "started", "ended", "closed"]

TRANSITIONS: Final[Mapping[tuple[ItemState, Transition], ItemState]] = {
    ("delivered", "slot"): "acking",
    # A parent process has acknowledged the item and handed it off to this process.
    ("delivered", "adopted"): "beginning",
    # A drain or a pause has forgotten the item before its acknowledgement.
    ("delivered", "closed"): "closed",
    ("acking", "acknowledged"): "beginning",
    # The ack was refused, or another worker has the item.
    ("acking", "closed"): "closed",
    ("beginning", "started"): "running",
    # No handler is called: the run exceeds `max_attempts`, or the pool drains, for example.
    ("beginning", "ended"): "completing",
    ("beginning", "closed"): "closed",
    ("running", "ended"): "completing",
    # A drain has abandoned the session.
    ("running", "closed"): "closed",
    ("completing", "closed"): "closed",
}
"""Every allowed transition; any other one is a bug and raises."""


class EndReason(enum.IntEnum):
    """The reason why a session ended; of several reasons, the greatest value counts.

    The order is that of the completion table.
    """

    RETURNED = enum.auto()
    RAISED = enum.auto()
    TIMED_OUT = enum.auto()
    STALLED = enum.auto()
    DRAINED = enum.auto()
    RELEASED = enum.auto()
    STOP_REQUESTED = enum.auto()
    HANDED_OFF = enum.auto()
    STOPPED = enum.auto()
    LOST = enum.auto()


REASONS_OF_LEASE: Final[Mapping[LeaseStatus, EndReason | None]] = {
    "stopped": EndReason.STOPPED,
    "handed_off": EndReason.HANDED_OFF,
    # The pool recorded the end reason when it released the item.
    "released": None,
}
"""The end reason that follows from the status of a lease that is over; for other statuses: lost."""


class Handoff:
    """One attempt to hand an item off to a child process.

    Created on the handlers' loop; after that everything is written on the renewer's.

    Attributes:
        state: `asked` at first; `open` while the pool's heartbeats are suspended; `closed` once the
            pool holds the lease again or the lease has ended.
        last_heartbeat: The value that the child's first heartbeat must expect, once open.
        ttl: The TTL in seconds of the pool's last heartbeat, once open.
        child_expected: Whether the child was started.
        take_back_requested: Whether the pool is to stop waiting for a child and take the item back.
        changed: Set at every change, and when a heartbeat was answered or the lease has ended.
    """

    def __init__(self) -> None:
        self.state: Literal["asked", "open", "closed"] = "asked"
        self.last_heartbeat = ""
        self.ttl = 0
        self.child_expected = self.take_back_requested = False
        self.changed = asyncio.Event()

    def wake_handoff_task(self) -> None:
        """Wake the handoff's task, because a heartbeat was answered or the lease has ended."""
        self.changed.set()

    def record_child_started(self) -> None:
        """Record that the child was started."""
        self.child_expected = True
        self.changed.set()

    def request_take_back(self) -> None:
        """Make the handoff's task stop waiting for a child and take the item back."""
        self.take_back_requested = True
        self.changed.set()


class PoolItem:
    """One item that this pool owns, from its delivery to the end of its completion.

    Attributes:
        id: The work id.
        work_item: The item in the answer to the poll, then in the answer to the acknowledgement.
        handler: The handler that runs the item; None for a health check, for which no handler is
            called.
        held_before: Whether a worker held the item before its delivery to this pool.
        polled_at: The time at which the last poll that delivered it before its ack was sent, on the
            lease clock.
        delivered_at: The time of the answer to the last poll that delivered it, on the lease clock.
        acked_at: The time at which the first ack that may have been applied was sent, on the lease
            clock.
        parents_heartbeat: The last heartbeat of the parent that handed the item off, if any.
        counts_towards_exit_limit: Whether the item counts towards `exit_after_sessions`.
        task_context: The context in which everything of this session runs.
        lease: Set once the item is acknowledged; reading it earlier is a bug (AttributeError).
        session_id: The agent session's id as it was delivered; empty for an item without one.
        session: Set once the item is acknowledged; None for a health check.
        attempt: The number of this run, and its mark. Set together with `session`; reading it
            earlier is a bug (AttributeError).
        task: Runs the item, once it has a slot.
        mark_task: Writes the mark of a drain while the handler runs, if a drain has begun.
        handoff: The last attempt to hand the item off.
        handler_task: Runs the handler, from its start.
        cancelled_for: The most severe reason for which the handler was cancelled.
        cancelled_at: The time of the handler's cancellation, on the loop's clock; infinite: none is
            planned. A drain has a deadline of its own.
        timer: Cancels the handler later, or repeats a cancellation that the handler ignores.
        progressed_at: The time of the handler's last progress, on the lease clock. Any thread may
            write it.
        waits: One entry for each block in which the handler waits for something that it cannot
            speed up. A list, since any thread may append and pop.
        stall_timer: Checks the handler's progress.
        error: The error of the handler, or the reason why its result cannot be written.
        result: The mapping that the handler returned.
    """

    __slots__ = (
        "_changed",
        "acked_at",
        "attempt",
        "cancelled_at",
        "cancelled_for",
        "counts_towards_exit_limit",
        "delivered_at",
        "end_reason",
        "error",
        "handler",
        "handler_task",
        "handoff",
        "held_before",
        "id",
        "lease",
        "mark_task",
        "open_sends",
        "parents_heartbeat",
        "polled_at",
        "progressed_at",
        "result",
        "session",
        "session_id",
        "stall_timer",
        "state",
        "task",
        "task_context",
        "timer",
        "waits",
        "work_item",
    )

    lease: Lease
    attempt: AttemptNumber

    def __init__(
        self, work_item: WorkItem, handler: Handler | None, task_context: Context, now: float
    ) -> None:
        self.work_item, self.id = work_item, work_item.id
        self.session_id = work_item.session_id
        self.handler = handler
        self.held_before = (
            work_item.acknowledged_at is not None or work_item.last_heartbeat is not None
        )
        self.delivered_at = self.acked_at = self.polled_at = self.progressed_at = now
        self.parents_heartbeat: str | None = None
        self.task_context = task_context
        self.counts_towards_exit_limit = False
        self.state: ItemState = "delivered"
        self.end_reason: EndReason | None = None
        """The most severe reason so far; None while nothing ends the session."""
        self.session: Session | None = None
        self.task: asyncio.Task[None] | None = None
        self.mark_task: asyncio.Task[None] | None = None
        self.handoff: Handoff | None = None
        self.handler_task: asyncio.Task[object] | None = None
        self.cancelled_for: EndReason | None = None
        self.cancelled_at = math.inf
        self.timer: asyncio.TimerHandle | None = None
        self.waits: list[None] = []
        self.stall_timer: asyncio.TimerHandle | None = None
        self.error: BaseException | None = None
        self.result: Mapping[str, str] = {}
        self.open_sends: set[TimeLimit] = set()
        """The waits of the calls in flight, which end when the lease is lost."""
        self._changed: asyncio.Event | None = None

    @property
    def handler_label(self) -> str:
        """The handler's name for metrics and logs."""
        return "none" if self.handler is None else self.handler.name

    @property
    def has_lease(self) -> bool:
        """Whether the item was acknowledged, so that `lease` is set; the lease may have ended."""
        return hasattr(self, "lease")

    @property
    def is_handler_running(self) -> bool:
        """Whether the handler was called and has not ended yet, even if it was cancelled."""
        return self.handler_task is not None and not self.handler_task.done()

    def seconds_without_progress(self, now: float) -> float:
        """Return the seconds since the handler's last progress; 0 inside `Session.waiting`.

        May be called on any thread.
        """
        return 0.0 if self.waits else max(0.0, now - self.progressed_at)

    def advance_state(self, transition: Transition) -> None:
        """Move to the state that the table `TRANSITIONS` names for this transition.

        Raises:
            RuntimeError: The table does not allow the transition, which is a bug of the pool.
        """
        state = TRANSITIONS.get((self.state, transition))
        if state is None:
            raise RuntimeError(f"{self.id}: {transition!r} is not allowed in {self.state!r}")
        self.state = state

    def add_end_reason(self, reason: EndReason | None) -> None:
        """Record a reason to end the session, unless a graver reason was recorded before.

        A reason of None has no effect.
        """
        if reason is not None and (self.end_reason is None or reason > self.end_reason):
            self.end_reason = reason

    def find_end_reason_of_lease(self, now: float) -> EndReason | None:
        """Return the reason why the lease ends the session; None while the session may go on."""
        lease = self.lease
        if lease.begun and lease.is_held(now):
            return EndReason.STOP_REQUESTED if lease.stop_requested else None
        return REASONS_OF_LEASE.get(lease.status, EndReason.LOST)

    def notify_waiters(self) -> None:
        """Wake all tasks that wait in `wait_until`."""
        if self._changed is not None:
            self._changed.set()
            self._changed.clear()

    async def wait_until(self, met: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait until `met()` returns True after a notification, for `seconds` at most."""
        changed = self._changed = self._changed or asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not met():
                    await changed.wait()


class OwnedItems:
    """The items that one pool owns, found by work id, by agent session and by handler."""

    def __init__(self) -> None:
        self._by_id: dict[str, PoolItem] = {}
        self._by_agent_session: dict[str, PoolItem] = {}
        # Handlers are counted by name, since a hook may return a new object for each item.
        self._per_handler: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_id)

    def find_item(self, work_id: str) -> PoolItem | None:
        """Return the item with this work id if the pool owns it."""
        return self._by_id.get(work_id)

    def copy_items(self) -> list[PoolItem]:
        """Return a copy of all items. May be called on any thread."""
        return list(self._by_id.values())

    def has_agent_session(self, session_id: str) -> bool:
        """Whether an item of this agent session is owned."""
        return session_id in self._by_agent_session

    def count_items(self, handler: Handler) -> int:
        """Return the number of items of one handler."""
        return self._per_handler[handler.name]

    def add_item(self, item: PoolItem) -> None:
        """Add an item, to be found by its work id, its agent session and its handler."""
        self._by_id[item.id] = item
        if item.handler is not None:
            self._per_handler[item.handler.name] += 1
            # Items without an agent session would share the empty id, and only one of them could
            # run.
            if item.session_id:
                self._by_agent_session[item.session_id] = item

    def remove_item(self, item: PoolItem) -> None:
        """Remove an item. Raises KeyError if it was not added."""
        del self._by_id[item.id]
        if item.handler is not None:
            self._per_handler[item.handler.name] -= 1
            self._by_agent_session.pop(item.session_id, None)
