"""Computes the number of workers that an environment needs from the environment's load.

Pure functions, shared by `workpool serve`, `workpool scale` and the simulation of autoscalers. See
workpool/docs/operating.md, "Scale automatically".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SLOTS_PER_WORKER: Final = 8
"""The default of the setting `concurrency`; a test compares them."""
REPLICAS_MAX: Final = 100
"""The default maximum, so that a wrong count cannot start workers without a limit."""


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """The items of one environment that are not stopped.

    Attributes:
        queued: Items that a poll could receive now.
        pending: Items that were delivered and are not acknowledged yet.
        running: Items under a lease: starting, active or stopping.
        oldest_queued_seconds: The age of the oldest queued item; 0 without one.
        lower_bound: Whether `running` may be too small, because not all items could be counted.
    """

    queued: int
    pending: int
    running: int
    oldest_queued_seconds: float = 0.0
    lower_bound: bool = False

    @property
    def unfinished(self) -> int:
        """The number of items that need a slot: queued, pending and running."""
        return self.queued + self.pending + self.running


def sum_fleet_loads(loads: Sequence[FleetLoad]) -> FleetLoad:
    """Return the sum of the loads of several environments."""
    return FleetLoad(
        queued=sum(load.queued for load in loads),
        pending=sum(load.pending for load in loads),
        running=sum(load.running for load in loads),
        oldest_queued_seconds=max((load.oldest_queued_seconds for load in loads), default=0.0),
        lower_bound=any(load.lower_bound for load in loads),
    )


@dataclass(frozen=True, slots=True)
class ReplicaRule:
    """The rule that computes the number of workers for a load.

    Args:
        slots_per_worker: The sessions that one worker runs at once: its setting `concurrency`.
        minimum: The least number of workers, also if there is no work.
        maximum: The largest number of workers, for any load.

    Raises:
        ValueError: A number is out of range.
    """

    slots_per_worker: int = SLOTS_PER_WORKER
    minimum: int = 0
    maximum: int = REPLICAS_MAX

    def __post_init__(self) -> None:
        if self.slots_per_worker < 1:
            raise ValueError("slots_per_worker: not 1 or more")
        if not 0 <= self.minimum <= self.maximum:
            raise ValueError("minimum and maximum of the replicas: not 0 <= minimum <= maximum")

    def recommended_replicas(self, load: FleetLoad) -> int:
        """Return `ceil(unfinished / slots_per_worker)`, within the minimum and the maximum.

        Running items count. Without them the number would fall to the minimum as soon as the last
        item is claimed, and the autoscaler would remove workers in the middle of their sessions.
        """
        needed = -(-load.unfinished // self.slots_per_worker)
        return min(self.maximum, max(self.minimum, needed))


FLEET_NUMBERS: Final[Mapping[str, str]] = {
    "queued": "Items that a poll could receive now.",
    "pending": "Items that were delivered and are not acknowledged yet.",
    "running": "Items under a lease: starting, active or stopping.",
    "unfinished": "The sum of queued, pending and running.",
    "oldest_queued_seconds": "Age of the oldest queued item; 0 without one.",
    "slots_per_worker": "Sessions that one worker runs at once, for recommended_replicas.",
    "recommended_replicas": "Workers that have a slot for each unfinished item, within the limits.",
    "lower_bound": "1 (true) if running may be too small, as not all items could be counted.",
    "age_seconds": "Time since the numbers were read.",
}
"""The numbers of an environment, in the order of their JSON, and what they mean."""


def calculate_scaling_numbers(
    load: FleetLoad, rule: ReplicaRule, *, age_seconds: float = 0.0
) -> dict[str, float]:
    """Return the load and the recommended workers as a flat JSON object, for autoscalers.

    Args:
        load: The load.
        rule: The calculation of the number of workers.
        age_seconds: The time since the load was read.
    """
    return {
        "queued": load.queued,
        "pending": load.pending,
        "running": load.running,
        "unfinished": load.unfinished,
        "oldest_queued_seconds": load.oldest_queued_seconds,
        "slots_per_worker": rule.slots_per_worker,
        "recommended_replicas": rule.recommended_replicas(load),
        "lower_bound": load.lower_bound,
        "age_seconds": age_seconds,
    }
