"""Server-Sent Events, parsed as they come (WHATWG HTML, "Parsing an event stream").

Pure: bytes in, frames out. What comes out does not depend on how the bytes were cut into chunks,
and no input makes it hold more than the limit.
"""

from __future__ import annotations

from typing import Final, NamedTuple

FRAME_LIMIT_BYTES: Final = 40 * 1024 * 1024
"""More than any event can have: some regions of the services accept bodies of 32 MiB."""
_BOM: Final = b"\xef\xbb\xbf"


class Frame(NamedTuple):
    """One event of a stream.

    Attributes:
        event: Its type; "message" where the stream named none.
        data: Its lines, joined.
        last_id: The last id that the stream has told so far; empty when none was.
    """

    event: str
    data: str
    last_id: str


class FrameParser:
    """One stream's parser. A frame counts when the blank line after it has come.

    Args:
        limit: Bytes of a line, and of all data of one frame, that are accepted.
    """

    def __init__(self, limit: int = FRAME_LIMIT_BYTES) -> None:
        self._limit = limit
        self._line = bytearray()  # the beginning of the line that is not complete yet
        self._first = True
        self._after_cr = False
        self._event = ""
        self._data: list[str] = []
        self._size = 0
        self._last_id = ""

    def feed(self, chunk: bytes) -> list[Frame]:
        """Take in the next bytes and return the frames that they complete.

        Raises:
            ValueError: A line or a frame beyond the limit; the parser is of no use anymore.
        """
        frames: list[Frame] = []
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")  # the rest of a CRLF that was cut in two
            self._after_cr = False
        for piece in chunk.splitlines(keepends=True):  # bytes end a line at CR, LF and CRLF only
            text = piece.rstrip(b"\r\n")
            if len(self._line) + len(text) > self._limit:
                raise ValueError("a line is too long")
            self._line += text
            if len(text) < len(piece):
                self._after_cr = piece.endswith(b"\r")
                self._take(frames)
        return frames

    def _take(self, frames: list[Frame]) -> None:
        """Interpret the complete line."""
        line = bytes(self._line)
        self._line.clear()
        if self._first:
            line = line.removeprefix(_BOM)
            self._first = False
        if not line:
            self._dispatch(frames)
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
        # Anything else, comments included, says nothing to us: `retry` too, we have a backoff.

    def _dispatch(self, frames: list[Frame]) -> None:
        if self._data:
            frames.append(Frame(self._event or "message", "\n".join(self._data), self._last_id))
        self._event, self._size = "", 0
        self._data.clear()
