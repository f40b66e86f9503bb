"""The requests per second and the CPU time of a worker program while its queue is empty.

    python benchmarks/idle_workers.py [--seconds N] [--settle N] [--only NAME …]

Every program handles a few items, then waits `--settle` seconds, then is measured. The requests
are those that the control plane received; CPU is that of all threads of the process.
"""

from __future__ import annotations

import argparse

import uvloop
from benchmark_runs import (
    BenchmarkRun,
    ControlPlaneAddress,
    ResourceUsageInPeriod,
    describe_cores_and_versions,
    enqueue_items,
    format_table,
    serve_control_plane,
    start_benchmark_run,
)
from compared_programs import BenchmarkEntry, parse_selected_programs

WARM_UP = 20


def measure_idle_program(
    plane: ControlPlaneAddress, entry: BenchmarkEntry, seconds: float, settle: float
) -> ResourceUsageInPeriod:
    """Measure a program while it is idle, after it has handled its warm-up items."""
    uvloop.run(enqueue_items(plane, WARM_UP))
    run = BenchmarkRun(entry.run, plane, 0, WARM_UP, watch=seconds, settle=settle)
    with start_benchmark_run(run) as receive:
        receive()
        watched: ResourceUsageInPeriod = receive()
    return watched


def format_report(found: dict[str, ResourceUsageInPeriod]) -> str:
    """Return the table of requests, CPU and memory of each program."""
    rows = [
        [
            name,
            f"{each.requests_per_second:.2f}",
            f"{each.cpu_percent:.3f}",
            f"{each.memory / 2**20:.1f}",
        ]
        for name, each in found.items()
    ]
    return format_table(("program", "requests/s", "CPU % of a core", "own memory MiB"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests and CPU of an idle program.")
    parser.add_argument("--seconds", type=float, default=60, help="how long it is watched")
    parser.add_argument("--settle", type=float, default=10, help="from its last item until then")
    options, entries = parse_selected_programs(parser)
    with serve_control_plane() as plane:
        found = {
            entry.name: measure_idle_program(plane, entry, options.seconds, options.settle)
            for entry in entries
        }
    print(format_report(found))
    print(f"\n{options.seconds:g} s each. {describe_cores_and_versions()}")


if __name__ == "__main__":
    main()
