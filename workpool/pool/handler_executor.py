"""Calls handlers: their tasks, the plugins' contexts around them, retries and cancellations.

This module decides nothing about the item. A cancelled handler counts as running until it has
returned; a cancellation that it ignores is repeated. See workpool/docs/architecture.md, "The end of
a session".
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeGuard, cast
from weakref import ref

from workpool.backoff import Backoff
from workpool.errors import ResultError, SessionGoneError
from workpool.events import HandlerRetried, SessionStarted
from workpool.log_fields import pool_logger
from workpool.pool.completion import (
    DRAIN_REASON,
    find_release_exception,
    iterate_errors_in_group,
    predict_session_outcome,
    str_without_raising,
)
from workpool.pool.diagnostics import format_stack_of_task, log_stacks
from workpool.pool.handler_result import make_metadata_from_result
from workpool.pool.pool_item import EndReason
from workpool.session import CURRENT, PoolRelease, Release
from workpool.wire.client_dialects import DIALECTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from workpool.blocking_session import BlockingSession
    from workpool.handlers import Handler, Retry
    from workpool.plugins.registry import NamedContext
    from workpool.pool.pool_context import PoolContext
    from workpool.pool.pool_item import PoolItem
    from workpool.session import Session

    Function = Callable[[BlockingSession], object]
    Call = Callable[[Session], Awaitable[object]]

log = pool_logger(__name__)

REPEAT_SECONDS = 10.0
"""Seconds between cancellations of a handler that ignores them.

From the second one on, the handler counts as stuck.
"""
STALL_CHECKS = 4
"""Number of progress checks in one `stall_timeout`: a block of the loop that is longer than the
time between two checks is noticed, and does not count as a stall."""
LATE_SECONDS = 0.1
"""A progress check that is this many seconds late was delayed by a sleep or a blocked loop."""
LEAVE_SECONDS = 0.1
"""Seconds for which the pool waits for the group of handlers to close, twice at most."""


class HandlerExecutor:
    """Runs each handler in a task of a task group. Lives on the handlers' loop.

    Attributes:
        stuck: Items whose handler has ignored its cancellation for `REPEAT_SECONDS`.
        on_stuck: Called when another handler becomes stuck.
    """

    def __init__(self, context: PoolContext, group: asyncio.TaskGroup) -> None:
        self.stuck: set[PoolItem] = set()
        self.on_stuck: Callable[[], None] | None = None
        self._session_timeout = context.settings.session_timeout
        self._metadata_limits = DIALECTS[context.settings.dialect].metadata_limits
        self._stall_timeout = context.settings.stall_timeout
        self._plugins = context.plugins
        self._threads = context.threads
        self._clock = context.clock
        self._pauses = context.renewer.pauses
        self._observe = context.observe
        self._group = group

    async def run_handler(self, item: PoolItem, handler: Handler, session: Session) -> None:
        """Call the handler in a task, and wait until the task has ended, however long it takes.

        The handler is not called if the lease has ended before the task starts.
        """
        item.progressed_at = self._clock()
        task = item.handler_task = self._group.create_task(
            self._call_handler(item, handler, session),
            name=f"{handler.name} {item.id}",
            # This code runs in `item.task_context`. An eager task enters its context inside this
            # call, and a context cannot be entered twice at the same time, so pass a copy.
            context=item.task_context.copy(),
        )
        timeout = self._session_timeout if handler.timeout is None else handler.timeout
        if timeout is not None:
            self.cancel_handler_later(item, EndReason.TIMED_OUT, timeout)
        stall = self._stall_timeout if handler.stall_timeout is None else handler.stall_timeout
        if stall is not None and item.is_handler_running:
            self._watch_progress(item, stall)
        try:
            await create_future_of_task_end(task)
        finally:
            if item.timer is not None:
                self._stop_cancellation_timer(item)
            if item.stall_timer is not None:
                self._stop_stall_timer(item)
            self.stuck.discard(item)
        if not task.cancelled():
            # If the handler raised a KeyboardInterrupt, raise it here, too: it must not be lost.
            task.result()
        elif item.cancelled_for is None:
            self._record_handler_error(item, asyncio.CancelledError("leaked from the handler"))

    def cancel_handler_later(self, item: PoolItem, reason: EndReason, seconds: float) -> None:
        """Cancel the handler after `seconds`, unless it will be cancelled earlier anyway."""
        if item.cancelled_for is not None or not item.is_handler_running:
            return
        loop = asyncio.get_running_loop()
        at = loop.time() + seconds
        if at < item.cancelled_at:
            self._stop_cancellation_timer(item)
            item.cancelled_at, item.timer = at, loop.call_at(at, self.cancel_handler, item, reason)

    def cancel_handler(self, item: PoolItem, reason: EndReason) -> None:
        """Cancel the handler now, unless it was already cancelled for this or a graver reason."""
        if item.handler_task is None or item.handler_task.done():
            return
        item.add_end_reason(reason)
        if item.cancelled_for is not None and item.cancelled_for >= reason:
            return
        self._stop_stall_timer(item)
        first, item.cancelled_for = item.cancelled_for is None, reason
        item.cancelled_at = min(item.cancelled_at, asyncio.get_running_loop().time())
        item.handler_task.cancel()
        log.info("handler cancelled", extra={"work_id": item.id, "reason": reason.name.lower()})
        if first:
            self._repeat_cancellation_later(item)

    def _watch_progress(
        self, item: PoolItem, stall: float, silence: float = 0.0, late: float = 0.0
    ) -> None:
        """Set the timer for the next check of the handler's progress.

        Args:
            item: The item.
            stall: The limit, in seconds.
            silence: Seconds without progress so far.
            late: Seconds of `silence` in which no handler could run.
        """
        seconds = min(stall / STALL_CHECKS, stall - silence)
        check = partial(self._cancel_if_stalled, item, stall, late, item.progressed_at)
        due_at = self._clock() + seconds
        item.stall_timer = asyncio.get_running_loop().call_later(seconds, check, due_at)

    def _cancel_if_stalled(
        self, item: PoolItem, stall: float, late: float, seen_at: float, due_at: float
    ) -> None:
        """Cancel the handler if it has made no progress for `stall` seconds.

        If this check is late, the machine slept or the loop was blocked. That time does not count,
        since no handler could make progress in it.
        """
        now = self._clock()
        late = late if item.progressed_at == seen_at else 0.0
        # This check was due at `due_at`. If the handler has made progress after that time, only the
        # time since the progress counts.
        lateness = now - max(due_at, item.progressed_at)
        # Do not subtract the short delay that every timer has: the delays of many checks would add
        # up, and a stalled handler would run for longer than `stall`.
        if lateness >= LATE_SECONDS:
            late += lateness
        silence = max(0.0, item.seconds_without_progress(now) - late)
        if not item.is_handler_running:
            return
        if silence < stall:
            self._watch_progress(item, stall, silence, late)
            return
        log.warning(
            "session stalled",
            extra={**_log_fields(item), "seconds": round(silence, 3)},
        )
        self.cancel_handler(item, EndReason.STALLED)

    def _repeat_cancellation_later(self, item: PoolItem) -> None:
        self._stop_cancellation_timer(item)
        item.timer = asyncio.get_running_loop().call_later(
            REPEAT_SECONDS, self._repeat_cancellation, item
        )

    def _repeat_cancellation(self, item: PoolItem) -> None:
        """Cancel the handler again if it still runs after its cancellation."""
        if item.handler_task is None or item.handler_task.done():
            return
        if item not in self.stuck:
            self._report_stuck_handler(item, item.handler_task)
        item.handler_task.cancel()
        self._repeat_cancellation_later(item)

    def _report_stuck_handler(self, item: PoolItem, task: asyncio.Task[object]) -> None:
        log_stacks(
            log,
            self._threads.format_handler_stack(item) or format_stack_of_task(task),
            "handler ignores its cancellation",
            work_id=item.id,
            handler=item.handler_label,
            seconds=REPEAT_SECONDS,
        )
        self.stuck.add(item)
        if self.on_stuck is not None:
            self.on_stuck()

    def _stop_cancellation_timer(self, item: PoolItem) -> None:
        if item.timer is not None:
            item.timer.cancel()
            item.timer = None

    def _stop_stall_timer(self, item: PoolItem) -> None:
        if item.stall_timer is not None:
            item.stall_timer.cancel()
            item.stall_timer = None

    async def _call_handler(self, item: PoolItem, handler: Handler, session: Session) -> None:
        """Call the handler if the item's lease is still held; record the handler's result or error.

        An error is recorded and not raised, since it would cancel all other handlers of the group.
        """
        # An eager task runs before `create_task` returns, so `run_handler` has not set
        # `item.handler_task` yet. Set it here, because the session's methods check it.
        if item.handler_task is None:
            item.handler_task = asyncio.current_task()
        if not self._lease_allows_handler_call(item):
            item.add_end_reason(EndReason.RETURNED)
            return
        CURRENT.set(ref(session))
        self._observe(SessionStarted, session, handler.name)
        try:
            # Call `make_metadata_from_result` inside this `try`, too: it reads the returned
            # mapping, whose class may be code of the handler and raise any error.
            contexts = self._plugins.collect_session_contexts(session)
            call: Call = handler.call  # type: ignore[assignment]  # async - unless `blocking`
            if handler.blocking or handler.retry is not None:
                call = self._build_handler_call(item, handler)
            if contexts:
                item.result = await self._call_handler_in_contexts(contexts, item, call, session)
            elif (returned := await call(session)) is not None:
                item.result = make_metadata_from_result(returned, self._metadata_limits)
            item.add_end_reason(EndReason.RETURNED)
        except (asyncio.CancelledError, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - SystemExit, too, cannot end the pool
            self._record_handler_error(item, error)

    async def _call_handler_in_contexts(
        self, contexts: list[NamedContext], item: PoolItem, call: Call, session: Session
    ) -> Mapping[str, str]:
        """Call the handler inside the plugins' contexts; set `session.outcome` inside them, too."""
        async with AsyncExitStack() as stack:
            for _, context in contexts:
                await stack.enter_async_context(context)
            error: BaseException | None = None
            try:
                return make_metadata_from_result(await call(session), self._metadata_limits)
            except BaseException as raised:
                error = raised
                raise
            finally:
                session.outcome = predict_session_outcome(item, error, self._clock())
                # Break the reference cycle between error, traceback and frame, which would keep the
                # session in memory until the next garbage collection.
                error = None
        # If a plugin's context manager has suppressed the handler's error, there is no result.
        return {}

    def _build_handler_call(self, item: PoolItem, handler: Handler) -> Call:
        """Return a function that calls the handler with its retries, on a thread if necessary."""
        call = cast("Call", handler.call)
        if handler.blocking:
            call = partial(self._threads.call_on_thread, item, cast("Function", handler.call))
        return (
            call if handler.retry is None else partial(self._call_with_retries, item, handler, call)
        )

    async def _call_with_retries(
        self, item: PoolItem, handler: Handler, call: Call, session: Session
    ) -> object:
        """Call the handler until it returns, or raises an error that ends the session."""
        backoff: Backoff | None = None
        while True:
            try:
                return await call(session)
            except Exception as error:
                if not _is_retryable(handler.retry, error, session) or not self._may_retry(item):
                    raise
                session.retry += 1
                backoff = backoff or Backoff(handler.retry.backoff, handler.retry.backoff_max)
                await self._wait_before_retry(item, session, backoff.next_delay(), error)
                self._observe(HandlerRetried, session, item.handler_label, session.retry, error)

    def _may_retry(self, item: PoolItem) -> bool:
        """Return whether a retry is allowed: the lease is held and the handler is not cancelled."""
        return item.cancelled_for is None and item.lease.is_held(self._clock())

    async def _wait_before_retry(
        self, item: PoolItem, session: Session, seconds: float, error: Exception
    ) -> None:
        """Wait until the handler may be called again.

        Raises:
            Exception: `error`, because an operator stops the session or the lease is not held.
            PoolRelease: The pool drains, or the machine was paused, so another run must continue
                the work.
        """
        text = f"{type(error).__name__}: {str_without_raising(error)}"
        log.warning(
            "handler failed and is called again: %s",
            text,
            extra={
                **_log_fields(item),
                "retry": session.retry,
                "wait_seconds": round(seconds, 3),
                "error": text,
            },
        )
        # `session.waiting` keeps this wait from counting towards `stall_timeout`.
        with suppress(TimeoutError), session.waiting():
            async with asyncio.timeout(seconds):
                await session.interrupted()
        if session.stopping:
            raise error
        if session.draining:
            raise PoolRelease(DRAIN_REASON) from error
        if not self._lease_allows_handler_call(item):
            raise item.error or error

    def _lease_allows_handler_call(self, item: PoolItem) -> bool:
        """Return whether the lease is held and the machine was not paused since the last heartbeat.

        If the machine was paused since then, record that the item is released.
        """
        now = self._clock()
        if not item.lease.is_held(now):
            return False
        if self._pauses.was_machine_paused(item.lease.clock_offset, now):
            item.error = PoolRelease("not started: the machine was paused")
            item.add_end_reason(EndReason.RELEASED)
            return False
        return True

    def _record_handler_error(self, item: PoolItem, error: BaseException) -> None:
        if item.state == "closed":
            return  # The session was abandoned, and its end was reported then.
        release = find_release_exception(error)
        item.error = release or error
        if release is not None:
            item.add_end_reason(EndReason.RELEASED)
            return
        item.add_end_reason(EndReason.RAISED)
        if isinstance(error, ResultError):
            # Omit the traceback, which shows no code of the handler.
            log.error(
                "result not written: %s",
                error,
                extra={**_log_fields(item), "error": str(error)},
            )
            return
        log.error("handler failed", extra=_log_fields(item), exc_info=error)


def _log_fields(item: PoolItem) -> dict[str, str]:
    """Return the fields that identify the session in a log record."""
    return {"work_id": item.id, "session_id": item.session_id, "handler": item.handler_label}


def _is_retryable(retry: Retry | None, error: Exception, session: Session) -> TypeGuard[Retry]:
    """Return whether the handler is called again after this error."""
    return (
        retry is not None
        and session.retry < retry.times
        and all(
            isinstance(each, retry.on) and not isinstance(each, Release | SessionGoneError)
            for each in iterate_errors_in_group(error)
        )
    )


def create_future_of_task_end(task: asyncio.Task[object]) -> asyncio.Future[None]:
    """Return a future that is done when the task has ended.

    A caller that is cancelled while it awaits this future does not cancel the task.
    """
    future: asyncio.Future[None] = task.get_loop().create_future()

    def complete_future(_: asyncio.Task[object]) -> None:
        # If the caller was cancelled while it awaited the future, the future is cancelled, too.
        if not future.done():
            future.set_result(None)

    task.add_done_callback(complete_future)
    return future


@asynccontextmanager
async def open_handler_task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Open a task group that the pool can leave while a handler in it still runs.

    A handler that ignores its cancellation would keep the pool from leaving a normal group. This
    group has its own task, which is the only kind of task that may outlive the pool.
    """
    opened, closing = asyncio.Event(), asyncio.Event()
    group = asyncio.TaskGroup()

    async def run_task_group() -> None:
        async with group:
            opened.set()
            await closing.wait()

    task = asyncio.get_running_loop().create_task(run_task_group(), name="workpool-handlers")
    try:
        await opened.wait()
        yield group
    finally:
        closing.set()
        if (await asyncio.wait({task}, timeout=LEAVE_SECONDS))[1]:
            task.cancel()
            await asyncio.wait({task}, timeout=LEAVE_SECONDS)
