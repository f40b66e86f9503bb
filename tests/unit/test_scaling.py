"""How many pollers poll, and who is told (issue: idle pollers; metrics.md, scale events)."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from workpool.events import PollersScaled
from workpool.pool.scaling import Scaling


def scaling(limit: int) -> tuple[Scaling, list[PollersScaled]]:
    told: list[PollersScaled] = []
    return Scaling(limit, told.append), told


def test_nulls_bring_it_down_to_one_and_hits_up_to_the_limit() -> None:
    pool, told = scaling(3)
    for _ in range(4):
        pool.null()
    assert pool.target == 1
    for _ in range(4):
        pool.hit()
    assert pool.target == 3
    assert told == [
        PollersScaled("down", "nulls", 2), PollersScaled("down", "nulls", 1),
        PollersScaled("up", "hits", 2), PollersScaled("up", "hits", 3),
    ]  # fmt: skip


def test_a_429_halves_it() -> None:
    pool, told = scaling(9)
    for _ in range(5):
        pool.throttled()
    assert [event.target for event in told] == [4, 2, 1]
    assert {(event.direction, event.reason) for event in told} == {("down", "throttled")}


async def test_a_poller_beyond_the_target_waits_until_items_come() -> None:
    pool, _ = scaling(2)
    pool.null()
    await pool.turn(0)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        waiting = group.create_task(pool.turn(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        pool.hit()


@given(st.integers(1, 6), st.lists(st.sampled_from(["hit", "null", "throttled"])))
def test_it_stays_between_one_and_the_limit_and_tells_every_change(
    limit: int, answers: list[str]
) -> None:
    pool, told = scaling(limit)
    before = pool.target
    for answer in answers:
        getattr(pool, answer)()
        assert 1 <= pool.target <= limit
        assert [pool.has_turn(number) for number in range(limit)] == [
            number < pool.target for number in range(limit)
        ]
        if pool.target != before:
            change = told.pop()
            assert change.target == pool.target
            assert (change.direction == "up") == (pool.target > before)
        assert not told
        before = pool.target
