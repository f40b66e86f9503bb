"""The search program of `glob` and `grep`. It is a process, so an endless search can be killed.

The program is run by its path with `python -I -S` and uses the standard library only. It gets an
open directory and a request as JSON, and prints one line for each match. A wrong request ends it
with status 2 and a sentence. The walk enters one directory after the other with descriptors. `grep`
follows no links. `glob` resolves links itself, component by component, and follows those inside of
the session's roots. A session that replaces files during the search can therefore not let it leave
the roots.
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

MAX_ENTRIES = 50_000
MAX_DEPTH = 100
MAX_GLOB_PATHS = 200
MAX_LINE_BYTES = 2_000
MAX_OUTPUT_BYTES = 100 * 1024
CPU_SECONDS = 30
MEMORY_BYTES = 1 << 30
SKIPPED_DIRECTORIES = {".git", "node_modules"}
MAX_ALTERNATIVES = 100
MAX_LINKS = 40
BAD_REQUEST = 2

_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASSED = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class DirectoryEntry(NamedTuple):
    """A file or directory that was found, with the open descriptor of its parent directory.

    The descriptor is open until the next entry is requested.

    Attributes:
        directory: The descriptor of the parent directory.
        name: The name in the parent directory.
        parts: The components of the path below the start.
        state: The `stat` result of the entry, or of a link's target.
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
    """An open directory whose entries are searched.

    Attributes:
        opened: The descriptor of the directory.
        parts: The components of its path below the start.
        shown: The path as the session sees it, without links.
    """

    opened: int
    parts: tuple[str, ...]
    shown: str


class DirectoryWalk:
    """Yields the entries below a directory, sorted by name.

    Args:
        skipped: The names of directories that are not entered.
        roots: The roots to which links may lead, each as the path that the session sees and the
            path on this machine. Without roots, links are ignored.
    """

    def __init__(self, skipped: set[str], roots: Sequence[tuple[str, str]] = ()) -> None:
        self._skipped = skipped
        self._roots = roots
        self._budget = iter(range(MAX_ENTRIES))
        self._linked: set[tuple[int, int]] = set()

    def list_entries_below(self, place: SearchedDirectory) -> Iterator[DirectoryEntry]:
        """Yield all directories and regular files at any depth below `place`.

        The descriptor of an entry is valid until the next entry is requested.
        """
        with os.scandir(place.opened) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if next(self._budget, None) is None:
                return
            try:
                state = os.lstat(name, dir_fd=place.opened)
                if stat.S_ISLNK(state.st_mode):
                    yield from self._list_entries_of_link(place, name)
                elif stat.S_ISDIR(state.st_mode):
                    opened = os.open(name, _LISTED, dir_fd=place.opened)
                    yield from self._list_directory_and_entries(
                        place, name, opened, posixpath.join(place.shown, name)
                    )
                elif stat.S_ISREG(state.st_mode):
                    yield DirectoryEntry(place.opened, name, (*place.parts, name), state)
            except OSError:
                # Skip the entry, which was replaced after it was listed, or which cannot be read.
                continue

    def _list_entries_of_link(
        self, place: SearchedDirectory, name: str
    ) -> Iterator[DirectoryEntry]:
        target = (
            open_path_in_roots(self._roots, posixpath.join(place.shown, name))
            if self._roots
            else None
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
            # Links may form a cycle. Do not list a directory that was already reached by a link.
            again = (state.st_dev, state.st_ino) in self._linked
            self._linked.add((state.st_dev, state.st_ino))
            yield from self._list_directory_and_entries(
                place, name, opened, shown, listed=not again
            )
            return
        os.close(opened)
        if stat.S_ISREG(state.st_mode):
            yield DirectoryEntry(place.opened, name, (*place.parts, name), state)

    def _list_directory_and_entries(
        self, place: SearchedDirectory, name: str, opened: int, shown: str, *, listed: bool = True
    ) -> Iterator[DirectoryEntry]:
        """Yield a directory and the entries below it, then close the directory's descriptor."""
        parts = (*place.parts, name)
        try:
            yield DirectoryEntry(place.opened, name, parts, os.fstat(opened))
            if listed and name not in self._skipped and len(place.parts) < MAX_DEPTH:
                yield from self.list_entries_below(SearchedDirectory(opened, parts, shown))
        finally:
            os.close(opened)


def open_path_in_roots(roots: Sequence[tuple[str, str]], path: str) -> tuple[int, str] | None:
    """Follow the symbolic links of a path as long as they stay in the roots, and open the target.

    Returns:
        A descriptor for `fstat` and the path without links; None for a path outside of the roots.
    """
    for _ in range(MAX_LINKS + 1):
        inside = [(shown, host) for shown, host in roots if _is_path_in_root(path, shown)]
        if not inside:
            return None
        # One root may contain another. Use the innermost root that contains the path.
        shown, host = max(inside, key=lambda root: len(root[0]))
        found = _open_path_below_root(shown, host, path)
        if isinstance(found, int):
            return found, path
        path = found
    return None


def _is_path_in_root(path: str, root: str) -> bool:
    return root in {"/", path} or path.startswith(root + "/")


def _open_path_below_root(shown: str, host: str, path: str) -> int | str:
    """Open a path below a root. If a component is a link, return the link's target path instead."""
    parts = [part for part in path[len(shown) :].split("/") if part]
    opened, here = os.open(host, _PASSED), shown
    try:
        for index, part in enumerate(parts):
            try:
                target = os.readlink(part, dir_fd=opened)
            except OSError:
                # The error shows that this component is no link. Open the component itself.
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


def split_glob_pattern(glob: str) -> list[list[str]]:
    """Expand the braces of a glob pattern, and return each alternative as a list of components.

    `*`, `?` and `[…]` mean the same as in a shell, `**` any number of directories, `{a,b}` either.
    """
    found, left = list[str](), [glob]
    while left and len(found) + len(left) <= MAX_ALTERNATIVES:
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


def path_matches_pattern(parts: Sequence[str], patterns: list[str]) -> bool:
    """Return whether the components of a path match a pattern. `**` matches any number of them.

    At the end of a pattern, `**` is one or more: `src/**` is everything below `src`.
    """
    if patterns[-1:] == ["**"]:
        patterns = [*patterns, "*"]
    reached = {0}
    for part in parts:
        reached = _add_positions_after_double_star(reached, patterns)
        reached = {
            place if patterns[place] == "**" else place + 1
            for place in reached
            if place < len(patterns)
            and (patterns[place] == "**" or fnmatch.fnmatchcase(part, patterns[place]))
        }
    return len(patterns) in _add_positions_after_double_star(reached, patterns)


def _add_positions_after_double_star(reached: set[int], patterns: list[str]) -> set[int]:
    """Return `reached`, with the position after each reached `**` added.

    `reached` has the positions in `patterns` at which the next component of the path may match. A
    `**` may match no component, so the component may also match the pattern after the `**`.
    """
    for place in range(len(patterns)):
        if place in reached and patterns[place] == "**":
            reached = reached | {place + 1}
    return reached


def file_matches_include_pattern(parts: Sequence[str], include: str) -> bool:
    """Return whether a file matches the `include` pattern of `grep`.

    A pattern without `/` is compared with the file's name, any other with the path below the
    searched directory. A pattern that begins with `!` excludes files and directories.
    """
    wanted, patterns = include.removeprefix("!"), split_glob_pattern(include.removeprefix("!"))
    anchored = pattern_applies_to_whole_path(wanted)
    if wanted == include:
        return any(
            path_matches_pattern(parts if anchored else parts[-1:], each) for each in patterns
        )
    last = range(1, len(parts) + 1)
    left_out = [parts[:end] if anchored else parts[end - 1 : end] for end in last]
    return not any(path_matches_pattern(part, each) for part in left_out for each in patterns)


def pattern_applies_to_whole_path(include: str) -> bool:
    """Return whether an `include` pattern is compared with the whole path of a file.

    Otherwise the pattern is compared only with the name of the file.
    """
    return "/" in include.strip("/")


def find_matching_paths(
    start: SearchedDirectory, pattern: str, roots: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """Yield the paths that match a glob pattern, the last modified path first."""
    patterns = split_glob_pattern(pattern)
    found = [
        (-entry.state.st_mtime_ns, "/".join(entry.parts))
        for entry in DirectoryWalk(set(), roots).list_entries_below(start)
        if any(path_matches_pattern(entry.parts, each) for each in patterns)
    ]
    for _, path in sorted(found)[:MAX_GLOB_PATHS]:
        yield path


def find_matching_lines(
    start: SearchedDirectory, pattern: str, name: str | None, include: str | None
) -> Iterator[str]:
    """Yield each matching line of the file `name`, or of all files, as `path:line:text`."""
    wanted = re.compile(pattern)
    entries = DirectoryWalk(SKIPPED_DIRECTORIES).list_entries_below(start)
    if name:
        entries = iter(
            [DirectoryEntry(start.opened, name, (), os.lstat(name, dir_fd=start.opened))]
        )
    for entry in entries:
        if not entry.is_directory and (
            not include or file_matches_include_pattern(entry.parts or (entry.name,), include)
        ):
            path = "/".join(entry.parts)
            for number, line in matching_lines_of_file(entry, wanted):
                yield f"{path}:{number}:{line}"


def matching_lines_of_file(entry: DirectoryEntry, wanted: re.Pattern[str]) -> list[tuple[int, str]]:
    """Return the matching lines of a file with their numbers, or none for a binary file."""
    found, size = list[tuple[int, str]](), 0
    for number, piece, whole in read_lines_of_file(entry):
        if b"\0" in piece:
            return []
        line = decode_line(piece) if whole else ""
        if whole and wanted.search(line):
            found.append((number, line))
            size += len(line)
            if size > MAX_OUTPUT_BYTES:
                break
    return found


def decode_line(line: bytes) -> str:
    """Return the text of a line without the line end."""
    return line.removesuffix(b"\n").removesuffix(b"\r").decode(errors="replace")


def read_lines_of_file(entry: DirectoryEntry) -> Iterator[tuple[int, bytes, bool]]:
    """Yield each line's number, its bytes, and whether these bytes are the whole line.

    A line that is longer than the limit is yielded in pieces, each with the line's number. Nothing
    is yielded if the file cannot be opened or is not regular.
    """
    try:
        file = os.fdopen(os.open(entry.name, _READ, dir_fd=entry.directory), "rb")
    except OSError:
        return
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return
        number, whole = 1, True
        while piece := file.readline(MAX_LINE_BYTES + 1):
            ended = piece.endswith(b"\n")
            yield number, piece, whole and (ended or len(piece) <= MAX_LINE_BYTES)
            number, whole = (number + 1, True) if ended else (number, False)


def main() -> int:
    """Run the search that the first argument describes as JSON, and print the matches."""
    request = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    start, pattern = (
        SearchedDirectory(request["directory"], (), request["shown"]),
        request["pattern"],
    )
    try:
        if request["tool"] == "glob":
            found = find_matching_paths(start, pattern, request["roots"])
        else:
            found = find_matching_lines(start, pattern, request.get("name"), request["include"])
        for line in found:
            sys.stdout.buffer.write(request["prefix"].encode() + os.fsencode(line) + b"\n")
    except (re.error, RecursionError, OverflowError) as error:
        sys.stderr.write(f"not a regular expression: {error}")
        return BAD_REQUEST
    except BrokenPipeError:
        # End without an error: the reader has enough output and has closed the pipe.
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
