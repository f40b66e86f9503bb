"""An executor with daemon threads for blocking calls, such as DNS lookups and file reads."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import queue
import threading
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

CLOSE_SECONDS: Final = 0.5
"""Seconds to wait for the end of threads; without a blocked call they end within microseconds."""


class DaemonThreads(Executor):
    """An executor whose threads never prevent the interpreter from exiting.

    A `ThreadPoolExecutor` joins its threads at exit, even one that hangs in a lookup or on a disk,
    and the event loop's executor is shared with code of users, which may occupy all its threads.

    Args:
        name: The first part of the threads' names; a number follows.
        limit: The largest number of threads.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        # Read and write the next four attributes only while the lock is held.
        self._threads: list[threading.Thread] = []
        self._alive = 0
        self._closed = False
        self._set_ended: Callable[[], object] | None = None

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit a call of `fn` to the threads, and return its future.

        Raises:
            OSError: EAGAIN: the first thread cannot be started.
            RuntimeError: The executor was closed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("these threads were closed")
            if not self._idle.acquire(blocking=False) and self._alive < self._limit:
                self._start_thread()
            self._calls.put(partial(_run_call, future, partial(fn, *args, **kwargs)))
        return future

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `fn` on one of the threads, in the caller's context, and return its result.

        A cancellation ends the wait; a call that has begun runs on.

        Raises:
            OSError, RuntimeError: As `submit` raises them; and whatever `fn` raises.
        """
        call = partial(contextvars.copy_context().run, fn, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self, call)

    async def close(self) -> None:
        """End the idle threads; a thread with a blocked call ends after its call."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._closed = True
            self._set_ended = partial(loop.call_soon_threadsafe, ended.set)
            for _ in self._threads:
                self._calls.put(None)
            if not self._alive:
                ended.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await ended.wait()
            for thread in self._threads:
                thread.join()  # Does not block: each thread has left its loop and ends now.

    def _start_thread(self) -> None:
        name = f"{self._name}-{self._alive + 1}"
        thread = threading.Thread(target=self._run_submitted_calls, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._alive:
                raise OSError(errno.EAGAIN, "no thread can be started") from error
            return  # no further thread can be started, so one of the running threads makes the call
        self._alive += 1
        self._threads.append(thread)

    def _run_submitted_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # free the arguments and the result now, not when the next call arrives
            self._idle.release()
        with self._lock:
            self._alive -= 1
            set_ended = None if self._alive else self._set_ended
        if set_ended is not None:
            # `set_ended` fails if the loop on which `close` waited is closed: nobody waits anymore.
            with suppress(RuntimeError):
                set_ended()


def _run_call(future: Future[T], call: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
        future.set_exception(error)
    else:
        future.set_result(result)
