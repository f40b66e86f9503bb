"""The path of one item: the files and functions of workpool that it passes, and its Python calls.

    python benchmarks/path.py [--items N] [--by-file] [--only NAME …]

The pool runs in this process, one item at a time, under `sys.setprofile` on all threads; the
control plane has a process of its own. The calls of an item are those from the answer to one stop
to the answer to the next: the end of the previous session, then poll, ack, first heartbeat, handler
and stop. A function is on the path if every item called it, so a periodic one is not. A coroutine
counts as one call, however often it is resumed. Code of this folder does not count. The bare loop,
which handles eight items at a time, calls nothing but libraries.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
from arena import Meter, control_plane, enqueue, table, versions
from contenders import Entry, bare, parse_contenders, workpool

import workpool as package

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, FrameType

    from arena import Plane

WARM_UP = 20
PACKAGE = Path(package.__file__).parent
FOLDER = Path(__file__).parent
COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})
"""Functions in Python 3.11 only."""
RESUMABLE = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
ENTRIES = (
    Entry("bare", bare, "aiohttp"),
    Entry("workpool", partial(workpool, concurrency=1, pollers=1, stats_interval=0), "workpool"),
)


@dataclass
class CallMeter(Meter):
    """Counts the Python calls of every item, warm-up included."""

    calls_of_items: list[Counter[CodeType]] = field(default_factory=list)
    _calls: Counter[CodeType] = field(default_factory=Counter)

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """Count a call. This is the callback of `sys.setprofile`."""
        if event == "call" and _is_new(frame):
            self._calls[frame.f_code] += 1

    def stopped(self) -> None:
        """Begin the next item, since the stop of the present one was answered."""
        super().stopped()
        self.calls_of_items.append(self._calls)
        self._calls = Counter()


@dataclass(frozen=True)
class ItemPath:
    """The calls of one item, by function.

    Attributes:
        functions: The functions of workpool that every item called, with their calls per item.
        calls: Python calls per item, those of libraries included.
        own_calls: Calls per item of functions of workpool.
    """

    functions: dict[CodeType, float]
    calls: float
    own_calls: float

    @classmethod
    def of(cls, items: Sequence[Counter[CodeType]]) -> ItemPath:
        """Compute the average over all items."""
        calls: Counter[CodeType] = Counter()
        for each in items:
            calls.update(each)
        counted = {
            code: count / len(items)
            for code, count in calls.items()
            if FOLDER not in Path(code.co_filename).parents
        }
        own = {code: count for code, count in counted.items() if _is_own(code)}
        everywhere = set.intersection(*map(set, items))
        functions = {
            code: count
            for code, count in own.items()
            if code in everywhere and code.co_name not in COMPREHENSIONS
        }
        return cls(functions, sum(counted.values()), sum(own.values()))

    def by_file(self) -> dict[str, list[float]]:
        """The calls per item of each function, by file."""
        files: dict[str, list[float]] = {}
        for code, count in self.functions.items():
            name = Path(code.co_filename).relative_to(PACKAGE).as_posix()
            files.setdefault(name, []).append(count)
        return dict(sorted(files.items()))


def _is_new(frame: FrameType) -> bool:
    """Return whether a function begins, rather than a coroutine or generator that continues.

    Both are at a RESUME instruction; the two low bits of its argument are 0 at a beginning.
    """
    code = frame.f_code
    return not code.co_flags & RESUMABLE or code.co_code[frame.f_lasti + 1] & 3 == 0


def _is_own(code: CodeType) -> bool:
    return PACKAGE in Path(code.co_filename).parents


async def measure(plane: Plane, entry: Entry, items: int) -> ItemPath:
    """Handle the items under the profiler."""
    await enqueue(plane, WARM_UP + items)
    meter = CallMeter(WARM_UP, items)
    threading.setprofile(meter.profile)
    sys.setprofile(meter.profile)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(entry.run(plane, meter), name="contender")
            await meter.done.wait()
            task.cancel()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return ItemPath.of(meter.calls_of_items[WARM_UP : WARM_UP + items])


def report(found: dict[str, ItemPath]) -> str:
    """Return the table, which compares the calls with those of the first contender."""
    first = next(iter(found.values()))
    rows = [
        [
            name,
            str(len(path.by_file())),
            str(len(path.functions)),
            f"{path.own_calls:.0f}",
            f"{path.calls:.0f}",
            f"{path.calls - first.calls:+.0f}",
        ]
        for name, path in found.items()
    ]
    head = ("contender", "files", "functions", "own calls/item", "calls/item", "difference")
    return table(head, rows)


def report_by_file(path: ItemPath) -> str:
    """Return the table of the files that one item passes."""
    rows = [[name, str(len(calls)), f"{sum(calls):.1f}"] for name, calls in path.by_file().items()]
    return table(("file", "functions", "calls/item"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Files, functions and calls per item.")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--by-file", action="store_true", help="list the files that an item passes")
    options, entries = parse_contenders(parser, entries=ENTRIES)
    with control_plane() as plane:
        found = {entry.name: uvloop.run(measure(plane, entry, options.items)) for entry in entries}
    print(report(found))
    for name, path in found.items():
        if options.by_file and path.functions:
            print(f"\n{name}:\n\n{report_by_file(path)}")
    print(f"\n{options.items} items. {versions()}")


if __name__ == "__main__":
    main()
