"""Runs the built-in and custom tools of a session. The error of a tool is a result for the agent.

The names of built-in tools are case-insensitive. Some fields have several names, because services
use different ones. Unknown fields are ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from workpool import DaemonThreads
from workpool.errors import exhausted
from workpool_toolset import file_tools
from workpool_toolset.file_tools import DEFAULT_SIZE_LIMITS, FileSizeLimits
from workpool_toolset.shell import BashShell, ShellEndedError
from workpool_toolset.tool_result import ToolError, ToolResult

if TYPE_CHECKING:
    from workpool_toolset.search_tools import SearchTools
    from workpool_toolset.workspace import Workspace

Fields: TypeAlias = Mapping[str, Any]

EXHAUSTED_TEXT: Final = "the worker has run out of resources"
"""The error text for exhausted memory, descriptors, processes or threads."""
RESTART_HINT: Final = "use restart=true for a new one"
_log: Final = logging.getLogger("workpool.toolset")

THREAD_COUNT: Final = 32
"""The number of threads of each kind, for all sessions of a pool."""
MARGIN_SECONDS: Final = 10.0
"""The seconds between the longest time of a command and the time limit of its call."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call of an agent.

    Attributes:
        id: The id of the event, which the result refers to.
        name: The name, as the agent wrote it.
        input: The arguments, which the model has written and which may be malformed.
        custom: Whether the call is for a custom tool (`agent.custom_tool_use`).
        session: The session's id.
    """

    id: str
    name: str
    input: Mapping[str, Any]
    custom: bool
    session: str


CustomTool: TypeAlias = Callable[[ToolCall], object]
"""A custom tool, which takes the call and returns text, a block, a list of these, or a JSON value.

An `async def` is awaited on the supervisor's loop. A plain `def` runs in a thread, which continues
after the time limit of the call.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """The limits of time and size of a tool call.

    Attributes:
        bash_seconds: The default time limit of a command.
        tool_seconds: The time limit of each call.
        sizes: The size limits of files.
    """

    bash_seconds: float
    tool_seconds: float
    sizes: FileSizeLimits = DEFAULT_SIZE_LIMITS


@dataclass(frozen=True, slots=True)
class ToolThreads:
    """The two groups of threads on which the tools of all sessions of a pool run.

    Attributes:
        files: The threads for the journals and the file tools, whose calls take limited time.
        custom: The threads for custom tools, which may hang.
    """

    files: DaemonThreads
    custom: DaemonThreads


@contextlib.asynccontextmanager
async def running_tool_threads() -> AsyncIterator[ToolThreads]:
    """Yield the threads for file tools and custom tools. They end with the `with` block."""
    async with contextlib.AsyncExitStack() as stack:
        kinds = [
            DaemonThreads(f"workpool-{name}", THREAD_COUNT) for name in ("toolset", "custom-tool")
        ]
        for threads in kinds:
            stack.push_async_callback(threads.close)
            # Start a thread now, so that a machine without free threads fails before the pool
            # claims sessions.
            await threads.run(threading.current_thread)
        yield ToolThreads(*kinds)


class Toolbox:
    """Runs the tool calls of one session, one call at a time.

    Args:
        workspace: The roots of the file tools.
        shell: The shell of the session.
        search: The search tools of the session.
        custom: The custom tools by name.
        bounds: The limits of each call.
        threads: The threads of the pool.
    """

    def __init__(
        self,
        workspace: Workspace,
        shell: BashShell,
        search: SearchTools,
        *,
        custom: Mapping[str, CustomTool],
        bounds: CallLimits,
        threads: ToolThreads,
    ) -> None:
        self._workspace = workspace
        self._shell = shell
        self._search = search
        self._custom = custom
        self._bounds = bounds
        self._threads = threads
        self._tools: Mapping[str, Callable[[Fields], Awaitable[object]]] = {
            "bash": self._run_bash_tool,
            "read": self._run_read_tool,
            "write": self._run_write_tool,
            "edit": self._run_edit_tool,
            "glob": self._run_glob_tool,
            "grep": self._run_grep_tool,
        }

    def is_call_for_this_worker(self, call: ToolCall) -> bool:
        """Return whether the call is for a tool of this worker."""
        return call.name in self._custom if call.custom else call.name.lower() in self._tools

    async def run_tool_call(self, call: ToolCall) -> ToolResult:
        """Execute a call within its time limit. An error becomes the result of the call."""
        try:
            async with asyncio.timeout(self._bounds.tool_seconds):
                if call.custom:
                    return ToolResult.from_value(
                        await self._call_custom_tool(self._custom[call.name], call)
                    )
                done = await self._tools[call.name.lower()](call.input)
                return done if isinstance(done, ToolResult) else ToolResult.from_value(done)
        except ToolError as error:
            return ToolResult.from_error(str(error))
        except TimeoutError:
            return ToolResult.from_error(
                f"{call.name}: took more than {self._bounds.tool_seconds:g} s"
            )
        except Exception as error:  # noqa: BLE001 - an error of a tool is an answer
            _log.exception("toolset: tool failed", extra={"tool": call.name, "call_id": call.id})
            if exhausted(error) and not call.custom:
                return ToolResult.from_error(f"{call.name}: {EXHAUSTED_TEXT}")
            # Hide the text of a built-in tool's error, which may contain paths of this machine.
            detail = f": {error}" if call.custom else ""
            return ToolResult.from_error(f"{call.name}: {type(error).__name__}{detail}")

    async def close_shell(self) -> None:
        """End the session's shell."""
        await self._shell.close()

    async def _call_custom_tool(self, tool: CustomTool, call: ToolCall) -> object:
        if inspect.iscoroutinefunction(tool):
            return await tool(call)
        return await self._threads.custom.run(tool, call)

    async def _run_bash_tool(self, fields: Fields) -> object:
        restarts = _read_boolean_field(fields, "restart")
        if restarts:
            await self._shell.restart()
        command = _read_text_field(fields, "command", default="" if restarts else None)
        if not command.strip():
            if restarts:
                return "bash session restarted"
            raise ToolError("command is missing")
        if "\0" in command:
            raise ToolError("command holds a NUL")
        if self._shell.ended:
            raise ToolError(f"the shell has ended; {RESTART_HINT}")
        return await self._run_command_in_shell(command, self._command_timeout_seconds(fields))

    async def _run_command_in_shell(self, command: str, seconds: float) -> ToolResult:
        try:
            async with asyncio.timeout(seconds):
                output = await self._shell.run_command(command)
        except TimeoutError:
            detail = f"killed after {seconds:g} s, and the shell with it; {RESTART_HINT}"
            return ToolResult.from_value([self._shell.output_so_far, detail], is_error=True)
        except ShellEndedError as error:
            detail = f"the shell ended with status {error.status}; {RESTART_HINT}"
            return ToolResult.from_value([error.output, detail], is_error=True)
        if output.status == 0:
            return ToolResult.from_value(output.text)
        return ToolResult.from_value([output.text, f"exit status {output.status}"], is_error=True)

    def _command_timeout_seconds(self, fields: Fields) -> float:
        milliseconds = _read_number_field(fields, "timeout_ms", "timeout")
        longest = self._bounds.tool_seconds - MARGIN_SECONDS
        seconds = (
            milliseconds / 1000
            if milliseconds is not None and milliseconds > 0
            else self._bounds.bash_seconds
        )
        return min(seconds, longest)

    async def _run_read_tool(self, fields: Fields) -> object:
        path = _read_text_field(fields, "file_path", "path")
        return await self._threads.files.run(
            file_tools.read_file,
            self._workspace,
            path,
            _read_line_range_fields(fields),
            self._bounds.sizes,
        )

    async def _run_write_tool(self, fields: Fields) -> object:
        path = _read_text_field(fields, "file_path", "path")
        content = _read_text_field(fields, "content")
        return await self._threads.files.run(file_tools.write_file, self._workspace, path, content)

    async def _run_edit_tool(self, fields: Fields) -> object:
        path = _read_text_field(fields, "file_path", "path")
        change = _read_text_field(fields, "old_string"), _read_text_field(fields, "new_string")
        return await self._threads.files.run(
            file_tools.edit_file,
            self._workspace,
            path,
            change,
            replace_all=_read_boolean_field(fields, "replace_all"),
            sizes=self._bounds.sizes,
        )

    async def _run_glob_tool(self, fields: Fields) -> object:
        return await self._search.glob(
            _read_text_field(fields, "pattern"), _read_text_field(fields, "path", default=".")
        )

    async def _run_grep_tool(self, fields: Fields) -> object:
        include = _read_text_field(fields, "include", "glob", default="")
        path = _read_text_field(fields, "path", default=".")
        return await self._search.grep(_read_text_field(fields, "pattern"), path, include or None)


def _read_first_given_field(fields: Fields, *names: str) -> Any:
    """Return the value of the first field in `names` that has a value, or None."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _read_text_field(fields: Fields, *names: str, default: str | None = None) -> str:
    value = _read_first_given_field(fields, *names)
    if value is None:
        if default is None:
            raise ToolError(f"{names[0]} is missing")
        return default
    if not isinstance(value, str):
        raise ToolError(f"{names[0]} must be a string")
    return value


def _read_boolean_field(fields: Fields, name: str) -> bool:
    value = _read_first_given_field(fields, name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ToolError(f"{name} must be true or false")


def _read_number_field(fields: Fields, *names: str) -> float | None:
    value = _read_first_given_field(fields, *names)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ToolError(f"{names[0]} must be a number")
    return float(value)


def _read_line_range_fields(fields: Fields) -> tuple[int, int] | None:
    """Return the first and last line to read, from `view_range` or from `offset` and `limit`.

    `offset` is a line, from 1, and `limit` a number of lines. An empty `view_range` is ignored. A
    first line of 0 means line 1.
    """
    view_range = _read_first_given_field(fields, "view_range")
    if view_range == []:
        return None
    if view_range is not None:
        match [_convert_to_int(one) for one in view_range] if isinstance(view_range, list) else []:
            case [int(start), int(end)] if start >= 0:
                return max(start, 1), end
        raise ToolError("view_range is [start, end], from 1; an end of 0 is the end of the file")
    offset, limit = (_read_count_field(fields, name) for name in ("offset", "limit"))
    if offset is None and limit is None:
        return None
    start = max(offset or 1, 1)
    return start, start + limit - 1 if limit else 0


def _read_count_field(fields: Fields, name: str) -> int | None:
    value = _read_first_given_field(fields, name)
    count = _convert_to_int(value)
    if count is None and value is not None:
        raise ToolError(f"{name} must be a number")
    return count


def _convert_to_int(value: object) -> int | None:
    """Convert a number that a model wrote (3, 3.0 or "3") to an int, or return None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return int(float(value)) if isinstance(value, str) else int(value)
    except (ValueError, OverflowError):
        return None
