"""The bash of a session, whose commands run one after the other and share its state.

A random word marks the end of a command's output. It consists of two halves, which an echo of the
source shows separately, so no output of a command looks like the mark. The mark is written to a
descriptor that commands do not have, so `exec >file` does not redirect it. A kill ends the whole
process group, and in a sandbox all its processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shlex
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, cast

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Mapping, Sequence
    from pathlib import Path

OUTPUT_BYTES: Final = 100 * 1024
TRUNCATED: Final = "[output truncated]\n"
TERM_SECONDS: Final = 1.0
"""Seconds from SIGTERM to SIGKILL."""
REAP_SECONDS: Final = 5.0
"""Seconds to wait after SIGKILL; a process may be blocked in the kernel."""

_MARKS: Final = 199
"""The descriptor for the marks."""
_CHUNK: Final = 64 * 1024
_REST_BYTES: Final = 1024 * 1024
"""Bytes to read after the shell's exit: the largest pipe of Linux."""
_ANSI: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


class ShellEnded(Exception):
    """The shell ended during a command. The error has the output so far and the reason."""

    def __init__(self, output: str, status: int | None) -> None:
        super().__init__(f"the shell ended with status {status}")
        self.output = output
        self.status = status


@dataclass(frozen=True, slots=True)
class CommandOutput:
    """The last part of a command's output, and its exit status; -1 if unknown."""

    text: str
    status: int


class BashShell:
    """A shell that its first command starts, and that only `restart` starts again.

    Args:
        words: The command line of the shell, with its sandbox.
        environment: All variables.
        folder: The directory; None: the one of the command line.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], folder: Path | None
    ) -> None:
        self._words = tuple(words)
        self._environment = dict(environment)
        self._folder = folder
        self._started: _StartedShell | None = None
        self._printed = _OutputTail()
        self.ended = False

    async def run_command(self, command: str) -> CommandOutput:
        """Run one command to its end. If it is cancelled, the shell is ended.

        Raises:
            ShellEnded: The shell ended by itself, for example after `exit`.
        """
        self._printed = _OutputTail()
        try:
            if self._started is None:
                self._started = await self._start_shell()
                self._started.stdin.write(f"exec {_MARKS}>&1\n".encode())
                # A command is sent only after the shell's first answer: a sandbox that is being
                # built when its worker is killed may outlive the worker, and must get no command.
                await self._send_and_read(":", self._started)
            return await self._send_and_read(command, self._started)
        except BaseException:
            self.ended = self._started is not None  # A shell that did not start can be tried again.
            await self.close()
            raise

    @property
    def output_so_far(self) -> str:
        """Return the output of the current command so far."""
        return self._printed.text()

    async def restart(self) -> None:
        """End the shell with all its processes; the next command starts a new one."""
        await self.close()
        self.ended = False

    async def close(self) -> None:
        """End the shell with all its processes: SIGTERM, then SIGKILL. Idempotent."""
        started = self._started
        if started is None:
            return
        try:
            await _end_group(started.process)
        finally:
            started.stdin.close()
            started.output.close()
        # Not earlier: after a cancellation, the next call waits for the shell's end.
        self._started = None

    async def _start_shell(self) -> _StartedShell:
        output = _ShellOutput()
        try:
            process = await self._spawn(output)
        except BaseException:
            output.close()
            raise
        return _StartedShell(process, cast("asyncio.StreamWriter", process.stdin), output)

    async def _spawn(self, output: _ShellOutput) -> Process:
        with os.fdopen(output.writer, "wb", 0) as sink:
            process = await asyncio.create_subprocess_exec(
                *self._words,
                stdin=asyncio.subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )
        try:
            output.watch_exit(process.pid)
        except OSError:
            await _end_group(process)
            raise
        return process

    async def _send_and_read(self, command: str, started: _StartedShell) -> CommandOutput:
        first, second = secrets.token_hex(8), secrets.token_hex(8)
        script = (
            f"eval {shlex.quote(command)} </dev/null 2>&{_MARKS} {_MARKS}>&-\n"
            f"\\builtin printf '\\n%s%s %d\\n' {first} {second} \"$?\" >&{_MARKS}\n"
        )
        # The shell has ended, as the reader will notice.
        with contextlib.suppress(ConnectionError):
            started.stdin.write(script.encode(errors="replace"))
            await started.stdin.drain()
        mark = re.compile(rb"\n" + (first + second).encode() + rb" (-?\d+)?[^\n]*\n")
        while True:
            chunk = await started.output.read_piece()
            if not chunk:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REAP_SECONDS):
                        await started.process.wait()
                raise ShellEnded(self.output_so_far, started.process.returncode)
            if status := self._printed.add(chunk, mark):
                return CommandOutput(self.output_so_far, status.code)


class _StartedShell(NamedTuple):
    process: Process
    stdin: asyncio.StreamWriter
    output: _ShellOutput


class _ShellOutput:
    """The output of a shell until its exit: its jobs may keep the pipe open for longer.

    Attributes:
        writer: The shell's end of the pipe, which the starter of the shell closes.
    """

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._pidfd = -1
        self._rest: int | None = None
        self._changed = asyncio.Event()

    def watch_exit(self, shell: int) -> None:
        """Notice the exit of this process.

        Raises:
            OSError: The process cannot be watched.
        """
        try:
            self._pidfd = os.pidfd_open(shell)
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit)
        except ProcessLookupError:
            self._on_exit()

    async def read_piece(self) -> bytes:
        """Return the next piece; empty bytes at the end of the pipe or of the shell's output."""
        while self._rest is None:
            await self._wake_reader()
            with contextlib.suppress(BlockingIOError):
                return os.read(self._reader, _CHUNK)
        self._rest -= _CHUNK
        try:
            return os.read(self._reader, _CHUNK) if self._rest >= 0 else b""
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Close the pipe. Idempotent."""
        self._stop_watching()
        if self._reader != -1:
            os.close(self._reader)
            self._reader = -1

    async def _wake_reader(self) -> None:
        # Always through the loop: a command that prints without end must not block it.
        loop = asyncio.get_running_loop()
        self._changed.clear()
        loop.add_reader(self._reader, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            loop.remove_reader(self._reader)

    def _on_exit(self) -> None:
        self._stop_watching()
        self._rest = _REST_BYTES
        self._changed.set()

    def _stop_watching(self) -> None:
        if self._pidfd != -1:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


@dataclass(frozen=True, slots=True)
class _ExitMark:
    code: int


class _OutputTail:
    """The last part of a command's output, and whether it is complete."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._cut = False

    def add(self, chunk: bytes, mark: re.Pattern[bytes]) -> _ExitMark | None:
        """Add output; return the command's status after its mark."""
        before = max(0, len(self._kept) - 128)  # Two chunks may split the mark.
        self._kept += chunk
        if found := mark.search(self._kept, before):
            status = _ExitMark(int(found[1]) if found[1] else -1)
            del self._kept[found.start() :]
            return status
        if len(self._kept) > 2 * OUTPUT_BYTES:
            del self._kept[:-OUTPUT_BYTES]
            self._cut = True
        return None

    def text(self) -> str:
        """Return the text without colours, with a note if the first part is missing."""
        kept = bytes(self._kept[-OUTPUT_BYTES:])
        cut = self._cut or len(kept) < len(self._kept)
        return (TRUNCATED if cut else "") + _ANSI.sub("", kept.decode(errors="replace"))


async def _end_group(process: Process) -> None:
    try:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERM_SECONDS):
                await process.wait()
    finally:
        # The group ends also after a cancellation or the exit of its leader, which it may outlive.
        _signal_group(process, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REAP_SECONDS):
            await process.wait()


def _signal_group(process: Process, number: signal.Signals) -> None:
    # Its pid is the group's id, which the kernel does not reuse while members are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
