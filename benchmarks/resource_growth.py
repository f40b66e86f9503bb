"""A check that the resources of one pool do not grow with the number of its past sessions.

    python benchmarks/resource_growth.py [--sessions 30000] [--samples 6] [--warm-up 12000]

One pool runs the sessions; the control plane has a process of its own. A third of the handlers
return a result, a third return none, a third raise. At each sample the queue is empty, and the
script counts what the process of the pool has: Python objects after a garbage collection, tasks,
file descriptors, threads, and its own memory. The exit status is 1 if any of them has grown between
the first and the last sample. The warm-up must exceed the 10,000 ids that a pool remembers.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import logging
import os
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import uvloop
from benchmark_runs import (
    ControlPlaneAddress,
    describe_cores_and_versions,
    enqueue_items,
    format_table,
    private_memory_kib,
    serve_control_plane,
)

from workpool import Session, Supervisor, handler

CONCURRENCY = 50
BATCH = 1000
OBJECTS_PART, MEMORY_PART = 0.005, 0.03
"""The growth of objects and memory that counts as noise, as parts of the first sample."""


class ResourceSample(NamedTuple):
    """The resources that the process uses after a number of sessions; `memory` is in bytes."""

    sessions: int
    objects: int
    tasks: int
    descriptors: int
    threads: int
    memory: int

    def format_table_row(self) -> list[str]:
        """Return the sample as the cells of a table row."""
        *numbers, memory = self
        return [*map(str, numbers), f"{memory / 2**20:.1f}"]


def take_sample(sessions: int) -> ResourceSample:
    """Return the resources that this process uses now."""
    # Collect three times: a finalizer may release objects that only the next collection frees.
    for _ in range(3):
        gc.collect()
    return ResourceSample(
        sessions,
        len(gc.get_objects()),
        len(asyncio.all_tasks()),
        sum(1 for _ in Path("/proc/self/fd").iterdir()),
        threading.active_count(),
        private_memory_kib(os.getpid()) * 1024,
    )


async def run_sessions_and_take_samples(
    plane: ControlPlaneAddress, samples: list[int]
) -> list[ResourceSample]:
    """Run sessions in one pool, and take a sample after each number of sessions in `samples`."""
    numbers = itertools.count()
    finished = 0
    changed = asyncio.Event()

    @handler
    async def run_numbered_session(_: Session) -> dict[str, str] | None:
        nonlocal finished
        number = next(numbers)
        try:
            await asyncio.sleep(0.001)
            if number % 3 == 0:
                raise ValueError("on purpose")
            return {"number": str(number)} if number % 3 == 1 else None
        finally:
            finished += 1
            changed.set()

    async def wait_until_sessions_finished(sessions: int) -> None:
        while finished < sessions:
            changed.clear()
            await changed.wait()

    found: list[ResourceSample] = []
    sent = 0
    async with Supervisor(
        plane.client_settings(concurrency=CONCURRENCY), plugins=[run_numbered_session]
    ):
        for sessions in samples:
            while sent < sessions:
                count = min(BATCH, sessions - sent)
                await enqueue_items(plane, count)
                sent += count
                await wait_until_sessions_finished(sent)
            # Let the last sessions end, so that the sample does not include their resources.
            await asyncio.sleep(1)
            found.append(take_sample(sessions))
            print(found[-1], file=sys.stderr, flush=True)
    return found


def find_grown_resources(first: ResourceSample, last: ResourceSample) -> list[str]:
    """Return the names of the resources that have grown by more than measurement noise."""
    limits = first._asdict() | {
        "sessions": last.sessions,
        "objects": first.objects * (1 + OBJECTS_PART),
        "memory": first.memory * (1 + MEMORY_PART),
    }
    return [name for name, value in last._asdict().items() if value > limits[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description="What grows with the number of sessions.")
    parser.add_argument("--sessions", type=int, default=30_000)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=12_000, help="sessions before the first")
    options = parser.parse_args()
    logging.disable(logging.ERROR)  # a third of the sessions raise an error on purpose
    step = (options.sessions - options.warm_up) / (options.samples - 1)
    samples = [options.warm_up + round(step * number) for number in range(options.samples)]
    with serve_control_plane() as plane:
        found = uvloop.run(run_sessions_and_take_samples(plane, samples))
    head = ("sessions", "objects", "tasks", "descriptors", "threads", "memory MiB")
    print(format_table(head, [each.format_table_row() for each in found]))
    names = find_grown_resources(found[0], found[-1])
    print(f"\ngrown: {', '.join(names) or 'nothing'}. {describe_cores_and_versions()}")
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
