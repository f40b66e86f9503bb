"""One persistent bash of a session: its commands run one after the other and share its state.

A command is read from a pipe, so nothing that it prints can be taken for the shell's own words: the
end of its output is marked by a random word that is made of two halves, which an echo of the source
shows apart. What is killed is the whole process group, and with it, in a sandbox, everything.
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

_CHUNK: Final = 64 * 1024
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
                # Heard from before it is given anything: a sandbox that is still being built when
                # its worker is killed may outlive it, and must find no command then, only the end.
                await self._run(":", self._started)
            return await self._run(command, self._started)
        except BaseException:
            self.ended = True
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
            started.pipe.close()
        self._started = None  # not before: what was cancelled here is awaited by the next call

    async def _start(self) -> _Started:
        # A pipe of our own: asyncio's would count as open while any child that escaped holds it.
        read, write = os.pipe()
        with os.fdopen(read, "rb", 0) as source, os.fdopen(write, "wb", 0) as sink:
            reader = asyncio.StreamReader()
            pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader),
                os.fdopen(os.dup(source.fileno()), "rb", 0),
            )
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._words,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=sink,
                    stderr=sink,
                    env=self._environment,
                    cwd=self._folder,
                    start_new_session=True,
                )
            except BaseException:
                pipe.close()
                raise
        return _Started(process, cast("asyncio.StreamWriter", process.stdin), reader, pipe)

    async def _run(self, command: str, started: _Started) -> Output:
        first, second = secrets.token_hex(8), secrets.token_hex(8)
        script = (
            f"eval {shlex.quote(command)} </dev/null 2>&1\n"
            f"\\builtin printf '\\n%s%s %d\\n' {first} {second} \"$?\"\n"
        )
        with contextlib.suppress(ConnectionError):  # it has ended: reading tells
            started.stdin.write(script.encode(errors="replace"))
            await started.stdin.drain()
        mark = re.compile(rb"\n" + (first + second).encode() + rb" (-?\d+)?[^\n]*\n")
        while True:
            chunk = await started.reader.read(_CHUNK)
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
    reader: asyncio.StreamReader
    pipe: asyncio.ReadTransport


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
