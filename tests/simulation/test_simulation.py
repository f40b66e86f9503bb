"""Tests of the simulation, with a few hundred schedules; `poe simulate` runs thousands of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.simulation.autoscaler.fleet_invariants import FLEET_INVARIANTS
from tests.simulation.autoscaler.fleet_mutations import FLEET_MUTATIONS
from tests.simulation.invariants import INVARIANTS
from tests.simulation.mutations import MUTATIONS
from tests.simulation.replay import format_simulation_as_lines
from tests.simulation.runner import (
    generate_schedule_for_seed,
    simulate_in_parallel,
    simulate_schedule,
    simulate_seeds,
)
from tests.simulation.schedule import (
    ACTION_KINDS,
    BEHAVIOURS,
    FAULT_KINDS,
    Action,
    PoolSettings,
    Schedule,
)
from tests.simulation.simulation_report import ProgressFile, SimulationReport

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]

pools = st.builds(
    PoolSettings,
    concurrency=st.integers(1, 3),
    prefetch=st.integers(0, 2),
    pollers=st.integers(1, 2),
    lease_ttl=st.sampled_from([10, 20, 30]),
    reclaim_ms=st.sampled_from([5000, 1000, 0]),
    drain_timeout=st.sampled_from([20.0, 0.0]),
    session_timeout=st.sampled_from([None, 10.0]),
)
moments = st.integers(0, 600).map(lambda tenths: tenths / 10)
works = st.builds(
    Action,
    at=moments,
    kind=st.just("work"),
    seconds=st.sampled_from([0.0, 5.0, 20.0, 45.0]),
    behaviour=st.sampled_from(list(dict.fromkeys(BEHAVIOURS))),
    count=st.sampled_from([1, 2, -1]),
)
actions = st.builds(
    Action,
    at=moments,
    kind=st.sampled_from(list(dict.fromkeys(ACTION_KINDS))),
    target=st.integers(0, 5),
    seconds=st.sampled_from([0.0, 2.0, 10.0, 40.0]),
)
schedules = st.builds(
    lambda seed, pools, works, actions, fault_share, fault_kinds: Schedule(
        seed,
        tuple(pools),
        tuple(sorted([*works, *actions], key=lambda action: action.at)),
        fault_share,
        tuple(fault_kinds),
    ),
    st.integers(0, 9),
    st.lists(pools, min_size=1, max_size=3),
    st.lists(works, min_size=1, max_size=4),
    st.lists(actions, max_size=5),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.lists(st.sampled_from(list(dict.fromkeys(FAULT_KINDS))), min_size=1, max_size=4),
)


@pytest.mark.timeout(120)
def test_simulation_of_two_hundred_schedules_violates_no_invariant(
    record_property: Callable[[str, object], None],
) -> None:
    """The seeds differ from those of `poe simulate`, to cover other schedules."""
    report = simulate_seeds(range(10_000, 10_200))
    record_property("simulation", str(report))
    assert report.schedules == 200
    assert report.faults > 200
    assert report.failures == (), str(report)


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schedules)
def test_simulation_of_schedule_generated_by_hypothesis_violates_no_invariant(
    schedule: Schedule,
) -> None:
    _, violations = simulate_schedule(schedule)
    assert violations == []


def test_two_simulations_of_one_seed_have_the_same_calls_and_history() -> None:
    """All calls and records have the same times; otherwise no schedule could be replayed."""

    def simulate_once() -> list[object]:
        case, _ = simulate_schedule(generate_schedule_for_seed(7))
        calls = [(call.at, call.op, call.answer) for call in case.trace.sent]
        return [*calls, *((each.time, each.kind, each.state) for each in case.history)]

    assert simulate_once() == simulate_once()


def test_replay_of_simulation_prints_each_kind_of_line() -> None:
    schedule = generate_schedule_for_seed(7)
    case, _ = simulate_schedule(schedule)
    lines = list(format_simulation_as_lines(schedule, case))
    for word in ("ACTION", "HISTORY", "SENT", "ANSWERED", "HANDLER", "POOL", "EVENT"):
        assert any(word in line for line in lines), word


def test_continued_simulation_reads_finished_results_from_progress_file(tmp_path: Path) -> None:
    file = tmp_path / "progress"
    failed = SimulationReport(50, 1, 2, 3, ((7, ("first violation", "second violation")),))
    ProgressFile(file).append_report_of_seed_range(range(50), failed)
    with file.open("a") as cut:
        cut.write('\n{"source": "')
    first = simulate_in_parallel(0, 60, 1, file)
    assert first.schedules == 60
    assert first.failures == failed.failures
    assert list(ProgressFile(file).read_reports_by_seed_range()) == [range(50), range(50, 60)]
    assert simulate_in_parallel(0, 60, 1, file) == first


def test_progress_file_of_another_version_of_the_code_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ProgressFile(tmp_path / "progress").append_report_of_seed_range(range(50), SimulationReport(50))
    monkeypatch.setattr("tests.simulation.simulation_report._hash_source_code", lambda: "other")
    assert ProgressFile(tmp_path / "progress").read_reports_by_seed_range() == {}


def read_promises_of_simulation_page() -> list[list[str]]:
    """Return the rows of the table in workpool/docs/simulation.md that lists the promises."""
    text = (ROOT / "workpool/docs/simulation.md").read_text()
    table = text.partition("| promise | invariants |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def test_documented_promises_name_existing_invariants_mutations_and_tests() -> None:
    invariants = {each.__name__ for each in (*INVARIANTS, *FLEET_INVARIANTS)}
    known = {*MUTATIONS, *FLEET_MUTATIONS}
    for promise, named, mutations, tests in read_promises_of_simulation_page():
        assert set(re.findall(r"`(\w+)`", named)) <= invariants, promise
        assert set(re.findall(r'"(.+?)"', mutations)) <= known, promise
        for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests):
            assert f"def {name}(" in (ROOT / path).read_text(), promise
        assert mutations or tests, promise
