"""Load and recommended replicas of workers that serve several environments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workpool.cli.fleet_reader import FleetReader
from workpool.cli.fleet_scaling import FleetScaling
from workpool.scaling import FleetLoad, ReplicaRule, sum_fleet_loads
from workpool.settings import Settings
from workpool.wire.client import WorkClient

if TYPE_CHECKING:
    from collections.abc import Mapping


def make_fleet_scaling_calculator(
    loads: Mapping[str, FleetLoad | None], slots: Mapping[str, int]
) -> FleetScaling:
    """Return a scaling calculator with one load reader for each environment in `loads`.

    The load None stands for a reader that has read no load yet.
    """
    client = WorkClient(Settings(environment_id="env_a"))
    readers = {}
    for number, (environment_id, load) in enumerate(loads.items(), start=1):
        reader = FleetReader(client, interval=15, max_age=120, clock=lambda: 100.0)
        reader._last = None if load is None else (100.0 - number, load)
        readers[environment_id] = reader
    return FleetScaling(readers, slots, ReplicaRule(7, 1, 20))


def test_fleet_totals_sum_item_counts_and_contain_longest_queue_time() -> None:
    loads = {"env_a": FleetLoad(3, 1, 6, 4.5), "env_b": FleetLoad(1, 0, 4, 9.0, lower_bound=True)}
    numbers = make_fleet_scaling_calculator(
        loads, {"env_a": 8, "env_b": 8}
    ).calculate_fleet_scaling_numbers()
    assert numbers is not None
    assert (numbers["queued"], numbers["pending"], numbers["running"]) == (4, 1, 10)
    assert (numbers["oldest_queued_seconds"], numbers["lower_bound"]) == (9.0, True)
    assert (numbers["recommended_replicas"], numbers["age_seconds"]) == (3, 2.0)


def test_recommended_replicas_are_the_maximum_over_all_environments() -> None:
    loads = {"env_a": FleetLoad(0, 0, 0), "env_b": FleetLoad(9, 0, 0)}
    fleet = make_fleet_scaling_calculator(loads, {"env_a": 8, "env_b": 2})
    numbers, few = (
        fleet.calculate_fleet_scaling_numbers(),
        fleet.calculate_environment_scaling_numbers("env_b"),
    )
    assert numbers is not None
    assert few is not None
    assert numbers["recommended_replicas"] == few["recommended_replicas"] == 5


def test_fleet_totals_are_unknown_until_every_environment_has_been_read() -> None:
    fleet = make_fleet_scaling_calculator(
        {"env_a": FleetLoad(1, 0, 0), "env_b": None}, {"env_a": 8, "env_b": 8}
    )
    assert fleet.calculate_fleet_scaling_numbers() is None
    assert fleet.calculate_environment_scaling_numbers("env_a") is not None
    assert fleet.unready_reasons() == ["env_b: the queue is not read to its end yet"]


def test_total_load_of_no_environment_is_zero() -> None:
    assert sum_fleet_loads([]) == FleetLoad(0, 0, 0)
