"""`glob` and `grep`: a search runs in a process that can be killed, and says no more than it may.

Ripgrep opens whole paths, so a session that swaps a directory for a link under its feet could lead
it out of the workspace. It therefore runs only inside the session's sandbox, where there is nothing
to be led to; without a sandbox, and for other roots, `walker` searches on descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from workpool_toolset import walker
from workpool_toolset.results import ERROR_CHARACTERS, ToolError
from workpool_toolset.shell import REAP_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from workpool_toolset.workspace import Spot, Workspace

RIPGREP: Final = Path("/usr/bin/rg")
"""Looked for in the system only: a `rg` of the session's own making must never run."""

GREP_BYTES: Final = 100 * 1024
SEARCH_SECONDS: Final = 30.0
CUT: Final = "[output truncated]\n"
_CHUNK: Final = 64 * 1024
_NOTHING: Final = 1
_WALKER: Final = str(Path(walker.__file__).resolve())


@dataclass(frozen=True, slots=True)
class Sandboxed:
    """How to run a program inside the session's sandbox: a prefix, and all of its variables."""

    prefix: Sequence[str]
    environment: Mapping[str, str]


class Search:
    """The searches of one session.

    Args:
        workspace: What may be searched.
        sandboxed: The session's sandbox, None when there is none.
    """

    def __init__(self, workspace: Workspace, sandboxed: Sandboxed | None) -> None:
        self._workspace = workspace
        self._sandboxed = sandboxed

    async def glob(self, pattern: str, path: str) -> str:
        """The files whose path matches, newest first; at most 200."""
        if pattern.startswith("/") or ".." in pattern.split("/"):
            raise ToolError("the pattern must be relative, without `..`")
        with self._workspace.directory(path) as spot:
            found = await self._walk(spot, {"tool": "glob", "pattern": pattern})
        return found or "no matches"

    async def grep(self, pattern: str, path: str, include: str | None) -> str:
        """The lines that match, as `path:line:text`."""
        with self._workspace.at(path) as spot:
            mode = os.stat(spot.name, dir_fd=spot.directory, follow_symlinks=False).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would be waited for
                raise ToolError(f"{path}: neither a file nor a directory")
            inside = spot.root is self._workspace.home
            if self._sandboxed and inside and RIPGREP.exists():
                found = await self._ripgrep(self._sandboxed, spot, pattern, include)
            elif stat.S_ISDIR(mode):
                with self._workspace.directory(path) as inner:
                    found = await self._walk(inner, _grep(pattern, include))
            else:
                found = await self._walk(spot, _grep(pattern, include) | {"name": spot.name})
        return found or "no matches"

    async def _ripgrep(
        self, sandboxed: Sandboxed, spot: Spot, pattern: str, include: str | None
    ) -> str:
        options = ["--no-config", "-n", "--no-heading", "--with-filename", "--sort=path"]
        options += [f"--max-columns={walker.LINE_BYTES}"]
        options += [f"--glob={include}"] if include else []
        where = self._workspace.relative(spot.shown)
        words = [*sandboxed.prefix, str(RIPGREP), *options, "-e", pattern, "--", where or "./"]
        status, found, said = await _bounded(words, sandboxed.environment)
        if status not in {0, _NOTHING} and not found:
            raise ToolError(f"grep: {said.strip() or 'failed'}")
        return found.replace("\n./", "\n").removeprefix("./")

    async def _walk(self, spot: Spot, request: dict[str, str | None]) -> str:
        where = self._workspace.relative(spot.shown)
        prefix = where if "name" in request or not where else f"{where}/"
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=spot.directory)
        try:
            asked = json.dumps(request | {"directory": directory, "prefix": prefix})
            words = [sys.executable, "-I", "-S", _WALKER, asked]
            status, found, said = await _bounded(words, {}, (directory,))
        finally:
            os.close(directory)
        if status == walker.BAD_REQUEST:
            raise ToolError(said.strip())
        if status and not found:
            raise ToolError(f"the search failed, or took more than {walker.CPU_SECONDS} s")
        return found


def _grep(pattern: str, include: str | None) -> dict[str, str | None]:
    return {"tool": "grep", "pattern": pattern, "include": include}


async def _bounded(
    words: Sequence[str], environment: Mapping[str, str], passed: tuple[int, ...] = ()
) -> tuple[int, str, str]:
    """Run a search: its status, what it found, what it said. Killed when that is enough or late."""
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
            enough = functools.partial(_kill, process)
            found = group.create_task(_start_of(process.stdout, GREP_BYTES, enough), name="found")
            said = group.create_task(_start_of(process.stderr, ERROR_CHARACTERS), name="said")
            await process.wait()
    except TimeoutError:
        raise ToolError(f"the search took more than {SEARCH_SECONDS:.0f} s") from None
    finally:
        _kill(process)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_SECONDS):
                await process.communicate()  # `wait` alone would wait for ever on an unread pipe
    text, cut = found.result()
    return process.returncode or 0, text + (CUT if cut else ""), said.result()[0]


async def _start_of(
    stream: asyncio.StreamReader | None, limit: int, on_cut: Callable[[], None] | None = None
) -> tuple[str, bool]:
    """What a stream begins with, in whole lines, and whether there was more.

    Reads to the end whatever it keeps: on an unread pipe a process stands still, and its end is
    never told.
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


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
