"""Logs a command's output up to a limit of lines, and drops the output after the limit.

A command can always write, and its output cannot exhaust memory, log or CPU: after the limit of
logged lines, output is read slowly and dropped.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from workpool_command.command_result import MAX_RESULT_BYTES

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator
    from typing import Self

CHUNK_BYTES: Final = 65_536
"""The largest number of bytes of one read."""
DROP_PAUSE_SECONDS: Final = 0.01
"""The pause between two dropped chunks, in seconds. An endless output is read with about 6 MB/s, so
that it does not use the whole CPU."""
MAX_REST_BYTES: Final = 1_048_576
"""The number of bytes that are read after the command's end: the largest content of a pipe."""
MAX_LINE_BYTES: Final = 2_000
"""The largest number of logged bytes of one line."""


class OutputLog:
    """Logs at most `limit` lines of a command's stdout and stderr together."""

    def __init__(self, log: logging.LoggerAdapter[logging.Logger], limit: int) -> None:
        self._log = log
        self._left = limit
        self._dropped = 0

    @property
    def has_reached_line_limit(self) -> bool:
        """Whether the limit of logged lines is reached."""
        return self._left <= 0

    def add_lines(self, stream: str, text: bytes) -> None:
        """Log lines of a stream up to the limit, and count the lines after the limit."""
        lines = text.split(b"\n", self._left) if self._left else [text]
        for line in lines[: self._left]:
            self._log.info("%s: %s", stream, escape_line(line))
        # Count the lines after the limit without splitting them, because splitting many short lines
        # would be slow.
        self._dropped += sum(rest.count(b"\n") + 1 for rest in lines[self._left :])
        self._left = max(0, self._left - len(lines))

    def log_dropped_count(self) -> None:
        """Log how many lines were dropped."""
        if self._dropped:
            self._log.info("lines not logged: %d", self._dropped)


class LineSplitter:
    """Splits a stream of bytes into lines, which may have any length and encoding.

    Attributes:
        last: The last line that is not blank, or its first `MAX_RESULT_BYTES` + 1 bytes.
    """

    def __init__(self, on_lines: Callable[[bytes], None]) -> None:
        """Create a splitter that calls `on_lines` with one or more whole lines at a time.

        The lines are separated by newlines, without a newline at the end.
        """
        self.last = b""
        self._on_lines = on_lines
        self._part = b""

    def add_chunk(self, chunk: bytes) -> None:
        """Add a chunk of the stream. Call `on_lines` with the lines that the chunk completes."""
        whole, newline, rest = (self._part + chunk).rpartition(b"\n")
        if newline:
            self._store_and_report_lines(whole)
        self._part = rest[: MAX_RESULT_BYTES + 1]

    def flush_unfinished_line(self) -> None:
        """Pass the bytes after the last newline to `on_lines` as a line."""
        if self._part:
            self._store_and_report_lines(self._part)
            self._part = b""

    def _store_and_report_lines(self, lines: bytes) -> None:
        last = lines.rstrip().rpartition(b"\n")[2]
        self.last = last[: MAX_RESULT_BYTES + 1] or self.last
        self._on_lines(lines)


class PipeReader:
    """Reads one stream of a command on the running loop during a `with` block.

    The reader never waits for the pipe's end, because a process that has left the command's group
    may keep the pipe open.

    Attributes:
        lines: The splitter of the stream.
        writer: The descriptor of the writing end of the pipe.
    """

    def __init__(self, name: str, log: OutputLog, progress: Callable[[], None]) -> None:
        def report_progress_and_log_lines(lines: bytes) -> None:
            progress()
            log.add_lines(name, lines)

        self.lines = LineSplitter(report_progress_and_log_lines)
        self.writer = -1
        self._reader = -1
        self._log = log
        self._pause: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._reader, self.writer = os.pipe()
        try:
            os.set_blocking(self._reader, False)
            self._resume_reading()
        except OSError:
            self._close_pipe()
            raise
        return self

    def close_write_end_of_pipe(self) -> None:
        """Close this process's copy of the writing end, after the command has inherited it."""
        os.close(self.writer)
        self.writer = -1

    def __exit__(self, *_: Any) -> None:
        """Read the remaining output from the pipe without waiting."""
        self._suspend_reading()
        total = 0
        while total < MAX_REST_BYTES and (chunk := self._read_output_chunk()):
            total += len(chunk)
            self.lines.add_chunk(chunk)
        self.lines.flush_unfinished_line()
        self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._reader)
        if self.writer != -1:
            os.close(self.writer)

    def _resume_reading(self) -> None:
        asyncio.get_running_loop().add_reader(self._reader, self._read_available_output)

    def _suspend_reading(self) -> None:
        asyncio.get_running_loop().remove_reader(self._reader)
        if self._pause is not None:
            self._pause.cancel()

    def _read_available_output(self) -> None:
        chunk = self._read_output_chunk()
        if chunk:
            self.lines.add_chunk(chunk)
        if chunk == b"":
            self._suspend_reading()
        elif self._log.has_reached_line_limit:
            self._suspend_reading()
            self._pause = asyncio.get_running_loop().call_later(
                DROP_PAUSE_SECONDS, self._resume_reading
            )

    def _read_output_chunk(self) -> bytes | None:
        """Return a chunk, empty bytes at the end of the output, or None if no output is waiting."""
        try:
            return os.read(self._reader, CHUNK_BYTES)
        except BlockingIOError:
            return None


@contextmanager
def read_output_into_log(
    log: logging.LoggerAdapter[logging.Logger], limit: int, progress: Callable[[], None]
) -> Iterator[tuple[PipeReader, PipeReader]]:
    """Log at most `limit` lines of a command's stdout and stderr during the `with` block.

    `progress` is called for each chunk with a line end, also after the limit is reached.
    """
    output_log = OutputLog(log, limit)
    try:
        with (
            PipeReader("stdout", output_log, progress) as stdout,
            PipeReader("stderr", output_log, progress) as stderr,
        ):
            yield stdout, stderr
    finally:
        output_log.log_dropped_count()


def escape_line(line: bytes) -> str:
    """Return a line as text of limited length, with all control characters escaped."""
    text = line[:MAX_LINE_BYTES].rstrip(b"\r").decode(errors="backslashreplace")
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return f"{text} … (cut)" if len(line) > MAX_LINE_BYTES else text
