"""A timeout for the waits of a block: as `asyncio.timeout`, at a third of its cost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


class Bound:
    """Cancels the wait of its block after `seconds`, so that the block raises `TimeoutError`.

    The rules are those of `asyncio.timeout`: any other cancellation passes through, also one in the
    same turn of the loop. An object is for one block, inside a task.

    Args:
        seconds: The bound; None = only `expire_now` ends the wait.
        loop: The running loop. It is given because Python 3.11 makes a system call to find it.
    """

    __slots__ = ("_before", "_loop", "_seconds", "_struck", "_task", "_timer")

    def __init__(self, seconds: float | None, loop: asyncio.AbstractEventLoop) -> None:
        self._seconds = seconds
        self._loop = loop
        self._struck = False

    def __enter__(self) -> None:
        task = asyncio.current_task(self._loop)
        if task is None:
            raise RuntimeError("a bound needs a task that it can cancel")
        self._task, self._before = task, task.cancelling()
        self._timer: asyncio.TimerHandle | None = None
        if self._seconds is not None:
            self._timer = self._loop.call_later(max(0.0, self._seconds), self.expire_now)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        alone = self._struck and self._task.uncancel() <= self._before
        if alone and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire_now(self) -> None:
        """End the wait now. Called on the loop while the block runs."""
        if not self._struck:
            self._struck = True
            self._task.cancel()
