"""Exit limits that all pools of one process share."""

from __future__ import annotations

import asyncio

import pytest

from workpool.pool.exit_limits import ExitLimits
from workpool.settings import Settings

UPTIME = 600


async def test_uptime_limit_after_pool_restart_counts_from_process_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = ExitLimits(Settings(exit_after_uptime=UPTIME))
    with pytest.raises(TimeoutError):
        # The first pool of this process fails before any exit limit is reached.
        async with asyncio.timeout(0):
            await limits.wait_for_exit_limit()
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + UPTIME)
    async with asyncio.timeout(30):
        assert await limits.wait_for_exit_limit() == "exit_after_uptime"
