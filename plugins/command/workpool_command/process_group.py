"""Runs a command and its child processes as one process group, from its start to its end.

The command has a session and a process group of its own, and is spawned in one step that cannot be
cancelled. The leader of the group is reaped last: while it is a zombie, the kernel does not reuse
the number of the group, so a signal cannot reach other processes. Subprocesses of asyncio do not
guarantee that, because the loop may reap the leader at any time.
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

KILL_WAIT_SECONDS: Final = 1.0
"""The longest wait for the exit of a killed leader, in seconds. The wait blocks the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandArguments:
    """The program, directory, environment and files with which a command is started.

    Attributes:
        argv: The program and its arguments.
        cwd: The working directory.
        env: All environment variables.
        stdin: The content of standard input.
        stdout: The file descriptor of standard output.
        stderr: The file descriptor of standard error.
        unique_entry: An entry of `env`, as `NAME=value`, that no other running command has.
    """

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    stdin: bytes
    stdout: int
    stderr: int
    unique_entry: str = ""

    def spawn_process(self) -> subprocess.Popen[bytes]:
        """Start the command as the leader of a new session and process group.

        Raises:
            OSError: The command cannot be started.
        """
        # Pass standard input in a memory file: a write to a pipe could block until the command
        # reads it.
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


class ProcessGroupRegistry(Protocol):
    """The interface for reporting process groups to the guard process.

    The guard process kills the registered groups if the worker is killed.
    """

    def announce_group(self, unique_entry: str) -> None:
        """Announce to the guard process that a process group will be spawned.

        The environment of the group's leader will contain `unique_entry`, of the form `NAME=value`.
        If the worker is killed before it registers the group, the guard process finds the leader by
        this entry and kills the group. An empty entry withdraws the announcement.
        """

    def register_process_group(self, number: int) -> None:
        """Register a running process group, so that it is killed if the worker is killed."""

    def unregister_process_group(self, number: int) -> None:
        """Unregister a process group that has ended, because the kernel may reuse its id."""


class ProcessGroup:
    """The process group of a spawned command. All methods are called on the running event loop.

    Attributes:
        number: The number of the group, which is the process id of its leader.
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

    def watch_group_leader(self) -> None:
        """Arrange that `exited` is set when the leader exits. Set it now if the leader was reaped.

        Raises:
            OSError: The leader cannot be watched, for example because no descriptor is free.
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

    def kill_group_after_failed_watch(self) -> None:
        """Kill the group and reap its leader, after `watch_group_leader` has failed."""
        self.stop_watching_leader()
        self.send_signal(signal.SIGKILL)
        try:
            self._process.wait(KILL_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            log.critical("command may still run", extra={"pid": self.number})

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the group, or do nothing if the leader has been reaped."""
        if self._is_reaped:
            return
        try:
            os.killpg(self.number, number)
        except ProcessLookupError:
            # The group has no process anymore: other code in this process has reaped the leader.
            pass
        except PermissionError:
            log.warning("command cannot be signalled, it runs as another user")

    async def end_process_group(self, grace: float) -> None:
        """Send SIGTERM to the group, wait up to `grace` seconds for its leader, then send SIGKILL.

        A cancellation ends the grace at once. A cancellation after the SIGKILL ends the wait for
        the leader, which may be blocked in the kernel.
        """
        try:
            if not self.exited.is_set():
                self.send_signal(signal.SIGTERM)
                async with asyncio.timeout(grace):
                    await self.exited.wait()
        except TimeoutError:
            pass
        finally:
            self.send_signal(signal.SIGKILL)
            await self.exited.wait()

    def reap_leader(self) -> None:
        """Reap the leader if it has exited, and set `status`.

        `Popen.wait` is not used: it returns 0 if other code has reaped the leader.
        """
        if self._is_reaped:
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
    def _is_reaped(self) -> bool:
        return self._process.returncode is not None

    def reap_leader_on_exit(
        self, before_reaping: Callable[[int], None] = lambda _number: None
    ) -> None:
        """Arrange that the leader is reaped when it exits, or reap it now if it has exited.

        No effect after `stop_watching_leader`.

        Args:
            before_reaping: Called with the group's number, which the kernel has not reused yet.
        """
        self._before_reaping = before_reaping
        if self.exited.is_set():
            self._on_leader_exit()

    def stop_watching_leader(self) -> None:
        """Stop watching for the exit of the leader, and close the leader's pidfd."""
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
            self.reap_leader()
            self.stop_watching_leader()


def start_group(start: CommandArguments) -> ProcessGroup:
    """Start a command in its own process group. Kill the whole group if the start fails.

    Raises:
        OSError: The command cannot be started or its leader cannot be watched.
    """
    loop = asyncio.get_running_loop()
    group = ProcessGroup(start.spawn_process(), loop)
    try:
        group.watch_group_leader()
    except BaseException:
        group.kill_group_after_failed_watch()
        raise
    return group


def _announce_and_start_group(
    start: CommandArguments, registry: ProcessGroupRegistry
) -> ProcessGroup:
    registry.announce_group(start.unique_entry)
    try:
        return start_group(start)
    except BaseException:
        # Withdraw the announcement that was made above. Otherwise the guard process would search
        # for this command after the worker's end.
        registry.announce_group("")
        raise


@asynccontextmanager
async def running_process_group(
    start: CommandArguments, registry: ProcessGroupRegistry, grace: Callable[[], float]
) -> AsyncIterator[ProcessGroup]:
    """Run a command in its own process group, and end the group when the `with` block ends.

    Args:
        start: The command.
        registry: The guard process, which kills the group if the worker is killed.
        grace: Returns the seconds between SIGTERM and SIGKILL. Called when the `with` block ends.

    Raises:
        OSError: The command cannot be started.
    """
    group = _announce_and_start_group(start, registry)
    try:
        registry.register_process_group(group.number)
        yield group
    finally:
        try:
            await group.end_process_group(grace())
        finally:
            group.reap_leader_on_exit(registry.unregister_process_group)
