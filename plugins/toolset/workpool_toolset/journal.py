"""The journal of a session's calls on this machine, which survives a crash.

The mark of a call is on disk *before* the call is executed, and its result before it is sent. So
after a crash each call is in one of three states: not begun (run it), begun without a result (its
effects are unknown: say so, and never run it again), or with a result (send it, however often).

There is one file for each fact, created in one step, and no lock: a worker that stops during a
write blocks no other worker. The mark also separates two workers of one machine: of a worker that
slept through its lease and the one that took the item over, only one can begin a call. See
plugins/toolset/README.md, "Exactly once".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from typing import TYPE_CHECKING, Literal

from workpool_toolset.results import Result

if TYPE_CHECKING:
    from pathlib import Path

    from workpool import DaemonThreads


class CallJournal:
    """The journal of one session, in a directory of its own. Used on threads.

    Attributes:
        new: Whether `open` created the directory.
        name: A name that differs from those of the session's journals on other machines.
    """

    def __init__(self, folder: Path, threads: DaemonThreads) -> None:
        self._folder = folder
        self._threads = threads
        self.new = False
        self.name = ""

    async def open(self) -> None:
        """Create the directory and its name, unless they exist."""
        await self._threads.run(self._make_directory)

    async def begin(self, call: str) -> Result | Literal["new", "begun"]:
        """Write the mark of a call. Only a call that is "new" may be executed.

        Returns:
            "new"; or the result of a call that was begun before, "begun" without a result.
        """
        return await self._threads.run(self._write_mark, call)

    async def finish(self, call: str, result: Result) -> None:
        """Store the result of a call until `forget`."""
        await self._threads.run(self._write_result, call, result)

    async def forget(self, call: str) -> None:
        """Delete the result, which the control plane has. The mark stays."""
        path = self._call_path(call, "result")
        await self._threads.run(path.unlink, missing_ok=True)

    def _call_path(self, call: str, fact: str) -> Path:
        # An id is text from outside, so it is no part of a path; the mark contains it for people.
        return self._folder / f"{hashlib.sha256(_result_bytes(call)).hexdigest()[:40]}.{fact}"

    def _make_directory(self) -> None:
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)
            self.new = True
            _sync_directory(self._folder.parent)
        path = self._folder / "name"
        if not path.exists():
            written = self._temporary_file(secrets.token_hex(8))
            with contextlib.suppress(FileExistsError):  # Of two concurrent calls, one creates it.
                path.hardlink_to(written)
            written.unlink()
            _sync_directory(self._folder)
        self.name = path.read_text()

    def _write_mark(self, call: str) -> Result | Literal["new", "begun"]:
        path = self._call_path(call, "begun")
        try:
            mark = path.open("xb")
        except FileExistsError:
            try:
                return Result(**json.loads(self._call_path(call, "result").read_text()))
            except FileNotFoundError:
                return "begun"
        try:
            with mark:
                mark.write(_result_bytes(call))
            _sync_directory(self._folder)
        except OSError:  # A call that was not begun must not look as if it was.
            path.unlink()
            raise
        return "new"

    def _write_result(self, call: str, result: Result) -> None:
        text = json.dumps({"content": result.content, "is_error": result.is_error})
        self._temporary_file(text).rename(self._call_path(call, "result"))
        _sync_directory(self._folder)

    def _temporary_file(self, text: str) -> Path:
        """Write a temporary file to disk, which the block then renames or links."""
        path = self._folder / f"{secrets.token_hex(8)}.tmp"
        try:
            with path.open("x") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError:  # A full disk must not keep an incomplete file.
            path.unlink(missing_ok=True)
            raise
        return path


def _result_bytes(call: str) -> bytes:
    return call.encode(errors="backslashreplace")


def _sync_directory(folder: Path) -> None:
    """Write a directory's entries to disk, or a power failure could lose its new files."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
