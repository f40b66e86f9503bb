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
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

KILLED_SECONDS: Final = 1.0
"""Longest wait for the exit of a killed leader that cannot be watched; it blocks the loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What to start, and in which surroundings.

    Attributes:
        argv: The program and its arguments.
        cwd: Where it runs.
        env: Its environment, all of it.
        stdin: What it can read, whether it does or not.
        stdout: A descriptor for its output.
        stderr: A descriptor for its error output.
        mark: An entry of `env`, as `NAME=value`, that no other living command has.
    """

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    stdin: bytes
    stdout: int
    stderr: int
    mark: str = ""

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

    def expect(self, mark: str) -> None:
        """A group whose leader has this entry in its environment is about to be spawned.

        An empty entry takes that back.
        """

    def add(self, group: int) -> None:
        """From now on this group must not outlive the worker."""

    def remove(self, group: int) -> None:
        """The group is gone, and its number may become somebody else's."""


class ProcessGroup:
    """A process that was just spawned, and its group. Belongs to the running loop.

    Attributes:
        number: The number of the group and the pid of its leader.
        exited: Set once the leader has exited. The leader may not be reaped yet.
        status: The leader's exit status, or the negative number of the signal that ended it. None
            before the leader is reaped, and when other code in this process has reaped it.
    """

    def __init__(self, process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self.number = process.pid
        self.exited = asyncio.Event()
        self.status: int | None = None
        self._process = process
        self._loop = loop
        self._pidfd = -1
        self._before_reaping: Callable[[int], None] | None = None

    def watch_leader(self) -> None:
        """Set `exited` when the leader exits; now, if other code has already reaped the leader.

        Raises:
            OSError: The leader cannot be watched, for example because no descriptor is left.
        """
        try:
            self._pidfd = os.pidfd_open(self.number)
            self._loop.add_reader(self._pidfd, self._leader_exited)
        except OSError:
            if not self._leader_taken():
                raise
            self.exited.set()

    def _leader_taken(self) -> bool:
        try:
            os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return True
        return False

    def discard(self) -> None:
        """Kill a group whose leader cannot be watched, and reap the leader."""
        self.close()
        self.signal(signal.SIGKILL)
        try:
            self._process.wait(KILLED_SECONDS)
        except subprocess.TimeoutExpired:
            log.critical("command may still run pid=%d", self.number)

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

    def leave_alone(self, before_reaping: Callable[[int], None] = lambda _number: None) -> None:
        """Reap the leader and let go of the group once the leader has exited, or now if it has.

        Nothing happens then if `close` was called before.

        Args:
            before_reaping: Called with the group's number, which no other group can have yet.
        """
        self._before_reaping = before_reaping
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
        if self._before_reaping is None:
            self._loop.remove_reader(self._pidfd)
            return
        try:
            self._before_reaping(self.number)
        finally:
            self.reap()
            self.close()


def started(start: Start) -> ProcessGroup:
    """Start a command in a group of its own. After an error nothing of the group is left.

    Raises:
        OSError: The command cannot be started or its leader cannot be watched.
    """
    loop = asyncio.get_running_loop()
    group = ProcessGroup(start.spawn(), loop)
    try:
        group.watch_leader()
    except BaseException:
        group.discard()
        raise
    return group


def _announced(start: Start, watch: Watch) -> ProcessGroup:
    watch.expect(start.mark)
    try:
        return started(start)
    except BaseException:
        watch.expect("")  # else the watch would look for this command when the worker ends
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
    group = _announced(start, watch)
    try:
        watch.add(group.number)
        yield group
    finally:
        try:
            await group.end(patience())
        finally:
            group.leave_alone(watch.remove)
