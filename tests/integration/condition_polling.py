"""Functions that wait until threads, sockets or tasks reach a state that no event reports."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


async def wait_until(condition: Callable[[], object]) -> None:
    """Check a condition repeatedly until other tasks, threads or the kernel make it true.

    Raises:
        TimeoutError: The condition was false for 30 s.
    """
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - threads and sockets have no event
            await asyncio.sleep(0.001)
