"""The CPU time per item in the worker, and items per second, compared with a bare loop.

    python benchmarks/throughput.py [--items N] [--rounds N] [--only NAME …]

In each round, every program in turn empties an equally full queue. CPU is that of all threads of
its process, from the first claim after a warm-up to the answer to the last stop. The table shows
medians. A ratio compares results of one round, so that other load on the machine affects both.
"""

from __future__ import annotations

import argparse
import asyncio
from statistics import median

from benchmark_runs import (
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

WARM_UP = 100


def measure_program(
    plane: ControlPlaneAddress, entry: BenchmarkEntry, items: int
) -> BenchmarkResult:
    """Fill the queue, and measure a program until the queue is empty."""
    asyncio.run(enqueue_items(plane, items + WARM_UP))
    with start_benchmark_run(BenchmarkRun(entry.run, plane, items, WARM_UP)) as receive:
        receive()
        result: BenchmarkResult = receive()
    return result


def format_report(rounds: dict[str, list[BenchmarkResult]]) -> str:
    """Return the table, which compares each program with the first one."""
    base = next(iter(rounds.values()))

    def format_row(name: str, results: list[BenchmarkResult]) -> list[str]:
        pairs = list(zip(results, base, strict=True))
        speedups = [result.items_per_second / floor.items_per_second for result, floor in pairs]
        return [
            name,
            str(results[0].items),
            f"{median(result.cpu_ms for result in results):.3f}",
            f"{median(result.cpu_ms / floor.cpu_ms for result, floor in pairs):.2f} ×",
            f"{median(result.items_per_second for result in results):.0f}",
            f"{median(speedups):.2f} ×",
        ]

    head = ("program", "items", "CPU ms/item", "ratio", "items/s", "ratio")
    return format_table(head, [format_row(name, results) for name, results in rounds.items()])


def compare_programs(entries: list[BenchmarkEntry], items: int, number_of_rounds: int) -> None:
    """Measure all programs in each round, and print the table."""
    rounds: dict[str, list[BenchmarkResult]] = {entry.name: [] for entry in entries}
    with serve_control_plane() as plane:
        for number in range(number_of_rounds):
            # Rotate the order, so that each program runs first in some rounds.
            turn = number % len(entries)
            for entry in entries[turn:] + entries[:turn]:
                result = measure_program(plane, entry, max(1, items // entry.divisor))
                rounds[entry.name].append(result)
    print(format_report(rounds))
    print(f"\n{number_of_rounds} rounds. {describe_cores_and_versions()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU per item and items per second.")
    parser.add_argument("--items", type=int, default=3000, help="per program and round")
    parser.add_argument("--rounds", type=int, default=5)
    options, entries = parse_selected_programs(parser)
    compare_programs(entries, options.items, options.rounds)


if __name__ == "__main__":
    main()
