"""One command and whatever it starts, from its start until all of it is gone.

A process of its own session and group, spawned in one step that cannot be cancelled half-way. Its
leader is reaped last: as long as it is a zombie, the kernel gives the group's number to nobody
else, so that a signal can never reach somebody else's processes. That is what asyncio's own
subprocesses do not offer: their leader is reaped by the loop, at a moment of its choosing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What to start, and in which surroundings.

    Attributes:
        argv: The program and its arguments.
        cwd: Where it runs.
        env: Its environment, all of it.
        stdin: What it can read, whether it does or not.
        stdout: A descriptor for its output.
        stderr: Likewise.
    """

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    stdin: bytes
    stdout: int
    stderr: int

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start it, in a session of its own.

        Raises:
            OSError: It cannot be started.
        """
        # A file without a name, not a pipe: nobody has to wait until the command reads.
        with os.fdopen(os.memfd_create("item"), "w+b") as stdin:
            stdin.write(self.stdin)
            stdin.seek(0)
            return subprocess.Popen(  # noqa: S603 - the operator's own command, without a shell
                self.argv,
                stdin=stdin,
                stdout=self.stdout,
                stderr=self.stderr,
                cwd=self.cwd,
                env=self.env,
                start_new_session=True,
            )


class Watch(Protocol):
    """Who ends the groups that a worker leaves behind when it dies."""

    def add(self, group: int) -> None:
        """From now on this group must not outlive the worker."""

    def remove(self, group: int) -> None:
        """The group is gone, and its number may become somebody else's."""


class ProcessGroup:
    """A process that was just spawned, and its group. Belongs to the running loop.

    Attributes:
        number: The group's, and its leader's.
        exited: Its leader has ended; it is not reaped yet.
        status: Its exit status, or the negative number of the signal that ended it; None before
            it was reaped, or when somebody else took it.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.number = process.pid
        self.exited = asyncio.Event()
        self.status: int | None = None
        self._left_alone = False
        self._pidfd = os.pidfd_open(process.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._leader_exited)

    def signal(self, number: signal.Signals) -> None:
        """Send it to all that is left of the group, unless that may be somebody else's by now."""
        if self._reaped:
            return
        try:
            os.killpg(self.number, number)
        except ProcessLookupError:
            pass  # somebody else in this process has reaped the leader
        except PermissionError:
            log.warning("command cannot be signalled, it runs as somebody else")

    async def end(self, patience: float) -> None:
        """Leave nothing of the group alive: SIGTERM, `patience` seconds, SIGKILL.

        A cancellation ends the patience. One that comes after the SIGKILL, because a process is
        stuck in the kernel, leaves it behind.
        """
        try:
            if not self.exited.is_set():
                self.signal(signal.SIGTERM)
                async with asyncio.timeout(patience):
                    await self.exited.wait()
        except TimeoutError:
            pass
        finally:
            self.signal(signal.SIGKILL)
            await self.exited.wait()

    def reap(self) -> None:
        """Take the status. Not with `Popen.wait`: to it, one that somebody else took is a 0."""
        if self._reaped:
            return
        try:
            ended = os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            ended = None
        if ended is not None:
            sign = 1 if ended.si_code == os.CLD_EXITED else -1
            self.status = sign * ended.si_status
        self._process.returncode = -signal.SIGKILL if self.status is None else self.status

    @property
    def _reaped(self) -> bool:
        return self._process.returncode is not None

    def leave_alone(self) -> None:
        """Nobody waits for its end any more: it is only reaped then, unless it was closed."""
        self._left_alone = True
        if self.exited.is_set():
            self._leader_exited()

    def close(self) -> None:
        """Let go of it."""
        if self._pidfd != -1:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _leader_exited(self) -> None:
        self.exited.set()
        if self._left_alone:
            self.reap()
            self.close()
        else:
            self._loop.remove_reader(self._pidfd)


def started(start: Start) -> ProcessGroup:
    """A command in a group of its own.

    Raises:
        OSError: It cannot be started.
    """
    process = start.spawn()
    try:
        return ProcessGroup(process)
    except OSError:  # no descriptor left to watch it with
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


@asynccontextmanager
async def running(
    start: Start, watch: Watch, patience: Callable[[], float]
) -> AsyncIterator[ProcessGroup]:
    """A command in a group of its own, all of which is gone once the block is left.

    Args:
        start: What to run.
        watch: Told of the group.
        patience: Asked on leaving: the seconds between SIGTERM and SIGKILL for what still runs.

    Raises:
        OSError: It cannot be started.
    """
    group = started(start)
    watch.add(group.number)
    try:
        yield group
    finally:
        try:
            await group.end(patience())
            watch.remove(group.number)  # before the number may become somebody else's
            group.reap()
        finally:
            group.close()
