"""Counts the calls of workpool's Python functions for one item, by function and by file.

    python benchmarks/function_calls_per_item.py [--items N] [--by-file] [--only NAME …]

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
from benchmark_runs import (
    ProgramMeter,
    describe_cores_and_versions,
    enqueue_items,
    format_table,
    serve_control_plane,
)
from compared_programs import (
    BenchmarkEntry,
    parse_selected_programs,
    run_bare_aiohttp_loop,
    run_pool,
)

import workpool as package

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, FrameType

    from benchmark_runs import ControlPlaneAddress

WARM_UP = 20
PACKAGE = Path(package.__file__).parent
FOLDER = Path(__file__).parent
COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})
"""Functions in Python 3.11 only."""
RESUMABLE = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
ENTRIES = (
    BenchmarkEntry("bare", run_bare_aiohttp_loop, "aiohttp"),
    BenchmarkEntry(
        "workpool", partial(run_pool, concurrency=1, pollers=1, stats_interval=0), "workpool"
    ),
)


@dataclass
class FunctionCallMeter(ProgramMeter):
    """Counts the calls of Python functions for each item, including the items of the warm-up."""

    calls_of_items: list[Counter[CodeType]] = field(default_factory=list)
    _calls: Counter[CodeType] = field(default_factory=Counter)

    def count_call(self, frame: FrameType, event: str, _: object) -> None:
        """Count a function call, as the callback of `sys.setprofile`."""
        if event == "call" and _is_new_function_call(frame):
            self._calls[frame.f_code] += 1

    def record_item_stop(self) -> None:
        """Record that an item was stopped, and begin to count the calls of the next item."""
        super().record_item_stop()
        self.calls_of_items.append(self._calls)
        self._calls = Counter()


@dataclass(frozen=True)
class ItemCallCounts:
    """The number of calls of each Python function for one item.

    Attributes:
        functions: The functions of workpool that every item called, with their calls per item.
        calls: Python calls per item, those of libraries included.
        own_calls: Calls per item of functions of workpool.
    """

    functions: dict[CodeType, float]
    calls: float
    own_calls: float

    @classmethod
    def compute_averages(cls, items: Sequence[Counter[CodeType]]) -> ItemCallCounts:
        """Return the average number of calls per item, from the calls counted for each item."""
        calls: Counter[CodeType] = Counter()
        for each in items:
            calls.update(each)
        counted = {
            code: count / len(items)
            for code, count in calls.items()
            if FOLDER not in Path(code.co_filename).parents
        }
        own = {code: count for code, count in counted.items() if _is_workpool_code(code)}
        everywhere = set.intersection(*map(set, items))
        functions = {
            code: count
            for code, count in own.items()
            if code in everywhere and code.co_name not in COMPREHENSIONS
        }
        return cls(functions, sum(counted.values()), sum(own.values()))

    def group_call_counts_by_file(self) -> dict[str, list[float]]:
        """Return the calls per item of each function, grouped by the file of the function."""
        files: dict[str, list[float]] = {}
        for code, count in self.functions.items():
            name = Path(code.co_filename).relative_to(PACKAGE).as_posix()
            files.setdefault(name, []).append(count)
        return dict(sorted(files.items()))


def _is_new_function_call(frame: FrameType) -> bool:
    """Return whether the frame is a new call, not a resumed coroutine or generator.

    Python executes a RESUME instruction in both cases; at a beginning, the two low bits of its
    argument are 0.
    """
    code = frame.f_code
    return not code.co_flags & RESUMABLE or code.co_code[frame.f_lasti + 1] & 3 == 0


def _is_workpool_code(code: CodeType) -> bool:
    return PACKAGE in Path(code.co_filename).parents


async def profile_function_calls_per_item(
    plane: ControlPlaneAddress, entry: BenchmarkEntry, items: int
) -> ItemCallCounts:
    """Let a program run items under the profiler, and return the calls per item."""
    await enqueue_items(plane, WARM_UP + items)
    meter = FunctionCallMeter(WARM_UP, items)
    threading.setprofile(meter.count_call)
    sys.setprofile(meter.count_call)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(entry.run(plane, meter), name="program")
            await meter.done.wait()
            task.cancel()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return ItemCallCounts.compute_averages(meter.calls_of_items[WARM_UP : WARM_UP + items])


def format_report(found: dict[str, ItemCallCounts]) -> str:
    """Return a table with the files, functions and calls per item of each program.

    The last column is the number of calls that the program makes more than the first program.
    """
    first = next(iter(found.values()))
    rows = [
        [
            name,
            str(len(path.group_call_counts_by_file())),
            str(len(path.functions)),
            f"{path.own_calls:.0f}",
            f"{path.calls:.0f}",
            f"{path.calls - first.calls:+.0f}",
        ]
        for name, path in found.items()
    ]
    head = ("program", "files", "functions", "own calls/item", "calls/item", "difference")
    return format_table(head, rows)


def format_report_by_file(path: ItemCallCounts) -> str:
    """Return the table of the files whose functions run for an item."""
    rows = [
        [name, str(len(calls)), f"{sum(calls):.1f}"]
        for name, calls in path.group_call_counts_by_file().items()
    ]
    return format_table(("file", "functions", "calls/item"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Files, functions and calls per item.")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--by-file", action="store_true", help="list the files that an item passes")
    options, entries = parse_selected_programs(parser, entries=ENTRIES)
    with serve_control_plane() as plane:
        found = {
            entry.name: uvloop.run(profile_function_calls_per_item(plane, entry, options.items))
            for entry in entries
        }
    print(format_report(found))
    for name, path in found.items():
        if options.by_file and path.functions:
            print(f"\n{name}:\n\n{format_report_by_file(path)}")
    print(f"\n{options.items} items. {describe_cores_and_versions()}")


if __name__ == "__main__":
    main()
