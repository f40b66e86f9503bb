"""A journal on disk of the tool calls that a session made on this machine.

The begin record of a call is on disk *before* the call is executed, and its result before it is
sent. So after a crash each call is in one of three states: not begun (execute it), begun without a
result (its effects are unknown: answer with an error and never execute it again), or with a result
(send the result).

Each record is a file of its own, created in one step without a lock, so a suspended worker blocks
no other worker. Of two workers on one machine that both try to begin a call, only one succeeds. See
plugins/toolset/README.md, "Exactly once".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from typing import TYPE_CHECKING, Literal

from workpool_toolset.tool_result import ToolResult

if TYPE_CHECKING:
    from pathlib import Path

    from workpool import DaemonThreads


class CallJournal:
    """The journal of one session's tool calls, in a directory of its own.

    The journal reads and writes its files on the given threads.

    Attributes:
        is_new: Whether `open_directory` created the directory.
        name: A random name, which journals of the session on other machines do not have.
    """

    def __init__(self, directory: Path, threads: DaemonThreads) -> None:
        self._directory = directory
        self._threads = threads
        self.is_new = False
        self.name = ""

    async def open_directory(self) -> None:
        """Create the journal's directory and the file that stores `name`, unless they exist."""
        await self._threads.run(self._make_journal_directory)

    async def begin_call(self, call: str) -> ToolResult | Literal["new", "begun"]:
        """Record on disk that a call begins. The caller executes the call if "new" is returned.

        Returns:
            "new"; for a call that was begun before, its stored result, or "begun" if it has none.
        """
        return await self._threads.run(self._write_begin_record, call)

    async def store_result(self, call: str, result: ToolResult) -> None:
        """Store the result of a call on disk, so that it can be sent after a crash."""
        await self._threads.run(self._write_result, call, result)

    async def delete_result(self, call: str) -> None:
        """Delete the stored result of a call, which the control plane has received.

        The record that the call has begun remains.
        """
        path = self._call_record_path(call, "result")
        await self._threads.run(path.unlink, missing_ok=True)

    def _call_record_path(self, call: str, kind: str) -> Path:
        # Name the file by a hash of the call's id. The id comes from outside and could contain `/`.
        return self._directory / f"{hashlib.sha256(_encode_call_id(call)).hexdigest()[:40]}.{kind}"

    def _make_journal_directory(self) -> None:
        with contextlib.suppress(FileExistsError):
            self._directory.mkdir(mode=0o700)
            self.is_new = True
            _fsync_directory(self._directory.parent)
        path = self._directory / "name"
        if not path.exists():
            written = self._write_temporary_file(secrets.token_hex(8))
            # Another process may create the file first, with another name for the journal. The name
            # that is in the file counts.
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(written)
            written.unlink()
            _fsync_directory(self._directory)
        self.name = path.read_text()

    def _write_begin_record(self, call: str) -> ToolResult | Literal["new", "begun"]:
        path = self._call_record_path(call, "begun")
        try:
            record = path.open("xb")
        except FileExistsError:
            try:
                return ToolResult(**json.loads(self._call_record_path(call, "result").read_text()))
            except FileNotFoundError:
                return "begun"
        try:
            with record:
                record.write(_encode_call_id(call))
            _fsync_directory(self._directory)
        except OSError:
            # Remove the record that says that the call has begun: this call is not executed.
            path.unlink()
            raise
        return "new"

    def _write_result(self, call: str, result: ToolResult) -> None:
        text = json.dumps({"content": result.content, "is_error": result.is_error})
        self._write_temporary_file(text).rename(self._call_record_path(call, "result"))
        _fsync_directory(self._directory)

    def _write_temporary_file(self, text: str) -> Path:
        """Write a temporary file to disk. Return its path, which the caller renames or links."""
        path = self._directory / f"{secrets.token_hex(8)}.tmp"
        try:
            with path.open("x") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            # Remove the incomplete file, which would occupy space on a disk that may be full.
            path.unlink(missing_ok=True)
            raise
        return path


def _encode_call_id(call: str) -> bytes:
    return call.encode(errors="backslashreplace")


def _fsync_directory(directory: Path) -> None:
    """Write a directory's entries to disk, so that a power failure does not lose new files."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
