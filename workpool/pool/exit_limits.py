"""The exit limits, at which a pool ends by itself: sessions, idle time, uptime.

A limit that is reached ends the claiming; the drain follows once no session runs. Used on the
handlers' loop; `reached` may be read on any thread.
See workpool/docs/architecture.md, "Limits of a process".
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from workpool.pool.admission import Admission
    from workpool.settings import Settings

Limit = Literal["exit_after_sessions", "exit_after_idle", "exit_after_uptime"]


class ExitLimits:
    """The limits of one pool.

    Args:
        settings: The pool's.
        admission: The pool's; a pause interrupts the idle time.

    Attributes:
        reached: The first limit that was reached; None before that.
    """

    def __init__(self, settings: Settings, admission: Admission) -> None:
        self.reached: Limit | None = None
        self._sessions = settings.exit_after_sessions
        self._idle = settings.exit_after_idle
        self._uptime = settings.exit_after_uptime
        self._admission = admission
        self._claimed = 0
        self._idle_since: float | None = None
        self._changed = asyncio.Event()

    @property
    def any(self) -> bool:
        """Whether the pool has a limit."""
        return (self._sessions, self._idle, self._uptime) != (None, None, None)

    def note_claim(self) -> None:
        """Count a session that was claimed."""
        self._claimed += 1
        if self._claimed == self._sessions:
            self._reach("exit_after_sessions")

    def note_poll(self, idle: bool) -> None:  # noqa: FBT001 - a callback
        """Record a poll that succeeded; `idle`: it brought no item, and no item is ours."""
        if not idle:
            self._idle_since = None
            return
        now = asyncio.get_running_loop().time()
        if self._idle_since is None or self._idle_since < self._admission.granted_at:
            self._idle_since = now
        if self._idle is not None and now - self._idle_since >= self._idle:
            self._reach("exit_after_idle")

    async def wait(self) -> Limit:
        """Wait until a limit is reached, and return it. The uptime counts from this call."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._uptime):
                await self._changed.wait()
        return self._reach("exit_after_uptime")

    def _reach(self, limit: Limit) -> Limit:
        """Record that a limit is reached, and return the first one."""
        if self.reached is None:
            self.reached = limit
            self._changed.set()
        return self.reached
