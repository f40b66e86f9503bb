"""One command and all its child processes, from the start until all have ended.

The command has a session and a process group of its own, and is spawned in one step that cannot be
cancelled half-way. The leader of the group is reaped last: while it is a zombie, the kernel does
not reuse the number of the group, so a signal cannot reach other processes. The subprocesses of
asyncio do not offer that, since the loop reaps the leader at any time.
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
"""Longest wait for the exit of a killed leader that cannot be watched. Blocks the loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandStart:
    """The command to start, with its directory and environment.

    Attributes:
        argv: The program and its arguments.
        cwd: The directory.
        env: The whole environment.
        stdin: The content of standard input.
        stdout: The descriptor for the output.
        stderr: The descriptor for the error output.
        mark: An entry of `env`, as `NAME=value`, that no other running command has.
    """

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    stdin: bytes
    stdout: int
    stderr: int
    mark: str = ""

    def spawn_process(self) -> subprocess.Popen[bytes]:
        """Start the command in a session of its own.

        Raises:
            OSError: The command cannot be started.
        """
        # A file without a name instead of a pipe: nothing has to wait until the command reads it.
        with os.fdopen(os.memfd_create("item"), "w+b") as stdin:
            stdin.write(self.stdin)
            stdin.seek(0)
            return subprocess.Popen(  # noqa: S603 - the command of the operator, without a shell
                self.argv,
                stdin=stdin,
                stdout=self.stdout,
                stderr=self.stderr,
                cwd=self.cwd,
                env=self.env,
                start_new_session=True,
            )


class GroupWatcher(Protocol):
    """The interface of the guard, which ends the groups of a worker that was killed."""

    def expect(self, mark: str) -> None:
        """Announce a group whose leader will have this entry in its environment.

        An empty entry withdraws the announcement.
        """

    def add(self, group: int) -> None:
        """Add a group, which must not outlive the worker."""

    def remove(self, group: int) -> None:
        """Remove a group that has ended, whose number may be reused."""


class ProcessGroup:
    """A process that was just spawned, and its group. Used on the running loop only.

    Attributes:
        number: The number of the group and the pid of its leader.
        exited: Set once the leader has exited. The leader may not be reaped yet.
        status: The leader's exit status, or the negative number of the signal that ended it. None
            before the leader is reaped, and if other code in this process has reaped it.
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
            self._loop.add_reader(self._pidfd, self._on_leader_exit)
        except OSError:
            if not self._leader_was_reaped():
                raise
            self.exited.set()

    def _leader_was_reaped(self) -> bool:
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
            log.critical("command may still run", extra={"pid": self.number})

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the group, unless its number may have been reused."""
        if self._set_exit_status:
            return
        try:
            os.killpg(self.number, number)
        except ProcessLookupError:
            pass  # Other code in this process has reaped the leader.
        except PermissionError:
            log.warning("command cannot be signalled, it runs as another user")

    async def end(self, patience: float) -> None:
        """End the whole group: SIGTERM, `patience` seconds, SIGKILL.

        A cancellation shortens the wait to 0. A cancellation after the SIGKILL, while a process is
        blocked in the kernel, abandons the group.
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
        """Reap the leader. `Popen.wait` would return 0 if other code has reaped it."""
        if self._set_exit_status:
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
    def _set_exit_status(self) -> bool:
        return self._process.returncode is not None

    def leave_running(self, before_reaping: Callable[[int], None] = lambda _number: None) -> None:
        """Reap the leader and close this object once the leader has exited, or now if it has.

        No effect if `close` was called before.

        Args:
            before_reaping: Called with the group's number, which is not reused yet.
        """
        self._before_reaping = before_reaping
        if self.exited.is_set():
            self._on_leader_exit()

    def close(self) -> None:
        """Stop watching the leader."""
        if self._pidfd != -1:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_leader_exit(self) -> None:
        self.exited.set()
        if self._before_reaping is None:
            self._loop.remove_reader(self._pidfd)
            return
        try:
            self._before_reaping(self.number)
        finally:
            self.reap()
            self.close()


def start_group(start: CommandStart) -> ProcessGroup:
    """Start a command in a group of its own. After an error the whole group has ended.

    Raises:
        OSError: The command cannot be started or its leader cannot be watched.
    """
    loop = asyncio.get_running_loop()
    group = ProcessGroup(start.spawn_process(), loop)
    try:
        group.watch_leader()
    except BaseException:
        group.discard()
        raise
    return group


def _announced_group(start: CommandStart, watch: GroupWatcher) -> ProcessGroup:
    watch.expect(start.mark)
    try:
        return start_group(start)
    except BaseException:
        watch.expect("")  # otherwise the guard would look for this command when the worker ends
        raise


@asynccontextmanager
async def running_group(
    start: CommandStart, watch: GroupWatcher, patience: Callable[[], float]
) -> AsyncIterator[ProcessGroup]:
    """Run a command in a group of its own, which ends with the block.

    Args:
        start: The command.
        watch: The guard of the group.
        patience: Returns the seconds between SIGTERM and SIGKILL, called at the end of the block.

    Raises:
        OSError: The command cannot be started.
    """
    group = _announced_group(start, watch)
    try:
        watch.add(group.number)
        yield group
    finally:
        try:
            await group.end(patience())
        finally:
            group.leave_running(watch.remove)
