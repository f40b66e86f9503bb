"""Resolves the paths of a session's file tools, component by component, with descriptors.

Each component is opened relative to the directory before it, with O_NOFOLLOW. A symbolic link is
read and followed by this module, from a root again. So a session cannot let a file tool leave the
roots by a change between a check and a use: a directory that is replaced by a link is not entered,
and the kernel never gets a whole path or `..`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from workpool.errors import exhausted
from workpool_toolset.tool_result import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MAX_LINKS: Final = 40
"""The number of symbolic links that are followed for one path, as by the kernel."""
MAX_PATH_BYTES: Final = 4096
"""The kernel's limit of the length of a path, in bytes."""

_ENTER: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ERROR_TEXTS: Final = {
    errno.ENOENT: "no such file or directory",
    errno.ENOTDIR: "not a directory",
    errno.EISDIR: "is a directory",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "no space left",
    errno.EFBIG: "the file is too large",
    errno.ELOOP: "the path changed while it was used",
}


@dataclass(frozen=True, slots=True)
class WorkspaceRoot:
    """A root: a directory that the file tools may use, with everything below it.

    Attributes:
        shown: The path as the session sees it, absolute and without links.
        host: The path on this machine, which no other user may replace.
        writable: Whether files may be written below it.
        owner: The user and group id of new files; None: those of this process.
    """

    shown: str
    host: Path
    writable: bool = True
    owner: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ResolvedPath:
    """The file that a path leads to, as an open directory and a name in this directory.

    Attributes:
        directory: The descriptor of the directory, valid during the `with` block.
        name: A single component, or `.` for a root itself. It may not exist, or have any type.
        shown: The whole path as the session sees it, for messages.
        root: The root that contains the directory.
    """

    directory: int
    name: str
    shown: str
    root: WorkspaceRoot

    def set_entry_owner(self, name: str) -> None:
        """Set the owner of a new file or directory to `root.owner`; None changes nothing."""
        if self.root.owner:
            os.chown(name, *self.root.owner, dir_fd=self.directory, follow_symlinks=False)


class Workspace:
    """The root directories of one session. Relative paths begin at the first directory."""

    def __init__(self, roots: Sequence[WorkspaceRoot]) -> None:
        self._roots = tuple(roots)

    @property
    def root_directories(self) -> tuple[WorkspaceRoot, ...]:
        """All root directories of the session. The first one is the session's working directory."""
        return self._roots

    @property
    def session_root(self) -> WorkspaceRoot:
        """The root that is the session's own working directory."""
        return self._roots[0]

    @contextlib.contextmanager
    def open_parent_directory(
        self, path: str, *, write: bool = False, make: bool = False
    ) -> Iterator[ResolvedPath]:
        """Follow the links of `path`, and open the directory that contains the target.

        Args:
            path: The path as the session wrote it: absolute, or relative to its directory.
            write: Whether read-only roots are refused.
            make: Whether missing directories are created.

        Raises:
            ToolError: The path is outside of the roots, has a loop, or cannot be entered. An
                `OSError` of the `with` block becomes a `ToolError`, too.
        """
        with convert_os_errors(path), contextlib.ExitStack() as stack:
            yield self._resolve_path(path, stack, write=write, make=make)

    @contextlib.contextmanager
    def open_directory(self, path: str) -> Iterator[ResolvedPath]:
        """Open the directory `path`, and yield it as a `ResolvedPath` with the name `.`."""
        with self.open_parent_directory(path) as spot:
            opened = os.open(spot.name, _ENTER & ~os.O_PATH, dir_fd=spot.directory)
            try:
                yield ResolvedPath(opened, ".", spot.shown, spot.root)
            finally:
                os.close(opened)

    def relative_path(self, shown: str) -> str:
        """Return a path for messages. A path in the session's own directory becomes relative."""
        inside = _path_components_below(shown, self.session_root.shown)
        return shown if inside is None else "/".join(inside)

    def _resolve_path(
        self, path: str, stack: contextlib.ExitStack, *, write: bool, make: bool
    ) -> ResolvedPath:
        _check_path_characters(path)
        wanted = _normalized_path(posixpath.join(self.session_root.shown, path))
        for _ in range(MAX_LINKS + 1):
            root, parts = self._find_innermost_root(wanted, path)
            if write and not root.writable:
                raise ToolError(f"{path}: read-only")
            found = _follow_path_components(root, parts, make=make)
            if isinstance(found, ResolvedPath):
                stack.callback(os.close, found.directory)
                return found
            wanted = found
        raise ToolError(f"{path}: too many levels of symbolic links")

    def _find_innermost_root(self, wanted: str, path: str) -> tuple[WorkspaceRoot, list[str]]:
        found = [(root, _path_components_below(wanted, root.shown)) for root in self._roots]
        inside = [(root, parts) for root, parts in found if parts is not None]
        if not inside:
            raise ToolError(f"{path}: outside the session's working directory")
        # One root may contain another. Use the innermost root that contains the path.
        return min(inside, key=lambda pair: len(pair[1]))


@contextlib.contextmanager
def convert_os_errors(path: str) -> Iterator[None]:
    """Convert an `OSError` of the `with` block to a `ToolError` with a text for the agent.

    Raises:
        OSError: The machine has no free memory or descriptors.
        ToolError: Any other error.
    """
    try:
        yield
    except OSError as error:
        words = _ERROR_TEXTS.get(error.errno or 0)
        if words is None and exhausted(error):
            raise
        raise ToolError(f"{path}: {words or 'cannot be used'}") from None


def _follow_path_components(
    root: WorkspaceRoot, parts: list[str], *, make: bool
) -> ResolvedPath | str:
    """Follow `parts` from the root to a file, and return the file as a `ResolvedPath`.

    If a component is a link, the path of the link's target is returned instead.
    """
    here = root.shown
    directory = os.open(root.host, _ENTER)
    try:
        for index, name in enumerate(parts):
            target = _read_link_target(directory, name)
            if target is not None:
                os.close(directory)
                return _normalized_path(posixpath.join(here, target, *parts[index + 1 :]))
            spot = ResolvedPath(directory, name, posixpath.join(here, name), root)
            if index == len(parts) - 1:
                return spot
            entered = _open_or_make_directory(spot, make=make)
            # Close each directory at once, because a path may have more components than this
            # process may have open descriptors.
            os.close(directory)
            directory, here = entered, spot.shown
    except BaseException:
        os.close(directory)
        raise
    return ResolvedPath(directory, ".", here, root)


def _open_or_make_directory(spot: ResolvedPath, *, make: bool) -> int:
    try:
        return os.open(spot.name, _ENTER, dir_fd=spot.directory)
    except FileNotFoundError:
        if not make:
            raise
    # Ignore FileExistsError: the session may have created the directory after the failed open.
    with contextlib.suppress(FileExistsError):
        os.mkdir(spot.name, 0o755, dir_fd=spot.directory)
        spot.set_entry_owner(spot.name)
    return os.open(spot.name, _ENTER, dir_fd=spot.directory)


def _read_link_target(directory: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        # `readlink` fails with EINVAL if the name is no link, and with ENOENT if no file has it.
        if error.errno in {errno.EINVAL, errno.ENOENT}:
            return None
        raise


def _path_components_below(path: str, root: str) -> list[str] | None:
    """Return the components of `path` below `root`, or None if the path is not below it."""
    if root not in {"/", path} and not path.startswith(root + "/"):
        return None
    return [part for part in path[len(root) :].split("/") if part]


def _normalized_path(path: str) -> str:
    # Replace a leading `//`, which `normpath` keeps, by `/`.
    return "/" + posixpath.normpath(path).lstrip("/")


def _check_path_characters(path: str) -> None:
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise ToolError("the path is not valid Unicode") from None
    if not encoded or b"\0" in encoded or len(encoded) > MAX_PATH_BYTES:
        raise ToolError("the path is empty, too long or holds a NUL")
