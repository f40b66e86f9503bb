"""When a drain ends: its deadline, which may come nearer and never goes away again.

Owns no session: it only says when. Lives on the handlers' loop.
"""

from __future__ import annotations

import asyncio
import math


class Drain:
    """One supervisor's drain.

    Attributes:
        requested: Set once it has begun.
        started_at: On the loop's clock; None before it has begun.
        timeout: Seconds given by whoever asked first; None = no limit.
    """

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.started_at: float | None = None
        self.timeout: float | None = None
        self._deadline = math.inf
        self._nearer = asyncio.Event()

    def begin(self, timeout: float | None) -> None:
        """Ask for it; asking again can only bring the deadline nearer."""
        now = asyncio.get_running_loop().time()
        if self.started_at is None:
            self.started_at, self.timeout = now, timeout
            self.requested.set()
        if timeout is not None and now + timeout < self._deadline:
            self._deadline = now + timeout
            self._nearer.set()

    async def wait_for(self, tasks: set[asyncio.Task[None]]) -> bool:
        """Wait for the tasks until the deadline, wherever it moves; False when it came first."""
        loop = asyncio.get_running_loop()
        while tasks:
            left = self._deadline - loop.time()
            if left <= 0:
                return False
            self._nearer.clear()
            async with asyncio.TaskGroup() as group:
                nearer = group.create_task(self._nearer.wait(), name="drain-nearer")
                await asyncio.wait(
                    {nearer, *tasks},
                    timeout=None if left == math.inf else left,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                nearer.cancel()
            tasks = {task for task in tasks if not task.done()}
        return True
