"""The cost of an item: CPU in the worker's process, and items per second, against a bare loop.

    python benchmarks/throughput.py [--items N] [--rounds N] [--only NAME …]

In each round, every contender in turn empties an equally full queue. CPU is that of all threads of
its process, from the first claim after a warm-up to the answer to the last stop. The table shows
medians. A ratio compares results of one round, so that other load on the machine affects both.
"""

from __future__ import annotations

import argparse
import asyncio
from statistics import median

from arena import Contest, Plane, Result, compete, control_plane, enqueue, table, versions
from contenders import Entry, parse_contenders

WARM_UP = 100


def measure(plane: Plane, entry: Entry, items: int) -> Result:
    """Fill the queue, and measure the contender until the queue is empty."""
    asyncio.run(enqueue(plane, items + WARM_UP))
    with compete(Contest(entry.run, plane, items, WARM_UP)) as receive:
        receive()
        result: Result = receive()
    return result


def report(rounds: dict[str, list[Result]]) -> str:
    """Return the table, which compares each contender with the first one."""
    base = next(iter(rounds.values()))

    def row(name: str, results: list[Result]) -> list[str]:
        pairs = list(zip(results, base, strict=True))
        return [
            name,
            str(results[0].items),
            f"{median(result.cpu_ms for result in results):.3f}",
            f"{median(result.cpu_ms / floor.cpu_ms for result, floor in pairs):.2f} ×",
            f"{median(result.rate for result in results):.0f}",
            f"{median(result.rate / floor.rate for result, floor in pairs):.2f} ×",
        ]

    head = ("contender", "items", "CPU ms/item", "ratio", "items/s", "ratio")
    return table(head, [row(name, results) for name, results in rounds.items()])


def compare(entries: list[Entry], items: int, number_of_rounds: int) -> None:
    """Measure the contenders in turns, and print the table."""
    rounds: dict[str, list[Result]] = {entry.name: [] for entry in entries}
    with control_plane() as plane:
        for number in range(number_of_rounds):
            turn = number % len(entries)  # so that no contender always comes first
            for entry in entries[turn:] + entries[:turn]:
                result = measure(plane, entry, max(1, items // entry.divisor))
                rounds[entry.name].append(result)
    print(report(rounds))
    print(f"\n{number_of_rounds} rounds. {versions()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU per item and items per second.")
    parser.add_argument("--items", type=int, default=3000, help="per contender and round")
    parser.add_argument("--rounds", type=int, default=5)
    options, entries = parse_contenders(parser)
    compare(entries, options.items, options.rounds)


if __name__ == "__main__":
    main()
