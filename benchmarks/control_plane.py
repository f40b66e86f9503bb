"""The CPU cost per item of control planes with different stores, and of another job queue.

    python benchmarks/control_plane.py [--items N] [--stopped-rows N …] [--rounds N] [--only NAME …]

Worker processes with eight slots each share the servers and run no-op items. A run begins when the
first of these items is enqueued, in batches of 1,000, and ends with the answer to the last stop.
The table shows medians of the CPU of all processes of a kind, per item. Each store has items that
were stopped hours before. The ratio divides the CPU of servers and database by that of the run with
the fewest stopped items.
"""

from __future__ import annotations

import argparse
import os
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import TYPE_CHECKING

import job_queue
from backlog_setup import Backlog
from benchmark_runs import describe_cores_and_versions, format_ratio, format_table
from compared_programs import run_pool
from compared_stores import COLUMNS, COMPARED_STORES, ComparedStore
from database_server import database_server
from system_measurements import RunMeasurement, measure_run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from system_measurements import MeasuredSystem

    from tests.postgres.cluster import Cluster

WARM_UP = 200


JOB_QUEUE = ComparedStore("procrastinate", "procrastinate", nodes=0, on_database=True)
ENTRIES = COMPARED_STORES | {JOB_QUEUE.name: JOB_QUEUE}


@contextmanager
def start_measured_system(
    entry: ComparedStore, stopped: int, server: Cluster | None
) -> Iterator[MeasuredSystem]:
    """Start a control plane or the job queue `procrastinate` with `stopped` ended items or jobs."""
    if entry is not JOB_QUEUE:
        system = entry.open_store(run_pool, Backlog(stopped), server)
    else:
        assert server is not None
        system = job_queue.open_job_queue(server, stopped)
    with system as found:
        yield found


def measure_systems(
    entries: list[ComparedStore], options: argparse.Namespace, server: Cluster | None
) -> dict[tuple[ComparedStore, int], list[RunMeasurement]]:
    """Measure each system that can run on this machine, with each number of stopped items."""
    found: dict[tuple[ComparedStore, int], list[RunMeasurement]] = {}
    for entry in entries:
        if entry.on_database and server is None:
            continue
        if entry is JOB_QUEUE and not job_queue.INSTALLED:
            continue
        for stopped in options.stopped_rows:
            with start_measured_system(entry, stopped, server) as system:
                found[entry, stopped] = [
                    measure_run(system, options.items, WARM_UP, options.workers)
                    for _ in range(options.rounds)
                ]
    return found


def format_report(found: dict[tuple[ComparedStore, int], list[RunMeasurement]], fewest: int) -> str:
    """Return the table of CPU times per item."""

    def median_server_ms_per_item(runs: list[RunMeasurement]) -> float:
        return median(each.ms_per_item(sum(each.use.servers) + each.use.database) for each in runs)

    rows = [
        [
            *entry.first_cells_of_table_row,
            str(stopped),
            str(runs[0].items),
            f"{median(each.ms_per_item(sum(each.use.servers)) for each in runs):.3f}",
            f"{median(each.ms_per_item(each.use.database) for each in runs):.3f}",
            f"{median(each.ms_per_item(sum(each.use.workers)) for each in runs):.3f}",
            f"{median(each.ms_per_item(each.use.total_cpu_seconds) for each in runs):.3f}",
            f"{median(each.items_per_second for each in runs):.0f}",
            format_ratio(
                median_server_ms_per_item(runs), median_server_ms_per_item(found[entry, fewest])
            ),
        ]
        for (entry, stopped), runs in found.items()
    ]
    head = (*COLUMNS, "stopped rows", "items", "server ms", "database ms", "worker ms")
    return format_table((*head, "CPU ms/item", "items/s", "ratio"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU per item of control planes, by store.")
    parser.add_argument("--items", type=int, default=4000, help="per round")
    parser.add_argument("--workers", type=int, default=4, help="worker processes")
    parser.add_argument("--stopped-rows", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    options = parser.parse_args()
    entries = [ENTRIES[name] for name in options.only]
    load = os.getloadavg()[0]
    on_database = any(entry.on_database for entry in entries)
    with database_server() if on_database else nullcontext() as server:
        found = measure_systems(entries, options, server)
    print(format_report(found, min(options.stopped_rows)))
    print(
        f"\n{options.rounds} rounds, {options.workers} workers, a load of {load:.0f} at the start."
        f" {describe_cores_and_versions()}"
    )


if __name__ == "__main__":
    main()
