"""The threads of plain `def` handlers, and the calls that these threads make on the loop.

The task of such a handler lives until its thread has ended, cancelled or not: until then the item
keeps its slot and its id. See workpool/docs/architecture.md, "Threads and loops".
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from workpool.blocking_session import BlockingSession
from workpool.errors import SessionEnded, SessionGoneError
from workpool.pool.diagnostics import thread_stack
from workpool.session import release_on_exhaustion
from workpool.wire.http.daemon_threads import DaemonThreads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from workpool.pool.machine_pauses import Clock
    from workpool.pool.pool_item import PoolItem
    from workpool.session import Session

    Function = Callable[[BlockingSession], object]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _CaughtHandlerError:
    """An error that a handler raised on its thread, returned as the result of a future.

    A future cannot raise every error: StopIteration is not allowed.
    """

    error: BaseException


class HandlerThreads:
    """Runs plain handlers. Lives on the handlers' loop; starts a thread when one is needed.

    Args:
        limit: The number of slots, which limits the threads.
        clock: The lease clock.
    """

    def __init__(self, limit: int, clock: Clock) -> None:
        self._threads = DaemonThreads("workpool-handler", limit)
        self._clock = clock
        self._idents: dict[PoolItem, int] = {}

    async def call_on_thread(self, item: PoolItem, function: Function, session: Session) -> object:
        """Call a plain handler on a thread, and wait for its end, however long it takes.

        A cancellation sets `BlockingSession.cancelled`; the wait goes on until the handler ends or
        the item is abandoned. A result that the handler returns after its cancellation counts, as
        it does for an async handler.

        Raises:
            BaseException: An error of the handler.
            asyncio.CancelledError: The handler was cancelled, and raised an error because of that.
            Release: The machine cannot start a thread.
        """
        async with asyncio.TaskGroup() as group:
            caller = _LoopCallerForThread(item, group, self._clock)
            blocking = BlockingSession(session, caller)
            waiting = group.create_task(_interrupt_blocking_session(session, blocking))
            try:
                outcome = await self._run_handler_on_thread(item, function, blocking, caller)
            finally:
                caller.refuse_session_calls()
                waiting.cancel()
        if not isinstance(outcome, _CaughtHandlerError):
            return outcome
        if item.cancelled_for is not None and isinstance(outcome.error, SessionGoneError):
            raise asyncio.CancelledError
        try:
            raise outcome.error
        except KeyboardInterrupt as error:
            # Convert the error: a KeyboardInterrupt that is raised in a task would end the event
            # loop.
            raise RuntimeError("KeyboardInterrupt in a plain handler") from error

    async def _run_handler_on_thread(
        self,
        item: PoolItem,
        function: Function,
        blocking: BlockingSession,
        caller: _LoopCallerForThread,
    ) -> object:
        run = functools.partial(copy_context().run, self._wrap_function(item, function), blocking)
        try:
            with release_on_exhaustion():
                future = asyncio.get_running_loop().run_in_executor(self._threads, run)
        except Exception as error:  # noqa: BLE001 - raised outside of the task group, which wraps it
            return _CaughtHandlerError(error)
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError:
                blocking.interrupt(cancel=True)
                caller.cancel_calls()
                if item.state == "closed":
                    # A thread cannot be ended from outside, so only stop waiting for it.
                    future.cancel()
                    raise
        return future.result()

    def _wrap_function(
        self, item: PoolItem, function: Function
    ) -> Callable[[BlockingSession], object]:
        @functools.wraps(function, assigned=("__qualname__",), updated=())
        def run_handler_function(session: BlockingSession) -> object:
            self._idents[item] = threading.get_ident()
            try:
                returned = function(session)
                if inspect.iscoroutine(returned):
                    returned.close()
                    raise TypeError(  # noqa: TRY301 - an error of the handler like any other
                        "a plain `def` handler returned a coroutine; "
                        "is a decorator without `async def` around its function?"
                    )
            except BaseException as error:  # noqa: BLE001 - raised in the handler's task
                return _CaughtHandlerError(error)
            else:
                return returned
            finally:
                del self._idents[item]

        return run_handler_function

    def format_handler_stack(self, item: PoolItem) -> str | None:
        """Return the stack of the thread that runs the item's handler; None if there is none."""
        ident = self._idents.get(item)
        return None if ident is None else thread_stack(ident)

    async def close_threads(self) -> None:
        """End the threads; a thread whose handler still runs ends after the handler."""
        await self._threads.close()


class _LoopCallerForThread:
    """Runs coroutines on the handlers' loop for the thread of one plain handler.

    `run_on_handlers_loop` and `enter_context_on_handlers_loop` block the calling thread until the
    coroutine has ended. They may be used on any thread but the loop's; the other methods are used
    on the loop.
    """

    def __init__(self, item: PoolItem, group: asyncio.TaskGroup, clock: Clock) -> None:
        self._item = item
        self._group = group
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def run_on_handlers_loop(self, make: Callable[[], Awaitable[T]]) -> T:
        """Call `make` on the loop, await what it returns, and return the result to this thread.

        Raises:
            LeaseLost, SessionEnded: The handler was cancelled or has ended.
            RuntimeError: Called on the loop, which would wait for itself.
        """
        return self._submit_to_handlers_loop(make).result()

    @contextmanager
    def enter_context_on_handlers_loop(
        self, make: Callable[[], AbstractAsyncContextManager[T]]
    ) -> Iterator[T]:
        """Return a blocking context manager around the asynchronous one that `make` returns.

        The asynchronous context manager is entered and left on the loop, in one task.

        Raises:
            LeaseLost, SessionEnded: The handler was cancelled or has ended.
            RuntimeError: Called on the loop, which would wait for itself.
        """
        entered: Future[tuple[T, asyncio.Future[None]]] = Future()

        async def keep_context_open() -> None:
            async with make() as value:
                left: asyncio.Future[None] = self._loop.create_future()
                entered.set_result((value, left))
                await left

        ended = self._submit_to_handlers_loop(keep_context_open)
        ended.add_done_callback(functools.partial(_set_error_if_not_entered, entered))
        value, left = entered.result()
        try:
            yield value
        except BaseException as error:
            self._exit_context_on_loop(left, error)
            ended.result()  # An error of the context manager replaces the error of the block.
            raise
        self._exit_context_on_loop(left, None)
        ended.result()

    def cancel_calls(self) -> None:
        """Cancel the calls in progress, so that the threads stop waiting for them."""
        for task in self._tasks:
            task.cancel()

    def refuse_session_calls(self) -> None:
        """Cancel the calls in progress, and refuse further calls."""
        self._closed = True
        self.cancel_calls()

    def _submit_to_handlers_loop(self, make: Callable[[], Awaitable[T]]) -> Future[T]:
        if threading.get_ident() == self._thread:
            raise RuntimeError("a blocking session cannot be used on the event loop")
        future: Future[T] = Future()
        try:
            self._loop.call_soon_threadsafe(self._start_call, make, future)
        except RuntimeError:  # A closed loop means that the session was abandoned.
            raise SessionEnded(self._item.id) from None
        return future

    def _start_call(self, make: Callable[[], Awaitable[T]], future: Future[T]) -> None:
        if self._closed:
            future.set_exception(self._make_session_gone_error())
            return
        task = self._group.create_task(_run_and_set_future(make, future))
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._on_call_ended, future))

    def _on_call_ended(self, future: Future[Any], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not future.done():  # A cancelled task has set no result, so set an error.
            future.set_exception(self._make_session_gone_error())

    def _make_session_gone_error(self) -> SessionGoneError:
        """Return the error to raise from a call that was cancelled or is not allowed anymore.

        `LeaseLost` if the lease was lost, else `SessionEnded`.
        """
        try:
            self._item.lease.check_held(self._clock())
        except SessionGoneError as error:
            return error
        return SessionEnded(self._item.id)

    def _exit_context_on_loop(
        self, left: asyncio.Future[None], error: BaseException | None
    ) -> None:
        def finish_context() -> None:
            if left.done():
                # The task was cancelled, so it has already left the asynchronous context manager.
                return
            if error is None:
                left.set_result(None)
            else:
                left.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(finish_context)
        except RuntimeError:
            # The loop is closed, so the task has already left the asynchronous context manager.
            raise SessionEnded(self._item.id) from error


async def _run_and_set_future(make: Callable[[], Awaitable[T]], future: Future[T]) -> None:
    try:
        result = await make()
    except asyncio.CancelledError:
        raise  # `_on_call_ended` sets the error with the reason of the cancellation.
    except BaseException as error:  # noqa: BLE001 - raised on the thread that waits
        future.set_exception(error)
    else:
        future.set_result(result)


def _set_error_if_not_entered(entered: Future[Any], ended: Future[None]) -> None:
    if not entered.done():
        entered.set_exception(ended.exception() or RuntimeError("the context was not entered"))


async def _interrupt_blocking_session(session: Session, blocking: BlockingSession) -> None:
    """Wait until the session is stopping or draining; then interrupt the `BlockingSession`."""
    await session.interrupted()
    blocking.interrupt()
