"""Threads of a client's own for the calls that block: DNS, and files on a disk that may hang."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Executor, Future
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


class DaemonThreads(Executor):
    """An executor whose threads never keep the interpreter from ending.

    A `ThreadPoolExecutor` joins its threads at exit, also one that hangs in a lookup or on a disk;
    and the event loop's own is shared with code of users, which may occupy all of its threads.

    Args:
        name: Of the threads, before their number.
        limit: How many there are at most.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call `fn` on one of the threads.

        Raises:
            RuntimeError: The executor was closed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("these threads were closed")
            self._calls.put(partial(_call, future, partial(fn, *args, **kwargs)))
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._limit:
                name = f"{self._name}-{len(self._threads) + 1}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def close(self) -> None:
        """End the threads that are idle now, the others after their call; waits for none."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._calls.put(None)

    def shutdown(
        self,
        wait: bool = True,  # noqa: FBT001, FBT002 - as in Executor
        *,
        cancel_futures: bool = False,
    ) -> None:
        """Close, and wait for the threads if `wait` is true; a call that waits is not cancelled."""
        del cancel_futures
        self.close()
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # it would live on until the next one
            self._idle.release()


def _call(future: Future[T], call: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
        future.set_exception(error)
    else:
        future.set_result(result)
