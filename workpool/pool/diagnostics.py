"""The monitor of the handlers' event loop, and reports about a process whose loop is blocked.

From the lease renewer's thread, the monitor sends the loop a ping at a fixed interval, measures
how long the answer takes, logs the name of the task that blocks the loop, and reports when
`max_block` is reached. It decides nothing about leases. A report never delays its caller for longer
than `REPORT_SECONDS`. The stacks of all threads are collected without a file, and their size is
limited.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
import threading
import time
import traceback
from contextvars import copy_context
from typing import TYPE_CHECKING

from workpool.log_fields import pool_logger

if TYPE_CHECKING:
    from collections.abc import Callable

log = pool_logger(__name__)

LAG_WARNING_SECONDS = 1.0
REPORT_SECONDS = 2.0
THREADS_MAX = 32
FRAMES_MAX = 40
"""Largest number of innermost frames reported for each thread."""
STACK_CHARACTERS = 4_000
"""Largest number of characters reported for each thread, the innermost frames last."""


class LoopMonitor:
    """Measures how long the handlers' loop is blocked.

    Created on the handlers' loop and used on the renewer's thread; the properties may be read on
    any thread.

    Attributes:
        lag: The seconds that the last answer took; None before the first answer.
    """

    def __init__(
        self, tell: Callable[[Callable[[], object]], None], max_block: float, interval: float
    ) -> None:
        """Create the monitor of the running loop.

        Args:
            tell: Runs a callback on the handlers' loop; called on the renewer's thread.
            max_block: The seconds without an answer after which the renewer stops renewing.
            interval: The seconds between two pings, or two checks whether a ping is answered.
        """
        self.lag: float | None = None
        self._tell = tell
        self._max_block = max_block
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._waited = 0.0
        self._ping = 0
        self._asked_at = time.monotonic()
        self._answered_before = 0.0
        """The time of the second last answer."""
        # The handlers' loop writes `_pong` after the other results of a ping: a thread that reads
        # the new `_pong` must not combine it with older results.
        self._answered_at = time.monotonic()
        self._pong = 0

    @property
    def is_ping_answered(self) -> bool:
        """Whether the loop has answered the last ping."""
        return self._pong == self._ping

    @property
    def loop_blocked_seconds(self) -> float:
        """Seconds since the ping that the loop has not answered; 0 if every ping is answered.

        May be read on any thread.
        """
        return 0.0 if self.is_ping_answered else max(0.0, time.monotonic() - self._asked_at)

    @property
    def is_loop_blocked(self) -> bool:
        """Whether the loop has not answered for `LAG_WARNING_SECONDS`."""
        return self._waited >= LAG_WARNING_SECONDS

    def send_ping(self) -> None:
        """Send the loop the next ping. Allowed only after the loop has answered the last ping."""
        if self.is_loop_blocked:
            seconds = self._answered_at - self._answered_before
            _warn_on_new_thread("event loop runs again", seconds=round(seconds, 3))
        self._waited = 0.0
        # Set `_asked_at` before `_ping`: a thread that reads the new `_ping` must not combine it
        # with the old `_asked_at`.
        self._asked_at = time.monotonic()
        self._ping += 1
        self._answered_before = self._answered_at
        self._tell(functools.partial(self._record_ping_answer, self._ping, self._asked_at))

    def add_seconds_without_ping_answer(self, seconds: float) -> bool:
        """Add `seconds` to the time for which the loop has not answered the last ping.

        Returns:
            Whether that time has reached `max_block`.
        """
        was_blocked = self.is_loop_blocked
        # The calls of this method are `_interval` seconds apart. If more than twice that time has
        # passed since the last call, the whole process was stopped: do not add the excess, because
        # the loop was not blocked in it.
        self._waited += min(seconds, 2 * self._interval)
        if self.is_loop_blocked and not was_blocked:
            _warn_on_new_thread(
                "event loop is blocked; use asyncio.to_thread for blocking code",
                task=self._find_blocking_task(),
            )
        return self._waited >= self._max_block

    def prepare_blocked_loop_report(self) -> Callable[[], None]:
        """Measure the time for which the loop has been blocked; return a function that logs it."""
        seconds = time.monotonic() - self._answered_at
        return functools.partial(self._log_blocked_loop, seconds)

    def _log_blocked_loop(self, seconds: float) -> None:
        log_stacks(
            log,
            format_stacks_of_all_threads(self._thread),
            "event loop blocked; leases are not renewed anymore",
            seconds=round(seconds, 3),
            task=self._find_blocking_task(),
        )

    def _record_ping_answer(self, ping: int, asked_at: float) -> None:
        """Record the answer to a ping. Called on the handlers' loop."""
        self._answered_at = time.monotonic()
        self.lag = self._answered_at - asked_at
        self._pong = ping

    def _find_blocking_task(self) -> str:
        task = asyncio.current_task(self._loop)
        return "no task" if task is None else task.get_name()


def _warn_on_new_thread(message: str, **fields: object) -> None:
    log_on_new_thread(functools.partial(log.warning, message, extra=fields))


def log_on_new_thread(write: Callable[[], None]) -> None:
    """Run a logging function on a new thread, and wait `REPORT_SECONDS` at most for its end.

    The wait is limited because the blocked loop's thread may hold the lock of a log handler, and
    then `write` would wait for this lock.

    Raises:
        BaseException: The exception that `write` raised within that time.
    """
    errors: list[BaseException] = []

    def write_report_and_log_error() -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001 - raised on the calling thread
            errors.append(error)

    thread = threading.Thread(
        # Copy this thread's context: without it, the log records would lack the pool's ids.
        target=copy_context().run,
        args=(write_report_and_log_error,),
        name="workpool-report",
        daemon=True,
    )
    thread.start()
    thread.join(REPORT_SECONDS)
    for error in errors:
        raise error


def log_stacks(log: logging.Logger, stacks: str, message: str, **fields: object) -> None:
    """Log a critical one-line message with its fields, and `stacks` on the lines below."""
    if log.isEnabledFor(logging.CRITICAL):
        path, line, function, _ = log.findCaller(stacklevel=2)
        level = logging.CRITICAL
        log.handle(
            log.makeRecord(log.name, level, path, line, message, (), None, function, fields, stacks)
        )


def thread_stack(ident: int) -> str | None:
    """Return the current stack of a thread as text; None if the thread has ended."""
    frame = sys._current_frames().get(ident)  # noqa: SLF001 - the documented way to other threads' frames
    return None if frame is None else "".join(traceback.format_stack(frame, FRAMES_MAX))


def format_stack_of_task(task: asyncio.Task[object]) -> str:
    """Return the stack of a waiting task as text: a frame for each coroutine of its await chain.

    `Task.print_stack` prints the outermost coroutine only, which is the pool's own.
    """
    awaited: object = task.get_coro()
    frames: list[str] = []
    while awaited is not None and len(frames) < FRAMES_MAX:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            frames += traceback.format_stack(frame, 1)
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return f"Task {task.get_name()} (most recent call last):\n{''.join(frames)}"


def format_stacks_of_all_threads(first: int) -> str:
    """Return the current stacks of all threads as text, with at most 128,000 characters of frames.

    Args:
        first: The identifier of the thread that is listed first.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()  # noqa: SLF001 - the documented way to other threads' frames
    order = sorted(frames, key=lambda ident: ident != first)
    stacks = [
        f"Thread {names.get(ident, ident)} (most recent call last):\n"
        + "".join(traceback.format_stack(frames[ident], FRAMES_MAX))[-STACK_CHARACTERS:]
        for ident in order[:THREADS_MAX]
    ]
    if len(order) > THREADS_MAX:
        stacks.append(f"{len(order) - THREADS_MAX} more threads")
    return "\n".join(stacks)
