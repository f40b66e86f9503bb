"""The cost of a drain: seconds and CPU, by the number of sessions that it ends.

    python benchmarks/drain.py [--sessions 1500 6000] [--rounds 3]

A pool holds this many sessions, then drains. `return`: each handler returns as soon as it notices
the drain, and each session is stopped. `release`: the drain has no time, so the handlers are
cancelled and each item is released by a last heartbeat. The cost per session must not depend on the
number of sessions.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import multiprocessing
import statistics
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import uvloop
from benchmark_runs import (
    ClockReading,
    ControlPlaneAddress,
    describe_cores_and_versions,
    enqueue_items,
    format_table,
    serve_control_plane,
)

from workpool import Session, Supervisor, handler

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ENDS = ("return", "release")


class DrainCost(NamedTuple):
    """The wall clock and CPU seconds of one drain, and the number of sessions it abandoned."""

    wall: float
    cpu: float
    abandoned: int


async def measure_drain(plane: ControlPlaneAddress, sessions: int, end: str) -> DrainCost:
    """Run sessions in a pool, drain the pool, and return the cost of the drain."""
    started = 0
    all_started = asyncio.Event()

    @handler
    async def wait_for_drain(session: Session) -> None:
        nonlocal started
        started += 1
        if started == sessions:
            all_started.set()
        await (session.interrupted() if end == "return" else asyncio.sleep(3600))

    settings = plane.client_settings(concurrency=sessions, lease_ttl=600, drain_timeout=600)
    async with Supervisor(settings, plugins=[wait_for_drain]) as pool:
        await all_started.wait()
        begin = ClockReading.read_clocks()
        await pool.drain(None if end == "return" else 0)
        cpu, wall = ClockReading.read_clocks().cpu - begin.cpu, time.monotonic() - begin.wall
    return DrainCost(wall, cpu, pool.abandoned)


def measure_drain_in_processes(sessions: int, end: str) -> DrainCost:
    """Measure one drain, with the pool and the control plane in processes of their own."""
    with serve_control_plane() as plane:
        uvloop.run(enqueue_items(plane, sessions))
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=_measure_drain_and_send_cost, args=(theirs, plane, sessions, end)
        )
        process.start()
        theirs.close()
        cost: DrainCost = ours.recv()
        process.join()
    return cost


def _measure_drain_and_send_cost(
    pipe: Connection, plane: ControlPlaneAddress, sessions: int, end: str
) -> None:
    # Disable warnings. On a slow machine, each of the thousands of sessions would log a warning.
    logging.disable(logging.WARNING)
    pipe.send(uvloop.run(measure_drain(plane, sessions, end)))


def main() -> None:
    parser = argparse.ArgumentParser(description="What a drain costs.")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1500, 6000])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for end, sessions in itertools.product(ENDS, options.sessions):
        costs = [measure_drain_in_processes(sessions, end) for _ in range(options.rounds)]
        wall, cpu = (statistics.median(each[i] for each in costs) for i in (0, 1))
        abandoned = max(each.abandoned for each in costs)
        each = (f"{wall:.2f}", f"{cpu:.2f}", f"{1000 * cpu / sessions:.3f}", str(abandoned))
        rows.append([end, str(sessions), *each])
        print(*rows[-1], file=sys.stderr, flush=True)
    head = ("handlers", "sessions", "seconds", "CPU seconds", "CPU ms/session", "abandoned")
    print(format_table(head, rows))
    print(f"\nMedians of {options.rounds}. {describe_cores_and_versions()}")


if __name__ == "__main__":
    main()
