"""Runs simulations: `python -m tests.simulation --schedules N --seed N [--replay SEED]`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tests.simulation.replay import format_simulation_as_lines
from tests.simulation.runner import (
    generate_schedule_for_seed,
    simulate_in_parallel,
    simulate_schedule,
)


def main() -> int:
    """Run simulations, and return the exit status: 1 if an invariant was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--schedules", type=int, default=10_000, help="number of schedules")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first schedule")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replay", type=int, metavar="SEED", help="print all events of one")
    parser.add_argument(
        "--progress", type=Path, metavar="FILE", help="keep finished parts, to continue later"
    )
    options = parser.parse_args()
    out = sys.stdout
    if options.replay is not None:
        schedule = generate_schedule_for_seed(options.replay)
        case, violations = simulate_schedule(schedule)
        out.writelines(
            f"{line}\n" for line in [*format_simulation_as_lines(schedule, case), *violations]
        )
        return 1 if violations else 0
    started = time.monotonic()
    report = simulate_in_parallel(
        options.seed, options.schedules, options.processes, options.progress
    )
    out.write(f"{report}\nseed {options.seed}, {time.monotonic() - started:.1f} s\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
