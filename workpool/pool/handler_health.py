"""Detects failing handlers, and decides when each may claim an item.

A handler that fails at once could take item after item from other workers, so it gets only one at
a time, after a pause that doubles with every further failure. See workpool/docs/architecture.md,
"Failing handlers".
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
"""After this many failed sessions in a row, of different items, a handler counts as failing."""
QUICK_SECONDS = 1.0
"""Only a failure within this many seconds after the acknowledgement counts."""
FAILING_PAUSE_SECONDS, FAILING_PAUSE_MAX_SECONDS = 1.0, 30.0


@dataclass(slots=True)
class _HandlerFailures:
    """The record of the failed sessions of one handler since its last success.

    Attributes:
        handler: The handler.
        work_ids: The ids of the items that failed, until there are `FAILURES` of them.
        pause: Seconds until the next item may be claimed; 0 while the handler is not failing.
        resume_at: The time of the next claim, on the loop's clock.
    """

    handler: Handler
    work_ids: set[str] = field(default_factory=set)
    pause: float = 0.0
    resume_at: float = 0.0


class HandlerHealth:
    """Detects the failing handlers of one pool, and decides when each may claim an item.

    Used on the handlers' loop; `failing_handlers` may be called on any thread.

    Args:
        count: Returns the number of owned items of a handler.

    Attributes:
        failures: The failures by handler name: a handler whose last session succeeded has no entry.
    """

    def __init__(self, count: Callable[[Handler], int]) -> None:
        self._count = count
        self._seen: set[str] = set()
        """The names of the handlers that have run in this pool."""
        self.failures: dict[str, _HandlerFailures] = {}
        self._changed = asyncio.Event()

    def failing_handlers(self) -> list[str]:
        """The names of the failing handlers."""
        return [name for name, each in list(self.failures.items()) if each.pause]

    def record_session_end(self, item: PoolItem, outcome: Outcome, seconds: float) -> None:
        """Update the failure record of the handler whose session has ended."""
        if item.handler is None:
            return
        handler = item.handler
        self._seen.add(handler.name)
        quick = outcome == "failed" and seconds < QUICK_SECONDS
        if quick or (outcome == "released" and exhausted(item.error)):
            self._record_failed_session(
                self.failures.setdefault(handler.name, _HandlerFailures(handler)), item.id
            )
        elif outcome in {"completed", "failed", "timed_out", "stalled"}:
            self.failures.pop(handler.name, None)

    def wake_waiting_pollers(self) -> None:
        """Let the waiting pollers check again, because an item of the pool has ended."""
        self._changed.set()

    def may_claim(self, handler: Handler) -> bool:
        """Whether an item may be claimed for this handler now."""
        failures = self.failures.get(handler.name)
        return failures is None or self._failures_allow_claim(failures)

    async def wait_until_a_handler_may_claim(self) -> None:
        """Wait until a handler may claim an item.

        Returns at once unless every handler that has run in this pool is failing and may claim no
        item now.
        """
        while self.failures and self._no_handler_may_claim():
            now = asyncio.get_running_loop().time()
            # Wait at most until the next pause of a failing handler ends. A handler whose pause has
            # ended may claim nothing while it owns an item; the end of that item sets `_changed`.
            resume_at = [each.resume_at for each in self.failures.values()]
            pauses = [each - now for each in resume_at if each > now]
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(pauses, default=None)):
                    await self._changed.wait()

    def _no_handler_may_claim(self) -> bool:
        return len(self.failures) == len(self._seen) and not any(
            map(self._failures_allow_claim, self.failures.values())
        )

    def _failures_allow_claim(self, failures: _HandlerFailures) -> bool:
        if not failures.pause:
            return True
        now = asyncio.get_running_loop().time()
        return now >= failures.resume_at and self._count(failures.handler) == 0

    def _record_failed_session(self, failures: _HandlerFailures, work_id: str) -> None:
        if not failures.pause:
            failures.work_ids.add(work_id)
            if len(failures.work_ids) < FAILURES:
                return
            failures.work_ids.clear()
        pause = max(FAILING_PAUSE_SECONDS, 2 * failures.pause)
        failures.pause = min(FAILING_PAUSE_MAX_SECONDS, pause)
        failures.resume_at = asyncio.get_running_loop().time() + failures.pause
