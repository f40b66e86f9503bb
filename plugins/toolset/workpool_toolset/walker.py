"""The search of `glob` and `grep`: a program of its own, so that a regex without end can be killed.

Standard library only, run by its path with `python -I -S`: it gets an open directory and a request
as JSON, prints one line per finding, and ends with 2 and a sentence when the request is bad. It
goes down directory by directory on descriptors and follows no link: a race leads it nowhere.
"""

import fnmatch
import json
import os
import re
import resource
import stat
import sys
from collections.abc import Iterator
from typing import NamedTuple

ENTRIES = 50_000
DEPTH = 100
RESULTS = 200
LINE_BYTES = 2_000
SNIFFED_BYTES = 512
CPU_SECONDS = 30
MEMORY_BYTES = 1 << 30
SKIPPED = {".git", "node_modules"}
BAD_REQUEST = 2


class Found(NamedTuple):
    """One entry that is no directory: where it lies, and its path below the start."""

    directory: int
    name: str
    parts: tuple[str, ...]


def walk(start: int, skipped: set[str]) -> Iterator[Found]:
    """All entries below an open directory, in order of their names; each valid until the next."""
    budget = iter(range(ENTRIES))

    def below(directory: int, parts: tuple[str, ...]) -> Iterator[Found]:
        with os.scandir(directory) as entries:
            listed = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        for name, is_directory in listed:
            if next(budget, None) is None:
                return
            if not is_directory:
                yield Found(directory, name, (*parts, name))
            elif name not in skipped and len(parts) < DEPTH:
                yield from entered(directory, name, (*parts, name))

    def entered(directory: int, name: str, parts: tuple[str, ...]) -> Iterator[Found]:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            opened = os.open(name, flags, dir_fd=directory)
        except OSError:  # replaced or forbidden: not ours to search
            return
        try:
            yield from below(opened, parts)
        finally:
            os.close(opened)

    return below(start, ())


def matches(parts: tuple[str, ...], patterns: list[str]) -> bool:
    """Whether a path matches, component by component; `**` stands for any number of them."""
    reached = {0}
    for part in parts:
        reached = _closed(reached, patterns)
        reached = {
            place if patterns[place] == "**" else place + 1
            for place in reached
            if place < len(patterns)
            and (patterns[place] == "**" or fnmatch.fnmatchcase(part, patterns[place]))
        }
    return len(patterns) in _closed(reached, patterns)


def _closed(reached: set[int], patterns: list[str]) -> set[int]:
    """With all places that can be reached by letting a `**` stand for nothing."""
    for place in range(len(patterns)):
        if place in reached and patterns[place] == "**":
            reached = reached | {place + 1}
    return reached


def glob(start: int, pattern: str) -> Iterator[str]:
    """Paths that match, newest first."""
    patterns = [part for part in pattern.split("/") if part not in {"", "."}]
    found: list[tuple[int, str]] = []
    for entry in walk(start, set()):
        if matches(entry.parts, patterns):
            try:
                changed = os.lstat(entry.name, dir_fd=entry.directory).st_mtime_ns
            except OSError:  # gone meanwhile
                continue
            found.append((-changed, "/".join(entry.parts)))
    for _, path in sorted(found)[:RESULTS]:
        yield path


def grep(start: int, pattern: str, name: str | None, include: str | None) -> Iterator[str]:
    """`path:line:text` for every line that matches; only of the file `name`, if one is given."""
    wanted = re.compile(pattern)
    entries = iter([Found(start, name, ())]) if name else walk(start, SKIPPED)
    for entry in entries:
        if not include or fnmatch.fnmatchcase(entry.name, include):
            for number, line in lines(entry):
                if wanted.search(line):
                    yield f"{'/'.join(entry.parts)}:{number}:{line}"


def lines(entry: Found) -> Iterator[tuple[int, str]]:
    """The lines of a regular text file that are not too long, with their numbers."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(entry.name, flags, dir_fd=entry.directory), "rb")
    except OSError:
        return
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or b"\0" in file.read(SNIFFED_BYTES):
            return
        file.seek(0)
        number, whole = 1, True
        while line := file.readline(LINE_BYTES + 1):
            ended = line.endswith(b"\n")
            if whole and (ended or len(line) <= LINE_BYTES):
                yield number, line.decode(errors="replace").rstrip("\r\n")
            number, whole = (number + 1, True) if ended else (number, False)


def main() -> int:
    """Read the request from the first argument, and print."""
    request = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    start, pattern = request["directory"], request["pattern"]
    try:
        if request["tool"] == "glob":
            found = glob(start, pattern)
        else:
            found = grep(start, pattern, request.get("name"), request["include"])
        for line in found:
            sys.stdout.buffer.write(request["prefix"].encode() + os.fsencode(line) + b"\n")
    except (re.error, RecursionError, OverflowError) as error:
        sys.stderr.write(f"not a regular expression: {error}")
        return BAD_REQUEST
    except BrokenPipeError:  # enough was read
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
