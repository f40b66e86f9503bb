"""The scaling of control planes: many workers, held leases, open event streams and long queues.

    python benchmarks/control_plane_scaling.py [--only PART …] [--stores STORE …]

- `workers`: 1, 2, 4 and 8 worker processes with eight slots each run no-op items, and their limit.
- `leases`: one process holds 10,000 leases and renews each every 20 s.
- `streams`: one process has 1,000 sessions with an open event stream each.
- `depth`: an item in a queue of 10, 10,000 and 1,000,000 items must cost the same.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backlog_setup import Backlog
from benchmark_runs import (
    describe_cores_and_versions,
    format_ratio,
    format_table,
    private_memory_kib,
)
from compared_programs import run_pool
from compared_stores import COLUMNS, COMPARED_STORES, ComparedStore
from database_server import database_server
from system_measurements import (
    ResourceUse,
    RunMeasurement,
    measure_at_queue_depth,
    measure_run,
)
from waiting_sessions import (
    WaitingSessionsCost,
    make_program_with_waiting_sessions,
    measure_waiting_sessions,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.postgres.cluster import Cluster

WARM_UP = 100
BUSY = 0.85
"""The part of a core or a machine from which on it counts as used up."""


@dataclass(frozen=True)
class ScaleBenchmark:
    """The options of the benchmark, the stores that it measures, and a database server if any."""

    options: argparse.Namespace
    stores: Sequence[ComparedStore]
    server: Cluster | None


def describe_limiting_resource(use: ResourceUse) -> str:
    """Return the resource that limited the items per second."""
    cores = os.cpu_count() or 1
    used, available = use.machine
    if max(use.servers) > BUSY * use.wall:
        return "one core: a control plane"
    if use.total_cpu_seconds > BUSY * cores * use.wall:
        return f"all {cores} cores"
    if max(use.workers) > BUSY * use.wall:
        return "one core: a worker"
    if used > BUSY * available:
        others = 1 - use.total_cpu_seconds / used
        return f"all {cores} cores, with {100 * others:.0f} % for other programs"
    return "waiting: round trips and commits"


def format_workers_report(bench: ScaleBenchmark) -> str:
    """Return the table of throughput by number of workers."""
    rows = []
    for store in bench.stores:
        with store.open_store(run_pool, Backlog(), bench.server) as system:
            for number in bench.options.workers:
                found = measure_run(system, bench.options.items, WARM_UP, number)
                rows.append(
                    [
                        *store.first_cells_of_table_row,
                        str(number),
                        *format_costs(found),
                        describe_limiting_resource(found.use),
                    ]
                )
    return format_table((*COLUMNS, "workers", *COSTS, "limit"), rows)


COSTS = ("server ms", "database ms", "worker ms", "items/s")


def format_costs(found: RunMeasurement) -> list[str]:
    """Return table cells: for each kind of process the CPU ms per item, then the items per second.

    The kinds are the servers, the database and the workers.
    """
    use = found.use
    each = (sum(use.servers), use.database, sum(use.workers))
    return [
        *(f"{found.ms_per_item(seconds):.3f}" for seconds in each),
        f"{found.items_per_second:.0f}",
    ]


def format_leases_report(bench: ScaleBenchmark) -> str:
    """Return the table of the cost of waiting sessions, by the number of their leases."""
    return format_waiting_sessions_report(bench, bench.options.leases, streams=False)


def format_event_streams_report(bench: ScaleBenchmark) -> str:
    """Return the table of the cost of waiting sessions by the number of their event streams."""
    return format_waiting_sessions_report(bench, bench.options.streams, streams=True)


def format_waiting_sessions_report(
    bench: ScaleBenchmark, numbers: Sequence[int], *, streams: bool
) -> str:
    """Return the table of the cost of waiting sessions, by the number of sessions.

    The memory is the difference to processes with a single session.
    """
    rows = []
    for store in bench.stores:
        alone = measure_waiting_sessions_on_store(bench, store, 1, streams=streams)
        for number in numbers:
            found = measure_waiting_sessions_on_store(bench, store, number, streams=streams)
            use = found.use
            cpu = [
                found.convert_to_percent_of_core(each)
                for each in (sum(use.workers), sum(use.servers), use.database)
            ]
            rows.append(
                [
                    *store.first_cells_of_table_row,
                    str(number),
                    f"{(found.worker_kib - alone.worker_kib) / number:.1f}",
                    f"{(found.server_kib - alone.server_kib) / number:.1f}",
                    *(f"{each:.2f}" for each in cpu),
                    f"{1000 * sum(cpu) / number:.3f}",
                    f"{found.connections / number:.3f}",
                    str(number - found.running),
                ]
            )
    head = ("sessions", "worker KiB", "server KiB", "worker %", "server %", "database %")
    return format_table((*COLUMNS, *head, "per 1,000 %", "connections", "lost"), rows)


def measure_waiting_sessions_on_store(
    bench: ScaleBenchmark, store: ComparedStore, sessions: int, *, streams: bool
) -> WaitingSessionsCost:
    """Measure one worker with a number of waiting sessions, on new control planes."""
    options = bench.options
    with store.open_store(
        make_program_with_waiting_sessions(sessions, streams=streams), Backlog(), bench.server
    ) as system:
        return measure_waiting_sessions(
            system, sessions, seconds=options.seconds, settle=options.settle, streams=streams
        )


def format_report_by_queue_depth(bench: ScaleBenchmark) -> str:
    """Return the table of the cost per item by the number of items in the queue."""
    rows = []
    for store in bench.stores:
        base = 0.0
        for queued in bench.options.depths:
            with store.open_store(run_pool, Backlog(queued=queued), bench.server) as system:
                found = measure_at_queue_depth(system, bench.options.items, WARM_UP)
                memory = private_memory_kib(system.servers[0]) / 1024
            ms = found.ms_per_item(sum(found.use.servers) + found.use.database)
            base = base or ms
            cells = (
                *store.first_cells_of_table_row,
                str(queued),
                *format_costs(found),
                f"{memory:.0f}",
                format_ratio(ms, base),
            )
            rows.append([*cells, describe_limiting_resource(found.use)])
    return format_table((*COLUMNS, "depth", *COSTS, "server MiB", "ratio", "limit"), rows)


PARTS: dict[str, Callable[[ScaleBenchmark], str]] = {
    "workers": format_workers_report,
    "leases": format_leases_report,
    "streams": format_event_streams_report,
    "depth": format_report_by_queue_depth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The limits of control planes.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--stores", nargs="+", choices=COMPARED_STORES, default=list(COMPARED_STORES)
    )
    parser.add_argument("--items", type=int, default=4000, help="of `workers` and `depth`")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--leases", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--streams", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 10_000, 1_000_000])
    parser.add_argument("--seconds", type=float, default=40, help="how long sessions are watched")
    parser.add_argument("--settle", type=float, default=5, help="seconds before that")
    options = parser.parse_args()
    stores = [COMPARED_STORES[name] for name in options.stores]
    on_database = any(store.on_database for store in stores)
    with database_server() if on_database else nullcontext() as server:
        stores = [store for store in stores if server is not None or not store.on_database]
        for name in options.only:
            load = os.getloadavg()[0]
            found = PARTS[name](ScaleBenchmark(options, stores, server))
            print(f"{name}, at a load of {load:.0f}:\n\n{found}\n", flush=True)
    print(describe_cores_and_versions())


if __name__ == "__main__":
    main()
