"""Diagnostics of a process whose event loop is blocked.

A report never delays its caller for longer than `REPORT_SECONDS`. The stacks of all threads are
collected without a file, and their size is limited.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

REPORT_SECONDS = 2.0
THREADS_MAX = 32
FRAMES_MAX = 40
"""Innermost frames reported per thread."""
STACK_CHARACTERS = 4_000
"""Characters reported per thread, the innermost frames last."""


def report(write: Callable[[], None]) -> None:
    """Call `write` on a thread of its own and wait until it returns, at most `REPORT_SECONDS`.

    The blocked loop may hold the lock of a log handler, which `write` then waits for.

    Raises:
        BaseException: The exception that `write` raised within that time.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001 - raised on the calling thread
            errors.append(error)

    thread = threading.Thread(target=run, name="workpool-report", daemon=True)
    thread.start()
    thread.join(REPORT_SECONDS)
    for error in errors:
        raise error


def log_stacks(log: logging.Logger, stacks: str, message: str, *args: object) -> None:
    """Log a critical message with stacks below it, as `stack_info`: a message is one line."""
    if log.isEnabledFor(logging.CRITICAL):
        path, line, function, _ = log.findCaller(stacklevel=2)
        level = logging.CRITICAL
        log.handle(
            log.makeRecord(log.name, level, path, line, message, args, None, function, None, stacks)
        )


def all_stacks(first: int) -> str:
    """Return the current stack of every thread as text, at most 128,000 characters of frames.

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
