"""The interface of a handler: `Session`, `current_session`, `Release`, `Outcome`, `HandedLease`.

Each call that reaches the control plane checks right before it is sent that the pool holds the
item. See workpool/docs/handlers.md, "The session".
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from workpool.errors import exhausted
from workpool.log_fields import FieldsAdapter, current_trace_id, pool_logger
from workpool.wire.protocol import TTL_MAX_SECONDS, TTL_MIN_SECONDS

if TYPE_CHECKING:
    import logging
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from weakref import ref

    from workpool.secret import Secret
    from workpool.wire.events.session_events import SessionEvents
    from workpool.wire.items import WorkItem

Outcome = Literal[
    "completed",
    "failed",
    "timed_out",
    "stalled",
    "stopped",
    "released",
    "lease_lost",
    "detached",
]
"""The way in which a session ended in this pool.

See workpool/docs/semantics.md, "How a session ends".
"""


_log = pool_logger("workpool.session")


class Release(Exception):
    """Raised by a handler to return the item to the queue unfinished.

    An exception group that contains only releases, at any depth, counts as the one of them that has
    the longest delay.

    Args:
        reason: Written to the metadata `workpool.released` if the setting `report_errors` is
            `message`; otherwise only the type `Release` is written.
        delay: Seconds until the item is delivered again, 10 to 600.

    Raises:
        ValueError: `delay` is not within these limits.
    """

    def __init__(self, reason: str = "", delay: float = 10.0) -> None:
        if not TTL_MIN_SECONDS <= delay <= TTL_MAX_SECONDS:
            raise ValueError(f"delay is not {TTL_MIN_SECONDS} to {TTL_MAX_SECONDS} seconds")
        super().__init__(reason)
        self.reason = reason
        self.delay = delay


class PoolRelease(Release):
    """A `Release` that workpool raises, not a handler.

    Its `reason` cannot contain data of a handler, so it is written to the metadata even if
    `report_errors` is not `message`.
    """


@contextmanager
def release_on_exhaustion() -> Iterator[None]:
    """Raise `Release` if the block fails because this computer has run out of a resource.

    A session does not fail because its worker has no descriptor, disk space, memory, process or
    thread left: another worker may have them. Other errors pass unchanged.

    Raises:
        Release: `workpool.errors.exhausted` is true of the block's error, which is its cause.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Release) or not exhausted(error):
            raise
        raise Release("the worker's machine has run out of resources") from error


@dataclass(frozen=True, slots=True)
class HandedLease:
    """The data that a child process needs to extend the lease of an item (`Session.handover`).

    Attributes:
        work_id: The id of the item, `work_…`.
        environment_id: The id of its environment, `env_…`.
        last_heartbeat: The `expected_last_heartbeat` of the child's first heartbeat.
        ttl: Seconds of the lease after the parent's last heartbeat; the child requests as many.
        base_url: The address of the control plane.
        dialect: The dialect of the control plane.
        session_id: The id of the item's session.
        item_token: The item's own token, of its `secret`; None if it came without one.
    """

    work_id: str
    environment_id: str
    last_heartbeat: str
    ttl: int
    base_url: str
    dialect: str
    session_id: str = ""
    item_token: Secret | None = None

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables for `workpool hold`, without a token.

        The child process must get a token in another way; see `keyless_variables`.
        """
        return {
            "WORKPOOL_BASE_URL": self.base_url,
            "WORKPOOL_DIALECT": self.dialect,
            "WORKPOOL_ENVIRONMENT_ID": self.environment_id,
            "WORKPOOL_HOLD_WORK_ID": self.work_id,
            "WORKPOOL_HOLD_LAST_HEARTBEAT": self.last_heartbeat,
            "WORKPOOL_HOLD_TTL": str(self.ttl),
        }

    @property
    def keyless_variables(self) -> dict[str, str]:
        """The environment variables for `workpool hold`, with a token for this item only.

        The token comes with the item and is valid for this item and its session. It may not read
        the item, so the id of the session is a variable too.

        Raises:
            ValueError: The item came without a token of its own.
        """
        if self.item_token is None:
            raise ValueError(f"{self.work_id} came without a token of its own")
        return self.variables | {
            "WORKPOOL_HOLD_SESSION_ID": self.session_id,
            "WORKPOOL_TOKEN": self.item_token.get_secret_value(),
        }


class SessionBackend(Protocol):
    """The interface through which a session calls the pool that holds its item."""

    @property
    def lease_remaining(self) -> float:
        """Seconds until the lease is considered lost; 0 if the pool does not hold the lease."""

    @property
    def deadline(self) -> float | None:
        """The loop time at which the handler is cancelled; None if there is no limit."""

    def progress(self) -> None:
        """Record that the session has made progress. May be called on any thread."""

    def waiting(self) -> AbstractContextManager[None]:
        """A context in which time does not count towards `stall_timeout`.

        May be entered on any thread.
        """

    def check(self) -> None:
        """Raise `LeaseLost` or `SessionEnded` if the pool does not hold the item."""

    async def update_metadata(self, patch: Mapping[str, str | None]) -> WorkItem:
        """Write metadata; the lease is checked right before each try is sent."""

    def hand_off_item(self) -> AbstractAsyncContextManager[HandedLease]:
        """Hand the item off to a child process."""

    def events(self) -> SessionEvents:
        """Return the events of the session, usable while the pool holds the item."""


class Session:
    """One session, as it is passed to its handler. Use it on the supervisor's event loop only.

    Attributes:
        item: The item as the acknowledgement returned it.
        redelivered: Whether the item was held before, here or elsewhere: it may have run before.
        attempt: The number of this run: 1, and one more for each earlier run that ended with
            neither a release (by a drain or by `Release`) nor a stop.
        retry: The number of this call of the handler in its run: 0, and one more for each retry. A
            run that was released leaves the number to the next run. Changed by the pool.
        state: For the plugins' wrapping contexts and the handler: connections, spans and the like,
            by names of their own. The pool does not use it.
        outcome: None while the handler runs. Then the outcome that the session has if its last
            requests succeed, and after these requests the final outcome.
        traceparent: The W3C trace context for what this session starts. At first that of the poll
            (`item.traceparent`), if any; a plugin may replace it. Commands and containers get it in
            the variable `TRACEPARENT`.
    """

    __slots__ = (
        "__weakref__",
        "_draining",
        "_held",
        "_interrupt_waiters",
        "_stopping",
        "attempt",
        "item",
        "outcome",
        "redelivered",
        "retry",
        "state",
        "traceparent",
    )

    def __init__(
        self,
        item: WorkItem,
        held: SessionBackend,
        *,
        redelivered: bool,
        attempt: int = 1,
        retry: int = 0,
    ) -> None:
        self.item = item
        self.redelivered = redelivered
        self.attempt = attempt
        self.retry = retry
        self.state: dict[str, Any] = {}
        self.outcome: Outcome | None = None
        self.traceparent = item.traceparent
        self._held = held
        self._stopping = False
        self._draining = False
        # Use a list of futures, because an `asyncio.Event` would cost 1 KiB for each session.
        self._interrupt_waiters: list[asyncio.Future[None]] = []

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose records have the ids of the item, its session and the pool.

        The attributes are `work_id`, `session_id`, `environment_id`, `worker_id`, and `trace_id` if
        the item or OpenTelemetry has a trace. The `extra` of a call adds others.
        """
        return FieldsAdapter(
            _log,
            {"work_id": self.item.id, "session_id": self.item.session_id, **self.trace_fields},
        )

    @property
    def trace_fields(self) -> dict[str, str]:
        """The log field `trace_id`; empty without a trace.

        The id comes from OpenTelemetry's current trace, or else from `traceparent`.
        """
        trace_id = current_trace_id()
        if trace_id is None and self.traceparent is not None:
            _, _, rest = self.traceparent.partition("-")
            trace_id, _, _ = rest.partition("-")
        return {"trace_id": trace_id} if trace_id else {}

    def __repr__(self) -> str:
        return f"<Session {self.id} of {self.item.id}>"

    @property
    def id(self) -> str:
        """The id of the session, `sess_…`."""
        return self.item.session_id

    @property
    def stopping(self) -> bool:
        """Whether an operator asked to end the session.

        The handler should then end within `stop_grace` seconds.
        """
        return self._stopping

    @property
    def draining(self) -> bool:
        """Whether the pool is draining.

        The handler should then end within `drain_timeout` seconds, or raise `Release`.
        """
        return self._draining

    @property
    def lease_remaining(self) -> float:
        """Seconds until the pool loses the lease if no further heartbeat succeeds."""
        return self._held.lease_remaining

    @property
    def deadline(self) -> float | None:
        """The time when the handler is cancelled, on the clock of the event loop (`loop.time()`).

        The earliest of the end of its timeout, of `stop_grace` after a stop request, and of a
        drain; None while nothing limits it. For example `asyncio.timeout_at(session.deadline)`.
        A drain or a stop request may bring it nearer. The lease is no part of it: see
        `lease_remaining`.
        """
        return self._held.deadline

    @property
    def events(self) -> SessionEvents:
        """The messages, tool uses and results of the session: `list()`, `send(…)`, `stream()`.

        If the pool no longer holds the item, all of these raise `LeaseLost` or `SessionEnded` and
        send nothing.
        """
        return self._held.events()

    def progress(self) -> None:
        """Record that the session makes progress.

        A session without progress for `stall_timeout` seconds is ended as `stalled`.
        `update_metadata` and `events.send` record progress when they succeed. May be called on any
        thread and as often as convenient: it reads a clock and writes one attribute.
        """
        self._held.progress()

    def waiting(self) -> AbstractContextManager[None]:
        """A context in which the handler waits for a person or another system.

        Time in the context does not count towards `stall_timeout`.

            with session.waiting():
                answer = await approval()

        Leaving the block records progress. May be used on any thread, and nested.
        """
        return self._held.waiting()

    async def interrupted(self) -> None:
        """Wait until `stopping` or `draining` is true."""
        if self._stopping or self._draining:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._interrupt_waiters.append(waiter)
        try:
            await waiter
        finally:
            self._interrupt_waiters.remove(waiter)

    async def update_metadata(self, patch: Mapping[str, str | None]) -> WorkItem:
        """Merge `patch` into the item's metadata; None deletes a key.

        A transient error is retried while the lease is held.

        Raises:
            LeaseLost: The lease is not held; nothing was sent.
            SessionEnded: The session has ended; nothing was sent.
            NotPermittedError: The pool's credential may not write metadata; only the first call of
                a process is sent.
            ControlPlaneError: The control plane refused, or did not answer in time.
        """
        self._held.check()
        return await self._held.update_metadata(patch)

    def handover(self) -> AbstractAsyncContextManager[HandedLease]:
        """Hand the item off to a child process, which extends the lease from then on.

            async with session.handover() as lease:
                await start_container(lease)  # for example one that runs `workpool hold`

        Inside the block the pool sends nothing for the item, so start the child and leave. Leaving
        waits for the child's first heartbeat, at most two thirds of `lease.ttl` after entering.
        Then the outcome of the session is `detached`, whatever the handler returns, and the pool
        sends nothing more for the item. If the block raises, the pool sends heartbeats again, and a
        child without a heartbeat so far is refused.

        Raises:
            HandoverError: No child sent a heartbeat in time; the pool holds the item again.
            LeaseLost: Neither the pool nor a child holds the item.
            SessionEnded: The session has ended, or an operator asked to end it.
        """
        return self._held.hand_off_item()

    def interrupt(self, *, stopping: bool = False, draining: bool = False) -> None:
        """Set `stopping` or `draining`. Called by the pool."""
        self._stopping = self._stopping or stopping
        self._draining = self._draining or draining
        for waiter in self._interrupt_waiters:
            if not waiter.done():
                waiter.set_result(None)


CURRENT: Final[ContextVar[ref[Session]]] = ContextVar("workpool_session")
"""The session that `current_session` returns, set by the pool. Weak: a connection that was opened
in a session keeps the context of that time, and would keep the session."""


def current_session() -> Session | None:
    """Return the session whose handler or `workpool_wrap_session` context runs this code.

    Return None if the code runs outside of a session.

    Tasks that a handler creates and calls of `asyncio.to_thread` inherit the session. Useful for a
    log processor, to which no session is passed.
    """
    current = CURRENT.get(None)
    return None if current is None else current()
