"""The plugin class `Toolset`: its settings, the checks at start, and the handler."""

from __future__ import annotations

import importlib
import logging
import os
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from workpool import (
    PluginError,
    Session,
    handler,
    hookimpl,
    release_on_exhaustion,
)
from workpool_toolset.call_journal import CallJournal
from workpool_toolset.command_sandbox import (
    BASH,
    VISIBLE_PATHS,
    Bubblewrap,
    CommandIsolation,
    NoIsolation,
    ProcessLimits,
    find_sandbox_problem,
)
from workpool_toolset.file_tools import DEFAULT_SIZE_LIMITS, FileSizeLimits
from workpool_toolset.search_tools import SandboxCommand, SearchTools
from workpool_toolset.shell import BashShell
from workpool_toolset.tool_call_answerer import ToolCallAnswerer, release_on_journal_error
from workpool_toolset.toolbox import (
    MARGIN_SECONDS,
    CallLimits,
    CustomTool,
    Toolbox,
    ToolThreads,
    running_tool_threads,
)
from workpool_toolset.workspace import Workspace, WorkspaceRoot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from workpool import Supervisor

NAME: Final = "toolset"
NUMBERS: Final = (
    *("bash_timeout", "tool_timeout", "max_idle"),
    *("max_file_bytes", "max_image_bytes", "max_pdf_bytes"),
    *("memory_mb", "cpu_seconds", "processes", "file_mb"),
)

_SESSION: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_log: Final = logging.getLogger("workpool.toolset")


def _default_state_directory() -> str:
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return f"{home}/workpool-toolset"


@dataclass(kw_only=True, eq=False)
class Toolset:
    """Executes the tool calls of sessions. The fields are the settings of the plugin.

    See plugins/toolset/README.md, "Settings".
    """

    isolation: str = "bubblewrap"
    """`bubblewrap`, or `none`: commands may then do everything that the worker may."""
    state: str = field(default_factory=_default_state_directory)
    """The directory of workspaces and journals, with a directory for each session."""
    allowed_roots: Sequence[str] = ()
    """Further directories that sessions may read and write."""
    read_only_roots: Sequence[str] = ()
    """Directories that sessions may read."""
    environment: Mapping[str, str] | None = None
    """All variables of commands; unset: PATH, HOME, LANG, TZ and TMPDIR."""
    tools: Mapping[str, str | CustomTool] = field(default_factory=dict)
    """Custom tools by name: functions, or `module:function`."""
    bash_timeout: float = 120.0
    """Default time limit of a command, in seconds."""
    tool_timeout: float = 150.0
    """Time limit of each call, in seconds; at least 10 more than `bash_timeout`."""
    max_idle: float = 60.0
    """Seconds to wait after the end of a turn; `inf`: until the session ends."""
    max_file_bytes: int = DEFAULT_SIZE_LIMITS.text
    """The largest text file for `read` and `edit`, in bytes."""
    max_image_bytes: int = DEFAULT_SIZE_LIMITS.image
    """The largest image for `read`, in bytes."""
    max_pdf_bytes: int = DEFAULT_SIZE_LIMITS.pdf
    """The largest PDF for `read`, in bytes."""
    memory_mb: int = 4096
    """Memory of each process, and the size of `/tmp` and `/dev/shm` together, in MiB; sandboxed."""
    cpu_seconds: int = 3600
    """Processor time of each process; sandboxed."""
    processes: int = 512
    """Processes and threads of a session; sandboxed."""
    file_mb: int = 4096
    """The largest file that a process may write, in MiB; sandboxed."""

    _isolation: CommandIsolation | None = field(default=None, init=False, repr=False)
    _threads: ToolThreads | None = field(default=None, init=False, repr=False)
    _roots: tuple[WorkspaceRoot, ...] = field(default=(), init=False, repr=False)
    _tools: Mapping[str, CustomTool] = field(default_factory=dict, init=False, repr=False)

    @hookimpl
    @asynccontextmanager
    async def workpool_lifespan(self, supervisor: Supervisor) -> AsyncIterator[None]:
        """Check the settings and the sandbox. Start the threads of the tools for this pool."""
        self._reject_invalid_numbers()
        state, settings = self._state_directory(), supervisor.settings
        credentials = (settings.token_file, settings.api_key_file)
        private = [state, *(path for path in credentials if path)]
        self._check_token_and_state_paths(private)
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PluginError(NAME, f"state {state}: {error.strerror}") from error
        self._roots = tuple(self._root_directories(private))
        self._reject_roots_with_replaceable_parents()
        self._tools = {name: _load_custom_tool(name, tool) for name, tool in self.tools.items()}
        self._isolation = await self._create_isolation_from_setting(state)
        async with running_tool_threads() as self._threads:
            yield

    @handler
    async def run(self, session: Session) -> None:
        """Answer the tool calls of a session until the session ends or is idle."""
        isolation, threads = self._isolation, self._threads
        if isolation is None or threads is None:
            raise PluginError(NAME, "not started: its workpool_lifespan was not entered")
        with release_on_exhaustion():
            with release_on_journal_error():
                folder = await threads.files.run(self._session_directory, session.id)
                journal = CallJournal(folder / "journal", threads.files)
                await journal.open_directory()
            toolbox = self._make_toolbox(session.id, folder / "workspace", isolation, threads)
            try:
                answerer = ToolCallAnswerer(session, toolbox, journal, self.max_idle)
                await answerer.answer_calls_of_session()
            finally:
                await toolbox.close_shell()

    def _make_toolbox(
        self, session: str, workspace: Path, isolation: CommandIsolation, threads: ToolThreads
    ) -> Toolbox:
        owner = isolation.owner_of_session_files(session)
        roots = Workspace(
            [
                WorkspaceRoot(isolation.workspace_path(workspace), workspace, owner=owner),
                *self._roots,
            ]
        )
        environment = isolation.command_environment_variables(self.environment)
        prefix = isolation.command_line(session, workspace, ())
        sandbox = SandboxCommand(prefix, environment) if isolation.is_sandboxed else None
        return Toolbox(
            roots,
            BashShell([*prefix, *BASH], environment, None if sandbox else workspace),
            SearchTools(roots, sandbox),
            custom=self._tools,
            bounds=CallLimits(
                bash_seconds=self.bash_timeout,
                tool_seconds=self.tool_timeout,
                sizes=FileSizeLimits(self.max_file_bytes, self.max_image_bytes, self.max_pdf_bytes),
            ),
            threads=threads,
        )

    def _session_directory(self, session: str) -> Path:
        """Check the session's id, and create the session's directory and workspace."""
        if not _SESSION.fullmatch(session):
            raise ValueError("the session's id cannot be a directory's name")
        folder = self._state_directory() / session
        workspace = folder / "workspace"
        folder.mkdir(mode=0o700, exist_ok=True)
        workspace.mkdir(mode=0o700, exist_ok=True)
        owner = self._isolation.owner_of_session_files(session) if self._isolation else None
        if owner:
            os.chown(workspace, *owner)
        return folder

    def _state_directory(self) -> Path:
        return Path(os.path.realpath(Path(self.state).expanduser()))

    async def _create_isolation_from_setting(self, state: Path) -> CommandIsolation:
        if self.isolation == "none":
            _log.warning("toolset: isolation is none: sessions may do all that this worker may")
            return NoIsolation()
        if self.isolation != "bubblewrap":
            raise PluginError(NAME, "isolation must be bubblewrap or none")
        limits = ProcessLimits(
            memory_mb=self.memory_mb,
            cpu_seconds=self.cpu_seconds,
            processes=self.processes,
            file_mb=self.file_mb,
        )
        sandbox = Bubblewrap(limits, self._roots)
        try:
            found = await find_sandbox_problem(sandbox, state)
        except OSError as error:
            found = error.strerror or "it cannot be run"
        if found:
            raise PluginError(
                NAME, f'bubblewrap does not work here ({found}); isolation = "none" goes without'
            )
        _log.info("toolset: isolation is bubblewrap", extra={"path": str(state)})
        return sandbox

    def _reject_invalid_numbers(self) -> None:
        for name in NUMBERS:
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise PluginError(NAME, f"{name} must be a number above 0")
            if not (isinstance(value, int) or name in {"bash_timeout", "tool_timeout", "max_idle"}):
                raise PluginError(NAME, f"{name} must be a whole number")
        if self.tool_timeout < self.bash_timeout + MARGIN_SECONDS:
            raise PluginError(NAME, f"tool_timeout must exceed bash_timeout by {MARGIN_SECONDS:g}")

    def _check_token_and_state_paths(self, private: Sequence[Path]) -> None:
        """Raise an error if sandboxed sessions could read a private path.

        The private paths are the worker's files with tokens and the plugin's state. Without a
        sandbox, nothing is checked.
        """
        for path in private if self.isolation != "none" else ():
            for visible in VISIBLE_PATHS:
                if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(visible)):
                    raise PluginError(NAME, f"{path}: lies in {visible}, which sessions may read")

    def _reject_roots_with_replaceable_parents(self) -> None:
        """Raise an error if a session could replace a parent directory of a root by a link."""
        hosts = {root.host for root in self._roots}
        for inner in hosts:
            for outer in (root.host for root in self._roots if root.writable):
                if outer in inner.parents and inner.parent not in hosts:
                    raise PluginError(
                        NAME, f"root {inner}: {inner.parent}, in root {outer}, must be a root, too"
                    )

    def _root_directories(self, private: Sequence[Path]) -> Iterator[WorkspaceRoot]:
        """Yield the roots of the settings.

        Raise an error if a root would let sandboxed sessions read one of the private paths: the
        worker's files with tokens and the plugin's state.
        """
        writable_roots = [(path, True) for path in self.allowed_roots]
        for path, writable in [*writable_roots, *((path, False) for path in self.read_only_roots)]:
            host = Path(os.path.realpath(path))
            if not host.is_dir():
                raise PluginError(NAME, f"root {path}: not a directory")
            for secret in map(os.path.realpath, private if self.isolation != "none" else ()):
                if host.is_relative_to(secret) or Path(secret).is_relative_to(host):
                    raise PluginError(NAME, f"root {path}: shows {secret} to sessions")
            yield WorkspaceRoot(str(host), host, writable)


def _load_custom_tool(name: str, tool: object) -> CustomTool:
    """Return the function of a custom tool. `tool` is a function or a string `module:function`."""
    if isinstance(tool, str):
        module, _, attribute = tool.partition(":")
        try:
            tool = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise PluginError(NAME, f"tool {name!r}: {tool} cannot be loaded: {error}") from error
    if not callable(tool):
        raise PluginError(NAME, f"tool {name!r}: neither a function nor module:function")
    return tool
