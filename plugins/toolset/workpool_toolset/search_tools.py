"""The tools `glob` and `grep`, whose searches are processes with limited time and output.

Ripgrep opens whole paths, so a session that replaces a directory by a link during the search could
let it read files outside of the workspace. Ripgrep therefore runs only inside of the session's
sandbox, which contains no other files. Without a sandbox, and for other roots, the program
`walker` searches with descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from workpool_toolset import ripgrep_search, walker
from workpool_toolset.shell import REAP_SECONDS
from workpool_toolset.tool_result import MAX_ERROR_CHARACTERS, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from workpool_toolset.workspace import ResolvedPath, Workspace

RIPGREP: Final = Path("/usr/bin/rg")
"""The path of `rg`. The PATH is not searched, so that an `rg` of the session never runs."""

GREP_BYTES: Final = walker.MAX_OUTPUT_BYTES
SEARCH_SECONDS: Final = 30.0
CUT: Final = "[output truncated]\n"
_CHUNK: Final = 64 * 1024
_WALKER: Final = str(Path(walker.__file__).resolve())


@dataclass(frozen=True, slots=True)
class SandboxCommand:
    """The command prefix and the variables with which a program runs in the session's sandbox."""

    prefix: Sequence[str]
    environment: Mapping[str, str]


class SearchTools:
    """The tools `glob` and `grep` of one session.

    Args:
        workspace: The roots that may be searched.
        sandboxed: The command of the session's sandbox; None without a sandbox.
    """

    def __init__(self, workspace: Workspace, sandboxed: SandboxCommand | None) -> None:
        self._workspace = workspace
        self._sandboxed = sandboxed

    async def glob(self, pattern: str, path: str) -> str:
        """Return the paths of at most 200 matching files and directories, newest first."""
        if pattern.startswith("/") or ".." in pattern.split("/"):
            raise ToolError("the pattern must be relative, without `..`")
        roots = [(root.shown, str(root.host)) for root in self._workspace.root_directories]
        with self._workspace.open_directory(path) as spot:
            request = {"tool": "glob", "pattern": pattern, "roots": roots}
            found = await self._run_walker(spot, request)
        return found or "no matches"

    async def grep(self, pattern: str, path: str, include: str | None) -> str:
        """Return the matching lines, as `path:line:text`."""
        if "\0" in pattern or "\0" in (include or ""):
            raise ToolError("the pattern holds a NUL")
        with self._workspace.open_parent_directory(path) as spot:
            mode = os.stat(spot.name, dir_fd=spot.directory, follow_symlinks=False).st_mode
            # Refuse other types of file, because opening a pipe would block the search.
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ToolError(f"{path}: neither a file nor a directory")
            is_file = stat.S_ISREG(mode)
            if (
                is_file
                and include
                and not walker.file_matches_include_pattern((spot.name,), include)
            ):
                return "no matches"
            inside = spot.root is self._workspace.session_root
            if self._sandboxed and inside and RIPGREP.exists():
                where = self._workspace.relative_path(spot.shown)
                globs = (
                    () if is_file else tuple(ripgrep_search.ripgrep_glob_options(where, include))
                )
                found = await self._run_ripgrep(self._sandboxed, spot, pattern, globs)
            elif is_file:
                found = await self._run_walker(
                    spot, _make_grep_request(pattern, include) | {"name": spot.name}
                )
            else:
                with self._workspace.open_directory(path) as inner:
                    found = await self._run_walker(inner, _make_grep_request(pattern, include))
        return found or "no matches"

    async def _run_ripgrep(
        self, sandboxed: SandboxCommand, spot: ResolvedPath, pattern: str, globs: Sequence[str]
    ) -> str:
        where = self._workspace.relative_path(spot.shown)
        words = [
            *sandboxed.prefix,
            str(RIPGREP),
            *ripgrep_search.RIPGREP_OPTIONS,
            *globs,
            "-e",
            pattern,
            "--",
        ]
        matches = ripgrep_search.RipgrepMatches(GREP_BYTES)
        _, error_text = await _run_search_process(
            [*words, where or "./"], sandboxed.environment, matches.read_ripgrep_messages
        )
        if not matches.complete:
            raise ToolError(ripgrep_search.regex_error_text(error_text))
        return matches.format_matches() + (CUT if matches.cut else "")

    async def _run_walker(self, spot: ResolvedPath, request: dict[str, Any]) -> str:
        where = self._workspace.relative_path(spot.shown)
        prefix = where if "name" in request or not where else f"{where}/"
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=spot.directory)
        output = _WalkerOutput()
        try:
            place = {"directory": directory, "shown": spot.shown, "prefix": prefix}
            words = [sys.executable, "-I", "-S", _WALKER, json.dumps(request | place)]
            status, error_text = await _run_search_process(
                words, {}, output.read_walker_output, (directory,)
            )
        finally:
            os.close(directory)
        if status == walker.BAD_REQUEST:
            raise ToolError(error_text.strip())
        if status and not output.text:
            raise ToolError(f"the search failed, or took more than {walker.CPU_SECONDS} s")
        return output.text


def _make_grep_request(pattern: str, include: str | None) -> dict[str, Any]:
    return {"tool": "grep", "pattern": pattern, "include": include}


class _WalkerOutput:
    """The output of the program `walker`, cut to whole lines.

    Attributes:
        text: The first lines, with a note if further lines are missing.
    """

    text = ""

    async def read_walker_output(
        self, stream: asyncio.StreamReader | None, enough: Callable[[], None]
    ) -> None:
        """Read the output of the walker process, and keep at most `GREP_BYTES` of it.

        `enough` is called once the output exceeds this limit, so that the process can be killed.
        """
        text, cut = await _read_first_lines(stream, GREP_BYTES, enough)
        self.text = text + (CUT if cut else "")


async def _run_search_process(
    words: Sequence[str],
    environment: Mapping[str, str],
    read: Callable[[asyncio.StreamReader | None, Callable[[], None]], Coroutine[Any, Any, None]],
    passed: tuple[int, ...] = (),
) -> tuple[int, str]:
    """Run a search process within its limits, and return its exit status and error output."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        pass_fds=passed,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(SEARCH_SECONDS), asyncio.TaskGroup() as group:
            group.create_task(
                read(process.stdout, partial(_kill_search_process, process)), name="found"
            )
            error_text = group.create_task(
                _read_first_lines(process.stderr, MAX_ERROR_CHARACTERS), name="errors"
            )
            await process.wait()
    except TimeoutError:
        raise ToolError(f"the search took more than {SEARCH_SECONDS:.0f} s") from None
    finally:
        _kill_search_process(process)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_SECONDS):
                # Do not call `wait`, which does not return while the pipe has unread output.
                await process.communicate()
    return process.returncode or 0, error_text.result()[0]


async def _read_first_lines(
    stream: asyncio.StreamReader | None, limit: int, on_cut: Callable[[], None] | None = None
) -> tuple[str, bool]:
    """Return the first lines of a stream, up to `limit` bytes, and whether the stream has more.

    The stream is read to its end, because a process cannot end while its pipe is full.
    """
    kept = bytearray()
    cut = False
    while stream and (chunk := await stream.read(_CHUNK)):
        if not cut:
            kept += chunk
            cut = len(kept) > limit
            if cut and on_cut is not None:
                on_cut()
    if cut:
        del kept[kept.rfind(b"\n", 0, limit) + 1 :]
    return kept.decode(errors="replace"), cut


def _kill_search_process(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
