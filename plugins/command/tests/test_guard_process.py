"""Tests of the guard process, which kills the commands of a killed worker."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from plugins.command.tests.conftest import WAIT_SECONDS
from workpool_command.guard_process import running_guard_process

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.filterwarnings("ignore:unclosed resource <UVProcessTransport:ResourceWarning")
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_guard_context_ends_without_error_if_code_outside_plugin_reaped_guard(
    new_loop: Callable[[], asyncio.AbstractEventLoop], procfs: Any
) -> None:
    children = procfs.list_child_processes()

    async def kill_and_reap_guard_process() -> None:
        async with asyncio.timeout(WAIT_SECONDS), running_guard_process({}):
            [pid] = procfs.list_child_processes() - children
            # Ignore SIGCHLD, so that the kernel reaps the guard process before asyncio can.
            before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            try:
                os.kill(int(pid), signal.SIGKILL)
                await procfs.wait_until(lambda: procfs.list_child_processes() == children)
            finally:
                signal.signal(signal.SIGCHLD, before)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(kill_and_reap_guard_process())


WORKER_PROGRAM = """
import asyncio, os, pathlib, signal, subprocess, sys, uvloop
from workpool_command.process_group import CommandArguments
from workpool_command.guard_process import running_guard_process

async def work():
    async with running_guard_process({}) as guard:
        env = {"PATH": os.environ["PATH"], "ENTRY": "of this command"}
        start = CommandArguments(
            argv=["sleep", "60"], cwd=pathlib.Path("/"), env=env, stdin=b"",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            unique_entry="ENTRY=of this command",
        )
        guard.announce_group(start.unique_entry)
        process = start.spawn_process()
        if sys.argv[2] == "reported":
            guard.register_process_group(process.pid)
        print(process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
with asyncio.Runner(loop_factory=loops[sys.argv[1]]) as runner:
    runner.run(work())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("number", ["reported", "not_reported"])
async def test_command_is_killed_by_guard_if_worker_dies_right_after_spawn(
    loop: str, number: str, procfs: Any
) -> None:
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER_PROGRAM, loop, number), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await worker.communicate()
    pid = int(output)

    assert worker.returncode == -signal.SIGKILL
    try:
        await procfs.wait_for_process_end([str(pid)])
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
