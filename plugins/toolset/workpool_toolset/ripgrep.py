"""The use of ripgrep by `grep`: the same files and lines as the walker, without its hints.

Owns the options, the translation of patterns, and the parsing of the messages of ripgrep.
"""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any, Final

from workpool_toolset import walker

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Mapping

MESSAGE_BYTES: Final = 100 * walker.LINE_BYTES
"""The longest message about a line within its limit: it may list a match at each byte."""
OPTIONS: Final = (
    *("--no-config", "--json", "--no-messages", "--no-mmap", "--sort=path"),
    *("--hidden", "--no-ignore", "--crlf", "--engine=auto", "--encoding=none"),
)
"""The options with which ripgrep searches the same lines as the walker and prints messages."""
_CHUNK: Final = 64 * 1024


def glob_options(where: str, include: str | None) -> Iterator[str]:
    """Return the options with which ripgrep searches the same files as the walker.

    Args:
        where: The directory that is searched, as ripgrep gets it.
        include: The pattern, as for `walker.included`.
    """
    wanted = (include or "").removeprefix("!")
    way = "/" + _path_pattern(f"{where}/").lstrip("/")
    start = ("!" if wanted != include else "") + (way if walker.is_anchored(wanted) else "")
    for pattern in walker.split_pattern(wanted) if include else ():
        if pattern:
            yield f"--glob={start}{'/'.join(map(_translate_component, pattern))}"
    yield from (f"--glob=!{name}/" for name in sorted(walker.SKIPPED))


def _path_pattern(path: str) -> str:
    """Return a pattern of ripgrep that matches this path only."""
    return re.sub(r"([][*?{}!\\])", r"\\\1", path)


def _translate_component(pattern: str) -> str:
    """Translate a component of a pattern of Python's `fnmatch` for ripgrep."""
    if pattern == "**":
        return pattern
    kept = re.compile(r"\[!?\]?[^]]*\]|\*+|\?|.", re.DOTALL)
    parts = (found[0] for found in kept.finditer(pattern))
    return "".join(
        "*" if part[0] == "*" else part if len(part) > 1 or part == "?" else _path_pattern(part)
        for part in parts
    )


def error_text(error_text: str) -> str:
    """Return the error of ripgrep, without hints at options that an agent does not have."""
    reasons = re.findall(r"^(?:error|PCRE2): (.*)", error_text, re.MULTILINE)
    if reasons:
        return f"not a regular expression: {reasons[-1]}"
    return "not a regular expression" if "regex" in error_text else "the search failed"


class RipgrepMatches:
    """The findings of ripgrep, parsed from its messages (`--json`), file by file.

    Attributes:
        complete: Whether everything was searched, or the limit was reached.
        cut: Whether there are more than `limit` bytes.
    """

    def __init__(self, limit: int) -> None:
        self.complete = False
        self.cut = False
        self._limit = limit
        self._lines: list[str] = []
        self._file: list[str] = []
        self._size = 0
        self._file_size = 0

    def text(self) -> str:
        """Return the lines that were found."""
        return "".join(self._lines)

    async def read_messages(
        self, stream: asyncio.StreamReader | None, enough: Callable[[], None]
    ) -> None:
        """Read all messages; call `enough` once there is more than `limit` bytes."""
        part, dropped = b"", False
        while stream and (chunk := await stream.read(_CHUNK)):
            *messages, part = (part + chunk).split(b"\n")
            for message in messages:
                if not (dropped or self.cut or len(message) > MESSAGE_BYTES):
                    self._add_message(json.loads(message))
                dropped = False
            if len(part) > MESSAGE_BYTES:  # This message is about a line that exceeds the limit.
                part, dropped = b"", True
            if self.cut:
                enough()

    def _add_message(self, message: dict[str, Any]) -> None:
        kind, data = message["type"], message.get("data", {})
        if kind == "match":
            self._add_line(data)
        elif kind == "end":
            self._end_file(searched=data["binary_offset"] is None)
        elif kind == "summary":
            self.complete = True

    def _add_line(self, data: dict[str, Any]) -> None:
        line = _bytes_of(data["lines"])
        if len(line.removesuffix(b"\n")) > walker.LINE_BYTES:
            return
        path = _bytes_of(data["path"]).decode(errors="replace").removeprefix("./")
        text = f"{path}:{data['line_number']}:{walker.line_text(line)}\n"
        self._file_size += len(text.encode())
        if self._size + self._file_size > self._limit:
            self._end_file(searched=True)
            self.cut = self.complete = True
        else:
            self._file.append(text)

    def _end_file(self, *, searched: bool) -> None:
        if searched:
            self._lines += self._file
            self._size += self._file_size
        self._file, self._file_size = [], 0


def _bytes_of(data: Mapping[str, str]) -> bytes:
    return data["text"].encode() if "text" in data else base64.b64decode(data["bytes"])
