"""The output of a command, which is logged up to a limit and not stored.

A command is never blocked by its output forever, and cannot exhaust memory, log or CPU with it:
output beyond the limit of the log is read slowly and dropped.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from workpool_command.ending import RESULT_LIMIT

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator
    from typing import Self

CHUNK: Final = 65_536
PAUSE_SECONDS: Final = 0.01
"""Seconds between two dropped chunks: some 6 MB/s, so that `yes` does not use all the CPU."""
REST_LIMIT: Final = 1_048_576
"""Bytes that are read from a pipe after the command's end: as many as a pipe of Linux holds."""
SHOWN: Final = 2_000
"""Largest number of bytes of a line in the log."""


class OutputLog:
    """The session's log of a command's output: at most `limit` lines of both streams together."""

    def __init__(self, log: logging.LoggerAdapter[logging.Logger], limit: int) -> None:
        self._log = log
        self._left = limit
        self._dropped = 0

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached."""
        return self._left <= 0

    def add(self, name: str, text: bytes) -> None:
        """Log lines of a stream until the limit is reached."""
        lines = text.split(b"\n", self._left) if self._left else [text]
        for line in lines[: self._left]:
            self._log.info("%s: %s", name, escape_line(line))
        # Beyond the limit a stream of short lines costs little: the rest is one piece.
        self._dropped += sum(rest.count(b"\n") + 1 for rest in lines[self._left :])
        self._left = max(0, self._left - len(lines))

    def close(self) -> None:
        """Log how many lines were dropped."""
        if self._dropped:
            self._log.info("lines not logged: %d", self._dropped)


class LineSplitter:
    """Splits a stream into lines, of any length and in any encoding.

    Attributes:
        last: The last line that is not blank, or its first `RESULT_LIMIT` + 1 bytes.
    """

    def __init__(self, tell: Callable[[bytes], None]) -> None:
        """Create it with `tell`, which is called with whole lines, without the last newline."""
        self.last = b""
        self._tell = tell
        self._part = b""

    def feed(self, chunk: bytes) -> None:
        """Process a chunk of the stream."""
        whole, newline, rest = (self._part + chunk).rpartition(b"\n")
        if newline:
            self._end_line(whole)
        self._part = rest[: RESULT_LIMIT + 1]

    def close(self) -> None:
        """Add the bytes after the last newline as a line."""
        if self._part:
            self._end_line(self._part)
            self._part = b""

    def _end_line(self, lines: bytes) -> None:
        last = lines.rstrip().rpartition(b"\n")[2]
        self.last = last[: RESULT_LIMIT + 1] or self.last
        self._tell(lines)


class PipeReader:
    """Reads one stream of a command on the running loop during a `with` block.

    Never waits for the pipe's end: a process that has left the command's group may keep it open
    forever.

    Attributes:
        lines: The lines of the stream.
        writer: The command's end of the pipe.
    """

    def __init__(self, name: str, log: OutputLog, progress: Callable[[], None]) -> None:
        def _watch_pipe(lines: bytes) -> None:
            progress()
            log.add(name, lines)

        self.lines = LineSplitter(_watch_pipe)
        self.writer = -1
        self._reader = -1
        self._log = log
        self._pause: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._reader, self.writer = os.pipe()
        try:
            os.set_blocking(self._reader, False)
            self._resume_reading()
        except OSError:  # the loop cannot watch another descriptor
            self._close()
            raise
        return self

    def close_writing_end(self) -> None:
        """Close this process's copy of the writing end, once the command has its own."""
        os.close(self.writer)
        self.writer = -1

    def __exit__(self, *_: Any) -> None:
        """Read the rest of the pipe without waiting for more."""
        self._suspend_reading()
        taken = 0
        while taken < REST_LIMIT and (chunk := self._read_chunk()):
            taken += len(chunk)
            self.lines.feed(chunk)
        self.lines.close()
        self._close()

    def _close(self) -> None:
        os.close(self._reader)
        if self.writer != -1:
            os.close(self.writer)

    def _resume_reading(self) -> None:
        asyncio.get_running_loop().add_reader(self._reader, self._read_available)

    def _suspend_reading(self) -> None:
        asyncio.get_running_loop().remove_reader(self._reader)
        if self._pause is not None:
            self._pause.cancel()

    def _read_available(self) -> None:
        chunk = self._read_chunk()
        if chunk:
            self.lines.feed(chunk)
        if chunk == b"":
            self._suspend_reading()
        elif self._log.is_full:
            self._suspend_reading()
            self._pause = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._resume_reading)

    def _read_chunk(self) -> bytes | None:
        """Return a chunk; empty bytes at the end of the pipe; None if nothing can be read yet."""
        try:
            return os.read(self._reader, CHUNK)
        except BlockingIOError:
            return None


@contextmanager
def logged_output(
    log: logging.LoggerAdapter[logging.Logger], limit: int, progress: Callable[[], None]
) -> Iterator[tuple[PipeReader, PipeReader]]:
    """Read stdout and stderr of a command into a log of at most `limit` lines.

    `progress` is called for lines that were read, also beyond the limit.
    """
    bounded = OutputLog(log, limit)
    try:
        with (
            PipeReader("stdout", bounded, progress) as stdout,
            PipeReader("stderr", bounded, progress) as stderr,
        ):
            yield stdout, stderr
    finally:
        bounded.close()


def escape_line(line: bytes) -> str:
    """Return a line for the log, in which no byte can forge another line."""
    text = line[:SHOWN].rstrip(b"\r").decode(errors="backslashreplace")
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return f"{text} … (cut)" if len(line) > SHOWN else text
