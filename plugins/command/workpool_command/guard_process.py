"""The guard process, which kills the running commands if the worker is killed.

A worker that is killed, or that runs out of memory, cannot end its commands. Its leases expire, and
other workers start the sessions again while the old commands still run. The guard reads the numbers
of the running process groups from a pipe. The pipe ends with the worker, and the guard then kills
these groups.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from io import RawIOBase

log = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 2.0
"""The longest wait for the guard's exit after the pipe is closed, and again after SIGKILL, in
seconds."""
# The guard process ignores SIGTERM, SIGINT and SIGHUP. An init system that stops a service sends
# them to all processes of the service, and the guard process must outlive the worker.
GUARD_PROGRAM: Final = """
import os, signal, sys, time

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
groups, announced = set(), None
for line in sys.stdin:
    if line.startswith("?"):
        announced = bytes.fromhex(line[1:]) or None
    elif int(line) > 0:
        groups.add(int(line))
        announced = None
    else:
        groups.discard(-int(line))

def is_announced_leader(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            return announced in environ.read().split(b"\\0") and os.getsid(pid) == pid
    except OSError:
        return False

for _ in range(20 * (announced is not None)):
    found = set(filter(is_announced_leader, map(int, filter(str.isdigit, os.listdir("/proc")))))
    groups |= found
    if found:
        break
    time.sleep(0.05)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class GuardProcessPipe:
    """Reports the running process groups to the guard process.

    Each line is written by a system call at once. An event loop could write it only after the step
    that spawns the command, and the worker could be killed before.

    Args:
        pipe: The standard input of the guard's process, unbuffered and non-blocking.
    """

    def __init__(self, pipe: RawIOBase) -> None:
        self._pipe = pipe

    def announce_group(self, unique_entry: str) -> None:
        """Announce a process group that will be spawned and then registered.

        A worker can be killed before it calls `register_process_group`. The guard process then
        searches for a process whose environment contains `unique_entry`, which has the form
        `NAME=value`. The search takes up to a second, because the kernel shows the environment of
        a program only a moment after its start. An empty `unique_entry` withdraws the announcement.
        """
        self._write_line(b"?%s\n" % os.fsencode(unique_entry).hex().encode())

    def register_process_group(self, number: int) -> None:
        """Register a running process group, so that it is killed if the worker is killed."""
        self._write_line(b"%d\n" % number)

    def unregister_process_group(self, number: int) -> None:
        """Unregister a process group that has ended, because the kernel may reuse its id."""
        self._write_line(b"%d\n" % -number)

    def _write_line(self, line: bytes) -> None:
        try:
            written = self._pipe.write(line)
        except (OSError, ValueError):
            written = None
        # `write` returns None if the pipe is full. The guard process has then left 64 KiB of lines
        # unread, so it does not work anymore.
        if written is None:
            log.warning("the guard has ended: commands may outlive a worker that is killed")


@asynccontextmanager
async def running_guard_process(env: Mapping[str, str]) -> AsyncIterator[GuardProcessPipe]:
    """Run a guard process during the `with` block.

    At the end of the block, the guard process kills the process groups that still run, and exits.

    Raises:
        OSError: The guard cannot be started.
    """
    stdin, writing_end = os.pipe()
    os.set_blocking(writing_end, False)
    with os.fdopen(writing_end, "wb", buffering=0) as pipe:
        process = await _start_guard_process(stdin, env)
        try:
            yield GuardProcessPipe(pipe)
        finally:
            pipe.close()
            await _wait_for_exit(process)


async def _start_guard_process(stdin: int, env: Mapping[str, str]) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", "-c", GUARD_PROGRAM),
            stdin=stdin,
            cwd="/",
            env=env,
            start_new_session=True,
        )
    finally:
        os.close(stdin)


async def _wait_for_exit(process: asyncio.subprocess.Process) -> None:
    """Wait `CLOSE_SECONDS` for the guard process to exit, then kill it and wait once more."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await process.wait()
    except TimeoutError:
        # If other code has reaped the guard process, `kill` raises an error, and uvloop's `wait`
        # never returns. Suppress the error and limit the wait. Otherwise the pool would end with
        # this error or never end.
        with suppress(ProcessLookupError, TimeoutError):
            process.kill()
            async with asyncio.timeout(CLOSE_SECONDS):
                await process.wait()
