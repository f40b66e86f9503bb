"""Decides when a pool may claim items.

A pool claims nothing while it is paused or a plugin refuses. Running sessions are not affected.
Lives on the handlers' loop; the reasons may be read on any thread. See
workpool/docs/architecture.md, "Admission".
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import TYPE_CHECKING

from workpool.log_fields import pool_logger
from workpool.logs import readable

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from workpool.pool.machine_pauses import Clock

log = pool_logger(__name__)

REASON_CHARACTERS = 200
"""Largest number of characters of a reason."""
ASK_SECONDS = 1.0
"""Seconds until a plugin that refused is asked again."""
LOOK_SECONDS = 10.0
"""Seconds between checks of a pause's end. The wall clock may jump, or the machine may sleep."""


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
