"""Incremental parser of Server-Sent Events (WHATWG HTML, "Parsing an event stream").

The parser does no I/O: it gets bytes and returns frames. The frames do not depend on the boundaries
of the chunks, and the parser never stores more than the limit.
"""

from __future__ import annotations

from typing import Final, NamedTuple

FRAME_LIMIT_BYTES: Final = 40 * 1024 * 1024
"""Larger than any event: some regions of the services accept bodies of 32 MiB."""
_BOM: Final = b"\xef\xbb\xbf"


class Frame(NamedTuple):
    """One event of an SSE stream.

    Attributes:
        event: The type; "message" if the stream gives none.
        data: The data lines, joined.
        last_id: The last id of the stream so far; empty if there was none.
    """

    event: str
    data: str
    last_id: str


class FrameParser:
    """The parser of one SSE stream; a blank line completes a frame.

    Args:
        limit: The largest accepted number of bytes of a line, and of all data of one frame.
    """

    def __init__(self, limit: int = FRAME_LIMIT_BYTES) -> None:
        self._limit = limit
        self._line = bytearray()  # the received part of an incomplete line
        self._first = True
        self._after_cr = False
        self._event = ""
        self._data: list[str] = []
        self._size = 0
        self._last_id = ""

    def parse_chunk(self, chunk: bytes) -> list[Frame]:
        """Parse the next bytes of the stream, and return the frames that they complete.

        Raises:
            ValueError: A line or a frame exceeds the limit; the parser cannot be used anymore.
        """
        frames: list[Frame] = []
        if self._after_cr and chunk:
            # The previous chunk ended with CR. Skip an LF at the beginning of this chunk: it
            # belongs to the same line end and is no empty line.
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        # Split before decoding: `str.splitlines` splits at more characters than CR and LF.
        for piece in chunk.splitlines(keepends=True):
            text = piece.rstrip(b"\r\n")
            if len(self._line) + len(text) > self._limit:
                raise ValueError("a line is too long")
            self._line += text
            if len(text) < len(piece):
                self._after_cr = piece.endswith(b"\r")
                self._parse_complete_line(frames)
        return frames

    def _parse_complete_line(self, frames: list[Frame]) -> None:
        """Parse the line in `_line`, and append the frame that it completes, if any."""
        line = bytes(self._line)
        self._line.clear()
        if self._first:
            line = line.removeprefix(_BOM)
            self._first = False
        if not line:
            self._dispatch_frame(frames)
            return
        name, _, rest = line.partition(b":")
        value = rest.removeprefix(b" ").decode(errors="replace")
        if name == b"data":
            self._size += len(rest) + 1
            if self._size > self._limit:
                raise ValueError("an event is too long")
            self._data.append(value)
        elif name == b"event":
            self._event = value
        elif name == b"id" and "\0" not in value:
            self._last_id = value
        # Comments are ignored, and so is the field `retry`, since the client has its own backoff.

    def _dispatch_frame(self, frames: list[Frame]) -> None:
        if self._data:
            frames.append(Frame(self._event or "message", "\n".join(self._data), self._last_id))
        self._event, self._size = "", 0
        self._data.clear()
