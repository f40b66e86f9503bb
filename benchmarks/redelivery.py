"""The cost of a poll to the embedded control plane with many delivered, unacknowledged items.

    python benchmarks/redelivery.py [--items 1000000] [--calls 2000]

The operations run in this process, without HTTP, and the clock of the queue is moved by hand. Each
case fills a queue, then measures calls of three kinds: a poll with its ack, a poll that finds
nothing because its redelivery window is longer, and a reading of the statistics. The baseline is a
queue of 1,000 items of which none was delivered before.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import TYPE_CHECKING, NamedTuple

from benchmark_runs import describe_cores_and_versions, format_table

from workpool.server import Operations, Poll

if TYPE_CHECKING:
    from collections.abc import Callable

ENVIRONMENT = "env_0199aaaaaaaa70008000000000000001"
POLLS_PER_SECOND = 3000
"""More requests than the embedded control plane answers over HTTP on one core."""
WINDOW_SECONDS = 5
BATCH = 1000
LONG_WINDOW_MS = 3_600_000
PATIENT = Poll("patient", reclaim_older_than_ms=LONG_WINDOW_MS)
"""The poll of a worker that leaves items to others for an hour."""


class MeasuredQueue(NamedTuple):
    """The size of a measured queue. `delivered` items were delivered, but not acknowledged."""

    name: str
    items: int
    delivered: int


class CallCpuSeconds(NamedTuple):
    """The mean CPU seconds of a call, for each kind of call that is measured."""

    claim: float
    empty: float
    stats: float


def fill_queue(case: MeasuredQueue, now: list[float]) -> Operations:
    """Return a queue whose delivered items are old enough to be delivered again by a poll."""
    operations = Operations([ENVIRONMENT], now=lambda: now[0], history_limit=0)
    for _ in range(0, case.items, BATCH):
        operations.enqueue(ENVIRONMENT, count=BATCH)
    for _ in range(case.delivered):
        now[0] += 1 / POLLS_PER_SECOND
        operations.poll(ENVIRONMENT, PATIENT)
    now[0] += WINDOW_SECONDS
    return operations


def measure_cpu_seconds_of_calls(case: MeasuredQueue, calls: int) -> CallCpuSeconds:
    """Measure the CPU time of each kind of call on a queue."""
    operations = fill_queue(case, [1_800_000_000.0])

    def poll_and_ack() -> None:
        item = operations.poll(ENVIRONMENT, Poll("worker"))
        assert item is not None
        operations.ack_item(ENVIRONMENT, item.id, "worker")

    def search_queue_without_due_items() -> None:
        operations.get_queue(ENVIRONMENT).find_oldest_claimable_item(-1)

    claims = mean_cpu_seconds(poll_and_ack, min(calls, case.items // 2))
    return CallCpuSeconds(
        claims,
        mean_cpu_seconds(search_queue_without_due_items, calls),
        mean_cpu_seconds(lambda: operations.queue_stats(ENVIRONMENT), 20),
    )


def mean_cpu_seconds(call: Callable[[], object], count: int) -> float:
    """Return the mean CPU seconds of `count` calls, after a first call as warm-up."""
    call()
    gc.collect()
    gc.disable()
    started = time.thread_time()
    for _ in range(count):
        call()
    seconds = time.thread_time() - started
    gc.enable()
    return seconds / count


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a poll while many items wait.")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    window = POLLS_PER_SECOND * WINDOW_SECONDS
    cases = (
        MeasuredQueue("baseline", 1000, 0),
        MeasuredQueue("nothing delivered", options.items, 0),
        MeasuredQueue("a window of deliveries", options.items, min(window, options.items)),
        MeasuredQueue("all delivered", options.items, options.items),
    )
    rows: list[list[str]] = []
    baseline: CallCpuSeconds | None = None
    for case in cases:
        costs = measure_cpu_seconds_of_calls(case, options.calls)
        baseline = baseline or costs
        cells = [
            f"{each * 1e6:.1f} ({each / first:.1f} ×)"
            for each, first in zip(costs, baseline, strict=True)
        ]
        rows.append([case.name, str(case.items), str(case.delivered), *cells])
    head = ("case", "items", "delivered", "poll and ack, µs", "poll, nothing due, µs", "stats, µs")
    print(format_table(head, rows))
    print(f"\nCPU time of one call, and its ratio to the baseline. {describe_cores_and_versions()}")


if __name__ == "__main__":
    main()
