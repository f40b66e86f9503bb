"""The plugin class `Command`: its settings, the checks at the start of a pool, and the handler.

A problem that is found only when a session starts fails that session.
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
from workpool_command.command_inputs import (
    DEFAULT_VARIABLES,
    encode_item_as_json,
    ensure_private_directory,
    id_environment_variables,
    inherited_environment_variables,
    redelivery_environment_variables,
    temporary_directory,
    trace_context_environment_variables,
)
from workpool_command.command_output import read_output_into_log
from workpool_command.command_result import (
    parse_result,
    raise_for_exit_status,
    release_or_fail_on_start_error,
)
from workpool_command.detached_command import WorkpoolHoldStarter
from workpool_command.guard_process import GuardProcessPipe, running_guard_process
from workpool_command.process_group import CommandArguments, ProcessGroup, running_process_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from workpool import Settings

NAME: Final = "command"
REMOVAL_THREADS: Final = 4
"""The number of threads that remove working directories."""
MAX_CANCELLED_GRACE_SECONDS: Final = 3.0
"""The longest grace of a cancelled session, in seconds. The last step of a drain has 5 s in all."""
LOST_LEASE_GRACE_SECONDS: Final = 0.5
"""The grace after a lost lease, in seconds. Another worker may start the item after the margin of
1 s."""


@dataclass(kw_only=True, eq=False)
class Command:
    """Runs a command for each session. Its exit status decides the outcome of the session.

    The keywords are the settings of the table `[workpool.plugin.command]`.
    """

    command: Sequence[str]
    """The program and its arguments. A string is refused, since there is no shell."""
    root: str | os.PathLike[str] | None = None
    """The parent of the sessions' directories. Default: the directory for temporary files."""
    keep: bool = False
    """Whether a session's directory is kept, and used again by the next run."""
    environment: Sequence[str] = DEFAULT_VARIABLES
    """The names of the worker's environment variables that the command gets."""
    result: bool = False
    """Whether the last line of stdout is a JSON object of strings, which becomes metadata."""
    grace: float = 10.0
    """Seconds between SIGTERM and SIGKILL."""
    log_lines: int = 1000
    """The largest number of logged lines of a session's output."""
    detach: bool = False
    """Whether the lease is handed off to `workpool hold`, and the command outlives the worker."""
    item_token: bool = False
    """Whether the command and `workpool hold` get the item's own token, not the worker's."""
    type: str = "session"
    """The type of the items, as in `@handler`."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The metadata of the items, as in `@handler`."""
    timeout: float | None = None
    """The timeout of a session, as in `@handler`."""
    max_sessions: int | None = None
    """The largest number of sessions that run at once, as in `@handler`."""
    stall_timeout: float | None = None
    """The seconds without a line of output after which a session is stalled, as in `@handler`."""

    def __post_init__(self) -> None:
        """Check the settings. Checks that depend on the machine happen at the start of the pool.

        Raises:
            TypeError: A setting has the wrong type.
            ValueError: A setting has a value that works on no machine.
        """
        _check_settings(self)
        self._root = None if self.root is None else Path(self.root).absolute()
        self._guard: GuardProcessPipe | None = None
        self._workpool_hold_starter: WorkpoolHoldStarter | None = None
        self._settings: Settings | None = None
        self._threads = DaemonThreads("workpool-command", REMOVAL_THREADS)

        async def run(session: Session) -> Mapping[str, str] | None:
            with release_on_exhaustion():
                return await self._run_command(session)

        # The decorator `handler` puts the qualified name of `run` into its error messages about
        # wrong settings.
        run.__qualname__ = NAME
        as_handler = handler(
            type=self.type,
            metadata=self.metadata,
            timeout=self.timeout,
            max_sessions=self.max_sessions,
            stall_timeout=self.stall_timeout,
        )
        self.run = as_handler(run)

    @hookimpl
    @asynccontextmanager
    async def workpool_lifespan(self, supervisor: Supervisor) -> AsyncIterator[None]:
        """Check that the machine can run the command. Run the guard process while the pool runs."""
        if self._guard is not None:
            raise PluginError(NAME, "one object serves one pool; give each its own")
        async with AsyncExitStack() as stack:
            self._threads = DaemonThreads("workpool-command", REMOVAL_THREADS)
            stack.push_async_callback(self._threads.close)
            try:
                # Check the machine on a thread of `_threads`, so that this thread is started now.
                # The thread removes directories later, when the machine may have no free thread
                # left.
                await self._threads.run(self._check_machine_requirements)
                env = inherited_environment_variables(("PATH", "LD_LIBRARY_PATH"))
                self._guard = await stack.enter_async_context(running_guard_process(env))
            except OSError as error:
                raise PluginError(NAME, f"cannot be used here: {error}") from error
            self._settings = supervisor.settings
            self._workpool_hold_starter = stack.enter_context(
                closing(WorkpoolHoldStarter(self, supervisor.settings))
            )
            try:
                yield
            finally:
                self._guard = self._workpool_hold_starter = None

    def _check_machine_requirements(self) -> None:
        """Check that this machine can run the program, create directories and watch processes.

        Raises:
            PluginError: A setting does not fit the machine.
            OSError: A directory or a process cannot be created.
        """
        program, path = (
            self.command[0],
            inherited_environment_variables(self.environment).get("PATH", os.defpath),
        )
        if shutil.which(program, path=path) is None:
            raise PluginError(NAME, f"command: {program!r} is not an executable file on the PATH")
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            raise PluginError(NAME, "SIGCHLD is ignored here, so no exit status can be known")
        if self._root is not None:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._root):
            # Do nothing with the temporary directory. An OSError has been raised before if the
            # directory cannot be created.
            pass
        if self.detach and importlib.util.find_spec("typer") is None:
            raise PluginError(NAME, "detach: needs `workpool hold`, of workpool[cli]")
        if not hasattr(os, "pidfd_open"):
            raise PluginError(NAME, "needs Linux")
        # Fail here where `pidfd_open` raises an OSError: on Linux before 5.3 and in some sandboxes.
        # Otherwise each session would fail.
        os.close(os.pidfd_open(os.getpid()))

    async def _run_command(self, session: Session) -> Mapping[str, str] | None:
        if self._guard is None or self._workpool_hold_starter is None:
            raise PluginError(NAME, "runs in a pool only")
        if self.detach and self._root is not None:
            with release_or_fail_on_start_error("directory"):
                cwd = ensure_private_directory(self._root, _session_directory_name(session))
            await self._workpool_hold_starter.hand_off_session(session, cwd)
            return None
        program = Path(self.command[0]).name
        with read_output_into_log(session.log, self.log_lines, session.progress) as (
            stdout,
            stderr,
        ):
            async with AsyncExitStack() as stack:
                with release_or_fail_on_start_error(program):
                    cwd = await stack.enter_async_context(self._working_directory(session))
                    start = self._command_arguments(session, cwd, stdout.writer, stderr.writer)
                    grace = functools.partial(self._grace_seconds, session)
                    group = await stack.enter_async_context(
                        running_process_group(start, self._guard, grace)
                    )
                stdout.close_write_end_of_pipe()
                stderr.close_write_end_of_pipe()
                await self._wait_for_exit(session, group)
        raise_for_exit_status(session, program, group.status)
        return parse_result(program, stdout.lines.last) if self.result else None

    async def _wait_for_exit(self, session: Session, group: ProcessGroup) -> None:
        """Wait for the command's exit. A stop request or a drain ends the command."""
        async with asyncio.TaskGroup() as tasks:
            interrupt = tasks.create_task(
                self._end_command_on_interrupt(session, group), name="interrupted"
            )
            await group.exited.wait()
            interrupt.cancel()

    async def _end_command_on_interrupt(self, session: Session, group: ProcessGroup) -> None:
        await session.interrupted()
        await group.end_process_group(self.grace)

    def _grace_seconds(self, session: Session) -> float:
        """Return the seconds between SIGTERM and SIGKILL for the command of a cancelled session.

        The command must end before another worker can start the session and before the drain ends.
        """
        return min(
            self.grace,
            MAX_CANCELLED_GRACE_SECONDS,
            max(LOST_LEASE_GRACE_SECONDS, session.lease_remaining / 2),
        )

    def _working_directory(self, session: Session) -> AbstractAsyncContextManager[Path]:
        name = _session_directory_name(session)
        if self.keep and self._root is not None:
            return nullcontext(ensure_private_directory(self._root, name))
        return temporary_directory(self._root, name, self._threads)

    def _command_arguments(
        self, session: Session, cwd: Path, stdout: int, stderr: int
    ) -> CommandArguments:
        return CommandArguments(
            argv=self.command,
            cwd=cwd,
            env=inherited_environment_variables(self.environment)
            | id_environment_variables(session)
            | redelivery_environment_variables(session)
            | trace_context_environment_variables(session)
            | self._item_token_variables(session),
            stdin=encode_item_as_json(session.item),
            stdout=stdout,
            stderr=stderr,
            unique_entry=f"WORKPOOL_WORK_ID={session.item.id}",
        )

    def _item_token_variables(self, session: Session) -> dict[str, str]:
        if not self.item_token or self._settings is None:
            return {}
        return self._settings.item_token_variables(session.item)


def _session_directory_name(session: Session) -> str:
    # An item of a type other than `session` may have no session id.
    return session.id or session.item.id


def _check_settings(plugin: Command) -> None:
    """Raise an error if a setting is wrong. The machine is not checked here."""
    _check_setting_types(plugin)
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


def _check_setting_types(plugin: Command) -> None:
    _check_string_list("command", plugin.command)
    _check_string_list("environment", plugin.environment)
    _check_number_setting("grace", plugin.grace, float)
    _check_number_setting("log_lines", plugin.log_lines, int)
    for name in ("keep", "result", "detach", "item_token"):
        if not isinstance(getattr(plugin, name), bool):
            raise TypeError(f"{name}: not true or false")


def _check_string_list(name: str, value: object) -> None:
    # A string is a sequence of strings: `command = "ls -l"` would run `l`.
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: not a list of strings")
    if not all(isinstance(each, str) and "\0" not in each for each in value):
        raise TypeError(f"{name}: not a list of strings without NUL")


def _check_number_setting(name: str, value: object, kind: type[int] | type[float]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise TypeError(f"{name}: not a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: less than 0, or no number")
