"""Failing handlers, whose sessions fail at once: their items are left to other workers.

A worker whose disk is full, or whose handler has a bug, would otherwise take item after item from
the workers that can run them. A failing handler claims one item at a time, after a pause that
doubles with every further failure; one success ends that.
See workpool/docs/architecture.md, "Failing handlers".
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workpool.errors import exhausted

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.handlers import Handler
    from workpool.pool.pool_item import PoolItem
    from workpool.session import Outcome

FAILURES = 5
"""The number of sessions of different items that must fail in a row."""
QUICK_SECONDS = 1.0
"""Only a failure within this time after the acknowledgement counts."""
PAUSE_SECONDS, PAUSE_MAX_SECONDS = 1.0, 30.0


@dataclass(slots=True)
class _Failures:
    """The failures in a row of one handler.

    Attributes:
        handler: The handler.
        work_ids: Their items, as long as they are fewer than `FAILURES`.
        pause: Seconds until the next item may be claimed; 0 while the handler is not failing.
        resume_at: When that is, on the loop's clock.
    """

    handler: Handler
    work_ids: set[str] = field(default_factory=set)
    pause: float = 0.0
    resume_at: float = 0.0


class HandlerHealth:
    """The failing handlers of one pool. Used on the handlers' loop; `failing` on any thread.

    Args:
        count: Returns the number of items of a handler that are ours.
    """

    def __init__(self, count: Callable[[Handler], int]) -> None:
        self._count = count
        self._seen: set[str] = set()
        """The names of the handlers that have run here."""
        self._failures: dict[str, _Failures] = {}
        """By handler name, while there are any: a handler that succeeds has no entry."""
        self._changed = asyncio.Event()

    def failing(self) -> list[str]:
        """The names of the failing handlers."""
        return [name for name, each in list(self._failures.items()) if each.pause]

    def record(self, item: PoolItem, outcome: Outcome, seconds: float) -> None:
        """Record the end of a session."""
        if item.handler is None:
            return
        handler, failing = item.handler, bool(self._failures)
        self._seen.add(handler.name)
        quick = outcome == "failed" and seconds < QUICK_SECONDS
        if quick or (outcome == "released" and exhausted(item.error)):
            self._failed(self._failures.setdefault(handler.name, _Failures(handler)), item.id)
        elif outcome in {"completed", "failed", "timed_out"}:
            self._failures.pop(handler.name, None)
        if failing:
            self._changed.set()

    def may_claim(self, handler: Handler) -> bool:
        """Whether an item may be claimed for this handler now."""
        failures = self._failures.get(handler.name)
        return failures is None or self._may_claim(failures)

    async def admission(self) -> None:
        """Wait while every handler that has run here is failing and none may claim an item."""
        while self._failures and self._all_wait():
            now = asyncio.get_running_loop().time()
            # A handler whose pause is over waits for the end of its one session.
            resume_at = [each.resume_at for each in self._failures.values()]
            pauses = [each - now for each in resume_at if each > now]
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(pauses, default=None)):
                    await self._changed.wait()

    def _all_wait(self) -> bool:
        return len(self._failures) == len(self._seen) and not any(
            map(self._may_claim, self._failures.values())
        )

    def _may_claim(self, failures: _Failures) -> bool:
        if not failures.pause:
            return True
        now = asyncio.get_running_loop().time()
        return now >= failures.resume_at and self._count(failures.handler) == 0

    def _failed(self, failures: _Failures, work_id: str) -> None:
        if not failures.pause:
            failures.work_ids.add(work_id)
            if len(failures.work_ids) < FAILURES:
                return
            failures.work_ids.clear()
        failures.pause = min(PAUSE_MAX_SECONDS, max(PAUSE_SECONDS, 2 * failures.pause))
        failures.resume_at = asyncio.get_running_loop().time() + failures.pause
