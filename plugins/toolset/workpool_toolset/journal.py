"""What this machine knows of a session's calls: begun, and with which result. Survives a crash.

A mark is on disk *before* a call is executed, and its result before it is sent. So after a crash
each call is one of three: never begun (run it), begun without a result (nobody knows how far it
got: say so, never run it again), or with a result (send it, however often).

One file per fact, made in one step, and no lock: a worker that is stopped in the middle of a write
holds up nobody. Making the mark also keeps two workers of one machine apart: of one that slept
through its lease and the one that took over, only one can begin a call.
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


class Journal:
    """One session's journal, in a directory of its own, used on threads.

    Attributes:
        new: Whether the directory was made by `open`.
        name: Tells this journal from the session's journals on other machines.
    """

    def __init__(self, folder: Path, threads: DaemonThreads) -> None:
        self._folder = folder
        self._threads = threads
        self.new = False
        self.name = ""

    async def open(self) -> None:
        """Make the directory, if there is none, and give it its name."""
        await self._threads.run(self._make)

    async def begin(self, call: str) -> Result | Literal["new", "begun"]:
        """Note that a call is about to be executed; "new" is the leave to execute it.

        Returns:
            "new", or, when it was begun before, its result, or "begun" when there is none.
        """
        return await self._threads.run(self._begin, call)

    async def finish(self, call: str, result: Result) -> None:
        """Keep a call's result until `forget`."""
        await self._threads.run(self._finish, call, result)

    async def forget(self, call: str) -> None:
        """Drop the result, since the control plane has it; that the call was begun stays known."""
        path = self._path(call, "result")
        await self._threads.run(path.unlink, missing_ok=True)

    def _path(self, call: str, fact: str) -> Path:
        # An id is another's word, and becomes no path of ours; the mark holds it, for people.
        return self._folder / f"{hashlib.sha256(_bytes(call)).hexdigest()[:40]}.{fact}"

    def _make(self) -> None:
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)
            self.new = True
            _sync(self._folder.parent)
        path = self._folder / "name"
        if not path.exists():
            written = self._written(secrets.token_hex(8))
            with contextlib.suppress(FileExistsError):  # of two at once, one gives it
                path.hardlink_to(written)
            written.unlink()
            _sync(self._folder)
        self.name = path.read_text()

    def _begin(self, call: str) -> Result | Literal["new", "begun"]:
        path = self._path(call, "begun")
        try:
            mark = path.open("xb")
        except FileExistsError:
            try:
                return Result(**json.loads(self._path(call, "result").read_text()))
            except FileNotFoundError:
                return "begun"
        try:
            with mark:
                mark.write(_bytes(call))
            _sync(self._folder)
        except OSError:  # a call that was not begun must not be taken for one that was
            path.unlink()
            raise
        return "new"

    def _finish(self, call: str, result: Result) -> None:
        text = json.dumps({"content": result.content, "is_error": result.is_error})
        self._written(text).rename(self._path(call, "result"))
        _sync(self._folder)

    def _written(self, text: str) -> Path:
        """A file that is on disk, to be put in place in one step."""
        path = self._folder / f"{secrets.token_hex(8)}.tmp"
        try:
            with path.open("x") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError:  # a full disk must not keep the half of it as well
            path.unlink(missing_ok=True)
            raise
        return path


def _bytes(call: str) -> bytes:
    return call.encode(errors="backslashreplace")


def _sync(folder: Path) -> None:
    """Bring a directory's names to disk: a file outlives a power cut only with its name."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
