"""The process of the guard: when the worker is killed, and when the guard itself ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from workpool_command.guard import running_guard

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.filterwarnings("ignore:unclosed resource <UVProcessTransport:ResourceWarning")
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_guard_reaped_by_other_code_does_not_fail_end_of_pool(
    new_loop: Callable[[], asyncio.AbstractEventLoop], process_view: Any
) -> None:
    children = process_view.child_processes()

    async def reap_guard() -> None:
        async with asyncio.timeout(20), running_guard({}):
            [pid] = process_view.child_processes() - children
            # From now on the kernel reaps all children.
            before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            try:
                os.kill(int(pid), signal.SIGKILL)
                await process_view.wait_for_file(lambda: process_view.child_processes() == children)
            finally:
                signal.signal(signal.SIGCHLD, before)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(reap_guard())


WORKER = """
import asyncio, os, pathlib, signal, subprocess, sys, uvloop
from workpool_command.group import CommandStart
from workpool_command.guard import running_guard

async def work():
    async with running_guard({}) as guard:
        env = {"PATH": os.environ["PATH"], "MARK": "of this command"}
        start = CommandStart(
            argv=["sleep", "60"], cwd=pathlib.Path("/"), env=env, stdin=b"",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, mark="MARK=of this command",
        )
        guard.expect(start.mark)
        process = start.spawn_process()
        if sys.argv[2] == "told":
            guard.add(process.pid)
        print(process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
with asyncio.Runner(loop_factory=loops[sys.argv[1]]) as runner:
    runner.run(work())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("number", ["told", "not told"])
async def test_guard_of_worker_killed_right_after_spawn_kills_command(
    loop: str, number: str, process_view: Any
) -> None:
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER, loop, number), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await worker.communicate()
    pid = int(output)

    assert worker.returncode == -signal.SIGKILL
    try:
        await process_view.wait_for_end([str(pid)])
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
