"""Whether the pool may claim items: pauses by its embedder, and refusals by plugins.

Pollers ask before they poll; sessions that run are not concerned. Lives on the handlers' loop; the
reasons may be read on any thread.
See workpool/docs/architecture.md, "Admission".
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress
from typing import TYPE_CHECKING

from workpool.logs import readable

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from workpool.pool.lease_clock import Clock

log = logging.getLogger(__name__)

REASON_CHARACTERS = 200
"""Characters of a reason that are kept."""
ASK_SECONDS = 1.0
"""The time after which a plugin that refused is asked again."""
LOOK_SECONDS = 10.0
"""The wall clock is compared with the end of a pause this often: it may jump, or the machine may
sleep."""


class Admission:
    """The admission of one pool.

    Args:
        wall: The wall clock.

    Attributes:
        gated: Pollers must await `granted` before they poll.
        refused: The reason of the plugin that refused last; None: none refuses.
        granted_at: When a pause or a refusal last ended, on the loop's clock.
    """

    def __init__(self, wall: Clock) -> None:
        self.gated = False
        self.refused: str | None = None
        self.granted_at = -math.inf
        self._wall = wall
        self._paused: str | None = None
        self._until = math.inf  # on the wall clock
        self._ask: Callable[[], str | None] | None = None
        self._changed = asyncio.Event()

    @property
    def paused(self) -> str | None:
        """The reason of the pause; None if the pool is not paused or the pause is over."""
        reason = self._paused
        return None if reason is None or self._wall() >= self._until else reason

    def ask(self, ask: Callable[[], str | None]) -> None:
        """Set the function that asks the plugins; it returns a reason to refuse, or None."""
        self._ask, self.gated = ask, True

    def pause(self, reason: str, until: datetime | None) -> None:
        """Pause, or replace the reason and the end of the pause.

        Raises:
            ValueError: `until` has no time zone.
        """
        if until is not None and until.utcoffset() is None:
            raise ValueError("`until` needs a time zone, as in datetime.now(UTC)")
        self._until = math.inf if until is None else until.timestamp()
        self._paused, self.gated = readable(reason, REASON_CHARACTERS), True
        end = "" if until is None else f" until={until.isoformat(timespec='seconds')}"
        log.info("paused reason=%s%s", self._paused, end)
        self._notify()

    def resume(self) -> None:
        """End the pause, if there is one."""
        if self._paused is None:
            return
        self._paused, self.gated = None, self._ask is not None
        log.info("resumed")
        self._notify()

    async def granted(self) -> None:
        """Wait until the pool is not paused and no plugin refuses."""
        waited = False
        while self.paused is not None or self._refusal() is not None:
            waited = True
            await self._change()
        if self._paused is not None:
            self.resume()  # it is over
        if waited:
            self.granted_at = asyncio.get_running_loop().time()

    def _refusal(self) -> str | None:
        """Ask the plugins, and log a change of their answer."""
        reason = None if self._ask is None else self._ask()
        refused = None if reason is None else readable(reason, REASON_CHARACTERS)
        if refused != self.refused:
            if refused is None:
                log.info("claiming again; no plugin refuses any more")
            elif self.refused is None:
                log.warning("claiming nothing, as a plugin refuses reason=%s", refused)
            self.refused = refused
        return refused

    async def _change(self) -> None:
        """Wait for a pause or a resumption, or until it is time to look or ask again."""
        seconds = ASK_SECONDS
        if self._paused is not None:
            seconds = max(0.0, min(LOOK_SECONDS, self._until - self._wall()))
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
