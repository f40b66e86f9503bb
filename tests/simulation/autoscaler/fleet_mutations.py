"""Mutations of scaling and drain code, each of which the simulation of fleets must detect.

As a script, this module prints which invariant caught each mutation, and after how many schedules:

    python -m tests.simulation.autoscaler.fleet_mutations
"""

from __future__ import annotations

import sys
from typing import Final

from tests.simulation.autoscaler.fleet_runner import (
    generate_fleet_schedule_for_seed,
    simulate_fleet,
)
from tests.simulation.mutations import SourceEdit, report_mutations

LIMIT: Final = 300

FLEET_MUTATIONS: Final[dict[str, list[SourceEdit]]] = {
    "drain without its timeout": [
        SourceEdit("drain:Drain", "self._deadline = now + timeout", "self._deadline = now"),
    ],
    "running items not counted": [
        SourceEdit(
            "workpool.scaling:FleetLoad",
            "self.queued + self.pending + self.running",
            "self.queued + self.pending",
        ),
    ],
    "number of workers rounded down": [
        SourceEdit(
            "workpool.scaling:ReplicaRule",
            "-(-load.unfinished // self.slots_per_worker)",
            "load.unfinished // self.slots_per_worker",
        ),
    ],
    "cost written once": [
        SourceEdit(
            "workpool_kubernetes.cost_writer:CostWriter",
            "cost != self._written",
            "self._written is None",
        ),
    ],
    "cost written without regard to changes": [
        SourceEdit("workpool_kubernetes.cost_writer:CostWriter", "self._changed.set()", "pass"),
    ],
}


def find_fleet_invariant_violations(seed: int) -> list[str]:
    """Simulate the fleet schedule of a seed, and return the violations of invariants."""
    return simulate_fleet(generate_fleet_schedule_for_seed(seed)).violations


def main() -> int:
    return report_mutations(FLEET_MUTATIONS, range(LIMIT), find_fleet_invariant_violations)


if __name__ == "__main__":
    sys.exit(main())
