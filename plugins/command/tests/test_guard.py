"""The guard's process ends with the block, also when other code in this process reaps it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from workpool_command.guard import guarding

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.filterwarnings("ignore:unclosed resource <UVProcessTransport:ResourceWarning")
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_guard_reaped_by_other_code_does_not_fail_the_end_of_the_pool(
    new_loop: Callable[[], asyncio.AbstractEventLoop], machine: Any
) -> None:
    children = machine.children()

    async def lose_the_guard() -> None:
        async with asyncio.timeout(20), guarding({}):
            [pid] = machine.children() - children
            before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps from now on
            try:
                os.kill(int(pid), signal.SIGKILL)
                await machine.reached(lambda: machine.children() == children)
            finally:
                signal.signal(signal.SIGCHLD, before)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(lose_the_guard())
