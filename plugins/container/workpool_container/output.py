"""What a container prints, line by line, in its session's log, within bounds."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import logging

LINE_BYTES: Final = 2_000
"""What of a line is logged."""


class Output:
    """At most `limit` lines of both streams together for one session's log."""

    def __init__(self, log: logging.LoggerAdapter[logging.Logger], limit: int) -> None:
        self._log = log
        self._left = limit
        self._parts: defaultdict[str, bytes] = defaultdict(bytes)

    @property
    def full(self) -> bool:
        """Nothing more is logged."""
        return self._left <= 0

    def add(self, stream: str, piece: bytes) -> None:
        """Log the lines that this piece completes."""
        *lines, rest = (self._parts[stream] + piece).split(b"\n")
        # Of a line without an end no more is kept than is logged, and what tells that it was cut.
        self._parts[stream] = rest[: LINE_BYTES + 1]
        for line in lines:
            self._say(stream, line)

    def close(self) -> None:
        """Log what came after the last line's end."""
        for stream, line in self._parts.items():
            if line:
                self._say(stream, line)

    def _say(self, stream: str, line: bytes) -> None:
        if self.full:
            return
        self._left -= 1
        self._log.info("%s: %s", stream, readable(line))
        if self.full:
            self._log.info("more of its output is not logged")


def readable(line: bytes) -> str:
    """One line for a log: nothing that a terminal obeys, nothing that forges another line."""
    text = line[:LINE_BYTES].rstrip(b"\r").decode(errors="backslashreplace")
    if not text.isprintable():
        text = "".join(
            char if char.isprintable() or char == "\t" else ascii(char)[1:-1] for char in text
        )
    return f"{text} … (cut)" if len(line) > LINE_BYTES else text
