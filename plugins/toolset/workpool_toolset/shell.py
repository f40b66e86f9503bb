"""One persistent bash of a session: its commands run one after the other and share its state.

A command is read from a pipe, so nothing that it prints can be taken for the shell's own words: the
end of its output is marked by a random word that is made of two halves, which an echo of the source
shows apart. The mark is written to a descriptor that commands do not have, so `exec >file` does
not lose it. What is killed is the whole process group, and with it, in a sandbox, everything.
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
"""From SIGTERM to SIGKILL."""
REAP_SECONDS: Final = 5.0
"""From SIGKILL to giving up the wait; a process in the kernel can take its time."""

_MARKS: Final = 199
"""The descriptor of the shell's output that marks are written to."""
_CHUNK: Final = 64 * 1024
_REST_BYTES: Final = 1024 * 1024
"""Read of the output after the shell's exit: the most that Linux lets a pipe hold."""
_ANSI: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


class ShellEnded(Exception):
    """The shell ended under a command: its output so far, and how it ended."""

    def __init__(self, output: str, status: int | None) -> None:
        super().__init__(f"the shell ended with status {status}")
        self.output = output
        self.status = status


@dataclass(frozen=True, slots=True)
class Output:
    """What a command printed, its end at most, and its exit status; -1 when that is unknown."""

    text: str
    status: int


class Shell:
    """Started by its first command; never started anew unless `restart` is called.

    Args:
        words: The command line of the shell, sandbox included.
        environment: All of its variables.
        folder: Where it starts, None where its command line says.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], folder: Path | None
    ) -> None:
        self._words = tuple(words)
        self._environment = dict(environment)
        self._folder = folder
        self._started: _Started | None = None
        self._printed = _Tail()
        self.ended = False

    async def run(self, command: str) -> Output:
        """Run one command to its end; if that does not come, the shell is shut.

        Raises:
            ShellEnded: It ended by itself, as after `exit`.
        """
        self._printed = _Tail()
        try:
            if self._started is None:
                self._started = await self._start()
                self._started.stdin.write(f"exec {_MARKS}>&1\n".encode())
                # Heard from before it is given anything: a sandbox that is still being built when
                # its worker is killed may outlive it, and must find no command then, only the end.
                await self._run(":", self._started)
            return await self._run(command, self._started)
        except BaseException:
            self.ended = self._started is not None  # what was not started can be tried again
            await self.close()
            raise

    @property
    def printed(self) -> str:
        """What the latest command has printed so far."""
        return self._printed.text()

    async def restart(self) -> None:
        """End the shell with all its processes; the next command starts a new one."""
        await self.close()
        self.ended = False

    async def close(self) -> None:
        """End the shell with all its processes: asked first, then killed. Safe to repeat."""
        started = self._started
        if started is None:
            return
        try:
            await _end(started.process)
        finally:
            started.stdin.close()
            started.output.close()
        self._started = None  # not before: what was cancelled here is awaited by the next call

    async def _start(self) -> _Started:
        output = _Output()
        try:
            process = await self._spawn(output)
        except BaseException:
            output.close()
            raise
        return _Started(process, cast("asyncio.StreamWriter", process.stdin), output)

    async def _spawn(self, output: _Output) -> Process:
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
            output.watch(process.pid)
        except OSError:
            await _end(process)
            raise
        return process

    async def _run(self, command: str, started: _Started) -> Output:
        first, second = secrets.token_hex(8), secrets.token_hex(8)
        script = (
            f"eval {shlex.quote(command)} </dev/null 2>&{_MARKS} {_MARKS}>&-\n"
            f"\\builtin printf '\\n%s%s %d\\n' {first} {second} \"$?\" >&{_MARKS}\n"
        )
        with contextlib.suppress(ConnectionError):  # it has ended: reading tells
            started.stdin.write(script.encode(errors="replace"))
            await started.stdin.drain()
        mark = re.compile(rb"\n" + (first + second).encode() + rb" (-?\d+)?[^\n]*\n")
        while True:
            chunk = await started.output.read()
            if not chunk:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REAP_SECONDS):
                        await started.process.wait()
                raise ShellEnded(self.printed, started.process.returncode)
            if status := self._printed.add(chunk, mark):
                return Output(self.printed, status.code)


class _Started(NamedTuple):
    process: Process
    stdin: asyncio.StreamWriter
    output: _Output


class _Output:
    """What a shell prints, until it has exited: its jobs may hold the pipe open for longer.

    Attributes:
        writer: The shell's end of the pipe; whoever starts the shell closes it.
    """

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._pidfd = -1
        self._rest: int | None = None
        self._changed = asyncio.Event()

    def watch(self, shell: int) -> None:
        """Notice the exit of this process.

        Raises:
            OSError: It cannot be watched.
        """
        try:
            self._pidfd = os.pidfd_open(shell)
            asyncio.get_running_loop().add_reader(self._pidfd, self._exited)
        except ProcessLookupError:
            self._exited()

    async def read(self) -> bytes:
        """The next piece; nothing at the end of the pipe, or when the shell left nothing more."""
        while self._rest is None:
            await self._change()
            with contextlib.suppress(BlockingIOError):
                return os.read(self._reader, _CHUNK)
        self._rest -= _CHUNK
        try:
            return os.read(self._reader, _CHUNK) if self._rest >= 0 else b""
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Close the pipe. Safe to repeat."""
        self._stop_watching()
        if self._reader != -1:
            os.close(self._reader)
            self._reader = -1

    async def _change(self) -> None:
        # Always by way of the loop: a command that prints without end must not block it.
        loop = asyncio.get_running_loop()
        self._changed.clear()
        loop.add_reader(self._reader, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            loop.remove_reader(self._reader)

    def _exited(self) -> None:
        self._stop_watching()
        self._rest = _REST_BYTES
        self._changed.set()

    def _stop_watching(self) -> None:
        if self._pidfd != -1:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


@dataclass(frozen=True, slots=True)
class _Status:
    code: int


class _Tail:
    """The end of what a command printed: as much as is kept, and whether that is all."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._cut = False

    def add(self, chunk: bytes, mark: re.Pattern[bytes]) -> _Status | None:
        """Add output; the command's status once its end is marked."""
        before = max(0, len(self._kept) - 128)  # the mark may lie across two chunks
        self._kept += chunk
        if found := mark.search(self._kept, before):
            status = _Status(int(found[1]) if found[1] else -1)
            del self._kept[found.start() :]
            return status
        if len(self._kept) > 2 * OUTPUT_BYTES:
            del self._kept[:-OUTPUT_BYTES]
            self._cut = True
        return None

    def text(self) -> str:
        """For people: without colours, cut at the front."""
        kept = bytes(self._kept[-OUTPUT_BYTES:])
        cut = self._cut or len(kept) < len(self._kept)
        return (TRUNCATED if cut else "") + _ANSI.sub("", kept.decode(errors="replace"))


async def _end(process: Process) -> None:
    try:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERM_SECONDS):
                await process.wait()
    finally:
        # Also when cancelled, and when the leader has exited: the group may have outlived it.
        _signal(process, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REAP_SECONDS):
            await process.wait()


def _signal(process: Process, number: signal.Signals) -> None:
    # Its pid is the group's id, which nobody else gets while members are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
