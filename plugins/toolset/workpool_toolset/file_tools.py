"""The tools that read and change one file: `read`, `write`, `edit`.

The functions run on a thread. They open regular files only and limit the search for lines, so that
no call occupies its thread for long. They open files through `Workspace`, which accepts paths
inside of the roots only.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import os
import posixpath
import secrets
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

from workpool_toolset.tool_result import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool_toolset.tool_result import Block
    from workpool_toolset.workspace import ResolvedPath, Workspace

MAX_SCANNED_BYTES: Final = 256 << 20
"""The largest number of bytes that `read` searches for the lines of a range."""
SCAN_SECONDS: Final = 10.0
"""The time limit of the search for the lines of a range, in seconds."""
MAX_EDITED_CHARACTERS: Final = 32 * 1024 * 1024
"""The largest size of a file after an edit, which `replace_all` could multiply many times."""

CHUNK_BYTES: Final = 64 * 1024
IMAGES: Final = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}
LAST_LINE: Final = 1 << 62
"""The last line of a range without an end."""


@dataclass(frozen=True, slots=True)
class FileSizeLimits:
    """The largest files that the tools accept, in bytes.

    Attributes:
        text: Text for `read` and `edit`.
        image: An image for `read`.
        pdf: A PDF for `read`.
    """

    text: int = 256 * 1024
    image: int = 5 * 1024 * 1024 * 3 // 4  # the base64 text of these bytes has 5 MiB
    pdf: int = 20 * 1024 * 1024


DEFAULT_SIZE_LIMITS: Final = FileSizeLimits()
"""The default limits."""


def read_file(
    workspace: Workspace, path: str, view_range: tuple[int, int] | None, sizes: FileSizeLimits
) -> str | list[Block]:
    """Return the text of a file, or an image or a PDF as a content block of a tool result.

    Args:
        workspace: The roots of the session.
        path: The path, as the session wrote it.
        view_range: The first and the last line, from 1. A last line of 0 or less is the end.
        sizes: The limits.

    Raises:
        ToolError: The file cannot be read. The text is for the agent.
    """
    with (
        workspace.open_parent_directory(path) as spot,
        _open_regular_file(spot, path) as (file, size),
    ):
        suffix = posixpath.splitext(spot.name)[1].lower()
        if suffix in IMAGES or suffix == ".pdf":
            if view_range:
                raise ToolError(f"{path}: view_range is for text files only")
            limit = sizes.pdf if suffix == ".pdf" else sizes.image
            return [_image_or_pdf_block(_read_whole_file(file, path, size, limit), suffix)]
        if view_range:
            return _read_lines(file, path, view_range, sizes.text)
        hint = "; read it in parts with view_range=[start, end]"
        return _decode_text(_read_whole_file(file, path, size, sizes.text, hint), path)


def write_file(workspace: Workspace, path: str, content: str) -> str:
    """Create or replace a file, and create missing directories. Newlines are not converted."""
    encoded = _encode_text(content)
    with workspace.open_parent_directory(path, write=True, make=True) as spot:
        _replace_file(spot, path, encoded)
    return f"wrote {len(encoded)} bytes to {path}"


def edit_file(
    workspace: Workspace,
    path: str,
    change: tuple[str, str],
    *,
    replace_all: bool = False,
    sizes: FileSizeLimits,
) -> str:
    """Replace the text `change[0]` in a file by `change[1]`, and return a message for the agent.

    The text must occur once, unless `replace_all` is set.
    """
    old, new = change
    if not old or old == new:
        raise ToolError("old_string must not be empty, nor equal to new_string")
    with workspace.open_parent_directory(path, write=True) as spot:
        with _open_regular_file(spot, path) as (file, size):
            hint = "; change it with bash, for example with sed"
            text = _decode_text(_read_whole_file(file, path, size, sizes.text, hint), path)
        count = text.count(old)
        if count == 0:
            raise ToolError(f"{path}: old_string was not found")
        if count > 1 and not replace_all:
            raise ToolError(
                f"{path}: old_string occurs {count} times; make it unique, or use replace_all"
            )
        if len(text) + count * (len(new) - len(old)) > MAX_EDITED_CHARACTERS:
            raise ToolError(f"{path}: would be larger than {MAX_EDITED_CHARACTERS} characters")
        _replace_file(spot, path, _encode_text(text.replace(old, new)))
    return f"replaced {count} occurrence{'s' if count > 1 else ''} in {path}"


@contextlib.contextmanager
def _open_regular_file(spot: ResolvedPath, path: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file. Refuse other files, because opening a device may have side effects."""
    _check_regular_file(os.stat(spot.name, dir_fd=spot.directory, follow_symlinks=False), path)
    # Use O_NONBLOCK. If a pipe has replaced the file since the check, the open would otherwise
    # block until the pipe has a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(spot.name, flags, dir_fd=spot.directory), "rb") as file:
        found = os.fstat(file.fileno())
        _check_regular_file(found, path)
        yield file, found.st_size


def _check_regular_file(found: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise ToolError(f"{path}: is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise ToolError(f"{path}: not a regular file")


def _read_whole_file(file: BinaryIO, path: str, size: int, limit: int, hint: str = "") -> bytes:
    # Check the limit again, because the file may have grown since its size was read.
    content = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(content) > limit:
        raise ToolError(f"{path}: larger than {limit} bytes{hint}")
    return content


def _read_lines(file: BinaryIO, path: str, view_range: tuple[int, int], limit: int) -> str:
    """Return the lines of a range. The file is read in chunks, because a line may be very long."""
    start, end = view_range[0], view_range[1] if view_range[1] > 0 else LAST_LINE
    if end < start:
        raise ToolError("view_range is [start, end], from 1; an end of 0 is the end of the file")
    kept, line, last = bytearray(), 1, b""
    for chunk in _read_file_chunks(file, path):
        last, newlines = chunk[-1:], chunk.count(b"\n")
        if line + newlines >= start:
            kept += _select_lines_of_chunk(chunk, start - line, end - line)
        line += newlines
        if line > end or len(kept) > limit:
            break
    count = line - 1 if last == b"\n" else line
    if start > count:
        raise ToolError(f"{path}: has only {count} lines")
    if len(kept) <= limit:
        return _decode_text(bytes(kept), path)
    return _decode_text(bytes(kept[:limit]), path, final=False) + f"\n[cut after {limit} bytes]"


def _select_lines_of_chunk(chunk: bytes, first: int, last: int) -> bytes:
    """Return the chunk's lines `first` to `last`, counted from 0, as far as they exist."""
    lines = chunk.split(b"\n")
    ended = last + 1 < len(lines)
    return b"\n".join(lines[max(first, 0) : last + 1]) + (b"\n" if ended else b"")


def _read_file_chunks(file: BinaryIO, path: str) -> Iterator[bytes]:
    """Yield the chunks of a file. Raise `ToolError` after too many bytes or too much time."""
    deadline, read = time.monotonic() + SCAN_SECONDS, 0
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
        read += len(chunk)
        if read >= MAX_SCANNED_BYTES or time.monotonic() > deadline:
            raise ToolError(
                f"{path}: the lines begin or end beyond the first {read} bytes, which is as far as"
                " read goes; use bash, for example tail -c or dd"
            )


def _image_or_pdf_block(content: bytes, suffix: str) -> Block:
    return {
        "type": "document" if suffix == ".pdf" else "image",
        "source": {
            "type": "base64",
            "media_type": IMAGES.get(suffix, "application/pdf"),
            "data": base64.b64encode(content).decode(),
        },
    }


def _replace_file(spot: ResolvedPath, path: str, content: bytes) -> None:
    """Write a temporary file and rename it, so that no reader sees an unfinished file."""
    mode = 0o644
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(spot.name, dir_fd=spot.directory, follow_symlinks=False)
        _check_regular_file(found, path)
        # Keep the permissions without the setuid bit, because the code below may change the owner.
        mode = stat.S_IMODE(found.st_mode) & 0o777
    temporary = f".{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    opened = os.open(temporary, flags, 0o600, dir_fd=spot.directory)
    try:
        with os.fdopen(opened, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            if spot.root.owner:
                os.fchown(file.fileno(), *spot.root.owner)
        os.replace(temporary, spot.name, src_dir_fd=spot.directory, dst_dir_fd=spot.directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=spot.directory)
        raise


def _decode_text(content: bytes, path: str, *, final: bool = True) -> str:
    """Decode UTF-8 text. Unless `final` is set, drop an incomplete last character."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(content, final)
    except UnicodeDecodeError:
        raise ToolError(f"{path}: not UTF-8 text") from None


def _encode_text(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ToolError("the text holds lone surrogates, which no file can hold") from None
