"""Decides when a pool may claim items, and when it must end because of an exit limit.

A pool claims nothing while it is paused or a plugin refuses. A handler without a free slot gets no
item. A handler that fails at once could take item after item from other workers, so it gets only
one at a time, after a pause that doubles with every further failure. Once an exit limit is reached,
no item is claimed anymore, and the pool drains when no session runs. Running sessions are not
affected. Lives on the handlers' loop; the reasons may be read on any thread. See
workpool/docs/architecture.md, "Admission", "Failing handlers" and "Limits of a process", and
workpool/docs/routing.md, "Limits of handlers".
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from workpool.errors import PluginError, exhausted
from workpool.log_fields import pool_logger
from workpool.logs import readable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from workpool.handlers import Handler
    from workpool.pool.machine_pauses import Clock
    from workpool.pool.pool_item import OwnedItems, PoolItem
    from workpool.session import Outcome
    from workpool.settings import Settings

log = pool_logger(__name__)

REASON_CHARACTERS = 200
"""Largest number of characters of a reason."""
ASK_SECONDS = 1.0
"""Seconds until a plugin that refused is asked again."""
LOOK_SECONDS = 10.0
"""Seconds between checks of a pause's end. The wall clock may jump, or the machine may sleep."""
FAILURES = 5
"""After this many failed sessions in a row, of different items, a handler counts as failing."""
QUICK_SECONDS = 1.0
"""Only a failure within this many seconds after the acknowledgement counts."""
FAILING_PAUSE_SECONDS, FAILING_PAUSE_MAX_SECONDS = 1.0, 30.0


class Admission:
    """Keeps a pool from claiming items while the pool is paused or a plugin refuses.

    Args:
        wall: The wall clock.

    Attributes:
        gated: Whether pollers must await `wait_until_claiming_is_allowed` before they poll.
        refusal_reason: The reason of the last plugin that refused; None: no plugin refuses.
        granted_at: The time at which the last pause or refusal ended, on the loop's clock.
    """

    def __init__(self, wall: Clock) -> None:
        self.gated = False
        self.refusal_reason: str | None = None
        self.granted_at = -math.inf
        self._wall = wall
        self._paused: str | None = None
        self._until = math.inf
        """The end of the pause, on the wall clock."""
        self._ask: Callable[[], str | None] | None = None
        self._changed = asyncio.Event()

    @property
    def pause_reason(self) -> str | None:
        """The reason of the pause; None if the pool is not paused or the pause is over."""
        reason = self._paused
        return None if reason is None or self._wall() >= self._until else reason

    def set_plugin_refusal_function(self, ask: Callable[[], str | None]) -> None:
        """Set the function that asks the plugins whether they refuse claims.

        The function returns the reason of a plugin that refuses, or None if no plugin refuses.
        """
        self._ask, self.gated = ask, True

    def pause(self, reason: str, until: datetime | None) -> None:
        """Stop the pool from claiming items until the pause ends.

        If the pool is paused already, the new reason and end replace the old ones.

        Raises:
            ValueError: `until` has no time zone.
        """
        if until is not None and until.utcoffset() is None:
            raise ValueError("`until` needs a time zone, as in datetime.now(UTC)")
        self._until = math.inf if until is None else until.timestamp()
        self._paused, self.gated = readable(reason, REASON_CHARACTERS), True
        end = None if until is None else until.isoformat(timespec="seconds")
        log.info("paused", extra={"reason": self._paused, "until": end})
        self._wake_waiters()

    def resume(self) -> None:
        """End the pause, if there is one."""
        if self._paused is None:
            return
        self._paused, self.gated = None, self._ask is not None
        log.info("resumed")
        self._wake_waiters()

    async def wait_until_claiming_is_allowed(self) -> None:
        """Wait until the pool is not paused and no plugin refuses."""
        waited = False
        while self.pause_reason is not None or self._ask_plugins_for_refusal() is not None:
            waited = True
            await self._wait_for_pause_change()
        if self._paused is not None:
            self.resume()
        if waited:
            self.granted_at = asyncio.get_running_loop().time()

    def _ask_plugins_for_refusal(self) -> str | None:
        """Ask the plugins whether the pool may claim items; return the reason if one refuses.

        Logs the first refusal, and the first answer without a refusal after it.
        """
        reason = None if self._ask is None else self._ask()
        refusal = None if reason is None else readable(reason, REASON_CHARACTERS)
        if refusal != self.refusal_reason:
            if refusal is None:
                log.info("claiming again; no plugin refuses any more")
            elif self.refusal_reason is None:
                log.warning("claiming nothing, as a plugin refuses", extra={"reason": refusal})
            self.refusal_reason = refusal
        return refusal

    async def _wait_for_pause_change(self) -> None:
        """Wait until a pause begins or ends, but at most until the next check is due.

        Without a pause, the check of the plugins is due after `ASK_SECONDS`. In a pause, the check
        of the wall clock is due at the pause's end, or after `LOOK_SECONDS` if that is earlier.
        """
        seconds = ASK_SECONDS
        if self._paused is not None:
            seconds = max(0.0, min(LOOK_SECONDS, self._until - self._wall()))
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _wake_waiters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


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
        handler, failing = item.handler, bool(self.failures)
        self._seen.add(handler.name)
        quick = outcome == "failed" and seconds < QUICK_SECONDS
        if quick or (outcome == "released" and exhausted(item.error)):
            self._record_failed_session(
                self.failures.setdefault(handler.name, _HandlerFailures(handler)), item.id
            )
        elif outcome in {"completed", "failed", "timed_out", "stalled"}:
            self.failures.pop(handler.name, None)
        if failing:
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
            # ended may claim nothing because it has a session; that session's end sets `_changed`.
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


class HandlerSlots:
    """Decides whether a handler has a free slot, by `max_sessions` and `reserved_sessions`.

    Reads the items that the pool owns, and changes nothing.

    Args:
        items: The items that the pool owns.
        handlers: The handlers that are known before the first item.
        concurrency: The number of slots of the pool.

    Raises:
        PluginError: More slots are reserved than there are, or a handler would never have one.
    """

    def __init__(self, items: OwnedItems, handlers: Sequence[Handler], concurrency: int) -> None:
        self._items = items
        self._concurrency = concurrency
        self._reserving = [each for each in handlers if each.reserved_sessions]
        reserved = sum(each.reserved_sessions for each in self._reserving)
        if reserved > concurrency:
            names = ", ".join(f"{each.name} {each.reserved_sessions}" for each in self._reserving)
            raise PluginError(
                self._reserving[0].plugin,
                f"reserved_sessions are {reserved} in all ({names}), and concurrency is "
                f"{concurrency}: reserve less, or raise concurrency",
            )
        for each in handlers:
            if reserved == concurrency and not each.reserved_sessions:
                raise PluginError(
                    each.plugin,
                    f"{each.name} would never run: all {concurrency} slots are reserved for other "
                    "handlers; reserve less, or raise concurrency",
                )

    def has_free_slot(self, handler: Handler) -> bool:
        """Return whether one more session of this handler may run."""
        limit = handler.max_sessions
        if limit is not None and self._items.count_items(handler) >= limit:
            return False
        if not self._reserving:
            return True
        kept_free = sum(
            max(0, other.reserved_sessions - self._items.count_items(other))
            for other in self._reserving
            if other.name != handler.name
        )
        return len(self._items) + kept_free < self._concurrency


Limit = Literal["exit_after_sessions", "exit_after_idle", "exit_after_uptime"]


class ExitLimits:
    """The limits after which one process ends: sessions, idle time and uptime of all its pools.

    Args:
        settings: The settings of the process.

    Attributes:
        reached: The first limit that was reached; None before that.
    """

    def __init__(self, settings: Settings) -> None:
        self.reached: Limit | None = None
        self._sessions = settings.exit_after_sessions
        self._idle = settings.exit_after_idle
        self._uptime = settings.exit_after_uptime
        self._ends_at: float | None = None
        """The end of the uptime, on the loop's clock; None before `wait_for_exit_limit`."""
        self._claimed = 0
        self._pools: dict[Admission, _IdlePeriod] = {}
        self._changed = asyncio.Event()

    @property
    def has_exit_limit(self) -> bool:
        """Whether the settings have an exit limit."""
        return (self._sessions, self._idle, self._uptime) != (None, None, None)

    def record_claimed_session(self) -> None:
        """Count a claimed session, and record whether `exit_after_sessions` is reached."""
        self._claimed += 1
        if self._claimed == self._sessions:
            self._record_reached_limit("exit_after_sessions")

    def include_pool_in_idle_limit(self, admission: Admission) -> Callable[[bool], None]:
        """Include a pool in the check of `exit_after_idle`.

        The limit is reached once every included pool has been idle for that long and is not paused.

        Returns:
            The function to call after each successful poll of the pool, with True if the poll
            brought no item and the pool owns no item.
        """
        self._pools[admission] = _IdlePeriod()
        return partial(self._record_poll_result, admission)

    def exclude_pool_from_idle_limit(self, admission: Admission) -> None:
        """Exclude a pool from the check of `exit_after_idle`, because the pool has ended."""
        self._pools.pop(admission, None)

    async def wait_for_exit_limit(self) -> Limit:
        """Wait until an exit limit is reached, and return the name of its setting.

        The time for `exit_after_uptime` starts with the first call of this method.
        """
        if self._uptime is not None and self._ends_at is None:
            self._ends_at = asyncio.get_running_loop().time() + self._uptime
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._ends_at):
                await self._changed.wait()
        return self._record_reached_limit("exit_after_uptime")

    def _record_poll_result(self, admission: Admission, idle: bool) -> None:  # noqa: FBT001 - a callback
        period = self._pools.get(admission)
        if period is None:
            # The poll ended after `exclude_pool_from_idle_limit`, so its result does not count.
            return
        if not idle:
            period.since = None
            return
        now = asyncio.get_running_loop().time()
        if period.since is None or period.since < admission.granted_at:
            period.since = now
        period.last = now
        if self._idle is not None and all(
            each.idle_seconds >= self._idle
            and pool.pause_reason is None
            and pool.refusal_reason is None
            for pool, each in self._pools.items()
        ):
            self._record_reached_limit("exit_after_idle")

    def _record_reached_limit(self, limit: Limit) -> Limit:
        """Record that a limit was reached; return the limit that was reached first."""
        if self.reached is None:
            self.reached = limit
            self._changed.set()
        return self.reached


@dataclass(slots=True)
class _IdlePeriod:
    """A period in which no poll of one pool has brought an item.

    Both attributes are times on the loop's clock.

    Attributes:
        since: The time of the first poll of the period; None: the pool is not idle.
        last: The time of the latest poll of the period.
    """

    since: float | None = None
    last: float = 0.0

    @property
    def idle_seconds(self) -> float:
        return -1.0 if self.since is None else self.last - self.since
