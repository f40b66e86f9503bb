"""The recommended number of workers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workpool.scaling import (
    FLEET_NUMBERS,
    SLOTS_PER_WORKER,
    FleetLoad,
    ReplicaRule,
    calculate_scaling_numbers,
)
from workpool.settings import Settings

COUNTS = st.integers(0, 10_000)


def test_default_slots_per_worker_equal_default_of_setting_concurrency() -> None:
    assert Settings().concurrency == SLOTS_PER_WORKER


@pytest.mark.parametrize(
    ("queued", "pending", "running", "replicas"),
    [
        (0, 0, 0, 1),
        (0, 0, 1, 1),
        (0, 0, 8, 1),
        (1, 0, 8, 2),
        (0, 1, 8, 2),
        (0, 0, 9, 2),
        (100, 0, 0, 5),
    ],
)
def test_recommended_replicas_have_slots_for_all_unfinished_items_within_limits(
    queued: int, pending: int, running: int, replicas: int
) -> None:
    rule = ReplicaRule(slots_per_worker=8, minimum=1, maximum=5)
    assert rule.recommended_replicas(FleetLoad(queued, pending, running)) == replicas


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 100))
def test_recommended_replicas_are_the_fewest_with_a_slot_for_each_item(
    queued: int, pending: int, running: int, slots: int
) -> None:
    load = FleetLoad(queued, pending, running)
    replicas = ReplicaRule(slots, maximum=100_000).recommended_replicas(load)
    assert replicas * slots >= load.unfinished
    assert replicas == math.ceil(load.unfinished / slots)


@given(COUNTS, st.integers(1, 100))
def test_recommended_replicas_do_not_change_when_the_last_queued_items_are_claimed(
    items: int, slots: int
) -> None:
    rule = ReplicaRule(slots)
    queued, running = FleetLoad(items, 0, 0), FleetLoad(0, 0, items)
    assert rule.recommended_replicas(queued) == rule.recommended_replicas(running)


@pytest.mark.parametrize("wrong", [(0, 0, 1), (1, -1, 1), (1, 2, 1)])
def test_invalid_number_of_slots_or_replicas_raises_value_error(
    wrong: tuple[int, int, int],
) -> None:
    with pytest.raises(ValueError, match=r"slots_per_worker|minimum and maximum"):
        ReplicaRule(*wrong)


def test_calculated_scaling_numbers_have_exactly_the_listed_fields_in_order() -> None:
    numbers = calculate_scaling_numbers(
        FleetLoad(3, 1, 12, 4.5, lower_bound=True), ReplicaRule(8, 1, 20), age_seconds=2.5
    )
    assert numbers == {
        "queued": 3,
        "pending": 1,
        "running": 12,
        "unfinished": 16,
        "oldest_queued_seconds": 4.5,
        "slots_per_worker": 8,
        "recommended_replicas": 2,
        "lower_bound": True,
        "age_seconds": 2.5,
    }
    assert list(numbers) == list(FLEET_NUMBERS)


def test_documented_table_of_scaling_fields_equals_fields_in_code() -> None:
    page = (Path(__file__).parents[2] / "workpool/docs/operating.md").read_text()
    table = page.partition("### The fleet\n")[2].partition("\n### ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(FLEET_NUMBERS)
