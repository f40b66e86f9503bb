"""The output of a container, in the log of its session, within bounds."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

LINE_BYTES: Final = 2_000
"""Largest number of bytes of a line in the log."""


class Output:
    """The log of one session, for at most `limit` lines of both streams together.

    `progress` is called for lines that arrive, also beyond the limit.
    """

    def __init__(
        self,
        log: logging.LoggerAdapter[logging.Logger],
        limit: int,
        progress: Callable[[], None],
    ) -> None:
        self._log = log
        self._progress = progress
        self._left = limit
        self._parts: defaultdict[str, bytes] = defaultdict(bytes)

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._left <= 0

    def add(self, stream: str, piece: bytes) -> None:
        """Log the lines that this piece completes."""
        if b"\n" in piece:
            self._progress()
        if self.full:
            return
        *lines, rest = (self._parts[stream] + piece).split(b"\n")
        # An unfinished line is stored only up to the logged part, and a byte that shows the cut.
        self._parts[stream] = rest[: LINE_BYTES + 1]
        for line in lines:
            self._log_line(stream, line)

    def close(self) -> None:
        """Log the last lines of both streams that have no line end."""
        for stream, line in self._parts.items():
            if line:
                self._log_line(stream, line)

    def _log_line(self, stream: str, line: bytes) -> None:
        if self.full:
            return
        self._left -= 1
        self._log.info("%s: %s", stream, readable(line))
        if self.full:
            self._log.info("more of its output is not logged")


def readable(line: bytes) -> str:
    """Return a line for the log, in which no byte controls a terminal or forges a line."""
    text = line[:LINE_BYTES].rstrip(b"\r").decode(errors="backslashreplace")
    if not text.isprintable():
        text = "".join(
            char if char.isprintable() or char == "\t" else ascii(char)[1:-1] for char in text
        )
    return f"{text} … (cut)" if len(line) > LINE_BYTES else text
