"""A condition variable with a time limit, for tests that wait for a change by other tasks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

WAIT_SECONDS = 30.0
"""The default bound of a wait, in seconds."""
VIRTUAL_WAIT_SECONDS = 86_400.0
"""The bound of a wait in virtual time. A session that never ends costs seconds of real time."""


class BoundedCondition:
    """A condition variable for one event loop, whose waits have a time limit."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify_all(self) -> None:
        """Wake all waiting tasks, so that they check their condition again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_until(
        self,
        wanted: Callable[[], T | None],
        describe: Callable[[], str],
        timeout: float = WAIT_SECONDS,
    ) -> T:
        """Wait until the condition `wanted` returns a true value, and return this value.

        Raises:
            AssertionError: `wanted` returned no true value within `timeout` seconds. `describe`
                returns the text of the error.
        """
        try:
            async with asyncio.timeout(timeout):
                while not (found := wanted()):
                    await self._changed.wait()
                return found
        except TimeoutError:
            raise AssertionError(f"not within {timeout:g} s: {describe()}") from None
