"""Runs simulations of autoscaled fleets: one schedule, or many in several processes."""

from __future__ import annotations

import functools
import multiprocessing
import random
from typing import TYPE_CHECKING, NamedTuple

from tests.simulation.autoscaler.fleet_invariants import (
    FinishedFleet,
    RemovalCounts,
    check_fleet_invariants,
    count_removed_pods,
)
from tests.simulation.autoscaler.fleet_schedule import FleetSchedule, generate_fleet_schedule
from tests.simulation.autoscaler.fleet_world import FLEET_PLUGINS, FleetWorld
from tests.simulation.invariants import check_invariants
from tests.simulation.runner import (
    PART,
    iterate_with_rare_garbage_collection,
    metrics_registry,
    run_seeded_simulation,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.simulation.finished_simulation import FinishedSimulation

Without = frozenset[str]
DOCUMENTED: Without = frozenset()
"""No documented setting is left out."""


class FleetResult(NamedTuple):
    """The result of the simulation of one fleet."""

    case: FinishedSimulation
    counts: RemovalCounts
    violations: list[str]


class FleetReport(NamedTuple):
    """The summed results of fleets; `failures` has each failed fleet's seed and violations."""

    schedules: int = 0
    faults: int = 0
    counts: RemovalCounts = RemovalCounts()
    failures: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def add_report(self, other: FleetReport) -> FleetReport:
        """Return the sum of this report and `other`."""
        return FleetReport(
            self.schedules + other.schedules,
            self.faults + other.faults,
            self.counts.add_counts(other.counts),
            self.failures + other.failures,
        )

    def __str__(self) -> str:
        """Return lines with the totals, then the violations of each schedule that has some."""
        lines = [
            f"{self.schedules} schedules, {self.faults} faults, {len(self.failures)} broken",
            str(self.counts),
        ]
        for seed, violations in self.failures:
            lines += [f"seed {seed}: {each}" for each in violations[:3]]
            lines.append(f"  replay: python -m tests.simulation.autoscaler --replay {seed}")
        return "\n".join(lines)


def generate_fleet_schedule_for_seed(seed: int, without: Without = DOCUMENTED) -> FleetSchedule:
    """Return the fleet schedule of a seed.

    `without` has the names of the documented settings that the schedule leaves out.
    """
    return generate_fleet_schedule(seed, random.Random(seed), without)


def simulate_fleet(schedule: FleetSchedule, *, documented: bool = True) -> FleetResult:
    """Run the schedule of a fleet, and return the result with its violations of invariants.

    Args:
        schedule: The schedule.
        documented: Its settings are the documented ones, so that the invariants of a fleet hold.
    """

    async def main() -> FleetResult:
        world = FleetWorld(schedule, metrics_registry())
        case, violations = await world.run_simulation(check_invariants)
        fleet = FinishedFleet(case.trace, world.cluster.record, schedule.settings)
        if documented:
            violations += check_fleet_invariants(fleet)
        return FleetResult(case, count_removed_pods(fleet, len(world.items)), violations)

    return run_seeded_simulation(main, schedule.world.seed, FLEET_PLUGINS)


def simulate_fleet_seeds(seeds: Iterable[int], without: Without = DOCUMENTED) -> FleetReport:
    """Simulate the fleets of these seeds in this process."""
    report = FleetReport()
    for seed in iterate_with_rare_garbage_collection(seeds):
        result = simulate_fleet(
            generate_fleet_schedule_for_seed(seed, without), documented=not without
        )
        failures = ((seed, tuple(result.violations)),) if result.violations else ()
        report = report.add_report(
            FleetReport(1, result.case.trace.faults, result.counts, failures)
        )
    return report


def simulate_fleets_in_parallel(
    seed: int, schedules: int, processes: int, without: Without = DOCUMENTED
) -> FleetReport:
    """Simulate `schedules` fleets in several processes, with consecutive seeds from `seed` on."""
    parts = [
        range(first, min(first + PART, seed + schedules))
        for first in range(seed, seed + schedules, PART)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        reports = pool.imap_unordered(
            functools.partial(simulate_fleet_seeds, without=without), parts
        )
        return functools.reduce(FleetReport.add_report, reports, FleetReport())
