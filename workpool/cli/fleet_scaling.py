"""The load and the recommended replicas of a fleet, for autoscalers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from workpool.scaling import ReplicaRule, calculate_scaling_numbers, sum_fleet_loads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.cli.fleet_reader import FleetReader


class FleetScaling:
    """Reads the load of each environment of a fleet, and computes the numbers for autoscalers.

    Each worker of the fleet works for all of these environments.

    Args:
        readers: The reader of each environment, by its id.
        own_slots: The sessions that one worker runs at once for each environment.
        rule: The calculation for all environments together. Its `slots_per_worker` are the slots
            that one worker has at least, however the items are spread over the environments.
    """

    def __init__(
        self,
        readers: Mapping[str, FleetReader],
        own_slots: Mapping[str, int],
        rule: ReplicaRule,
    ) -> None:
        self.readers = readers
        self._rule = rule
        self._rules = {
            environment_id: ReplicaRule(
                min(slots, rule.slots_per_worker), rule.minimum, rule.maximum
            )
            for environment_id, slots in own_slots.items()
        }

    def calculate_fleet_scaling_numbers(self) -> dict[str, float] | None:
        """Return the scaling numbers of the fleet; None if the load of an environment is unknown.

        The recommended number of workers suffices for all items together, and for the items of
        each environment.
        May be called on any thread.
        """
        found = {
            environment_id: self.calculate_environment_scaling_numbers(environment_id)
            for environment_id in self.readers
        }
        loads = [reader.latest_load for reader in self.readers.values()]
        known = [each for each in found.values() if each is not None]
        if len(known) < len(found) or None in loads:
            return None
        total = sum_fleet_loads([load for load in loads if load is not None])
        numbers = calculate_scaling_numbers(
            total, self._rule, age_seconds=max(each["age_seconds"] for each in known)
        )
        wanted = [numbers, *known]
        numbers["recommended_replicas"] = max(each["recommended_replicas"] for each in wanted)
        return numbers

    def calculate_environment_scaling_numbers(self, environment_id: str) -> dict[str, float] | None:
        """Return the scaling numbers of one environment; None if its load is unknown.

        May be called on any thread.
        """
        reader = self.readers[environment_id]
        load, age = reader.latest_load, reader.load_age_seconds
        if load is None or age is None:
            return None
        return calculate_scaling_numbers(load, self._rules[environment_id], age_seconds=age)

    def unready_reasons(self) -> list[str]:
        """Return a reason for each environment whose load is unknown; empty if all loads are known.

        May be called on any thread.
        """
        if len(self.readers) == 1:
            return [
                reason for reader in self.readers.values() for reason in reader.unready_reasons()
            ]
        return [
            f"{environment_id}: {reason}"
            for environment_id, reader in self.readers.items()
            for reason in reader.unready_reasons()
        ]

    async def read_loads_periodically(self) -> None:
        """Read the load of each environment at intervals until cancelled."""
        async with asyncio.TaskGroup() as group:
            for environment_id, reader in self.readers.items():
                group.create_task(reader.read_load_periodically(), name=f"read {environment_id}")
