"""The plugin: its settings, the checks before the first session, and the handler.

A problem that only a session can find is reported as the failure of that session.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from workpool import (
    DaemonThreads,
    PluginError,
    Session,
    Supervisor,
    handler,
    hookimpl,
    release_on_exhaustion,
)
from workpool.settings import CREDENTIAL_PREFIXES
from workpool_command.detached import HoldProcesses
from workpool_command.ending import check_exit, parse_result, start_errors_as_session_errors
from workpool_command.group import CommandStart, ProcessGroup, running_group
from workpool_command.guard import Guard, running_guard
from workpool_command.output import logged_output
from workpool_command.surroundings import (
    HANDED_ON,
    id_variables,
    inherited_variables,
    item_json,
    kept_directory,
    may_have_run_before,
    temporary_directory,
    trace_variables,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from workpool import Settings

NAME: Final = "command"
THREADS: Final = 4
"""Number of working directories that are removed at the same time."""
CANCELLED_SECONDS: Final = 3.0
"""Largest grace of a cancelled session: the last step of a drain takes 5 s."""
LOST_SECONDS: Final = 0.5
"""The grace when the lease is lost: less than the margin before another worker can start."""


@dataclass(kw_only=True, eq=False)
class Command:
    """Runs a command for each session. The exit status decides the outcome.

    The keywords are the settings of the table `[workpool.plugin.command]`.
    """

    command: Sequence[str]
    """The program and its arguments. A string is refused, since there is no shell."""
    root: str | os.PathLike[str] | None = None
    """The parent of the sessions' directories. Default: the directory for temporary files."""
    keep: bool = False
    """Keep a session's directory, and use it again in the next run."""
    environment: Sequence[str] = HANDED_ON
    """The worker's variables that the command gets."""
    result: bool = False
    """Whether the last line of stdout is a JSON object of strings, the metadata of the session."""
    grace: float = 10.0
    """Seconds between SIGTERM and SIGKILL."""
    log_lines: int = 1000
    """Largest number of lines of a session's output in the log."""
    detach: bool = False
    """Hand the lease off to `workpool hold`, so that the command outlives the worker."""
    item_token: bool = False
    """Give the command, and `workpool hold`, the item's own token in place of the worker's."""
    type: str = "session"
    """The type of the items, as in `@handler`."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The metadata of the items, as in `@handler`."""
    timeout: float | None = None
    """The timeout of a session, as in `@handler`."""
    max_sessions: int | None = None
    """Sessions that run at once, as in `@handler`."""
    stall_timeout: float | None = None
    """Seconds without a line of output, as in `@handler`."""

    def __post_init__(self) -> None:
        """Check the settings themselves, without looking at the machine.

        Raises:
            TypeError: A setting has the wrong type.
            ValueError: A setting can never work.
        """
        _check_settings(self)
        self._root = None if self.root is None else Path(self.root).absolute()
        self._guard: Guard | None = None
        self._holders: HoldProcesses | None = None
        self._settings: Settings | None = None
        self._threads = DaemonThreads("workpool-command", THREADS)

        async def run(session: Session) -> Mapping[str, str] | None:
            with release_on_exhaustion():
                return await self._run_command(session)

        run.__qualname__ = NAME  # The names of the four settings that follow, for errors.
        mark = handler(
            type=self.type,
            metadata=self.metadata,
            timeout=self.timeout,
            max_sessions=self.max_sessions,
            stall_timeout=self.stall_timeout,
        )
        self.run = mark(run)

    @hookimpl
    @asynccontextmanager
    async def workpool_lifespan(self, supervisor: Supervisor) -> AsyncIterator[None]:
        """Check the machine before the first session, and run the guard."""
        if self._guard is not None:
            raise PluginError(NAME, "one object serves one pool; give each its own")
        async with AsyncExitStack() as stack:
            self._threads = DaemonThreads("workpool-command", THREADS)
            stack.push_async_callback(self._threads.close)
            try:
                # This also starts a thread, which may be impossible once sessions run.
                await self._threads.run(self._check_machine)
                env = inherited_variables(("PATH", "LD_LIBRARY_PATH"))
                self._guard = await stack.enter_async_context(running_guard(env))
            except OSError as error:
                raise PluginError(NAME, f"cannot be used here: {error}") from error
            self._settings = supervisor.settings
            self._holders = stack.enter_context(closing(HoldProcesses(self, supervisor.settings)))
            try:
                yield
            finally:
                self._guard = self._holders = None

    def _check_machine(self) -> None:
        """Find problems of the machine that would fail every session.

        Raises:
            PluginError: A setting does not fit the machine.
            OSError: A directory or a process cannot be created.
        """
        program, path = (
            self.command[0],
            inherited_variables(self.environment).get("PATH", os.defpath),
        )
        if shutil.which(program, path=path) is None:
            raise PluginError(NAME, f"command: {program!r} is not an executable file on the PATH")
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            raise PluginError(NAME, "SIGCHLD is ignored here, so no exit status can be known")
        if self._root is not None:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._root):
            pass  # the directory can be written
        if self.detach and importlib.util.find_spec("typer") is None:
            raise PluginError(NAME, "detach: needs `workpool hold`, of workpool[cli]")
        if not hasattr(os, "pidfd_open"):
            raise PluginError(NAME, "needs Linux")
        # available from Linux 5.3 on, and not in every sandbox
        os.close(os.pidfd_open(os.getpid()))

    async def _run_command(self, session: Session) -> Mapping[str, str] | None:
        if self._guard is None or self._holders is None:
            raise PluginError(NAME, "runs in a pool only")
        if self.detach and self._root is not None:
            with start_errors_as_session_errors("directory"):
                cwd = kept_directory(self._root, _directory_name(session))
            await self._holders.hand_off(session, cwd)
            return None
        program = Path(self.command[0]).name
        with logged_output(session.log, self.log_lines, session.progress) as (stdout, stderr):
            async with AsyncExitStack() as stack:
                with start_errors_as_session_errors(program):
                    cwd = await stack.enter_async_context(self._directory(session))
                    start = self._start_of(session, cwd, stdout.writer, stderr.writer)
                    patience = functools.partial(self._grace_seconds, session)
                    group = await stack.enter_async_context(
                        running_group(start, self._guard, patience)
                    )
                stdout.close_writing_end()
                stderr.close_writing_end()
                await self._wait_for_exit(session, group)
        check_exit(session, program, group.status)
        return parse_result(program, stdout.lines.last) if self.result else None

    async def _wait_for_exit(self, session: Session, group: ProcessGroup) -> None:
        """Wait for the command's end; end it after a stop request or in a drain."""
        async with asyncio.TaskGroup() as tasks:
            ending = tasks.create_task(self._end_on_interrupt(session, group), name="interrupted")
            await group.exited.wait()
            ending.cancel()

    async def _end_on_interrupt(self, session: Session, group: ProcessGroup) -> None:
        await session.interrupted()
        await group.end(self.grace)

    def _grace_seconds(self, session: Session) -> float:
        """Return the seconds between SIGTERM and SIGKILL for a cancelled session.

        The command must end before another worker can start the session, and before the drain ends.
        """
        return min(self.grace, CANCELLED_SECONDS, max(LOST_SECONDS, session.lease_remaining / 2))

    def _directory(self, session: Session) -> AbstractAsyncContextManager[Path]:
        if self.keep and self._root is not None:
            return nullcontext(kept_directory(self._root, _directory_name(session)))
        return temporary_directory(self._root, _directory_name(session), self._threads)

    def _start_of(self, session: Session, cwd: Path, stdout: int, stderr: int) -> CommandStart:
        return CommandStart(
            argv=self.command,
            cwd=cwd,
            env=inherited_variables(self.environment)
            | id_variables(session)
            | may_have_run_before(session)
            | trace_variables(session)
            | self._token_variables(session),
            stdin=item_json(session.item),
            stdout=stdout,
            stderr=stderr,
            mark=f"WORKPOOL_WORK_ID={session.item.id}",
        )

    def _token_variables(self, session: Session) -> dict[str, str]:
        if not self.item_token or self._settings is None:
            return {}
        return self._settings.item_token_variables(session.item)


def _directory_name(session: Session) -> str:
    return session.id or session.item.id  # items of another type may have no session


def _check_settings(plugin: Command) -> None:
    """Refuse settings that can never work on any machine."""
    _check_types(plugin)
    if not plugin.command or not plugin.command[0]:
        raise ValueError("command: names no program")
    if "/" in plugin.command[0] and not Path(plugin.command[0]).is_absolute():
        raise ValueError("command: not an absolute path, nor a name to be looked up on the PATH")
    for name in plugin.environment:
        if name.startswith(CREDENTIAL_PREFIXES):
            raise ValueError(f"environment: {name} is never handed on: it may be a credential")
    if (plugin.keep or plugin.detach) and plugin.root is None:
        raise ValueError("root: needed for a directory that is kept")
    if plugin.detach and plugin.result:
        raise ValueError("result: a command that was detached has none")


def _check_types(plugin: Command) -> None:
    _check_strings("command", plugin.command)
    _check_strings("environment", plugin.environment)
    _check_number("grace", plugin.grace, float)
    _check_number("log_lines", plugin.log_lines, int)
    for name in ("keep", "result", "detach", "item_token"):
        if not isinstance(getattr(plugin, name), bool):
            raise TypeError(f"{name}: not true or false")


def _check_strings(name: str, given: object) -> None:
    # A string is a sequence of strings: `command = "ls -l"` would run `l`.
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name}: not a list of strings")
    if not all(isinstance(each, str) and "\0" not in each for each in given):
        raise TypeError(f"{name}: not a list of strings without NUL")


def _check_number(name: str, given: object, kind: type[int] | type[float]) -> None:
    if isinstance(given, bool) or not isinstance(given, int | kind):
        raise TypeError(f"{name}: not a number")
    if not 0 <= given < math.inf:
        raise ValueError(f"{name}: less than 0, or no number")
