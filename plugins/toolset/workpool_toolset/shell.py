"""The bash process of a session. Its commands run in sequence and share variables and directory.

A random word, the end marker, ends the output of a command. The script contains the marker in two
halves, so an echo of the script does not look like the marker. The marker is written to a
descriptor that commands do not have, so `exec >file` does not redirect it. A kill ends the whole
process group, and in a sandbox all processes.
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
"""The largest output of a command that is returned: its last part, in bytes."""
TRUNCATED: Final = "[output truncated]\n"
TERM_SECONDS: Final = 1.0
"""The seconds between SIGTERM and SIGKILL."""
REAP_SECONDS: Final = 5.0
"""The longest wait after SIGKILL, in seconds. A process may be blocked in the kernel."""

_MARKER_FD: Final = 199
"""The number of the descriptor to which the shell writes end markers."""
_CHUNK: Final = 64 * 1024
_REST_BYTES: Final = 1024 * 1024
"""The bytes that are read after the shell's exit: the largest content of a pipe."""
_ANSI: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


class ShellEndedError(Exception):
    """Raised if the shell ends during a command, with the output so far and the exit status."""

    def __init__(self, output: str, status: int | None) -> None:
        super().__init__(f"the shell ended with status {status}")
        self.output = output
        self.status = status


@dataclass(frozen=True, slots=True)
class CommandOutput:
    """The last part of a command's output, and the command's exit status (-1 if unknown)."""

    text: str
    status: int


class BashShell:
    """Runs commands in one bash process, which the first command starts.

    After this process has ended, `restart` must be called before the next command.

    Args:
        words: The command line of the shell, with its sandbox.
        environment: All environment variables.
        folder: The working directory; None: the command line sets it.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], folder: Path | None
    ) -> None:
        self._words = tuple(words)
        self._environment = dict(environment)
        self._folder = folder
        self._started: _ShellProcess | None = None
        self._output = _OutputTail()
        self.ended = False

    async def run_command(self, command: str) -> CommandOutput:
        """Run one command to its end. A cancellation ends the shell.

        Raises:
            ShellEndedError: The shell ended by itself, for example after `exit`.
        """
        self._output = _OutputTail()
        try:
            if self._started is None:
                self._started = await self._start_shell()
                self._started.stdin.write(f"exec {_MARKER_FD}>&1\n".encode())
                # Send the first command only after the shell has answered. If the worker is killed
                # while the sandbox starts, the sandbox may survive. A surviving sandbox must not
                # run a command.
                await self._run_command_in_started_shell(":", self._started)
            return await self._run_command_in_started_shell(command, self._started)
        except BaseException:
            # Require `restart` only if the shell had started. After a failed start, the next
            # command tries to start the shell again.
            self.ended = self._started is not None
            await self.close()
            raise

    @property
    def output_so_far(self) -> str:
        """The output that the running command has written so far."""
        return self._output.output_text()

    async def restart(self) -> None:
        """End the shell with all its processes, and let the next command start a new shell."""
        await self.close()
        self.ended = False

    async def close(self) -> None:
        """End the shell and all its processes, with SIGTERM and then SIGKILL."""
        started = self._started
        if started is None:
            return
        try:
            await _end_process_group(started.process)
        finally:
            started.stdin.close()
            started.output.close()
        # Reset `_started` last. If this `close` is cancelled, the next `close` must still end the
        # shell.
        self._started = None

    async def _start_shell(self) -> _ShellProcess:
        output = _ShellOutput()
        try:
            process = await self._spawn_shell(output)
        except BaseException:
            output.close()
            raise
        return _ShellProcess(process, cast("asyncio.StreamWriter", process.stdin), output)

    async def _spawn_shell(self, output: _ShellOutput) -> Process:
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
            output.watch_shell_exit(process.pid)
        except OSError:
            await _end_process_group(process)
            raise
        return process

    async def _run_command_in_started_shell(
        self, command: str, started: _ShellProcess
    ) -> CommandOutput:
        first, second = secrets.token_hex(8), secrets.token_hex(8)
        script = (
            f"eval {shlex.quote(command)} </dev/null 2>&{_MARKER_FD} {_MARKER_FD}>&-\n"
            f"\\builtin printf '\\n%s%s %d\\n' {first} {second} \"$?\" >&{_MARKER_FD}\n"
        )
        # Ignore a failed write to a shell that has ended. The read below reports the end.
        with contextlib.suppress(ConnectionError):
            started.stdin.write(script.encode(errors="replace"))
            await started.stdin.drain()
        end_marker = re.compile(rb"\n" + (first + second).encode() + rb" (-?\d+)?[^\n]*\n")
        while True:
            chunk = await started.output.read_output_chunk()
            if not chunk:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REAP_SECONDS):
                        await started.process.wait()
                raise ShellEndedError(self.output_so_far, started.process.returncode)
            if status := self._output.add_output(chunk, end_marker):
                return CommandOutput(self.output_so_far, status.code)


class _ShellProcess(NamedTuple):
    process: Process
    stdin: asyncio.StreamWriter
    output: _ShellOutput


class _ShellOutput:
    """Reads a shell's output until the shell exits, even if background jobs keep the pipe open.

    Attributes:
        writer: The writing end of the pipe. The caller passes it to the shell and closes it.
    """

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._pidfd = -1
        self._rest: int | None = None
        self._changed = asyncio.Event()

    def watch_shell_exit(self, shell: int) -> None:
        """Watch for the exit of the shell, given by its process id.

        Raises:
            OSError: The process cannot be watched.
        """
        try:
            self._pidfd = os.pidfd_open(shell)
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_shell_exit)
        except ProcessLookupError:
            self._on_shell_exit()

    async def read_output_chunk(self) -> bytes:
        """Return the next chunk of output, or empty bytes at the end of the shell's output."""
        while self._rest is None:
            await self._wait_until_output_is_readable()
            with contextlib.suppress(BlockingIOError):
                return os.read(self._reader, _CHUNK)
        self._rest -= _CHUNK
        try:
            return os.read(self._reader, _CHUNK) if self._rest >= 0 else b""
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Close the pipe, or do nothing if it is closed."""
        self._stop_watching_exit()
        if self._reader != -1:
            os.close(self._reader)
            self._reader = -1

    async def _wait_until_output_is_readable(self) -> None:
        # Wait in the event loop even if the pipe has output. Otherwise a command that prints
        # endlessly would block the loop.
        loop = asyncio.get_running_loop()
        self._changed.clear()
        loop.add_reader(self._reader, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            loop.remove_reader(self._reader)

    def _on_shell_exit(self) -> None:
        self._stop_watching_exit()
        self._rest = _REST_BYTES
        self._changed.set()

    def _stop_watching_exit(self) -> None:
        if self._pidfd != -1:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


@dataclass(frozen=True, slots=True)
class _CommandExitStatus:
    code: int


class _OutputTail:
    """Stores the last part of a command's output, and whether an earlier part was dropped."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._cut = False

    def add_output(self, chunk: bytes, end_marker: re.Pattern[bytes]) -> _CommandExitStatus | None:
        """Add output. Return the command's exit status, or None before the end marker arrives."""
        # Search also the end of the previous chunk, because the marker may begin there.
        before = max(0, len(self._kept) - 128)
        self._kept += chunk
        if found := end_marker.search(self._kept, before):
            status = _CommandExitStatus(int(found[1]) if found[1] else -1)
            del self._kept[found.start() :]
            return status
        if len(self._kept) > 2 * OUTPUT_BYTES:
            del self._kept[:-OUTPUT_BYTES]
            self._cut = True
        return None

    def output_text(self) -> str:
        """Return the output without control sequences, and with a note if it was cut."""
        kept = bytes(self._kept[-OUTPUT_BYTES:])
        cut = self._cut or len(kept) < len(self._kept)
        return (TRUNCATED if cut else "") + _ANSI.sub("", kept.decode(errors="replace"))


async def _end_process_group(process: Process) -> None:
    try:
        _send_signal_to_group(process, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERM_SECONDS):
                await process.wait()
    finally:
        # Always send SIGKILL, because processes of the group may outlive its leader, and the wait
        # above may have been cancelled.
        _send_signal_to_group(process, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REAP_SECONDS):
            await process.wait()


def _send_signal_to_group(process: Process, number: signal.Signals) -> None:
    # The signal reaches no unrelated process, because the kernel does not reuse the id of a group
    # while one of its processes exists.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
