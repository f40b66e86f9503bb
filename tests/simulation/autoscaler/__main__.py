"""Simulates fleets: `python -m tests.simulation.autoscaler --schedules N [--without NAME]`."""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.simulation.autoscaler.fleet_runner import (
    generate_fleet_schedule_for_seed,
    simulate_fleet,
    simulate_fleets_in_parallel,
)
from tests.simulation.autoscaler.fleet_schedule import WITHOUT
from tests.simulation.replay import format_simulation_as_lines


def main() -> int:
    """Run simulations of fleets, and return the exit status: 1 if an invariant was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.autoscaler")
    parser.add_argument("--schedules", type=int, default=1_000, help="number of schedules")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first schedule")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=sorted(WITHOUT),
        help="leave out a documented setting, and count the sessions that are cut; repeatable",
    )
    parser.add_argument("--replay", type=int, metavar="SEED", help="print all events of one")
    options = parser.parse_args()
    out, without = sys.stdout, frozenset(options.without)
    if options.replay is not None:
        schedule = generate_fleet_schedule_for_seed(options.replay, without)
        result = simulate_fleet(schedule, documented=not without)
        lines = [str(schedule.settings), *map(str, schedule.incidents)]
        lines += [
            *format_simulation_as_lines(schedule.world, result.case),
            str(result.counts),
            *result.violations,
        ]
        out.writelines(f"{line}\n" for line in lines)
        return 1 if result.violations else 0
    started = time.monotonic()
    report = simulate_fleets_in_parallel(
        options.seed, options.schedules, options.processes, without
    )
    names = ", ".join(sorted(without)) or "nothing"
    out.write(f"{report}\nwithout {names}, seed {options.seed}, ")
    out.write(f"{time.monotonic() - started:.1f} s\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
