"""Runs simulations of autoscaled fleets: one schedule, or many on all cores."""

from __future__ import annotations

import functools
import multiprocessing
import random
from typing import TYPE_CHECKING, NamedTuple

from tests.simulation.autoscaler.fleet_schedule import FleetSchedule, fleet_schedule_of
from tests.simulation.autoscaler.fleet_world import FLEET_PLUGINS, FleetWorld
from tests.simulation.autoscaler.scale_down import Counts, Fleet, count_removed_pods, judge_fleet
from tests.simulation.invariants import judge
from tests.simulation.runner import PART, collecting_rarely, metrics_registry, run_world

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.simulation.case import FinishedSimulation

Without = frozenset[str]
DOCUMENTED: Without = frozenset()
"""No documented setting is left out."""


class FleetResult(NamedTuple):
    """The result of one simulation."""

    case: FinishedSimulation
    counts: Counts
    violations: list[str]


class FleetReport(NamedTuple):
    """The result of some simulations; `failures`: seed and violations."""

    schedules: int = 0
    faults: int = 0
    counts: Counts = Counts()
    failures: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def plus(self, other: FleetReport) -> FleetReport:
        """Return the sum of two reports."""
        return FleetReport(
            self.schedules + other.schedules,
            self.faults + other.faults,
            self.counts.plus(other.counts),
            self.failures + other.failures,
        )

    def __str__(self) -> str:
        """Return the counts, then lines for each failure."""
        lines = [
            f"{self.schedules} schedules, {self.faults} faults, {len(self.failures)} broken",
            str(self.counts),
        ]
        for seed, violations in self.failures:
            lines += [f"seed {seed}: {each}" for each in violations[:3]]
            lines.append(f"  replay: python -m tests.simulation.autoscaler --replay {seed}")
        return "\n".join(lines)


def schedule_of_fleet(seed: int, without: Without = DOCUMENTED) -> FleetSchedule:
    """Return the schedule of a seed, without some of the documented settings."""
    return fleet_schedule_of(seed, random.Random(seed), without)


def simulate_fleet(schedule: FleetSchedule, *, documented: bool = True) -> FleetResult:
    """Run a schedule.

    Args:
        schedule: The schedule.
        documented: Its settings are the documented ones, so that the invariants of a fleet hold.
    """

    async def main() -> FleetResult:
        world = FleetWorld(schedule, metrics_registry())
        case, violations = await world.run_schedule(judge)
        fleet = Fleet(case.trace, world.cluster.record, schedule.settings)
        if documented:
            violations += judge_fleet(fleet)
        return FleetResult(case, count_removed_pods(fleet, len(world.items)), violations)

    return run_world(main, schedule.world.seed, FLEET_PLUGINS)


def simulate_fleets(seeds: Iterable[int], without: Without = DOCUMENTED) -> FleetReport:
    """Simulate the seeds in this process."""
    report = FleetReport()
    for seed in collecting_rarely(seeds):
        result = simulate_fleet(schedule_of_fleet(seed, without), documented=not without)
        failures = ((seed, tuple(result.violations)),) if result.violations else ()
        report = report.plus(FleetReport(1, result.case.trace.faults, result.counts, failures))
    return report


def simulate_many_fleets(
    seed: int, schedules: int, processes: int, without: Without = DOCUMENTED
) -> FleetReport:
    """Simulate the seeds from `seed` to `seed + schedules - 1` in several processes."""
    parts = [
        range(first, min(first + PART, seed + schedules))
        for first in range(seed, seed + schedules, PART)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        reports = pool.imap_unordered(functools.partial(simulate_fleets, without=without), parts)
        return functools.reduce(FleetReport.plus, reports, FleetReport())
