"""`BlockingSession`: the interface of a plain `def` handler, which runs on a thread.

Every call runs on the handlers' event loop, with the checks of `Session`, while the thread waits.
See workpool/docs/handlers.md, "Plain handlers".
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from workpool.errors import SessionGoneError

if TYPE_CHECKING:
    import logging
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from workpool.session import HandedLease, Session
    from workpool.wire.events.event_calls import SessionEvent
    from workpool.wire.events.event_stream import EventStream
    from workpool.wire.items import WorkItem

T = TypeVar("T")


class LoopCaller(Protocol):
    """The interface for running coroutines on the handlers' event loop from a thread."""

    def run_on_handlers_loop(self, make: Callable[[], Awaitable[T]]) -> T:
        """Call `make` on the loop, await its awaitable, and return the result to this thread."""

    def enter_context_on_handlers_loop(
        self, make: Callable[[], AbstractAsyncContextManager[T]]
    ) -> AbstractContextManager[T]:
        """Return a blocking context manager around the asynchronous one that `make` returns.

        The asynchronous context manager is entered and left on the loop, in one task.
        """


class BlockingSession:
    """One session, for a plain `def` handler. May be used on any thread but the event loop's.

    A call that sends something raises `LeaseLost` or `SessionEnded` if the pool no longer holds the
    item, also while it waits for its answer.

    Attributes:
        cancelled: Set when the pool cancels the handler: after a time-out, a request to stop, a
            drain or a lost lease. Check it before each step with an effect, and return soon: the
            slot is occupied until then.
    """

    def __init__(self, session: Session, calls: LoopCaller) -> None:
        self.cancelled = threading.Event()
        self._session = session
        self._caller = calls
        self._interrupted = threading.Event()

    def __repr__(self) -> str:
        return f"<BlockingSession {self.id} of {self.item.id}>"

    @property
    def id(self) -> str:
        """The id of the session, `sess_…`."""
        return self._session.id

    @property
    def item(self) -> WorkItem:
        """The item, as the control plane returned it in the answer to the acknowledgement."""
        return self._session.item

    @property
    def redelivered(self) -> bool:
        """Whether a worker, this one or another, held the item before and may have run it."""
        return self._session.redelivered

    @property
    def attempt(self) -> int:
        """The number of this run of the item, starting at 1; see `Session.attempt`."""
        return self._session.attempt

    @property
    def retry(self) -> int:
        """0 in the first call of the handler in a run, and one more in each retry."""
        return self._session.retry

    @property
    def state(self) -> dict[str, Any]:
        """Objects that plugins' `workpool_wrap_session` contexts share with the handler."""
        return self._session.state

    @property
    def traceparent(self) -> str | None:
        """The W3C trace context to pass on to other programs. See `Session.traceparent`."""
        return self._session.traceparent

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose records have the ids of the item, its session and the pool."""
        return self._session.log

    @property
    def stopping(self) -> bool:
        """Whether an operator has asked to end the session.

        If so, the handler must return within `stop_grace` seconds.
        """
        return self._session.stopping

    @property
    def draining(self) -> bool:
        """Whether the pool drains.

        If so, the handler must return within `drain_timeout` seconds, or raise `Release`.
        """
        return self._session.draining

    @property
    def lease_remaining(self) -> float:
        """Seconds for which the pool holds the item even if no further heartbeat succeeds."""
        return self._session.lease_remaining

    @property
    def deadline(self) -> float | None:
        """The `time.monotonic()` at which the pool sets `cancelled`; None without a time limit."""
        return self._session.deadline

    @property
    def events(self) -> BlockingEvents:
        """The messages, tool uses and results of the session: `list()`, `send(…)`, `stream()`."""
        return BlockingEvents(self._session, self._caller)

    def progress(self) -> None:
        """Record that the handler makes progress, so that `stall_timeout` starts again."""
        self._session.progress()

    def waiting(self) -> AbstractContextManager[None]:
        """Return a context manager; the time inside it does not count towards `stall_timeout`."""
        return self._session.waiting()

    def interrupted(self, timeout: float | None = None) -> bool:
        """Wait until `stopping` or `draining` is true, or the handler is cancelled.

        Args:
            timeout: Seconds to wait at most; None: no limit.

        Returns:
            Whether one of these is the case. `interrupted(5)` can replace a sleep of 5 s.
        """
        return self._interrupted.wait(timeout)

    def update_metadata(self, patch: Mapping[str, str | None]) -> WorkItem:
        """Merge `patch` into the item's metadata; None deletes a key.

        Raises:
            LeaseLost: The lease is not held.
            SessionEnded: The session has ended, or its handler was cancelled.
            NotPermittedError: The pool's credential may not write metadata.
            ControlPlaneError: The control plane refused, or did not answer in time.
        """
        return self._caller.run_on_handlers_loop(lambda: self._session.update_metadata(patch))

    def handover(self) -> AbstractContextManager[HandedLease]:
        """Hand the item off to a child process. See `Session.handover`."""
        return self._caller.enter_context_on_handlers_loop(self._session.handover)

    def interrupt(self, *, cancel: bool = False) -> None:
        """Make `interrupted()` return at once; with `cancel`, also set the event `cancelled`.

        Only the pool calls this method.
        """
        if cancel:
            self.cancelled.set()
        self._interrupted.set()


class BlockingEvents:
    """Blocking methods to list, send and follow the events of one session, for use on a thread.

    See `workpool.wire.events.session_events`.
    """

    def __init__(self, session: Session, caller: LoopCaller) -> None:
        self._session = session
        self._caller = caller

    def list(self) -> Iterator[SessionEvent]:
        """Iterate over the whole history, oldest first, page by page."""

        async def open_event_history() -> Any:
            return self._session.events.list()

        events = self._caller.run_on_handlers_loop(open_event_history)
        try:
            while (
                event := self._caller.run_on_handlers_loop(lambda: anext(events, None))
            ) is not None:
                yield event
        finally:
            # If the session has ended, `events` is closed already and `run_on_handlers_loop`
            # raises.
            with suppress(SessionGoneError):
                self._caller.run_on_handlers_loop(events.aclose)

    def send(self, *events: Mapping[str, Any]) -> Sequence[SessionEvent]:
        """Append either all of these events or none of them, and return the stored events."""
        return self._caller.run_on_handlers_loop(lambda: self._session.events.send(*events))

    def _open_stream(self) -> EventStream:
        return self._session.events.stream()

    @contextmanager
    def stream(self) -> Iterator[BlockingStream]:
        """Follow the session: first its history, then new events; reconnect after a failure."""
        with self._caller.enter_context_on_handlers_loop(self._open_stream) as stream:
            yield BlockingStream(stream, self._caller)


class BlockingStream(Iterator["SessionEvent"]):
    """The events of one session, past and new, in order."""

    def __init__(self, stream: EventStream, caller: LoopCaller) -> None:
        self._stream = stream
        self._caller = caller

    @property
    def caught_up(self) -> bool:
        """Whether the session had no newer event when the last event was returned."""
        return self._stream.caught_up

    def __next__(self) -> SessionEvent:
        event = self._caller.run_on_handlers_loop(lambda: anext(self._stream, None))
        if event is None:
            raise StopIteration
        return event
