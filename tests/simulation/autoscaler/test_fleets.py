"""Tests of the simulation of autoscaled fleets, with a few dozen schedules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.simulation.autoscaler.fleet_mutations import (
    FLEET_MUTATIONS,
    LIMIT,
    find_fleet_invariant_violations,
)
from tests.simulation.autoscaler.fleet_runner import (
    DOCUMENTED,
    generate_fleet_schedule_for_seed,
    simulate_fleet,
    simulate_fleet_seeds,
)
from tests.simulation.autoscaler.fleet_schedule import (
    METRICS,
    ONE_PER_MINUTE,
    WINDOW_SECONDS,
    WITHOUT,
)
from tests.simulation.autoscaler.horizontal_autoscaler import ScalingPolicy
from tests.simulation.mutations import apply_mutation, find_invariants_that_catch_mutation
from tests.simulation.replay import format_simulation_as_lines

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.timeout(180)
def test_scale_down_with_documented_settings_cuts_no_session_in_fifty_simulations(
    record_property: Callable[[str, object], None],
) -> None:
    """The seeds differ from the default seeds of the command line, to cover other schedules."""
    report = simulate_fleet_seeds(range(10_000, 10_050))
    record_property("simulation", str(report))
    assert report.failures == (), str(report)
    assert report.counts.cut == 0
    assert report.counts.pods > 50
    assert report.counts.drained > 0, "no pod with sessions was removed"
    assert report.counts.cut_by_evictions > 0


@pytest.mark.timeout(120)
def test_scale_down_without_documented_settings_cuts_sessions() -> None:
    report = simulate_fleet_seeds(range(8), frozenset(WITHOUT))
    assert report.failures == (), str(report)
    assert report.counts.cut > 0


@pytest.mark.parametrize("name", WITHOUT)
def test_fleet_schedule_without_a_documented_setting_differs_only_in_its_settings(
    name: str,
) -> None:
    documented = generate_fleet_schedule_for_seed(1, DOCUMENTED)
    without = generate_fleet_schedule_for_seed(1, frozenset({name}))
    assert without.world == documented.world
    assert without.settings != documented.settings


def test_documented_fleet_settings_equal_those_of_kubernetes_manifests() -> None:
    overlays = Path(__file__).parents[3] / "workpool/deploy/kubernetes/overlays"
    spec = yaml.safe_load((overlays / "autoscaled-by-api/scaledobject.yaml").read_text())["spec"]
    down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    [policy] = down["policies"]
    assert down["stabilizationWindowSeconds"] in WINDOW_SECONDS
    assert ScalingPolicy(policy["type"], policy["value"], policy["periodSeconds"]) == ONE_PER_MINUTE
    settings = generate_fleet_schedule_for_seed(1).settings
    assert spec["pollingInterval"] == settings.polling
    assert spec.get("cooldownPeriod", 300) == settings.cooldown
    [trigger] = spec["triggers"]
    assert trigger["metadata"]["valueLocation"] in METRICS


def test_two_simulations_of_one_fleet_have_the_same_calls_and_history() -> None:
    def simulate_once() -> list[object]:
        case, counts, _ = simulate_fleet(generate_fleet_schedule_for_seed(3))
        calls = [(call.at, call.op, call.answer) for call in case.trace.sent]
        return [counts, *calls, *((each.time, each.kind, each.state) for each in case.history)]

    assert simulate_once() == simulate_once()


def test_replay_of_a_fleet_prints_its_pools_and_handlers() -> None:
    schedule = generate_fleet_schedule_for_seed(3)
    lines = list(format_simulation_as_lines(schedule.world, simulate_fleet(schedule).case))
    for word in ("ACTION", "HISTORY", "HANDLER", "POOL"):
        assert any(word in line for line in lines), word


@pytest.mark.parametrize("name", FLEET_MUTATIONS)
def test_each_text_that_a_fleet_mutation_replaces_occurs_exactly_once_in_source(name: str) -> None:
    with apply_mutation(FLEET_MUTATIONS[name]):
        pass


@pytest.mark.trial
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FLEET_MUTATIONS)
def test_fleet_mutation_is_caught_by_simulation(name: str) -> None:
    found = find_invariants_that_catch_mutation(
        FLEET_MUTATIONS[name], range(LIMIT), find_fleet_invariant_violations
    )
    assert found is not None, f"{name}: {LIMIT} schedules did not catch it"
