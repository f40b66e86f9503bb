"""A bound on what a task waits for: `asyncio.timeout` for the hot path, at a third of its cost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


class Bound:
    """Cancels what its block waits for after `seconds`, which then raises `TimeoutError`.

    By the rules of `asyncio.timeout`: a cancellation by anybody else goes through, also one that
    comes in the same turn of the loop. For one block, inside a task.
    """

    __slots__ = ("_before", "_seconds", "_struck", "_task", "_timer")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._struck = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a bound needs a task that it can cancel")
        self._task, self._before = task, task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, self._seconds), self._strike)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        alone = self._struck and self._task.uncancel() <= self._before
        if alone and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _strike(self) -> None:
        self._struck = True
        self._task.cancel()
