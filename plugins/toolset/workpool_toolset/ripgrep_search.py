"""The tool `grep` with the program ripgrep, which finds the same lines as the module `walker`.

This module has the options, the translation of patterns, and the parsing of ripgrep's messages.
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

MAX_MESSAGE_BYTES: Final = 100 * walker.MAX_LINE_BYTES
"""The longest message about one line, which may list a match at each byte of the line."""
RIPGREP_OPTIONS: Final = (
    *("--no-config", "--json", "--no-messages", "--no-mmap", "--sort=path"),
    *("--hidden", "--no-ignore", "--crlf", "--engine=auto", "--encoding=none"),
)
"""The options with which ripgrep matches lines as the walker does, and prints messages."""
_CHUNK: Final = 64 * 1024


def ripgrep_glob_options(where: str, include: str | None) -> Iterator[str]:
    """Yield `--glob` options with which ripgrep searches the same files as the module `walker`.

    Args:
        where: The directory that is searched, as ripgrep gets it.
        include: The pattern, as for `walker.file_matches_include_pattern`.
    """
    wanted = (include or "").removeprefix("!")
    way = "/" + _escaped_path_pattern(f"{where}/").lstrip("/")
    start = ("!" if wanted != include else "") + (
        way if walker.pattern_applies_to_whole_path(wanted) else ""
    )
    for pattern in walker.split_glob_pattern(wanted) if include else ():
        if pattern:
            yield f"--glob={start}{'/'.join(map(_convert_fnmatch_to_ripgrep_pattern, pattern))}"
    yield from (f"--glob=!{name}/" for name in sorted(walker.SKIPPED_DIRECTORIES))


def _escaped_path_pattern(path: str) -> str:
    """Return a ripgrep pattern that matches only this path."""
    return re.sub(r"([][*?{}!\\])", r"\\\1", path)


def _convert_fnmatch_to_ripgrep_pattern(pattern: str) -> str:
    """Convert one path component of an `fnmatch` pattern to a ripgrep pattern."""
    if pattern == "**":
        return pattern
    kept = re.compile(r"\[!?\]?[^]]*\]|\*+|\?|.", re.DOTALL)
    parts = (found[0] for found in kept.finditer(pattern))
    return "".join(
        "*"
        if part[0] == "*"
        else part
        if len(part) > 1 or part == "?"
        else _escaped_path_pattern(part)
        for part in parts
    )


def regex_error_text(error_text: str) -> str:
    """Return the text of ripgrep's error without hints at options that agents do not have."""
    reasons = re.findall(r"^(?:error|PCRE2): (.*)", error_text, re.MULTILINE)
    if reasons:
        return f"not a regular expression: {reasons[-1]}"
    return "not a regular expression" if "regex" in error_text else "the search failed"


class RipgrepMatches:
    """The matching lines, parsed from the messages of `rg --json`.

    Attributes:
        complete: Whether everything was searched, or the limit was reached.
        cut: Whether the matches have more than `limit` bytes.
    """

    def __init__(self, limit: int) -> None:
        self.complete = False
        self.cut = False
        self._limit = limit
        self._lines: list[str] = []
        self._file: list[str] = []
        self._size = 0
        self._file_size = 0

    def format_matches(self) -> str:
        """Return the matching lines, each as `path:line:text`."""
        return "".join(self._lines)

    async def read_ripgrep_messages(
        self, stream: asyncio.StreamReader | None, enough: Callable[[], None]
    ) -> None:
        """Read all messages. Call `enough` once the matches exceed the limit of bytes."""
        part, dropped = b"", False
        while stream and (chunk := await stream.read(_CHUNK)):
            *messages, part = (part + chunk).split(b"\n")
            for message in messages:
                if not (dropped or self.cut or len(message) > MAX_MESSAGE_BYTES):
                    self._apply_ripgrep_message(json.loads(message))
                dropped = False
            # Drop a message of ripgrep that exceeds `MAX_MESSAGE_BYTES`, because the matching line
            # that the message contains is too long.
            if len(part) > MAX_MESSAGE_BYTES:
                part, dropped = b"", True
            if self.cut:
                enough()

    def _apply_ripgrep_message(self, message: dict[str, Any]) -> None:
        kind, data = message["type"], message.get("data", {})
        if kind == "match":
            self._add_matching_line(data)
        elif kind == "end":
            self._keep_or_drop_matches_of_file(searched=data["binary_offset"] is None)
        elif kind == "summary":
            self.complete = True

    def _add_matching_line(self, data: dict[str, Any]) -> None:
        line = _bytes_of_json_field(data["lines"])
        if len(line.removesuffix(b"\n")) > walker.MAX_LINE_BYTES:
            return
        path = _bytes_of_json_field(data["path"]).decode(errors="replace").removeprefix("./")
        text = f"{path}:{data['line_number']}:{walker.decode_line(line)}\n"
        self._file_size += len(text.encode())
        if self._size + self._file_size > self._limit:
            self._keep_or_drop_matches_of_file(searched=True)
            self.cut = self.complete = True
        else:
            self._file.append(text)

    def _keep_or_drop_matches_of_file(self, *, searched: bool) -> None:
        if searched:
            self._lines += self._file
            self._size += self._file_size
        self._file, self._file_size = [], 0


def _bytes_of_json_field(data: Mapping[str, str]) -> bytes:
    return data["text"].encode() if "text" in data else base64.b64decode(data["bytes"])
