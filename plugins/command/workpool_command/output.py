"""What a command says: read as it comes, logged within bounds, never kept.

A command is not blocked by its output for ever, nor can it fill the memory, the log or the time of
the other sessions with it: what exceeds the log's bound is read slowly and thrown away.
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
"""Between two chunks that nobody reads any more: some 6 MB/s, so that `yes` does not hog us."""
REST_LIMIT: Final = 1_048_576
"""Bytes taken from a pipe after the command's end: the most that Linux lets a pipe hold."""
SHOWN: Final = 2_000
"""Bytes of a line that go to the log."""


class Log:
    """The session's log, for `limit` lines of both streams together."""

    def __init__(self, log: logging.LoggerAdapter[logging.Logger], limit: int) -> None:
        self._log = log
        self._left = limit
        self._dropped = 0

    @property
    def spent(self) -> bool:
        """Nothing more is logged."""
        return self._left <= 0

    def add(self, name: str, text: bytes) -> None:
        """Log some lines of a stream, as far as there is room for them."""
        lines = text.split(b"\n", self._left) if self._left else [text]
        for line in lines[: self._left]:
            self._log.info("%s: %s", name, readable(line))
        # A stream of short lines costs little once nobody reads them: the rest is one piece.
        self._dropped += sum(rest.count(b"\n") + 1 for rest in lines[self._left :])
        self._left = max(0, self._left - len(lines))

    def close(self) -> None:
        """Say how much was not logged."""
        if self._dropped:
            self._log.info("lines not logged: %d", self._dropped)


class Lines:
    """Splits a stream into lines, of any length and in any encoding.

    Attributes:
        last: The last line that was not blank, or its first `RESULT_LIMIT` + 1 bytes.
    """

    def __init__(self, tell: Callable[[bytes], None]) -> None:
        """`tell` is given one or more whole lines, without the last one's newline."""
        self.last = b""
        self._tell = tell
        self._part = b""

    def feed(self, chunk: bytes) -> None:
        """Take what was read."""
        whole, newline, rest = (self._part + chunk).rpartition(b"\n")
        if newline:
            self._end(whole)
        self._part = rest[: RESULT_LIMIT + 1]

    def close(self) -> None:
        """What came after the last newline is a line, too."""
        if self._part:
            self._end(self._part)
            self._part = b""

    def _end(self, lines: bytes) -> None:
        last = lines.rstrip().rpartition(b"\n")[2]
        self.last = last[: RESULT_LIMIT + 1] or self.last
        self._tell(lines)


class Reader:
    """Reads one of a command's streams on the running loop, from entering the block to leaving it.

    It never waits for the pipe's end: a process that has left the command's group may hold it open
    for ever.

    Attributes:
        lines: What was read.
        writer: The command's end of the pipe.
    """

    def __init__(self, name: str, log: Log) -> None:
        self.lines = Lines(lambda lines: log.add(name, lines))
        self.writer = -1
        self._reader = -1
        self._log = log
        self._pause: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._reader, self.writer = os.pipe()
        try:
            os.set_blocking(self._reader, False)
            self._resume()
        except OSError:  # the loop has no room for another descriptor
            self._close()
            raise
        return self

    def started(self) -> None:
        """The command has an end of its own by now."""
        os.close(self.writer)
        self.writer = -1

    def __exit__(self, *_: Any) -> None:
        """Take what is left in the pipe, without waiting for more."""
        self._suspend()
        taken = 0
        while taken < REST_LIMIT and (chunk := self._read()):
            taken += len(chunk)
            self.lines.feed(chunk)
        self.lines.close()
        self._close()

    def _close(self) -> None:
        os.close(self._reader)
        if self.writer != -1:
            os.close(self.writer)

    def _resume(self) -> None:
        asyncio.get_running_loop().add_reader(self._reader, self._take)

    def _suspend(self) -> None:
        asyncio.get_running_loop().remove_reader(self._reader)
        if self._pause is not None:
            self._pause.cancel()

    def _take(self) -> None:
        chunk = self._read()
        if chunk:
            self.lines.feed(chunk)
        if chunk == b"":
            self._suspend()
        elif self._log.spent:
            self._suspend()
            self._pause = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._resume)

    def _read(self) -> bytes | None:
        """A chunk; nothing at the pipe's end; None when there is nothing to read yet."""
        try:
            return os.read(self._reader, CHUNK)
        except BlockingIOError:
            return None


@contextmanager
def reading(
    log: logging.LoggerAdapter[logging.Logger], limit: int
) -> Iterator[tuple[Reader, Reader]]:
    """Read a command's two streams, stdout and stderr, into a log of at most `limit` lines."""
    bounded = Log(log, limit)
    try:
        with Reader("stdout", bounded) as stdout, Reader("stderr", bounded) as stderr:
            yield stdout, stderr
    finally:
        bounded.close()


def readable(line: bytes) -> str:
    """One line for a log: no bytes that are not text, nothing that could forge another line."""
    text = line[:SHOWN].rstrip(b"\r").decode(errors="backslashreplace")
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return f"{text} … (cut)" if len(line) > SHOWN else text
