"""Writes a container's output to the log of its session, up to a limit of lines."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

MAX_LINE_BYTES: Final = 2_000
"""The largest number of logged bytes of one line."""


class OutputLog:
    """Logs at most `limit` lines of one container's stdout and stderr together.

    `progress` is called for each chunk with a line end, also after the limit is reached.
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
    def has_reached_line_limit(self) -> bool:
        """Whether the limit of logged lines is reached."""
        return self._left <= 0

    def add_chunk(self, stream: str, chunk: bytes) -> None:
        """Log each line that this chunk of the stream completes."""
        if b"\n" in chunk:
            self._progress()
        if self.has_reached_line_limit:
            return
        *lines, rest = (self._parts[stream] + chunk).split(b"\n")
        # Store only the bytes of an unfinished line that can be logged, or an endless line would
        # fill the memory. One more byte shows that the line is longer.
        self._parts[stream] = rest[: MAX_LINE_BYTES + 1]
        for line in lines:
            self._log_line(stream, line)

    def log_unfinished_lines(self) -> None:
        """Log the last line of each stream if the stream ended without a line end."""
        for stream, line in self._parts.items():
            if line:
                self._log_line(stream, line)

    def _log_line(self, stream: str, line: bytes) -> None:
        if self.has_reached_line_limit:
            return
        self._left -= 1
        self._log.info("%s: %s", stream, escape_line(line))
        if self.has_reached_line_limit:
            self._log.info("more of its output is not logged")


def escape_line(line: bytes) -> str:
    """Return a line as text of limited length, with all control characters except tabs escaped."""
    text = line[:MAX_LINE_BYTES].rstrip(b"\r").decode(errors="backslashreplace")
    if not text.isprintable():
        text = "".join(
            char if char.isprintable() or char == "\t" else ascii(char)[1:-1] for char in text
        )
    return f"{text} … (cut)" if len(line) > MAX_LINE_BYTES else text
