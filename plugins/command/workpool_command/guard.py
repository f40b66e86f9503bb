"""The guard: a small process that ends the commands of a worker that was killed.

A worker that is killed, or that runs out of memory, cannot end its commands. Its leases lapse, and
other workers start the sessions again while the old commands still run. The guard reads the numbers
of the running groups from a pipe. When the pipe ends, the worker has ended, and the guard kills the
groups.
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
"""Longest wait for the guard's exit, after its pipe is closed and again after SIGKILL."""
# The guard ignores the signals that the end of a service sends to all its processes: only the end
# of the pipe counts.
PROGRAM: Final = """
import os, signal, sys, time

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
groups, mark = set(), None
for line in sys.stdin:
    if line.startswith("?"):
        mark = bytes.fromhex(line[1:]) or None
    elif int(line) > 0:
        groups.add(int(line))
        mark = None
    else:
        groups.discard(-int(line))

def leads(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            return mark in environ.read().split(b"\\0") and os.getsid(pid) == pid
    except OSError:
        return False

for _ in range(20 * (mark is not None)):
    found = set(filter(leads, map(int, filter(str.isdigit, os.listdir("/proc")))))
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


class Guard:
    """Reports the running groups to the guard's process.

    Lines are written with a system call of their own: an event loop may write them only after the
    current step, in which the command is spawned and the worker may be killed.

    Args:
        lines: The standard input of the guard, unbuffered and non-blocking.
    """

    def __init__(self, lines: RawIOBase) -> None:
        self._lines = lines

    def expect(self, mark: str) -> None:
        """Announce a group that will be spawned; the next `add` has its number.

        A worker can be killed before it passes the number on. The guard then finds the leader by
        this entry of its environment, `NAME=value`, and looks for a second: the pipe may end a
        moment before the kernel shows the environment of a program that is just being executed.
        An empty entry takes the announcement back.
        """
        self._send(b"?%s\n" % os.fsencode(mark).hex().encode())

    def add(self, group: int) -> None:
        """Add a group, which must not outlive the worker."""
        self._send(b"%d\n" % group)

    def remove(self, group: int) -> None:
        """Remove a group that has ended, whose number may be reused."""
        self._send(b"%d\n" % -group)

    def _send(self, line: bytes) -> None:
        try:
            written = self._lines.write(line)
        except (OSError, ValueError):  # The guard has ended, or its pipe is closed.
            written = None
        if written is None:  # The guard has not read the last 64 KiB.
            log.warning("the guard has ended: commands may outlive a worker that is killed")


@asynccontextmanager
async def running_guard(env: Mapping[str, str]) -> AsyncIterator[Guard]:
    """Run a guard, which kills the remaining groups at the end of the block.

    Raises:
        OSError: The guard cannot be started.
    """
    stdin, pipe = os.pipe()
    os.set_blocking(pipe, False)
    with os.fdopen(pipe, "wb", buffering=0) as lines:
        process = await _start_process(stdin, env)
        try:
            yield Guard(lines)
        finally:
            lines.close()
            await _wait_for_exit(process)


async def _start_process(stdin: int, env: Mapping[str, str]) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", "-c", PROGRAM),
            stdin=stdin,
            cwd="/",
            env=env,
            start_new_session=True,
        )
    finally:
        os.close(stdin)


async def _wait_for_exit(process: asyncio.subprocess.Process) -> None:
    """Wait for the guard's exit: at most `CLOSE_SECONDS` before a SIGKILL, and as long after it."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await process.wait()
    except TimeoutError:
        # No such process: other code has reaped it, which a uvloop loop never notices.
        with suppress(ProcessLookupError, TimeoutError):
            process.kill()
            async with asyncio.timeout(CLOSE_SECONDS):
                await process.wait()
