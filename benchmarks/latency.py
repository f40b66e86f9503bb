"""The latency of a handler's start: from the call that enqueues an item to the start.

    python benchmarks/latency.py [--items N] [--rounds N] [--only NAME …] [--gaps idle|sparse …]

An otherwise idle program runs one item at a time: `idle` has gaps around 50 ms, `sparse` has gaps
of 1 to 3 s and a tenth of the items. Both processes read the system's monotonic clock. The latency
includes the enqueuing request, the wake-up of the poll, and all steps before the handler: for the
pool, ack and first heartbeat. The samples of all rounds are combined.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from statistics import quantiles
from typing import Final

import uvloop
from benchmark_runs import (
    SENT,
    BenchmarkResult,
    BenchmarkRun,
    ControlPlaneAddress,
    describe_cores_and_versions,
    enqueue_items,
    format_table,
    serve_control_plane,
    start_benchmark_run,
)
from compared_programs import BenchmarkEntry, parse_selected_programs

from workpool import WorkClient

WARM_UP = 20
GAPS: Final = {"idle": (0.025, 0.075), "sparse": (1.0, 3.0)}
"""The shortest and the longest gap between two items, in seconds."""


async def enqueue_with_random_gaps(
    plane: ControlPlaneAddress, items: int, gaps: tuple[float, float]
) -> None:
    """Enqueue items one by one, each after a random gap."""
    async with WorkClient(plane.client_settings()) as client:
        for _ in range(items):
            await asyncio.sleep(random.uniform(*gaps))  # noqa: S311 - spreads load, guards nothing
            await client.enqueue(metadata={SENT: repr(time.monotonic())})


def measure_item_waits(
    plane: ControlPlaneAddress, entry: BenchmarkEntry, items: int, gaps: tuple[float, float]
) -> list[float]:
    """Return the seconds that each item waited for its handler."""
    uvloop.run(enqueue_items(plane, WARM_UP))
    with start_benchmark_run(BenchmarkRun(entry.run, plane, items, WARM_UP)) as receive:
        receive()
        uvloop.run(enqueue_with_random_gaps(plane, items, gaps))
        result: BenchmarkResult = receive()
    return result.waits


def format_report(waits: dict[tuple[str, str], list[float]]) -> str:
    """Return the table of the waits.

    A ratio divides a program's wait by the wait of the first program. Both are waits of items that
    were enqueued with the same range of gaps.
    """
    base: dict[str, tuple[float, float]] = {}
    rows = []
    for (gaps, name), seconds in waits.items():
        cuts = quantiles(seconds, n=100, method="inclusive")
        p50, p99 = cuts[49], cuts[98]
        base50, base99 = base.setdefault(gaps, (p50, p99))
        cells = [f"{p50 * 1000:.2f}", f"{p50 / base50:.2f} ×"]
        cells += [f"{p99 * 1000:.2f}", f"{p99 / base99:.2f} ×", f"{max(seconds) * 1000:.2f}"]
        rows.append([gaps, name, str(len(seconds)), *cells])
    return format_table(
        ("gaps", "program", "items", "p50 ms", "ratio", "p99 ms", "ratio", "max ms"), rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="From enqueue to the start of the handler.")
    parser.add_argument("--items", type=int, default=300, help="per program and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gaps", nargs="+", choices=GAPS, default=list(GAPS))
    options, entries = parse_selected_programs(parser, "bare", "workpool", "anthropic")
    waits: dict[tuple[str, str], list[float]] = {}
    with serve_control_plane() as plane:
        for _ in range(options.rounds):
            for name in options.gaps:
                items = options.items if name == "idle" else max(2, options.items // 10)
                for entry in entries:
                    samples = measure_item_waits(plane, entry, items, GAPS[name])
                    waits.setdefault((name, entry.name), []).extend(samples)
    print(format_report(waits))
    print(f"\n{options.rounds} rounds. {describe_cores_and_versions()}")


if __name__ == "__main__":
    main()
