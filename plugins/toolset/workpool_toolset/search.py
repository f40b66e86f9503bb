"""The tools `glob` and `grep`. A search is a process that can be killed, with bounded output.

Ripgrep opens whole paths, so a session that replaces a directory by a link during the search could
lead it out of the workspace. Therefore it runs only inside of the session's sandbox, where no other
file exists. Without a sandbox, and for other roots, `walker` searches with descriptors.
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

from workpool_toolset import ripgrep, walker
from workpool_toolset.results import ERROR_CHARACTERS, ToolError
from workpool_toolset.shell import REAP_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from workpool_toolset.workspace import PathTarget, Workspace

RIPGREP: Final = Path("/usr/bin/rg")
"""The only `rg` that is used, so that an `rg` of the session never runs."""

GREP_BYTES: Final = walker.FOUND_BYTES
SEARCH_SECONDS: Final = 30.0
CUT: Final = "[output truncated]\n"
_CHUNK: Final = 64 * 1024
_WALKER: Final = str(Path(walker.__file__).resolve())


@dataclass(frozen=True, slots=True)
class SandboxCommand:
    """The prefix and the variables for a program inside of the session's sandbox."""

    prefix: Sequence[str]
    environment: Mapping[str, str]


class SearchTools:
    """The searches of one session.

    Args:
        workspace: The roots that may be searched.
        sandboxed: The session's sandbox; None without one.
    """

    def __init__(self, workspace: Workspace, sandboxed: SandboxCommand | None) -> None:
        self._workspace = workspace
        self._sandboxed = sandboxed

    async def glob(self, pattern: str, path: str) -> str:
        """Return the files and directories whose path matches, newest first, at most 200."""
        if pattern.startswith("/") or ".." in pattern.split("/"):
            raise ToolError("the pattern must be relative, without `..`")
        roots = [(root.shown, str(root.host)) for root in self._workspace.roots]
        with self._workspace.open_directory(path) as spot:
            asked = {"tool": "glob", "pattern": pattern, "roots": roots}
            found = await self._run_walker(spot, asked)
        return found or "no matches"

    async def grep(self, pattern: str, path: str, include: str | None) -> str:
        """Return the lines that match, as `path:line:text`."""
        if "\0" in pattern or "\0" in (include or ""):
            raise ToolError("the pattern holds a NUL")
        with self._workspace.open_parent(path) as spot:
            mode = os.stat(spot.name, dir_fd=spot.directory, follow_symlinks=False).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # Opening a pipe would wait.
                raise ToolError(f"{path}: neither a file nor a directory")
            is_file = stat.S_ISREG(mode)
            if is_file and include and not walker.is_included((spot.name,), include):
                return "no matches"
            inside = spot.root is self._workspace.home
            if self._sandboxed and inside and RIPGREP.exists():
                where = self._workspace.relative_path(spot.shown)
                globs = () if is_file else tuple(ripgrep.glob_options(where, include))
                found = await self._run_ripgrep(self._sandboxed, spot, pattern, globs)
            elif is_file:
                found = await self._run_walker(
                    spot, _grep_script(pattern, include) | {"name": spot.name}
                )
            else:
                with self._workspace.open_directory(path) as inner:
                    found = await self._run_walker(inner, _grep_script(pattern, include))
        return found or "no matches"

    async def _run_ripgrep(
        self, sandboxed: SandboxCommand, spot: PathTarget, pattern: str, globs: Sequence[str]
    ) -> str:
        where = self._workspace.relative_path(spot.shown)
        words = [*sandboxed.prefix, str(RIPGREP), *ripgrep.OPTIONS, *globs, "-e", pattern, "--"]
        matches = ripgrep.RipgrepMatches(GREP_BYTES)
        _, error_text = await _run_bounded(
            [*words, where or "./"], sandboxed.environment, matches.read_messages
        )
        if not matches.complete:
            raise ToolError(ripgrep.error_text(error_text))
        return matches.text() + (CUT if matches.cut else "")

    async def _run_walker(self, spot: PathTarget, request: dict[str, Any]) -> str:
        where = self._workspace.relative_path(spot.shown)
        prefix = where if "name" in request or not where else f"{where}/"
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=spot.directory)
        output = _WalkerOutput()
        try:
            place = {"directory": directory, "shown": spot.shown, "prefix": prefix}
            words = [sys.executable, "-I", "-S", _WALKER, json.dumps(request | place)]
            status, error_text = await _run_bounded(words, {}, output.read_output, (directory,))
        finally:
            os.close(directory)
        if status == walker.BAD_REQUEST:
            raise ToolError(error_text.strip())
        if status and not output.text:
            raise ToolError(f"the search failed, or took more than {walker.CPU_SECONDS} s")
        return output.text


def _grep_script(pattern: str, include: str | None) -> dict[str, Any]:
    return {"tool": "grep", "pattern": pattern, "include": include}


class _WalkerOutput:
    """The findings of the walker, in whole lines.

    Attributes:
        text: The first part of them, and whether there is more.
    """

    text = ""

    async def read_output(
        self, stream: asyncio.StreamReader | None, enough: Callable[[], None]
    ) -> None:
        """Read all output; call `enough` once there is more than fits."""
        text, cut = await _first_lines(stream, GREP_BYTES, enough)
        self.text = text + (CUT if cut else "")


async def _run_bounded(
    words: Sequence[str],
    environment: Mapping[str, str],
    read: Callable[[asyncio.StreamReader | None, Callable[[], None]], Coroutine[Any, Any, None]],
    passed: tuple[int, ...] = (),
) -> tuple[int, str]:
    """Run a search, and return its status and errors. Kill it if it is late or has found enough."""
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
            group.create_task(read(process.stdout, partial(_kill_process, process)), name="found")
            error_text = group.create_task(
                _first_lines(process.stderr, ERROR_CHARACTERS), name="errors"
            )
            await process.wait()
    except TimeoutError:
        raise ToolError(f"the search took more than {SEARCH_SECONDS:.0f} s") from None
    finally:
        _kill_process(process)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_SECONDS):
                await process.communicate()  # `wait` alone would never end with an unread pipe.
    return process.returncode or 0, error_text.result()[0]


async def _first_lines(
    stream: asyncio.StreamReader | None, limit: int, on_cut: Callable[[], None] | None = None
) -> tuple[str, bool]:
    """Return the first lines of a stream, and whether there was more.

    Reads to the end, since a process with an unread pipe never ends.
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


def _kill_process(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
