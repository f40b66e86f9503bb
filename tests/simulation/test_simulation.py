"""The promise on some schedules; on thousands with `poe simulate`, or a million by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workpool.testing.simulation import story
from workpool.testing.simulation.run import schedule_of, simulate, simulate_all
from workpool.testing.simulation.schedule import DEEDS, PLAYS, TROUBLES, Deed, Pool, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

pools = st.builds(
    Pool,
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
    Deed,
    at=moments,
    kind=st.just("work"),
    seconds=st.sampled_from([0.0, 5.0, 20.0, 45.0]),
    play=st.sampled_from(list(dict.fromkeys(PLAYS))),
    count=st.sampled_from([1, 2, -1]),
)
deeds = st.builds(
    Deed,
    at=moments,
    kind=st.sampled_from(list(dict.fromkeys(DEEDS))),
    target=st.integers(0, 5),
    seconds=st.sampled_from([0.0, 2.0, 10.0, 40.0]),
)
schedules = st.builds(
    lambda seed, pools, works, deeds, troubles, kinds: Schedule(
        seed,
        tuple(pools),
        tuple(sorted([*works, *deeds], key=lambda deed: deed.at)),
        troubles,
        tuple(kinds),
    ),
    st.integers(0, 9),
    st.lists(pools, min_size=1, max_size=3),
    st.lists(works, min_size=1, max_size=4),
    st.lists(deeds, max_size=5),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.lists(st.sampled_from(list(dict.fromkeys(TROUBLES))), min_size=1, max_size=4),
)


@pytest.mark.timeout(120)
def test_the_promise_holds_on_two_hundred_schedules(
    record_property: Callable[[str, object], None],
) -> None:
    """Others than the 10,000 of `poe simulate`, which `poe check` runs without coverage's cost."""
    report = simulate_all(range(10_000, 10_200))
    record_property("simulation", str(report))
    assert report.schedules == 200
    assert report.troubles > 200
    assert report.failures == (), str(report)


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schedules)
def test_the_promise_holds_on_what_shrinks(schedule: Schedule) -> None:
    _, words = simulate(schedule)
    assert words == []


def test_a_seed_is_a_schedule_and_its_story() -> None:
    """The same calls, troubles and facts at the same instants: else a replay would be no use."""

    def once() -> list[object]:
        case, _ = simulate(schedule_of(7))
        calls = [(call.at, call.op, call.answer) for call in case.trace.sent]
        return [*calls, *((each.time, each.kind, each.state) for each in case.history)]

    assert once() == once()


def test_a_story_tells_all_that_happened() -> None:
    schedule = schedule_of(7)
    case, _ = simulate(schedule)
    lines = list(story.tell(schedule, case))
    for word in ("DEED", "HISTORY", "SENT", "ANSWERED", "RUNS", "POOL", "EVENT"):
        assert any(word in line for line in lines), word
