"""`python -m workpool.testing.simulation --schedules 1000000 --seed N`, or `--replay SEED`."""

from __future__ import annotations

import argparse
import os
import sys
import time

from workpool.testing.simulation.run import schedule_of, simulate, simulate_many
from workpool.testing.simulation.story import tell


def main() -> int:
    """Simulate; 1 when an invariant was broken."""
    parser = argparse.ArgumentParser(prog="python -m workpool.testing.simulation")
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replay", type=int, metavar="SEED", help="tell the story of one")
    options = parser.parse_args()
    out = sys.stdout
    if options.replay is not None:
        schedule = schedule_of(options.replay)
        case, words = simulate(schedule)
        out.writelines(f"{line}\n" for line in [*tell(schedule, case), *words])
        return 1 if words else 0
    started = time.monotonic()
    report = simulate_many(options.seed, options.schedules, options.processes)
    out.write(f"{report}\nseed {options.seed}, {time.monotonic() - started:.1f} s\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
