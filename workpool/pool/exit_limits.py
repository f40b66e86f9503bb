"""Decides when a process must end because of an exit limit.

Once an exit limit is reached, no item is claimed anymore, and each pool drains when it runs no
session. Running sessions are not affected. Lives on the handlers' loop; `ExitLimits.reached` may be
read on any thread. See workpool/docs/architecture.md, "Limits of a process".
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.pool.admission import Admission
    from workpool.settings import Settings

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

        The limit is reached once every included pool has been idle for that long, is not paused,
        and has no plugin that refuses.

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
