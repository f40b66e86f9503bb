"""The cost of an idle contender: requests per second and CPU, with an empty queue.

    python benchmarks/idle.py [--seconds N] [--settle N] [--only NAME …]

Every contender handles a few items, then waits `--settle` seconds, then is measured. The requests
are those that the control plane received; CPU is that of all threads of the process.
"""

from __future__ import annotations

import argparse

import uvloop
from arena import Contest, Plane, Watched, compete, control_plane, enqueue, table, versions
from contenders import Entry, parse_contenders

WARM_UP = 20


def measure(plane: Plane, entry: Entry, seconds: float, settle: float) -> Watched:
    """Measure an idle contender after its first items."""
    uvloop.run(enqueue(plane, WARM_UP))
    contest = Contest(entry.run, plane, 0, WARM_UP, watch=seconds, settle=settle)
    with compete(contest) as receive:
        receive()
        watched: Watched = receive()
    return watched


def report(found: dict[str, Watched]) -> str:
    """Return the table."""
    rows = [
        [name, f"{each.rate:.2f}", f"{each.cpu_percent:.3f}", f"{each.memory / 2**20:.1f}"]
        for name, each in found.items()
    ]
    return table(("contender", "requests/s", "CPU % of a core", "own memory MiB"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests and CPU of an idle contender.")
    parser.add_argument("--seconds", type=float, default=60, help="how long it is watched")
    parser.add_argument("--settle", type=float, default=10, help="from its last item until then")
    options, entries = parse_contenders(parser)
    with control_plane() as plane:
        found = {
            entry.name: measure(plane, entry, options.seconds, options.settle) for entry in entries
        }
    print(report(found))
    print(f"\n{options.seconds:g} s each. {versions()}")


if __name__ == "__main__":
    main()
