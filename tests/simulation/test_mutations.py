"""Tests that the simulation detects each mutation of the pool's code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "mutations", Path(__file__).with_name("mutations.py")
)
assert _spec is not None
assert _spec.loader is not None
mutations = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mutations)

SCHEDULES = range(2000)


def test_mutation_table_of_simulation_has_at_least_twenty_entries() -> None:
    assert len(mutations.MUTATIONS) >= 20


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_each_edit_of_a_pool_mutation_matches_exactly_one_place_in_source(name: str) -> None:
    """Without this quick test, only a slow trial would fail after a change of the edited lines."""
    with mutations.apply_mutation(mutations.MUTATIONS[name]):
        pass


@pytest.mark.trial
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_mutation_of_pool_is_caught_by_simulation(name: str) -> None:
    found = mutations.find_invariants_that_catch_mutation(mutations.MUTATIONS[name], SCHEDULES)
    assert found is not None, f"{name}: {len(SCHEDULES)} schedules did not catch it"
