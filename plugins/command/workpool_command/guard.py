"""The guard: a small process that ends the commands of a worker that was killed.

A worker that dies by SIGKILL, or for want of memory, cannot end its commands; its leases lapse, and
other workers start the sessions anew while the old commands still run. The guard reads the numbers
of the living groups from a pipe. The pipe's end means that the worker is gone, and so must they be.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

log = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 2.0
"""Longest wait for the guard's exit, after its pipe is closed and again after SIGKILL."""
# Deaf to what a service's end sends to all of its processes: the worker's end is its only cue.
PROGRAM: Final = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
groups = set()
for line in sys.stdin:
    group = int(line)
    (groups.add if group > 0 else groups.discard)(abs(group))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class Guard:
    """Tells the guard's process which groups there are."""

    def __init__(self, pipe: asyncio.StreamWriter) -> None:
        self._pipe = pipe

    def add(self, group: int) -> None:
        """From now on this group must not outlive the worker."""
        self._tell(group)

    def remove(self, group: int) -> None:
        """The group is gone, and its number may become somebody else's."""
        self._tell(-group)

    def _tell(self, number: int) -> None:
        if self._pipe.is_closing():
            log.warning("the guard is gone: commands may outlive a worker that is killed")
        else:
            self._pipe.write(b"%d\n" % number)


@asynccontextmanager
async def guarding(env: Mapping[str, str]) -> AsyncIterator[Guard]:
    """Run a guard; what it still knows of when the block is left is killed.

    Raises:
        OSError: It cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", "-c", PROGRAM),
        stdin=subprocess.PIPE,
        cwd="/",
        env=env,
        start_new_session=True,
    )
    pipe = cast("asyncio.StreamWriter", process.stdin)
    try:
        yield Guard(pipe)
    finally:
        pipe.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await process.wait()
        except TimeoutError:
            # No such process: other code has reaped it, which a uvloop loop never notices.
            with suppress(ProcessLookupError, TimeoutError):
                process.kill()
                async with asyncio.timeout(CLOSE_SECONDS):
                    await process.wait()
