"""The search of `glob` and `grep` as a separate program, so that an endless search can be killed.

It uses the standard library only and is run by its path with `python -I -S`. It gets an open
directory and a request as JSON, prints one line for each finding, and ends with status 2 and a
sentence if the request is wrong. It enters directory after directory with descriptors. `grep`
follows no link. `glob` resolves links itself, component by component, and follows those that stay
in the session's roots. So no race leads it outside.
"""

import fnmatch
import json
import os
import posixpath
import re
import resource
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ENTRIES = 50_000
DEPTH = 100
RESULTS = 200
LINE_BYTES = 2_000
FOUND_BYTES = 100 * 1024
CPU_SECONDS = 30
MEMORY_BYTES = 1 << 30
SKIPPED = {".git", "node_modules"}
ALTERNATIVES = 100
HOPS = 40
BAD_REQUEST = 2

_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASSED = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class DirectoryEntry(NamedTuple):
    """One entry of a directory, which is open until the next entry is requested.

    Attributes:
        directory: The descriptor of the directory.
        name: The name in the directory.
        parts: The path below the start.
        state: The state of the entry, or of the target of its link.
    """

    directory: int
    name: str
    parts: tuple[str, ...]
    state: os.stat_result

    @property
    def is_directory(self) -> bool:
        """Whether the entry is a directory, or a link to one."""
        return stat.S_ISDIR(self.state.st_mode)


class SearchedDirectory(NamedTuple):
    """A directory that is searched.

    Attributes:
        opened: The descriptor.
        parts: Its path below the start.
        shown: The path as the session sees it, without links.
    """

    opened: int
    parts: tuple[str, ...]
    shown: str


class DirectoryWalk:
    """Yields the entries below a directory, sorted by name.

    Args:
        skipped: Names of directories that are not entered.
        roots: The roots to which links may lead, as the session sees them and on this machine.
            Without roots, links are left out.
    """

    def __init__(self, skipped: set[str], roots: Sequence[tuple[str, str]] = ()) -> None:
        self._skipped = skipped
        self._roots = roots
        self._budget = iter(range(ENTRIES))
        self._linked: set[tuple[int, int]] = set()

    def entries_below(self, place: SearchedDirectory) -> Iterator[DirectoryEntry]:
        """Yield all directories and regular files, at any depth; each is valid until the next."""
        with os.scandir(place.opened) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if next(self._budget, None) is None:
                return
            try:
                state = os.lstat(name, dir_fd=place.opened)
                if stat.S_ISLNK(state.st_mode):
                    yield from self._enter_link(place, name)
                elif stat.S_ISDIR(state.st_mode):
                    opened = os.open(name, _LISTED, dir_fd=place.opened)
                    yield from self._entries_of(
                        place, name, opened, posixpath.join(place.shown, name)
                    )
                elif stat.S_ISREG(state.st_mode):
                    yield DirectoryEntry(place.opened, name, (*place.parts, name), state)
            except OSError:  # The entry was replaced, or may not be read.
                continue

    def _enter_link(self, place: SearchedDirectory, name: str) -> Iterator[DirectoryEntry]:
        target = (
            open_target(self._roots, posixpath.join(place.shown, name)) if self._roots else None
        )
        if target is None:
            return
        opened, shown = target
        try:
            state = os.fstat(opened)
            if stat.S_ISDIR(state.st_mode):
                opened, passed = os.open(".", _LISTED, dir_fd=opened), opened
                os.close(passed)
        except BaseException:
            os.close(opened)
            raise
        if stat.S_ISDIR(state.st_mode):
            # A directory is entered through links only once: two links could lead to each other.
            again = (state.st_dev, state.st_ino) in self._linked
            self._linked.add((state.st_dev, state.st_ino))
            yield from self._entries_of(place, name, opened, shown, listed=not again)
            return
        os.close(opened)
        if stat.S_ISREG(state.st_mode):
            yield DirectoryEntry(place.opened, name, (*place.parts, name), state)

    def _entries_of(
        self, place: SearchedDirectory, name: str, opened: int, shown: str, *, listed: bool = True
    ) -> Iterator[DirectoryEntry]:
        """Yield a directory and the entries below it, then close it."""
        parts = (*place.parts, name)
        try:
            yield DirectoryEntry(place.opened, name, parts, os.fstat(opened))
            if listed and name not in self._skipped and len(place.parts) < DEPTH:
                yield from self.entries_below(SearchedDirectory(opened, parts, shown))
        finally:
            os.close(opened)


def open_target(roots: Sequence[tuple[str, str]], path: str) -> tuple[int, str] | None:
    """Open the target of a path, following links inside of the roots.

    Returns:
        A descriptor (for `fstat`) and the path without links; None outside of the roots.
    """
    for _ in range(HOPS + 1):
        inside = [(shown, host) for shown, host in roots if _is_below(path, shown)]
        if not inside:
            return None
        # This is the root with the longest path.
        shown, host = max(inside, key=lambda root: len(root[0]))
        found = _open_in_root(shown, host, path)
        if isinstance(found, int):
            return found, path
        path = found
    return None


def _is_below(path: str, root: str) -> bool:
    return root in {"/", path} or path.startswith(root + "/")


def _open_in_root(shown: str, host: str, path: str) -> int | str:
    """Open a path in a root; or return the path to continue with after a link."""
    parts = [part for part in path[len(shown) :].split("/") if part]
    opened, here = os.open(host, _PASSED), shown
    try:
        for index, part in enumerate(parts):
            try:
                target = os.readlink(part, dir_fd=opened)
            except OSError:  # This component is no link.
                inner = os.open(part, _PASSED, dir_fd=opened)
                os.close(opened)
                opened, here = inner, posixpath.join(here, part)
                continue
            os.close(opened)
            opened = -1
            joined = posixpath.join(here, target, *parts[index + 1 :])
            return "/" + posixpath.normpath(joined).lstrip("/")
    except BaseException:
        if opened != -1:
            os.close(opened)
        raise
    return opened


def split_pattern(glob: str) -> list[list[str]]:
    """Return the alternatives of a pattern without braces, each as a list of components.

    `*`, `?` and `[…]` are as in a shell, `**` is any number of directories, `{a,b}` is either.
    """
    found, left = list[str](), [glob]
    while left and len(found) + len(left) <= ALTERNATIVES:
        each = left.pop()
        brace = re.search(r"\{([^{}]*,[^{}]*)\}", each)
        if brace is None:
            found.append(each)
            continue
        choices = brace[1].split(",")
        left += [each[: brace.start()] + choice + each[brace.end() :] for choice in choices]
    found += left
    return [
        [part.replace("[^", "[!") for part in each.split("/") if part not in {"", "."}]
        for each in found
    ]


def path_matches(parts: Sequence[str], patterns: list[str]) -> bool:
    """Return whether a path matches, component by component; `**` is any number of them.

    At the end of the pattern `**` is one or more: `src/**` is everything in `src`.
    """
    if patterns[-1:] == ["**"]:
        patterns = [*patterns, "*"]
    reached = {0}
    for part in parts:
        reached = _with_empty_wildcards(reached, patterns)
        reached = {
            place if patterns[place] == "**" else place + 1
            for place in reached
            if place < len(patterns)
            and (patterns[place] == "**" or fnmatch.fnmatchcase(part, patterns[place]))
        }
    return len(patterns) in _with_empty_wildcards(reached, patterns)


def _with_empty_wildcards(reached: set[int], patterns: list[str]) -> set[int]:
    """Add all places that follow if `**` matches no component."""
    for place in range(len(patterns)):
        if place in reached and patterns[place] == "**":
            reached = reached | {place + 1}
    return reached


def is_included(parts: Sequence[str], include: str) -> bool:
    """Return whether a file is searched.

    A pattern without `/` is compared with its name, any other with its path below the directory
    that is searched. One that begins with `!` excludes files and directories.
    """
    wanted, patterns = include.removeprefix("!"), split_pattern(include.removeprefix("!"))
    anchored = is_anchored(wanted)
    if wanted == include:
        return any(path_matches(parts if anchored else parts[-1:], each) for each in patterns)
    last = range(1, len(parts) + 1)
    left_out = [parts[:end] if anchored else parts[end - 1 : end] for end in last]
    return not any(path_matches(part, each) for part in left_out for each in patterns)


def is_anchored(include: str) -> bool:
    """Return whether a pattern is compared with the path and not with the name."""
    return "/" in include.strip("/")


def glob_paths(
    start: SearchedDirectory, pattern: str, roots: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """Yield the paths that match, newest first."""
    patterns = split_pattern(pattern)
    found = [
        (-entry.state.st_mtime_ns, "/".join(entry.parts))
        for entry in DirectoryWalk(set(), roots).entries_below(start)
        if any(path_matches(entry.parts, each) for each in patterns)
    ]
    for _, path in sorted(found)[:RESULTS]:
        yield path


def grep_lines(
    start: SearchedDirectory, pattern: str, name: str | None, include: str | None
) -> Iterator[str]:
    """Yield `path:line:text` for each line that matches, of all files or of the file `name`."""
    wanted = re.compile(pattern)
    entries = DirectoryWalk(SKIPPED).entries_below(start)
    if name:
        entries = iter(
            [DirectoryEntry(start.opened, name, (), os.lstat(name, dir_fd=start.opened))]
        )
    for entry in entries:
        if not entry.is_directory and (
            not include or is_included(entry.parts or (entry.name,), include)
        ):
            path = "/".join(entry.parts)
            for number, line in matching_lines(entry, wanted):
                yield f"{path}:{number}:{line}"


def matching_lines(entry: DirectoryEntry, wanted: re.Pattern[str]) -> list[tuple[int, str]]:
    """Yield the lines of a file that match, with their numbers; none of a file with a NUL."""
    found, size = list[tuple[int, str]](), 0
    for number, piece, whole in file_lines(entry):
        if b"\0" in piece:
            return []
        line = line_text(piece) if whole else ""
        if whole and wanted.search(line):
            found.append((number, line))
            size += len(line)
            if size > FOUND_BYTES:
                break
    return found


def line_text(line: bytes) -> str:
    """Return a line without its end, for search and output."""
    return line.removesuffix(b"\n").removesuffix(b"\r").decode(errors="replace")


def file_lines(entry: DirectoryEntry) -> Iterator[tuple[int, bytes, bool]]:
    """Yield the lines of a regular file: number, bytes, and whether the line is complete."""
    try:
        file = os.fdopen(os.open(entry.name, _READ, dir_fd=entry.directory), "rb")
    except OSError:
        return
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return
        number, whole = 1, True
        while piece := file.readline(LINE_BYTES + 1):
            ended = piece.endswith(b"\n")
            yield number, piece, whole and (ended or len(piece) <= LINE_BYTES)
            number, whole = (number + 1, True) if ended else (number, False)


def main() -> int:
    """Read the request from the first argument, and print."""
    request = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    start, pattern = (
        SearchedDirectory(request["directory"], (), request["shown"]),
        request["pattern"],
    )
    try:
        if request["tool"] == "glob":
            found = glob_paths(start, pattern, request["roots"])
        else:
            found = grep_lines(start, pattern, request.get("name"), request["include"])
        for line in found:
            sys.stdout.buffer.write(request["prefix"].encode() + os.fsencode(line) + b"\n")
    except (re.error, RecursionError, OverflowError) as error:
        sys.stderr.write(f"not a regular expression: {error}")
        return BAD_REQUEST
    except BrokenPipeError:  # The reader needs no more and has closed the pipe.
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
