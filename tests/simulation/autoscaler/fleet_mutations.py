"""Mutations of scaling and drain code, each of which the simulation of fleets must detect.

As a script, this module prints which invariant caught each mutation, and after how many schedules:

    python -m tests.simulation.autoscaler.fleet_mutations
"""

from __future__ import annotations

import sys
from typing import Final

from tests.simulation.autoscaler.fleet_runner import fleet_schedule_for_seed, simulate_fleet
from tests.simulation.mutations import SourceEdit, apply_mutation

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


def find_catching_fleet_invariants(
    edits: list[SourceEdit], seeds: range
) -> tuple[int, list[str]] | None:
    """Return the number of schedules until a violation, and the violated invariants; else None."""
    with apply_mutation(edits):
        for count, seed in enumerate(seeds, 1):
            violations = simulate_fleet(fleet_schedule_for_seed(seed)).violations
            if violations:
                return count, sorted({each.partition(":")[0] for each in violations})
    return None


def main() -> int:
    survived = 0
    for name, edits in FLEET_MUTATIONS.items():
        found = find_catching_fleet_invariants(edits, range(LIMIT))
        survived += found is None
        text = "SURVIVED" if found is None else f"{found[0]:5d}  {', '.join(found[1])}"
        sys.stdout.write(f"{name:40s} {text}\n")
        sys.stdout.flush()
    return survived


if __name__ == "__main__":
    sys.exit(main())
