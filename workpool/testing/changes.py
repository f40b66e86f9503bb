"""Waiting for what this loop will bring about: the opposite of sleeping and hoping."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

WAIT_SECONDS = 10.0
"""How long a test waits for what must come, unless it says otherwise."""


class Changes:
    """Something changes, and others wait until it has become what they want. One loop only."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """It has changed: let those who wait look at it."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(
        self,
        wanted: Callable[[], T | None],
        describe: Callable[[], str],
        timeout: float = WAIT_SECONDS,
    ) -> T:
        """Return what `wanted` returns once that is true.

        Raises:
            AssertionError: It was not within `timeout` seconds; `describe` tells what there was.
        """
        try:
            async with asyncio.timeout(timeout):
                while not (found := wanted()):
                    await self._changed.wait()
                return found
        except TimeoutError:
            raise AssertionError(f"not within {timeout:g} s: {describe()}") from None
